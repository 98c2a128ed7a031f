"""What the programs have in common: how they refuse, resume and end. Imports nothing that takes time."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TextIO

from raytrust.cluster.interrupts import Terminated, exit_code, raising
from raytrust.config.attacks import MOST_SIMULATED
from raytrust.config.register import PLUGINS, active_plugins, load_plugins, module_of
from raytrust.config.training import WIDTHS
from raytrust.reports import tracking_uri

# Near enough to when the program was started, as libraries that take time load later.
STARTED = time.monotonic()
# How the console program begins `sys.argv`, which is where errors and the command that resumes have the program's name.
CONSOLE = "raytrust "
# What the help says of a number of local steps besides its own line.
BEYOND = (
    f"any number; the attacker simulates up to {MOST_SIMULATED}, and of more takes a surrogate or a single gradient in "
    "their place"
)
NAMED_DATA = ("digits", "faces", "cifar10", "cifar100", "mnist")


class Parser(argparse.ArgumentParser):
    """Knows only options that were given, by their whole names. text: what the program does, up to an empty line."""

    def __init__(self, program: str, text: str | None):
        text = (text or "").split("\n\n")[0]
        named = command(program)
        # No abbreviations, which the next option could make ambiguous. Options that were not given stay absent, because
        # presets and --resume must tell them from defaults.
        super().__init__(named, f"{named} [options]", text, allow_abbrev=False, argument_default=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """One line without passwords, exit code 2."""
        self.exit(2, f"{self.prog}: error: {tracking_uri.scrub(message)}\n")

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """What turns out to be wrong within the block, as ValueError or OSError, is refused like a wrong option."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(_one_line(error))

    def add_places(self, noun: str) -> None:
        """The options on where a program's results, its cluster and its log are, and code of the user's."""
        add = self.add_argument_group("places").add_argument
        add("--plugin", action="append", metavar="FILE", help="a Python file or module that registers a network, a "
            f"compressor, an objective or an attack: docs/extend.md; repeatable; also those of {PLUGINS}")  # fmt: skip
        add("--output", type=Path, metavar="DIR", help="a new directory for the results")
        add("--resume", type=Path, metavar="DIR", help=f"go on with the {noun} in DIR")
        add("--address", metavar="ADDRESS", help="of a Ray cluster; a local one is started if none is given")
        add("--local", action="store_true", help="in this process, without Ray; of a sweep the list alone, no search")
        add("--tracking-uri", metavar="URI", help="of an MLflow store; sqlite in the output directory if none is given")


# Their defaults; chosen: the options that were given, when the run began or since.
PLACES: dict[str, Any] = dict(
    output=None, resume=None, address=None, local=False, tracking_uri=None, plugin=(), chosen=()
)


