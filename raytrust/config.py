"""Configurations: frozen dataclasses that refuse unknown keys and values out of range.

Every object of this module is a value: it compares by content, it is hashable, and it turns into JSON and back without
loss (`to_dict`, `from_dict`). The type of `TrainConfig.compressor` selects the compression method. All errors are a
`ValueError` of one line that names the argument, its value and what was expected.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def _expect(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"Expected {name}={value!r} {expected}.")


def _expect_choices(config: Any) -> None:
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            _expect_choice(name, getattr(config, name), get_args(hint))


def _expect_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    _expect(value in choices, name, value, "to be one of " + ", ".join(map(repr, choices)))


@dataclass(frozen=True)
class DenseConfig:
    """No compression: the gradient crosses the wire as it is."""

    method: ClassVar[str] = "none"


@dataclass(frozen=True)
class PowerSGDConfig:
    """PowerSGD of the given rank (Vogels et al. 2019, Algorithm 1), at most min(n, m) for an n x m matrix."""

    method: ClassVar[str] = "powersgd"
    rank: int = 4
    warm_start: bool = True

    def __post_init__(self) -> None:
        _expect(self.rank >= 1, "rank", self.rank, "to be at least 1")


@dataclass(frozen=True)
class TopKConfig:
    """Top-K over the whole gradient (Aji & Heafield 2017). Exactly one of the two levels is given.

    level: the fraction of entries that is sent, in (0, 1].
    equal_to_rank: send what PowerSGD of this rank sends, counted in bytes (a value and an index each: half as many
        entries as PowerSGD sends floats) or in values, as `equal_by` says.
    """

    method: ClassVar[str] = "topk"
    level: float | None = None
    equal_to_rank: int | None = None
    equal_by: Literal["bytes", "values"] = "bytes"

    def __post_init__(self) -> None:
        if (self.level is None) == (self.equal_to_rank is None):
            raise ValueError(
                f"Expected exactly one of level={self.level!r} and equal_to_rank={self.equal_to_rank!r} to be given."
            )
        if self.level is not None:
            _expect(0 < self.level <= 1, "level", self.level, "in (0, 1], the fraction of entries that is sent")
        if self.equal_to_rank is not None:
            _expect(self.equal_to_rank >= 1, "equal_to_rank", self.equal_to_rank, "to be at least 1")
        _expect_choices(self)


CompressorConfig: TypeAlias = DenseConfig | PowerSGDConfig | TopKConfig


@dataclass(frozen=True)
class Defence:
    """What stands between the private gradient and the wire: a compressor, with or without error feedback."""

    compressor: CompressorConfig = field(default_factory=DenseConfig)
    error_feedback: bool = False

    @property
    def name(self) -> str:
        """A short name for tables and plots, such as "PowerSGD rank 4 + EF"."""
        match self.compressor:
            case DenseConfig():
                name = "none"
            case PowerSGDConfig(rank=rank, warm_start=warm_start):
                name = f"PowerSGD rank {rank}" + ("" if warm_start else " cold")
            case TopKConfig(level=level) if level is not None:
                name = f"Top-K {100 * level:.3g} %"
            case TopKConfig(equal_to_rank=rank, equal_by=equal_by):
                name = f"Top-K level {rank}" + ("" if equal_by == "bytes" else " (values)")
        return name + (" + EF" if self.error_feedback else "")


@dataclass(frozen=True)
class ModelConfig:
    """resnet18: torchvision's ResNet-18 with `width` channels in its first stage (64 in the paper of He et al.).
    convnet: three convolutions of `width` channels and a linear layer, without batch norm.

    stem: "cifar" is a 3x3 convolution of stride 1 and no max-pool; "imagenet" is torchvision's own 7x7 stem.
    """

    name: Literal["resnet18", "convnet"] = "resnet18"
    stem: Literal["cifar", "imagenet"] = "cifar"
    width: int = 64

    def __post_init__(self) -> None:
        _expect_choices(self)
        _expect(1 <= self.width <= 1024, "width", self.width, "in [1, 1024]")


@dataclass(frozen=True)
class Threat:
    """What the attacker can see, and how the private gradient comes about. It stands in every result.

    vantage: "link" sees one worker's own messages (a server, a wire-tap); "peer" sees what the collective returned.
    batch_size: images in the private batch; the attacker knows it.
    batch_norm: the mode in which the private gradient is taken: "eval" uses the running statistics, which the attacker
        knows as buffers of the model; "train" uses the statistics of the private batch itself.
    labels: "known" grants the private labels to the attacker; "unknown" does not.
    """

    vantage: Literal["link", "peer"] = "link"
    batch_size: int = 1
    batch_norm: Literal["eval", "train"] = "eval"
    labels: Literal["known", "unknown"] = "known"

    def __post_init__(self) -> None:
        _expect_choices(self)
        _expect(self.batch_size >= 1, "batch_size", self.batch_size, "to be at least 1")


@dataclass(frozen=True)
class CaptureConfig:
    """Which steps of training are captured, and for how many private batches.

    The first `tuning` batches serve to choose an attack, the following `evaluation` batches to report it. The two sets
    share no image, and both are the same for every defence of one seed, so that defences are compared in pairs.
    """

    steps: tuple[int, ...] = (0,)
    tuning: int = 2
    evaluation: int = 4

    def __post_init__(self) -> None:
        _expect(len(self.steps) > 0, "steps", self.steps, "to name at least one step")
        _expect(min(self.steps, default=0) >= 0, "steps", self.steps, "to be at least 0")
        _expect(list(self.steps) == sorted(set(self.steps)), "steps", self.steps, "in increasing order, each once")
        _expect(self.tuning >= 1, "tuning", self.tuning, "to be at least 1")
        _expect(self.evaluation >= 1, "evaluation", self.evaluation, "to be at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: everything that decides what crosses the wire, but for the data.

    batch_size: images a worker and step. learning_rate: the peak of a schedule that rises over the first tenth of the
    steps and then falls linearly to zero. Optimiser: SGD with Nesterov momentum, on the mean gradient of all workers.
    """

    defence: Defence = field(default_factory=Defence)
    model: ModelConfig = field(default_factory=ModelConfig)
    threat: Threat = field(default_factory=Threat)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    workers: int = 2
    batch_size: int = 64
    steps: int = 200
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        _expect(self.workers >= 1, "workers", self.workers, "to be at least 1")
        _expect(self.batch_size >= 1, "batch_size", self.batch_size, "to be at least 1")
        _expect(self.steps >= 1, "steps", self.steps, "to be at least 1")
        _expect(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "to be positive and finite")
        _expect(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        _expect(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "to be at least 0 and finite")
        _expect(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2**31)")
        _expect(
            self.capture.steps[-1] < self.steps,
            "capture.steps",
            self.capture.steps,
            f"to lie below steps={self.steps}, the length of training",
        )


@dataclass(frozen=True)
class InversionConfig:
    """Gradient inversion (Geiping et al. 2020): minimise matching distance + tv * total variation over the image.

    objective: "naive" takes the decoded gradient for the whole gradient, as published attacks do; "aware" compares only
        what the compressor let through (`View.distance`).
    tv: weight of the mean absolute difference of neighbouring pixels, in normalised pixel units.
    step_size: of Adam, in normalised pixel units; it falls by 10 after 3/8, 5/8 and 7/8 of the iterations.
    signed: Adam is fed the sign of the gradient.
    restarts: independent random starts, run as one batch; the one with the least objective is returned.
    capture_step: the training step whose messages are attacked.
    """

    objective: Literal["naive", "aware"] = "aware"
    tv: float = 1e-2
    step_size: float = 0.1
    iterations: int = 400
    restarts: int = 1
    signed: bool = True
    capture_step: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _expect_choices(self)
        _expect(0 <= self.tv < math.inf, "tv", self.tv, "to be at least 0 and finite")
        _expect(0 < self.step_size < math.inf, "step_size", self.step_size, "to be positive and finite")
        _expect(self.iterations >= 1, "iterations", self.iterations, "to be at least 1")
        _expect(self.restarts >= 1, "restarts", self.restarts, "to be at least 1")
        _expect(self.capture_step >= 0, "capture_step", self.capture_step, "to be at least 0")
        _expect(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2**31)")

    @property
    def name(self) -> str:
        """A short name for tables, such as "aware tv=0.01 lr=0.1 r=2 s=0"."""
        return f"{self.objective} tv={self.tv:.2g} lr={self.step_size:.2g} r={self.restarts} s={self.capture_step}"

    def against(self, defence: Defence) -> InversionConfig:
        """This attack as it applies to a defence: without a compressor the two objectives are one, called naive."""
        return replace(self, objective="naive") if isinstance(defence.compressor, DenseConfig) else self


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-compatible builtins; a compressor carries its `method`. Inverse of `from_dict`."""

    def tagged(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            tag = {"method": value.method} if hasattr(value, "method") else {}
            return tag | {f.name: tagged(getattr(value, f.name)) for f in fields(value)}
        return [tagged(item) for item in value] if isinstance(value, (tuple, list)) else value

    return tagged(config)


def from_dict(kind: type[T], values: Any, name: str = "") -> T:
    """Build a config of type `kind` from builtins; keys left out take their defaults.

    Raises ValueError for a key that `kind` does not have, a value of the wrong type, or one out of range.
    """
    name = name or kind.__name__
    if not isinstance(values, dict):
        raise ValueError(f"Expected {name}={values!r} to be a mapping.")
    if "method" in values and values["method"] == getattr(kind, "method", None):
        values = {key: value for key, value in values.items() if key != "method"}
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ValueError(f"Expected the keys of {name} to be among {', '.join(known)}, got {key!r}.")
    return kind(**{key: _parse(hints[key], value, key) for key, value in values.items()})


def _parse(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return from_dict(hint, value, name)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        methods = {option.method: option for option in arguments if hasattr(option, "method")}
        if methods:
            return _parse_tagged(methods, value, name)
        if value is None:
            return None
        (hint,) = (option for option in arguments if option is not type(None))
        return _parse(hint, value, name)
    if origin is Literal:
        _expect_choice(name, value, arguments)
        return value
    if origin is tuple:
        _expect(isinstance(value, (list, tuple)), name, value, "to be a list")
        return tuple(_parse(arguments[0], item, name) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _expect(type(value) is hint, name, value, f"to be of type {hint.__name__}")
    return value


def _parse_tagged(methods: dict[str, Any], value: Any, name: str) -> Any:
    if not isinstance(value, dict) or value.get("method") not in list(methods):
        raise ValueError(f"Expected {name}={value!r} to have a method among {', '.join(methods)}.")
    return from_dict(methods[value["method"]], value, name)


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that identify the given configs and builtins: SHA-256 of their canonical JSON.

    Equal values have equal digests, 1 and 1.0 too.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    values = [plain(to_dict(p)) for p in parts]
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SweepConfig:
    """A search over defences and, for each of them, over attacks.

    train: what all defences share; its own `defence` is ignored. defences: audited first, in this order; `trials`
    counts all defences, and those beyond the list are chosen by the search. portfolio: attacks that every defence meets
    in the outer search. attack_trials: further attacks the inner search tries on each defence. bytes_objective: whether
    the outer search also minimises bytes per step.
    """

    name: str = "sweep"
    train: TrainConfig = field(default_factory=TrainConfig)
    defences: tuple[Defence, ...] = (Defence(),)
    trials: int = 1
    portfolio: tuple[InversionConfig, ...] = (InversionConfig(),)
    attack_trials: int = 0
    bytes_objective: bool = False

    def __post_init__(self) -> None:
        _expect(self.trials >= 1, "trials", self.trials, "to be at least 1")
        _expect(len(self.portfolio) >= 1, "portfolio", self.portfolio, "to hold at least one attack")
        _expect(self.attack_trials >= 0, "attack_trials", self.attack_trials, "to be at least 0")
        _expect(len(set(self.defences)) == len(self.defences), "defences", self.defences, "to differ from each other")
        for attack in self.portfolio:
            steps = self.train.capture.steps
            _expect(attack.capture_step in steps, "capture_step", attack.capture_step, f"to be a captured step {steps}")

    def portfolio_against(self, defence: Defence) -> list[InversionConfig]:
        """The attacks of the portfolio as they apply to a defence, each once."""
        return list(dict.fromkeys(attack.against(defence) for attack in self.portfolio))
