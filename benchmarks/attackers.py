"""How similar an image comes out after how many seconds: our attack, the textbook loop, and the library `breaching`.

    OMP_NUM_THREADS=1 python benchmarks/attackers.py --data cifar10.npz --defence none topk:rank4 powersgd:4 \\
        --images 10 --iterations 50 100 200 400 --output attackers

Inverts the gradients of CIFAR-10 test images (or others), each alone, its label known, at the untrained full ResNet-18
(CIFAR stem, evaluation mode; --width for a narrower one): every attacker the same gradients, in one run and in turns,
image by image. The attackers are ours, ours without knowledge of the compressor ("naive"), the textbook loop (Adam on
signs by double backward, with the published settings: `raytrust.config.attacks.GEIPING`) and, where it is installed
(extra `peers`), breaching's own attacks by its own program and configurations, in which nothing is set but iterations
and restarts: "modern" and "invertinggradients"; on sparse messages also with its masked cosine. More of either kind:

    --ours "tensors: matching=tensors tv=0.003" --peer "modern, no warm-up: modern optim.warmup=0"

Seconds are of this process on one CPU thread, or by the clock on a GPU, from the messages to the image; every attacker
has run 2 iterations before. Medians over images. Finished attacks are kept in the output directory, by their settings
and not by their program: after a change of ours, or on another machine, begin another directory. The same
directory gets attackers.md (also printed), attackers.json and attackers.png.
"""

from __future__ import annotations

import argparse
import io
import math
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from inversion import seconds, textbook
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from sklearn.isotonic import isotonic_regression
from torch import Tensor, nn
from uncompressed_inversion import captures_of_test_images

from raytrust.attacks.inversion import invert, total_variation
from raytrust.attacks.inversion.objectives import target_view
from raytrust.attacks.inversion.optimisers import step_sizes
from raytrust.config import Defence, InversionConfig, ModelConfig, digest, parse_defence, to_dict
from raytrust.config.attacks import GEIPING
from raytrust.config.parsing import parse_text
from raytrust.config.values import from_dict, type_hints
from raytrust.data import Dataset, load
from raytrust.jobs.files import read_json, write_file, write_json
from raytrust.leak import SparseView, view_of
from raytrust.leak.observation import Capture, Observation, decoded
from raytrust.metrics.images import psnr, ssim_table
from raytrust.metrics.statistics import Figure, Paired, mean_figure, paired_difference
from raytrust.persample.memory import keep_freed_memory
from raytrust.reports.drawing import GREY, plain_axes, save

