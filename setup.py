"""What pyproject.toml can't say: the programs of sweeps/ are installed, too, as `raytrust.sweeps`.

`raytrust frontier` is then sweeps/privacy_frontier.py with its tables, which stand once.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["raytrust*"]), "raytrust.sweeps"],
    package_dir={"raytrust.sweeps": "sweeps"},
)
