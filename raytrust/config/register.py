"""What has a name: networks, compressors, transforms, matching distances and attacks; open to code outside the package.

    @register.network("mine")
    def mine(channels: int, classes: int, depth: int = 3) -> nn.Module: ...

The file that holds such a line comes in with `--plugin FILE`, or as an entry point of an installed package, in a group
such as "raytrust.networks", under the name that it registers. docs/extend.md has an example of each.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeVar

from raytrust.config.method import CompressorConfig, MethodConfig, TransformConfig

# In the environment, as all processes that this one starts have it: files and modules, as PATH has directories.
PLUGINS = "RAYTRUST_PLUGINS"
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # package.module:attribute
_loaded: set[str] = set()

C = TypeVar("C", bound=Callable[..., Any])


class Registry:
    """Things of one kind by name.

    group: of the entry points. shipped: what the package has, or where, as "module:attribute": loaded when it is used,
    so that names can be checked before any library is imported. paths: whether such a path of a user's is a name, too.
    """

    def __init__(self, group: str, shipped: Mapping[str, Any] | None = None, paths: bool = True):
        self.group = group
        self._things: dict[str, Any] = dict(shipped or {})
        self._paths = paths

    def add(self, name: str, thing: Any) -> None:
        """Raises ValueError for a name that another thing has, or that a command line could not take."""
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"Expected name={name!r} of letters, digits, '-', '.' and '_'.")
        if name in self._things and not _same_definition(self._things[name], thing):
            raise ValueError(f"Expected name={name!r} to be new in {self.group}, but {self._things[name]!r} has it.")
        self._things[name] = thing

    def __iter__(self) -> Iterator[str]:
        """The names that are registered."""
        return iter(self._things)

    def __contains__(self, name: object) -> bool:
        """Whether the name is registered, after a look into plugins and entry points; or is an import path."""
        if not isinstance(name, str):
            return False
        if name in self._things or (self._paths and _PATH.fullmatch(name)):
            return True
        load_plugins()
        # Last, as plugins and entry points run code and take time, for which a name of the package's own must not wait.
        self._load_entry_points(name)
        return name in self._things

    def __getitem__(self, name: str) -> Any:
        """What the name stands for. Raises ValueError for an unknown name, or for a path that can't be imported."""
        if name not in self:
            raise ValueError(f"Expected name={name!r} in {self.group} to be one of {', '.join(map(repr, self))}.")
        if name not in self._things:
            _expect_plugin(name)
        thing = self._things.get(name, name)
        return _imported(thing) if isinstance(thing, str) else thing

    def _load_entry_points(self, name: str) -> None:
        # The import takes 50 ms, for which only an unknown name has to wait.
        from importlib.metadata import entry_points

        for point in entry_points(group=self.group, name=name):
            # The decorators of what is imported register it, so that there is nothing to be done with the object
            # itself.
            _imported(point.value)
            if name not in self._things:
                raise ValueError(f"Expected {point.value} to register {name!r} in {self.group}, as it says.")


# Paths, as entry points of our own would say them: names have to be known here, where nothing of upper rooms may be
# imported, and before anything is that takes time.
_INVERSION = "raytrust.attacks.inversion."
NETWORKS = Registry(
    "raytrust.networks",
    {
        "resnet18": "raytrust.networks.build:resnet18",
        "convnet": "raytrust.networks.build:ConvNet",
        "normed-convnet": "raytrust.networks.build:normed_convnet",
        "resnet20": "raytrust.networks.build:ResNet20",
        "lenet": "raytrust.networks.build:LeNet",
    },
)
# The options of a method, and its class, apart: options are checked before anything that takes time is imported.
COMPRESSORS = Registry("raytrust.compressors", paths=False)
METHODS = Registry("raytrust.compressors", paths=False)
TRANSFORMS = Registry("raytrust.transforms", paths=False)
TRANSFORM_METHODS = Registry("raytrust.transforms", paths=False)
OBJECTIVES = Registry(
    "raytrust.objectives",
    {
        "cosine": "raytrust.leak.views:LinearView",  # the view whose own distance it is
        "tensors": "raytrust.leak.views:TensorwiseView",
        "l2": f"{_INVERSION}objectives:l2",
        "l1": f"{_INVERSION}objectives:l1",
    },
)
ATTACKS = Registry(
    "raytrust.attacks",
    {
        "optimise": f"{_INVERSION}search:search",
        "analytic": f"{_INVERSION}analytic:analytic",
        "regression": f"{_INVERSION}regression:regression",
    },
)


def network(name: str) -> Callable[[C], C]:
    """Register a function, or a module class: (channels, classes, **options) -> nn.Module, from images to logits."""
    return _into(NETWORKS, name)


def compressor(options: type) -> Callable[[C], C]:
    """Register a class (options, layout, seed) -> `raytrust.compress.Compressor` for options of this type.

    options: a frozen dataclass derived from `raytrust.config.CompressorConfig`. Its `method` is the name, its first
    field what may follow that on a command line without a name: "topk:0.1".
    """
    return _with_options(options, CompressorConfig, COMPRESSORS, METHODS, TRANSFORMS)