WARM_UP = 2  # iterations
REFERENCES = 99  # of other images, whose mean is what is reached without any attack
# Okabe and Ito's, with a form each, for those who don't see them apart.
COLOURS = ("#0072B2", "#56B4E9", "#6E6E6E", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#000000")
MARKERS = "osD^v<>PX"  # one more, so that what has a colour again has another form


@dataclass(frozen=True)
class Ours:
    """Like all attackers, it has a `name`; `settings` are all that tells an attack from others, as builtins; `attack`
    is the attack on one image, made ready to be timed: (channels, height, width) in [0, 1], not finite where it broke.
    """

    name: str
    config: InversionConfig
    auxiliary: int = 0  # images that it may learn from

    def settings(self, defence: Defence, iterations: int) -> dict[str, Any]:
        settings = to_dict(replace(self.config, iterations=iterations).against(defence))
        return settings | ({"auxiliary": self.auxiliary} if self.config.learns else {})

    def attack(self, seen: Observation, iterations: int, seed: int, device: str) -> Callable[[], Tensor]:
        config = replace(self.config, iterations=iterations, seed=self.config.seed + seed).against(seen.defence)

        def run() -> Tensor:
            (candidates,) = invert([(seen, config)], device)
            broke = not bool(candidates.objective.isfinite().any())
            return torch.full(seen.image_shape, torch.nan) if broke else candidates.images[candidates.pick()][0]

        return run


@dataclass(frozen=True)
class Textbook:
    """One restart after the other; the last iterate of the one with the least objective."""

    name: str
    config: InversionConfig

    def settings(self, defence: Defence, iterations: int) -> dict[str, Any]:
        return {"textbook": to_dict(replace(self.config, iterations=iterations))}

    def attack(self, seen: Observation, iterations: int, seed: int, device: str) -> Callable[[], Tensor]:
        config = replace(self.config, iterations=iterations, seed=self.config.seed + seed)

        def run() -> Tensor:
            generator = torch.Generator().manual_seed(config.seed)
            ends = [textbook_loop(seen, config, generator, device) for _ in range(config.restarts)]
            return min(ends, key=lambda end: end[0] if math.isfinite(end[0]) else math.inf)[1]

        return run


def textbook_loop(
    seen: Observation, config: InversionConfig, generator: torch.Generator, device: str
) -> tuple[float, Tensor]:
    """Objective before the last step, and the image after it: Adam on the signs of the derivative, in the box of valid
    pixels, one pass there and back by torch.autograd an iteration."""
    model = seen.build_model().to(device)
    view, label = target_view(seen, config, device), known_label(seen).to(device)
    mean, std = (s.to(device).view(-1, 1, 1) for s in (seen.mean, seen.std))
    x = torch.randn((1, *seen.image_shape), generator=generator).to(device)
    x = x.clamp(-mean / std, (1 - mean) / std)
    optimiser = torch.optim.Adam([x], lr=config.step_size)
    value = torch.full((1,), torch.nan)
    for rate in step_sizes(config).tolist():
        value, slope = textbook(model, x, label, view)
        free = x.detach().requires_grad_()
        prior = config.tv * total_variation(free[None]).sum()
        value = value + prior.detach()
        x.grad = (slope + torch.autograd.grad(prior, free)[0]).sign()
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        x.clamp_(-mean / std, (1 - mean) / std)
    return float(value), (x[0] * std + mean).clamp(0, 1).cpu()


@dataclass(frozen=True)
class Peer:
    """An attack of `breaching` by one of its configurations, with overrides as Hydra takes them."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    restarts: int = 1

    @property
    def masked(self) -> bool:
        return any("masked" in override for override in self.overrides)

    def compose(self, iterations: int) -> Any:
        fixed = [f"optim.max_iterations={iterations}", f"optim.callback={iterations}"]
        # It prints what it loads; torch warns of its use of torch.jit, and Hydra of a version that it does not name.
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import breaching

            return breaching.get_attack_config(
                self.config, [*fixed, f"restarts.num_trials={self.restarts}", *self.overrides]
            )

    def settings(self, defence: Defence, iterations: int) -> dict[str, Any]:
        from omegaconf import OmegaConf

        return {"breaching": version("breaching"), "config": OmegaConf.to_container(self.compose(iterations))}

    def attack(self, seen: Observation, iterations: int, seed: int, device: str) -> Callable[[], Tensor]:
        import breaching

        # To read the configuration takes 0.1 s, which are not the attack's.
        config = self.compose(iterations)
        setup = {"dtype": torch.float, "device": torch.device(device)}

        def run() -> Tensor:
            model = seen.build_model()
            attacker = breaching.attacks.prepare_attack(model, nn.CrossEntropyLoss(), config, setup)
            mean, std = (s.view(-1, 1, 1) for s in (seen.mean, seen.std))
            # It draws from the global generators, which are somebody else's.
            with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
                torch.manual_seed(seed)
                found, _ = attacker.reconstruct(*payload(seen, model, device), server_secrets={})
            return (found["data"][0].cpu() * std + mean).clamp(0, 1)

        return run


Attacker: TypeAlias = Ours | Textbook | Peer


def payload(seen: Observation, model: nn.Module, device: str) -> tuple[list[Any], list[Any]]:
    """What breaching's server sent to the user, and the user to its server. Its model is in evaluation mode because the
    server sent buffers and the user none."""
    metadata = SimpleNamespace(shape=seen.image_shape, mean=seen.mean, std=seen.std, modality="vision")
    server = {
        "parameters": [seen.weights[name] for name, _ in model.named_parameters()],
        "buffers": [seen.buffers[name] for name, _ in model.named_buffers()],
        "metadata": metadata,
    }
    label = known_label(seen).to(device)
    user = {
        "gradients": decoded(seen, device).gradient,
        "buffers": None,
        "metadata": {"num_data_points": len(label), "labels": label, "local_hyperparams": None},
    }
    return [server], [user]


def known_label(seen: Observation) -> Tensor:
    if seen.labels is None:
        raise ValueError("Expected labels that the threat grants.")
    return seen.labels


@dataclass(frozen=True)
class Row:
    """One attacker with so many iterations. ssim, seconds: image by image; ssim of the mean image where the attack
    broke. nearest: the iterations of ours whose median time is nearest, by its logarithm, paired: ours minus this."""

    defence: str
    attacker: str
    iterations: int
    ssim: list[float]
    seconds: list[float]
    broke: int
    nearest: int | None = None
    nearest_seconds: float | None = None
    paired: Paired | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def mean(self) -> Figure:
        return mean_figure(self.ssim)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        data, defences, attackers = _checked(options)
    except (ValueError, OSError) as error:
        print(f"attackers.py: error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    keep_freed_memory()
    rows: list[Row] = []
    floors: dict[str, float] = {}
    notes: list[str] = []
    images = range(options.first, options.first + options.images)
    for defence in defences:
        captures = captures_of_test_images(data, images, ModelConfig(width=options.width), defence)
        floors[defence.name] = _floor(data, captures)
        if options.auxiliary:
            captures = [_granted(capture, data, options.auxiliary) for capture in captures]
        chosen = _applying(attackers, defence, captures[0].seen, notes)
        for iterations in options.iterations:
            chosen = [a for a in chosen if not _too_long(a, rows, defence, iterations, options.seconds, notes)]
            rows += _measure(chosen, captures, iterations, data, options)
            # After each, so that a run that is cut short leaves what it has.
            _write(_compared(rows), floors, notes, attackers, options)
    print((options.output / "attackers.md").read_text(), end="")
    return 0


def _granted(capture: Capture, data: Dataset, count: int) -> Capture:
    """The capture under a threat that grants the first training images."""
    seen, images = capture.seen, _images(data, count)
    return replace(capture, seen=replace(seen, auxiliary=images, threat=replace(seen.threat, auxiliary=count)))


@cache
def _images(data: Dataset, count: int) -> Tensor:
    return data.train_images[:count].float() / 255


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--data", required=True, help="cifar10, FILE.npz or DIR")
    add("--output", type=Path, required=True, metavar="DIR", help="for the table, the figure and finished attacks")
    add("--defence", nargs="+", default=["none", "topk:rank4", "powersgd:4"], help=default)
    add("--images", type=int, default=10, metavar="N", help=default)
    add("--first", type=int, default=0, metavar="INDEX", help=f"of the test images {default}")
    add("--iterations", type=int, nargs="+", default=[50, 100, 200, 400], metavar="N", help=default)
    add("--seconds", type=float, default=math.inf, help="an image at most, judged by fewer iterations, which are run")
    add("--auxiliary", type=int, default=0, metavar="N", help="training images that ours may learn from, for settings "
        "such as start=regression; learning, once for all images, is not timed")  # fmt: skip
    add("--width", type=int, default=64, help=f"of the ResNet-18 {default}")
    add("--restarts", type=int, default=1, help=f"of every attacker {default}")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help=f"of ours {default}")
    add("--device", default="cpu", help=default)
    add("--attacker", nargs="+", metavar="NAME", help="these alone (default: all)")
    add("--ours", action="append", default=[], metavar="NAME: FIELD=VALUE ...", help="ours with other settings")
    add("--peer", action="append", default=[], metavar="NAME: CONFIG KEY=VALUE ...", help="breaching's, with others")
    return parser


def _checked(options: argparse.Namespace) -> tuple[Dataset, list[Defence], list[Attacker]]:
    data = load(options.data)
    defences = [parse_defence(text) for text in options.defence]
    # A table by their names would take two of one name for one.
    for name, given in (("defence", [d.name for d in defences]), ("iterations", options.iterations)):
        if len(set(given)) < len(given):
            raise ValueError(f"Expected {name}={given} to name each once.")
    for name, least in (("images", 1), ("first", 0), ("auxiliary", 0), ("width", 1), ("restarts", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"Expected {name}={getattr(options, name)} to be at least {least}.")
    if min(options.iterations) < 1 or not options.seconds > 0:
        raise ValueError(f"Expected iterations={options.iterations} and seconds={options.seconds} to be positive.")
    last = len(data.test_labels) - REFERENCES
    if options.first + options.images > last:
        raise ValueError(f"Expected first={options.first} + images={options.images} to be at most {last}.")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"Expected device={options.device!r} to be available here.")
    options.iterations.sort()
    if options.auxiliary > len(data.train_labels):
        raise ValueError(f"Expected auxiliary={options.auxiliary} to be at most {len(data.train_labels)}.")
    attackers = _attackers(options)
    if learning := [a.name for a in attackers if isinstance(a, Ours) and a.config.learns and options.auxiliary < 2]:
        raise ValueError(f"Expected auxiliary={options.auxiliary} to be at least 2 for {learning[0]}.")
    return data, defences, attackers


def _attackers(options: argparse.Namespace) -> list[Attacker]:
    ours = InversionConfig(restarts=options.restarts, precision=options.precision)
    textbook_config = replace(GEIPING, restarts=options.restarts)
    masked = ("objective.type=masked-cosine-similarity",)
    known: list[Attacker] = [
        Ours("ours", ours),
        Ours("ours naive", replace(ours, objective="naive")),
        *(replace(_parse_ours(text, ours), auxiliary=options.auxiliary) for text in options.ours),
        Textbook("textbook", textbook_config),
    ]
    peers = [Peer(name, name, restarts=options.restarts) for name in ("modern", "invertinggradients")]
    peers += [Peer(f"{p.name} masked", p.config, masked, options.restarts) for p in peers]
    peers += [_parse_peer(text, options.restarts) for text in options.peer]
    names = [a.name for a in (*known, *peers)]
    if len(set(names)) < len(names):
        raise ValueError(f"Expected each attacker to have a name of its own, got {', '.join(names)}.")
    wanted = options.attacker or names
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(f"Expected attacker={unknown[0]!r} to be among {', '.join(names)}.")
    if find_spec("breaching") is not None:
        known += peers
    elif options.peer or any(p.name in (options.attacker or ()) for p in peers):
        raise ValueError("Expected the package breaching to be installed for its attacks (the extra [peers]).")
    else:
        print("attackers.py: breaching is not installed (the extra [peers]): without its attacks", file=sys.stderr)
    chosen = [a for a in known if a.name in wanted]
    for peer in (a for a in chosen if isinstance(a, Peer)):
        _try_overrides(peer)
    return chosen


def _parse_ours(text: str, base: InversionConfig) -> Ours:
    name, values = _named(text, "FIELD=VALUE ...")
    hints, changed = type_hints(InversionConfig), to_dict(base)
    for item in values:
        field, equals, value = item.partition("=")
        if not equals or field not in hints or field in ("iterations", "capture_step"):
            raise ValueError(f"Expected ours={text!r} to set fields of InversionConfig, without iterations.")
        changed[field] = parse_text(hints[field], value)
    return Ours(name, from_dict(InversionConfig, changed))


def _parse_peer(text: str, restarts: int) -> Peer:
    name, values = _named(text, "CONFIG KEY=VALUE ...")
    if not values:
        raise ValueError(f"Expected peer={text!r} to name a configuration of breaching.")
    return Peer(name, values[0], tuple(values[1:]), restarts)


def _named(text: str, form: str) -> tuple[str, list[str]]:
    name, colon, rest = text.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"Expected {text!r} to be 'NAME: {form}'.")
    return name.strip(), rest.split()


def _try_overrides(peer: Peer) -> None:
    from hydra.errors import HydraException

    try:
        peer.compose(WARM_UP)
    except HydraException as error:
        raise ValueError(f"Expected peer={peer.name!r} to be a configuration of breaching: {error}") from error


def _floor(data: Dataset, captures: Sequence[Capture]) -> float:
    """Mean SSIM of the mean of other images to the private ones: what is reached without any attack."""
    mean = (data.test_images[-REFERENCES:].float() / 255).mean(0, keepdim=True)
    return float(ssim_table(mean.numpy(), torch.cat([c.truth.images for c in captures]).numpy()).mean())


def _applying(attackers: Sequence[Attacker], defence: Defence, seen: Observation, notes: list[str]) -> list[Attacker]:
    """Those that are of use against a defence, each once."""
    view = view_of(seen.build_compressor(), list(seen.messages), seen.threat.vantage, seen.victim)
    applying: dict[str, Attacker] = {}
    for attacker in attackers:
        # Of what is not sparse a mask leaves out nothing.
        if isinstance(attacker, Peer) and attacker.masked and not isinstance(view, SparseView):
            continue
        first = applying.setdefault(digest(attacker.settings(defence, WARM_UP)), attacker)
        if first is not attacker:
            notes.append(f"{defence.name}: {attacker.name} is {first.name} here.")
    return list(applying.values())


def _too_long(
    attacker: Attacker, rows: Sequence[Row], defence: Defence, iterations: int, budget: float, notes: list[str]
) -> bool:
    """Whether it would take longer than this for an image, as far as fewer iterations tell."""
    # Not stopped on the way: step sizes fall with the iterations that are to come.
    before = [r for r in rows if (r.defence, r.attacker) == (defence.name, attacker.name)]
    expected = before[-1].median * iterations / before[-1].iterations if before else 0.0
    if expected > budget:
        notes.append(
            f"{defence.name}: {attacker.name} stops before {iterations} iterations (about {expected:.3g} s an image)."
        )
    return expected > budget


def _measure(
    attackers: Sequence[Attacker], captures: Sequence[Capture], iterations: int, data: Dataset, options: Any
) -> list[Row]:
    """All attackers with so many iterations, in turns, so that what else the machine does hits them alike."""
    defence = captures[0].seen.defence
    place = [options.width, options.device, torch.__version__, data.fingerprint(), options.first, options.images]
    reached: dict[str, list[dict[str, Any]]] = {a.name: [] for a in attackers}
    for i, capture in enumerate(captures):
        for attacker in attackers:
            settings = attacker.settings(defence, iterations)
            path = options.output / "attacks" / f"{digest(settings, defence, *place, i)}.json"
            if (figures := read_json(path)) is None:
                figures = _attack(attacker, capture, iterations, options)
                write_json(path, {"attack": settings, "defence": to_dict(defence), "place": [*place, i]} | figures)
                spent = f"SSIM {figures['ssim']:.3f} after {figures['seconds']:.1f} s"
                print(
                    f"{defence.name}, image {options.first + i}, {iterations} x {attacker.name}: {spent}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            reached[attacker.name].append(figures)
    return [
        Row(
            defence.name,
            name,
            iterations,
            [f["ssim"] for f in figures],
            [f["seconds"] for f in figures],
            sum(f["broke"] for f in figures),
        )
        for name, figures in reached.items()
    ]


_warm: set[tuple[str, str]] = set()


def _attack(attacker: Attacker, capture: Capture, iterations: int, options: Any) -> dict[str, Any]:
    """SSIM, PSNR and seconds of one attack on one image."""
    seed = options.first + capture.index
    if (attacker.name, capture.seen.defence.name) not in _warm:
        attacker.attack(capture.seen, WARM_UP, seed, options.device)()
        _warm.add((attacker.name, capture.seen.defence.name))
    run = attacker.attack(capture.seen, iterations, seed, options.device)
    handed_in: list[Tensor] = []
    spent = seconds(lambda: handed_in.append(run()), options.device)
    image, broke = handed_in[0], not bool(handed_in[0].isfinite().all())
    if broke:
        # An attacker who has nothing hands in the mean image.
        image = capture.seen.mean.view(-1, 1, 1).expand(capture.seen.image_shape)
    pair = image.numpy(), capture.truth.images[0].numpy()
    return {
        "ssim": float(ssim_table(pair[0][None], pair[1][None])[0, 0]),
        "psnr": psnr(*pair),
        "seconds": spent,
        "broke": broke,
    }


def _compared(rows: Sequence[Row]) -> list[Row]:
    """Each row with its comparison to ours of the nearest time; ours itself without."""
    compared = []
    for row in rows:
        ours = [r for r in rows if (r.defence, r.attacker) == (row.defence, "ours")]
        if row.attacker != "ours" and ours:
            near = min(ours, key=lambda r: abs(math.log(r.median / row.median)))
            paired = paired_difference(near.ssim, row.ssim)
            row = replace(row, nearest=near.iterations, nearest_seconds=near.median, paired=paired)
        compared.append(row)
    return compared


def _write(
    rows: Sequence[Row],
    floors: dict[str, float],
    notes: Sequence[str],
    attackers: Sequence[Attacker],
    options: argparse.Namespace,
) -> None:
    unit = "GPU" if options.device.startswith("cuda") else "CPU"
    peers = [a for a in attackers if isinstance(a, Peer)]
    head = (
        f"{options.data}, test images {options.first}-{options.first + options.images - 1}, untrained ResNet-18 of "
        f"width {options.width}, one image at a time; ours in {options.precision}; torch {torch.__version__}, "
        f"{platform.machine()}"
        + (f"; {', '.join(a.name for a in peers)}: breaching {version('breaching')}" if peers else "")
    )
    columns = f"defence|attacker|iterations|mean SSIM|{unit} s an image|ours - this, of ours at the nearest time|n"
    lines = [head, "", "| " + columns.replace("|", " | ") + " |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        against = "-"
        if row.paired is not None:
            ends = row.paired.interval
            interval = "" if ends is None else f" [{ends[0]:+.3f}, {ends[1]:+.3f}]"
            ours = f"{row.nearest} iterations, {row.nearest_seconds:.3g} s"
            against = f"{row.paired.difference:+.3f}{interval}, p = {row.paired.p_value:.2g} ({ours})"
        cells = [row.defence, row.attacker, row.iterations, f"{row.mean:.3f}", f"{row.median:.3g}", against]
        lines.append("| " + " | ".join(map(str, [*cells, len(row.ssim)])) + " |")
    broke = [f"{r.defence}: {r.iterations} x {r.attacker} broke on {r.broke} images." for r in rows if r.broke]
    known = [f"{defence}: the mean image reaches {floor:.3f}." for defence, floor in floors.items()]
    lines += ["", *(f"- {note}" for note in [*known, *notes, *broke])]
    write_file(options.output / "attackers.md", ("\n".join(lines) + "\n").encode())
    given = {name: str(value) for name, value in vars(options).items()}
    write_json(
        options.output / "attackers.json",
        {"what": head, "options": given, "floors": floors, "notes": list(notes), "rows": [asdict(r) for r in rows]},
    )
    names = [attacker.name for attacker in attackers]
    save(draw(rows, floors, names, f"{unit} seconds an image (median)"), options.output / "attackers.png")


def draw(rows: Sequence[Row], floors: dict[str, float], names: Sequence[str], label: str) -> Picture:
    """One panel a defence, SSIM over seconds, with 95 % intervals over images; a dotted line is the mean image. names:
    of the attackers, in the order of their colours."""
    # Inches that become 1000 pixels across: at 400, letters of 10 points are 11 pixels high. A letter of 9 points is
    # about 0.07 inches wide.
    left, right, high, gap, foot = 0.68, 0.2 + 0.07 * max(map(len, [*names, "mean image"])), 2.3, 0.42, 0.55
    width, height = max(1.5, 5.0 - left - right), len(floors) * (high + gap) + foot
    fig = Picture(figsize=(5.0, height), dpi=200)
    times = [row.median for row in rows]
    for i, (defence, floor) in enumerate(floors.items()):
        bottom = height - (i + 1) * (high + gap)
        ax = fig.add_axes((left / 5, bottom / height, width / 5, high / height))
        ax.set_title(defence, loc="left", fontsize=10.5, weight="bold", parse_math=False)
        _style(ax, min(times) / 1.25, max(times) * 1.25, last=i == len(floors) - 1)
        ends = [("mean image", ax.get_xlim()[1], floor, GREY)]
        ax.axhline(floor, color=GREY, linestyle=":", linewidth=1, zorder=1)
        for j, name in enumerate(names):
            line = [row for row in rows if (row.defence, row.attacker) == (defence, name)]
            if line:
                ends.append((name, *_draw_line(ax, line, j)))
        # An interval of few images is longer than all that is to be seen: it is cut off.
        reached = [floor, *(float(np.mean(row.ssim)) for row in rows if row.defence == defence)]
        margin = 0.03 + 0.4 * (max(reached) - min(reached))
        ax.set_ylim(min(reached) - margin, max(reached) + margin)
        _label(ax, ends, 0.16 / high)
    fig.text((left + width / 2) / 5, 0.1 / height, label, fontsize=10, ha="center")
    return fig


def _style(ax: Axes, low: float, high: float, last: bool) -> None:
    plain_axes(ax)
    ax.set(xscale="log", xlim=(low, high))
    ax.set_ylabel("mean SSIM", fontsize=10)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.tick_params(labelsize=10, labelbottom=last)


def _draw_line(ax: Axes, rows: Sequence[Row], number: int) -> tuple[float, float, str]:
    """Where the line ends, and its colour."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    x, means = [row.median for row in rows], [row.mean for row in rows]
    y = [float(np.mean(row.ssim)) for row in rows]
    for at, mean in zip(x, means, strict=True):
        if mean.low is not None and mean.high is not None:
            ax.plot([at, at], [mean.low, mean.high], color=colour, linewidth=1.1, alpha=0.5, zorder=2)
    ax.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=2.2 if number == 0 else 1.5, zorder=3)
    return x[-1], y[-1], colour


def _label(ax: Axes, ends: Sequence[tuple[str, float, float, str]], gap: float) -> None:
    """Names beside the panel, each at the height of its line's end, or as near as it does not cover another."""
    low, high = ax.get_ylim()
    order = sorted(ends, key=lambda end: end[2])
    heights, steps = np.array([(end[2] - low) / (high - low) for end in order]), gap * np.arange(len(order))
    # The least shifts by which they keep their order and this distance are an isotonic regression.
    places = isotonic_regression(heights - steps).clip(0, max(0.0, 1 - steps[-1])) + steps
    beside = ax.get_yaxis_transform()
    for (name, x, y, colour), place in zip(order, places, strict=True):
        ax.text(1.06, place, name, transform=ax.transAxes, fontsize=9, color=colour, va="center", parse_math=False)
        thin: dict[str, Any] = {"color": colour, "linewidth": 0.6, "alpha": 0.6, "clip_on": False, "zorder": 1}
        edge = ax.get_xlim()[1]
        ax.plot([x, edge], [y, y], linestyle=(0, (1, 3)), **thin)
        ax.plot([1.0, 1.05], [y, low + place * (high - low)], transform=beside, **thin)


if __name__ == "__main__":
    sys.exit(main())
