"""The sweep on a Ray cluster: `runtime` starts it, `training` trains, `phases` searches. Nothing else imports ray.

Import from the submodules: what a training worker imports, it imports anew for every defence.
"""