def transform(options: type) -> Callable[[C], C]:
    """Register a class (options) -> `raytrust.defend.Transform` for options of this type.

    options: a frozen dataclass derived from `raytrust.config.TransformConfig`, as for `compressor`: "clip:1".
    """
    return _with_options(options, TransformConfig, TRANSFORMS, TRANSFORM_METHODS, COMPRESSORS)


def objective(name: str) -> Callable[[C], C]:
    """Register a matching distance: (measured, observed) -> (candidates,), differentiable and least where they agree.

    measured: what each candidate's gradient would have shown, (candidates, *shape) each. observed: (*shape) each.
    """
    return _into(OBJECTIVES, name)


def attack(name: str) -> Callable[[C], C]:
    """Register an attack: (seen, config, device) -> `raytrust.attacks.inversion.Candidates`, from an observation."""
    return _into(ATTACKS, name)


def load_plugins(plugins: Sequence[str] = ()) -> list[str]:
    """Import these files and modules, and those of RAYTRUST_PLUGINS, each once; processes started later do so, too.

    Returns all of them, files by their absolute path. Raises ValueError for what can't be imported.
    """
    wanted = list(dict.fromkeys([*active_plugins(), *map(_absolute, plugins)]))
    for plugin in wanted:
        if plugin not in _loaded:
            # Before it is imported: the plugin itself may ask for a name, and so come here again.
            _loaded.add(plugin)
            try:
                _import_plugin(plugin)
            except BaseException:
                # An import that failed or was interrupted must be tried again, and not be taken for done.
                _loaded.discard(plugin)
                raise
    if plugins:
        os.environ[PLUGINS] = os.pathsep.join(wanted)
    return wanted


def active_plugins() -> list[str]:
    """The files and modules of RAYTRUST_PLUGINS."""
    return [plugin for plugin in os.environ.get(PLUGINS, "").split(os.pathsep) if plugin]


def module_of(name: str) -> str | None:
    """Of an import path, package.module:attribute."""
    return name.partition(":")[0] if _PATH.fullmatch(name) else None


def _expect_plugin(path: str) -> None:
    """Raises ValueError unless the module of an import path is a plugin.

    A configuration may be read from a file of somebody else's: it names what is called, and must not bring it in.
    """
    module = module_of(path)
    if module not in {Path(plugin).stem if plugin.endswith(".py") else plugin for plugin in active_plugins()}:
        raise ValueError(f"Expected {path!r} to be of a plugin: give --plugin {module}, or register.load_plugins.")


def _absolute(plugin: str) -> str:
    return str(Path(plugin).expanduser().resolve()) if plugin.endswith(".py") else plugin


def _import_plugin(plugin: str) -> None:
    name = plugin
    if plugin.endswith(".py"):
        path = Path(plugin)
        if not path.is_file():
            raise ValueError(f"Expected plugin={plugin!r} to be a file, but there is none.")
        name = path.stem
        # By its plain name, and not under one of our own: another process that is handed an object of it, pickled,
        # imports it by that name. At the end of the path, so that its neighbours hide no installed package.
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        spec = PathFinder.find_spec(name)
        if name in sys.builtin_module_names or spec is None or spec.origin is None or Path(spec.origin) != path:
            raise ValueError(f"Expected plugin={plugin!r} to have a name of its own, but {name} is another module.")
    try:
        importlib.import_module(name)
    except ValueError:
        raise
    # A user's file can raise anything. What it refuses itself is one line already, and passes through above.
    except Exception as error:
        raise ValueError(f"Expected plugin={plugin!r} to be imported, but {type(error).__name__}: {error}") from error


def _imported(path: str) -> Any:
    """What "module:attribute" or "module" is."""
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Expected {path!r} to be imported, but {error}.") from error


def _into(registry: Registry, name: str) -> Callable[[C], C]:
    def add(thing: C) -> C:
        registry.add(name, thing)
        return thing

    return add


def _with_options(
    options: type, base: type[MethodConfig], configs: Registry, classes: Registry, others: Registry
) -> Callable[[C], C]:
    frozen = is_dataclass(options) and options.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if not frozen or not issubclass(options, base) or not isinstance(getattr(options, "method", None), str):
        raise ValueError(f"Expected options={options!r} to be a frozen dataclass of {base.__name__} with a `method`.")

    # On a command line both stand where a method may: the one would be taken for the other without a word.
    if options.method in [*others]:
        raise ValueError(f"Expected method={options.method!r} to be new, but it is one of {others.group}.")

    def add(cls: C) -> C:
        configs.add(options.method, options)
        classes.add(options.method, cls)
        return cls

    return add


def _same_definition(one: Any, other: Any) -> bool:
    """Whether both are what one definition made: a cell of a notebook that runs again, or a module that is reloaded."""
    # Refusing these would make every second run of a cell fail; two methods of one name have different homes.
    names = [(getattr(x, "__module__", None), getattr(x, "__qualname__", None)) for x in (one, other)]
    return one is other or (names[0] == names[1] and None not in names[0])