@dataclass(frozen=True)
class Directory:
    """Where a program's run lies. noun: what such a run is called, with its article. file: marks its directory, and
    holds its options. changeable: options that may be given along with --resume."""

    program: str
    noun: str
    file: str
    changeable: tuple[str, ...]

    def resolve(
        self, given: Namespace, defaults: dict[str, Any], new: Callable[[dict[str, Any]], dict[str, Any]] = dict
    ) -> tuple[Namespace, Path]:
        """The options in full, and the run's directory: a resumed run keeps its own options.

        new: what the options given for a new run amount to, apart from the defaults. Raises ValueError for a directory
        that can't be resumed, or an option that can't be changed.
        """
        options = vars(given)
        if (resume := options.get("resume")) is not None:
            options = {**self._kept(resume, options), **options}
        else:
            options = new(options)
        options = {**defaults, **options}
        options["chosen"] = sorted({*options["chosen"], *vars(given)})
        # `raytrust audit` is the sweep's program, and what it leaves is looked for under its own name.
        name = "audit" if command(self.program) == f"{CONSOLE}audit" else self.program
        default = Path("results") / time.strftime(f"{name}-%Y%m%d-%H%M%S")
        root = (resume or options["output"] or default).resolve()
        return Namespace(**{**options, "tracking_uri": _tracking_uri(options["tracking_uri"], root)}), root

    def _kept(self, resume: Path, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name not in ("resume", *self.changeable):
                flag, noun = name.replace("_", "-"), self.noun.split()[-1]
                raise ValueError(f"Expected --{flag} not to be given with --resume: the {noun} keeps its own.")
        try:
            found: dict[str, Any] = dict(json.loads((resume / self.file).read_text())["options"])
        except (OSError, ValueError, LookupError, TypeError):
            raise ValueError(
                f"Expected resume={str(resume)!r} to hold {self.noun}, but it holds no {self.file} of one."
            ) from None
        return found

    def keep(self, options: Namespace, dropped: Sequence[str] = ()) -> dict[str, Any]:
        """The options that a resumed run takes over, from whatever directory it is resumed."""
        # Not the plugins: a directory, which may be somebody else's, must bring in no code.
        dropped = ("output", "resume", "address", "local", "plugin", *dropped)
        kept = {k: v for k, v in vars(options).items() if k not in dropped}
        if kept.get("data", "digits") not in NAMED_DATA:
            # A relative path would name another file once the run is resumed from elsewhere.
            kept["data"] = str(Path(kept["data"]).expanduser().resolve())
        if kept.get("tracking_uri"):
            kept["tracking_uri"] = tracking_uri.without_password(kept["tracking_uri"])
        return kept

    def launch(
        self,
        parser: Parser,
        arguments: Sequence[str] | None,
        defaults: dict[str, Any],
        new: Callable[[dict[str, Any]], dict[str, Any]],
        begin: Callable[[Namespace, Path], Callable[[], int]],
    ) -> int:
        """The exit code of a program: of the work that `begin` makes of its options and directory, or 2.

        begin: refuses what is wrong, as ValueError or OSError, before anything that takes time has started.
        """
        given = parser.parse_args(arguments)
        with parser.refusing():
            options, root = self.resolve(given, defaults, new)
            named = _modules_named(vars(given))
            _look_here([*named, *(plugin for plugin in options.plugin if not plugin.endswith(".py"))])
            load_plugins(options.plugin)
            _check_found(named)
            load_plugins(sorted(named))
            self.check_free(root, options)
            work = begin(options, root)
        return self.run(root, options, work)

    def check_free(self, root: Path, options: Namespace) -> None:
        """Raises ValueError if a new run would write into a directory that holds something, OSError if it is a file."""
        if options.resume is None and root.exists() and any(root.iterdir()):
            hint = f"--resume {shlex.quote(str(root))}" if (root / self.file).exists() else "another --output"
            raise ValueError(f"Expected output={str(root)!r} to be empty or new, but it is not; give {hint}.")

    def run(self, root: Path, options: Namespace, work: Callable[[], int]) -> int:
        """The exit code of `work`. After Ctrl-C, SIGTERM or SIGHUP 130, 143 or 129, with the command that goes on; 2
        where it can't be done: the cluster, the tracking store or the disk can't be used."""
        try:
            return work()
        except KeyboardInterrupt as error:
            kept = f"{_what_ended(error)}; what was finished is kept."
            _say(f"\n{kept} Go on with: {resumption(root, options)}", sys.stdout)
            return exit_code(error)
        except (ValueError, OSError) as error:
            _say(f"{command(self.program)}: error: {tracking_uri.scrub(_one_line(error))}", sys.stderr)
            return 2


def start(main: Callable[[], int]) -> int:
    """The exit code of `main`, which is that of a signal that came outside the run itself, as while libraries load.

    What the program and its children write is their owner's alone, and they leave no core files: all of it shows
    private images.
    """
    # Not left to each file: libraries write some, too.
    os.umask(0o077)
    _leave_no_core_files()
    try:
        with raising(once=True):
            return main()
    except KeyboardInterrupt as error:
        _say(f"\n{_what_ended(error)}.", sys.stderr)
        return exit_code(error)


def _leave_no_core_files() -> None:
    # Only Unix has this module.
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _what_ended(interrupt: KeyboardInterrupt) -> str:
    return f"Ended by {interrupt}" if isinstance(interrupt, Terminated) else "Interrupted"


def _modules_named(given: dict[str, Any]) -> dict[str, str]:
    """The modules of the import paths among these options, each with the option, as "network='my.models:build'".

    Who names a function on the command line has it imported; a directory that names one has not.
    """
    options = {name: str(given.get(name)) for name in ("network", "matching", "method")}
    found = {module_of(path): f"{name}={path!r}" for name, path in options.items()}
    return {module: option for module, option in found.items() if module not in (None, "torchvision")}


def _look_here(modules: Sequence[str]) -> None:
    """Let modules that are not found be looked for in the current folder, too, as `python -m` would."""
    if not all(map(_is_found, modules)):
        here = os.getcwd()
        # Last, so that what lies here by chance hides no installed package; and of processes that are started later, as
        # Ray's, which import plugins before they are told of this one's path.
        sys.path.append(here)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), here]))


