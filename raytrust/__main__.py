"""The console program: `raytrust frontier | audit | threats | membership | paper`, or `python -m raytrust ...`.

A sub-command is a program of sweeps/, with that file's tables. An installed package has these files as
`raytrust.sweeps` (setup.py); in a checkout they lie beside the package.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from raytrust.cli import options as cli

COMMANDS = {
    "frontier": ("privacy_frontier", "what compression costs in accuracy and buys in privacy"),
    "audit": (
        "privacy_frontier",
        "what gradients of a network of yours tell, as it is: raytrust audit my.models:build",
    ),
    "threats": ("threats", "which threats leak: batches, batch norm, local steps, states of the model, by defence"),
    "membership": ("membership", "who was in the training set, by the model and by what crossed the wire"),
    "paper": ("paper_tables", "every figure of the paper beside ours"),
}


def main() -> int:
    """The exit code of the sub-command that `sys.argv` names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: raytrust COMMAND [options]\n")
        for command, (_, purpose) in COMMANDS.items():
            print(f"  raytrust {command:<12} {purpose}")
        print("\nraytrust COMMAND --help shows the options of a command.")
        return 0
    if name not in COMMANDS:
        print(f"raytrust: error: Expected command={name!r} to be one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        words = _of_audit(sys.argv[2:]) if name == "audit" else sys.argv[2:]
    except ValueError as error:
        print(f"raytrust audit: error: {error}", file=sys.stderr)
        return 2
    # The program reads from it its options, and how it was called.
    sys.argv = [f"{cli.CONSOLE}{name}", *words]
    return cli.start(_program(COMMANDS[name][0]).main)


def _of_audit(words: list[str]) -> list[str]:
    """The options of a sweep that trains nothing: `raytrust audit NETWORK ...`; without Ray, unless it searches."""
    if words and not words[0].startswith("-"):
        words = ["--network", *words]
    given = cli.given(words)
    if "-h" in words or given.keys() & {"--resume", "--help"}:
        return words
    if not given.keys() & {"--network", "--model"}:
        raise ValueError("Expected a network to audit: raytrust audit my_package.models:build, or torchvision:NAME.")
    if "--defence" in given and "none" not in given["--defence"]:
        # The control, without which nothing can be said.
        words = [*words, "--defence", "none"]
    alone = [] if given.keys() & {"--attack-trials", "--trials", "--address", "--local"} else ["--local"]
    return ["--preset", "audit", "--workers", "1", *alone, *words]


def _program(name: str) -> ModuleType:
    # A wheel has no folder beside the package, and a checkout that is only on the path has no setup.
    if find_spec("raytrust.sweeps") is not None:
        return importlib.import_module(f"raytrust.sweeps.{name}")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sweeps"))
    return importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())
