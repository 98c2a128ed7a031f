"""What a worker knows of a plugin of the driver. A program for tests: plugged.py FILE [ADDRESS]

It hands a task an object of the plugin, pickled, and has it parse the plugin's name; prints what the task answers.
"""

from __future__ import annotations

import json
import sys

from raytrust.config import Defence, parse_defence, register, to_dict

register.load_plugins([sys.argv[1]])

from raytrust.cluster.runtime import cluster  # noqa: E402

import ray  # isort: skip  # noqa: E402


def known(defence: Defence) -> dict[str, object]:
    module = sys.modules[type(defence.compressor).__module__]
    return {"same": defence == parse_defence("doubled:0.25"), "config": to_dict(defence), "file": module.__file__}


with cluster(sys.argv[2] if len(sys.argv) > 2 else None, 1):
    print(json.dumps(ray.get(ray.remote(known).remote(parse_defence("doubled:0.25")))))