def _check_found(named: dict[str, str]) -> None:
    """Raises ValueError, with what to do, for a module that is nowhere."""
    for module, option in named.items():
        if not _is_found(module):
            raise ValueError(
                f"Expected {option} to be of a module that can be imported, but there is no {module} in the current "
                "folder or the environment: run it where it lies, set PYTHONPATH, or give --plugin FILE.py."
            )


def _is_found(module: str) -> bool:
    parent = module.rpartition(".")[0]
    if parent and not _is_found(parent):
        return False
    try:
        return find_spec(module) is not None
    # To look into a package imports it: what fails in there is said where the module is loaded.
    except Exception:
        return True


def _say(text: str, file: TextIO) -> None:
    # The terminal or pipe may have gone, and then nobody reads it.
    with suppress(OSError):
        print(text, file=file, flush=True)


def _tracking_uri(uri: str | None, root: Path) -> str | None:
    """The store of the run in `root`, absolute and with its password; None for the directory's own database."""
    if uri is not None:
        uri = tracking_uri.with_password(tracking_uri.absolute(uri), os.environ)
        if tracking_uri.database_path(uri) != root / tracking_uri.DATABASE:
            tracking_uri.check_outside(uri, root)
            return uri
    # Called for its refusal of a path that can't hold the database, before anything that takes time has begun.
    tracking_uri.default_uri(root)
    return None


def resumption(root: Path, options: Namespace) -> str:
    """The command that goes on with the run in `root`, for a shell."""
    address = ("--address", options.address) if options.address else ()
    return shlex.join([*called_as(), "--resume", str(root), *address])


def called_as() -> list[str]:
    """The words by which this program was called, without its options, but with the plugins that it has."""
    program = sys.argv[0].split() if sys.argv[0].startswith(CONSOLE) else ["python", sys.argv[0]]
    return [*program, *(word for plugin in active_plugins() for word in ("--plugin", plugin))]


def command(script: str) -> str:
    """What errors name: a sub-command of the console program, or the script."""
    return sys.argv[0] if sys.argv[0].startswith(CONSOLE) else f"{script}.py"


def given(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Which options a command line gives, by name, with their values; a flag's value is empty."""
    found: dict[str, list[str]] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            found.setdefault(name, [])
            if equals:
                found[name].append(value)
        elif name:
            found[name].append(argument)
    return found


def list_files(root: Path, names: Sequence[str]) -> None:
    """Print which of these there are."""
    for name in names:
        if (root / name).exists():
            print(f"  {root / name}")


def check_cpus(name: str, value: int | None, address: str | None) -> None:
    """Raises ValueError if a Ray on this machine would need more CPUs than it has."""
    if address is None and value is not None and value > cpus():
        raise ValueError(f"Expected {name}={value} to be at most the number of CPUs, {cpus()}.")


def check_least(options: Namespace, least: int, *names: str) -> None:
    """Raises ValueError if one of these options is given and less than that."""
    for name in names:
        if (value := getattr(options, name)) is not None and value < least:
            raise ValueError(f"Expected {name}={value} to be at least {least}.")


def drop_width(options: Namespace) -> None:
    """Leave the width of a network that is not shipped to itself, unless it was given: a preset's is of the shipped."""
    if options.network not in WIDTHS and "width" not in options.chosen:
        options.width = None


def check_local(options: Namespace) -> None:
    """Raises ValueError if a cluster is given, too."""
    if options.local and options.address is not None:
        raise ValueError(f"Expected address={options.address!r} not to be given with --local.")


def check_hours(options: Namespace) -> None:
    """Raises ValueError if hours are given that can't be waited for."""
    if options.hours is not None and not 0 < options.hours < math.inf:
        raise ValueError(f"Expected hours={options.hours:g} to be positive and finite.")


def cpus() -> int:
    """How many this process may use."""
    # A container or a batch system may allow fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
