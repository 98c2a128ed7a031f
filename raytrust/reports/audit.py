"""`audit`: what gradients of one's own model, compressed in one way or another, tell of one's own images."""

from __future__ import annotations

import copy
import importlib
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from raytrust.attacks.inversion.further import further_attacks
from raytrust.compress import Compressor, HookCompressor, ddp_comm_hook
from raytrust.compress.hook import AnyHook
from raytrust.config import ONE_STEP, Defence, InversionConfig, LocalConfig, Threat, parse_defence
from raytrust.config.attacks import through_local_steps
from raytrust.jobs.files import write_file
from raytrust.networks.task import LossFunction, Task
from raytrust.reports.frontier_table import frontier_table
from raytrust.reports.summary import answer, control_sentence
from raytrust.studies.audit.private import Private, images_of, private
from raytrust.studies.audit.study import Audit, Audited, drawn_attacks
from raytrust.studies.audit.training import Training
from raytrust.studies.audit.victim import Victim
from raytrust.studies.frontier.row import Row, write_rows
from raytrust.studies.frontier.verdicts import control_works

# Other images than the private ones, of which identification has to tell them: no more are used.
REFERENCES = 99


def audit(
    model: nn.Module,
    images: Any,
    labels: Any,
    defences: str | Sequence[str | Compressor] = ("none", "powersgd:4:ef", "topk:0.01:ef"),
    *,
    loss: LossFunction | None = None,
    inputs: Mapping[str, Any] | None = None,
    argument: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dropout: bool = False,
    batch_size: int = 1,
    labels_known: bool = True,
    evaluation: int = 8,
    tuning: int = 2,
    references: Any = None,
    auxiliary: Any = None,
    attack: InversionConfig | None = None,
    search: int = 0,
    training: Training | None = None,
    local: LocalConfig = ONE_STEP,
    hook: AnyHook | None = None,
    state: Any = None,
    device: str = "cpu",
    seed: int = 0,
    progress: bool | Callable[[str], None] = True,
) -> AuditResult:
    """Attack what a model's gradients of private images would send under each defence, and say what leaks.

    model: any module, as it stands: its weights, the modes of its modules, what is frozen. It is copied and stays as it
        is. Nothing is trained, unless `training` says so.
    images: (n, channels, height, width) in [0, 1], or bytes; a tensor or an array. The first `evaluation` + `tuning`
        batches are attacked, on the latter of which attacks are chosen; what is left serves as `references`: other
        images of the kind, for the floors and for identification. Without any, the tuning images serve.
    labels: (n,) classes; or what `loss` compares the output with, a tensor or tensors in a tuple or dict, (n, ...).
    defences: as `parse_defence` takes them, or compressors. Without compression is always audited: it is the control.
    loss: (output, target) -> the mean over the batch, one number; cross-entropy if it is not given.
    inputs: further inputs of the model by name, (n, ...), which the attacker knows. argument: the name of the argument
        that takes the images, where it is not the first.
    mean, std: by channel, where the model takes (image - mean) / std.
    dropout: whether the victim drops out, in layers that are in training mode; the attacker does not know the masks.
        Without, dropout is switched off, which is the worst case.
    batch_size: images of one private batch. labels_known: whether the attacker has the labels; else he recovers them.
    auxiliary: other images of the kind, which the attacker has, too, and learns from: a batch's batch-norm statistics,
        a regression, a start and a denoiser; none unless they are given. They may be the references, but none of the
        images that are attacked.
    attack: the settings from which the attacks are made: ignoring and knowing the compressor, by the cosine of the
        whole gradient and tensor by tensor, and a closed form where the model has one. search: how many more are drawn.
    hook: a communication hook, anybody's, as `DistributedDataParallel.register_comm_hook` takes it, with its state: one
        more defence, attacked in its first step that compresses.
    local: steps of SGD that the owner makes on a batch before it sends (FedAvg); what is attacked is then their
        pseudo-gradient, in each way through them. With `training`, its batches are taken so, too.
    training: captures at later steps of the owner's training, see `Training`.
    progress: whether to print a line for each part that is done, or what to call with it.

    Raises ValueError in one line for what can't be audited: see `raytrust.studies.audit.victim`.
    """
    started = time.perf_counter()
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"Expected model to be an instance of nn.Module, not of TorchScript, got {model!r:.60}.")
    task = Task(loss, argument)
    data = private(images, labels, inputs, task)
    total = (evaluation + tuning) * batch_size
    if (mean is None) != (std is None):
        raise ValueError(f"Expected mean={mean} and std={std} to be given together.")
    if str(device) != "cpu" and not (str(device).startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"Expected device={str(device)!r} to be cpu, or cuda where torch can use it.")
    if attack is not None and attack.residual != "ignore":
        raise ValueError(f"Expected residual={attack.residual!r} to be 'ignore': an audit grants no history.")
    for name, value in (("evaluation", evaluation), ("tuning", tuning), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"Expected {name}={value} to be a number from 1 on.")
    if total > len(data.images):
        raise ValueError(
            f"Expected at least {total} images for evaluation={evaluation} and tuning={tuning} batches of "
            f"batch_size={batch_size}, got {len(data.images)}."
        )
    if not labels_known and (loss is not None or inputs):
        raise ValueError("Expected labels_known=True: labels are recovered from cross-entropy of images alone.")
    channels = data.images.shape[1]
    mean_, std_ = (_by_channel(v, channels, name) for v, name in ((mean, "mean"), (std, "std")))
    local.check_takes_all(batch_size)
    victim = Victim(model, task, mean_, std_, dropout, local)
    classes = victim.check(data, batch_size)
    others = _others(data, references, tuning * batch_size, total, batch_size)
    extra = None if auxiliary is None else _auxiliary(auxiliary, data.images[:total])
    threat = Threat(
        batch_size=batch_size,
        batch_norm="train" if victim.trains_norms else "eval",
        labels="known" if labels_known else "unknown",
        batch_statistics="unknown" if extra is None else "proxy",
        auxiliary=0 if extra is None else len(extra),
    )
    base = attack or InversionConfig(seed=seed)
    # A model that is not solved for may look private: what kept it from being so stands on the page.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attacks = _portfolio(base, victim, data.batch(0, batch_size), threat, classes)
    remarks = [str(w.message) for w in caught]
    listed = _audited([defences] if isinstance(defences, str) else defences)
    if hook is not None:
        listed.append(_hooked(hook, state, victim.network))
    study = Audit(
        threat=threat,
        attacks=attacks,
        further=drawn_attacks(search, replace(base, through=attacks[0].through), seed),
        tuning=tuning,
        evaluation=evaluation,
        seed=seed,
        device=str(device),
        classes=classes,
        auxiliary=extra,
        local=local,
    )
    say = progress if callable(progress) else (print if progress else lambda _: None)
    # The tuning batches come first in every capture's order, as the sweep has it.
    rows = study.run(victim, data.batch(0, total), others, listed, training, say)
    parameters = sum(p.numel() for p in victim.network.parameters() if p.requires_grad)
    size = "x".join(map(str, data.images.shape[1:]))
    name = type(model).__name__
    if victim.dropouts and not dropout:
        remarks.append("Dropout is switched off.")
    return AuditResult(
        rows,
        listed,
        study,
        title=f"What gradients of {name} tell of its images",
        summary=f"{name}, {parameters:,} trainable parameters; {len(data.images)} images of {size}, {len(others)} "
        f"others for floor and identification. {' '.join(remarks)}".rstrip(),
        settings={
            "loss": "cross-entropy" if loss is None else getattr(loss, "__name__", type(loss).__name__),
            "inputs known besides": ", ".join(inputs or ()) or "none",
            "mean": mean,
            "std": std,
            "dropout": "of the victim, masks unknown" if victim.drops else "off",
            "tuning batches": tuning,
            "evaluation batches": evaluation,
            "local steps": local.title or "one, of the whole batch",
            "steps attacked": (0,) if training is None else training.steps,
            "seed": seed,
        },
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, eq=False)
class AuditResult:
    """The answer of an audit: `print` shows it as a table, a notebook as a page, and `save` writes both.

    rows: one a defence, see `raytrust.studies.frontier.row.Row`. defences: with what was captured and reconstructed.
    summary: of the model and the images, in a line. settings: what was asked for. seconds: by the clock.
    """

    rows: list[Row]
    defences: list[Audited]
    study: Audit
    title: str
    summary: str
    settings: Mapping[str, Any]
    seconds: float

    def __str__(self) -> str:
        # Where the attack fails without compression, the table begins with that sentence.
        control = [control_sentence(self.rows)] if control_works(self.rows) else []
        return "\n".join([frontier_table(self.rows), "", self.summary, answer(self.rows), *control])

    def _repr_html_(self) -> str:
        # In a frame of its own: the page's style sheet would else restyle the notebook.
        text = _pages().page_of(self).replace("&", "&amp;").replace('"', "&quot;")
        return f'<iframe srcdoc="{text}" style="width:100%;height:48rem;border:1px solid #ddd"></iframe>'

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write results.json, audit.txt, report.html, audit.png and reconstructions.png; returns their paths.

        Raises ValueError, after the first two, where the packages that draw are missing.
        """
        root = Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        paths = [root / "results.json", root / "audit.txt"]
        write_rows(paths[0], self.rows)
        write_file(paths[1], f"{self}\n".encode())
        return [*paths, *_pages().write(self, root)]


def _pages() -> ModuleType:
    # What draws is not needed to audit, and need not be there in a slim training image.
    try:
        return importlib.import_module("raytrust.reports.audit_page")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Expected {error.name} to be installed for pages and pictures: pip install raytrust."
        ) from None


def _others(data: Private, references: Any, tuning: int, total: int, batch_size: int) -> torch.Tensor:
    """Images for floors and identification, none of them private."""
    others = data.images[total:] if references is None else images_of(references)
    if others.shape[1:] != data.images.shape[1:]:
        raise ValueError(f"Expected references of shape {tuple(data.images.shape[1:])}, got {tuple(others.shape[1:])}.")
    private = {x.numpy().tobytes() for x in data.images[tuning:total]}
    # Beside its own copy no reconstruction could be identified, and the attack would seem to fail.
    others = others[[x.numpy().tobytes() not in private for x in others]]
    if len(others) < 2 * batch_size and references is not None:
        raise ValueError(f"Expected at least {2 * batch_size} references that are not private, got {len(others)}.")
    if len(others) < 2 * batch_size:
        others = torch.cat([others, data.images[:tuning]])
    return others[:REFERENCES]


def _auxiliary(images: Any, attacked: torch.Tensor) -> torch.Tensor:
    """Images for the attacker. Raises ValueError if one of them is attacked, which would be known then."""
    granted = images_of(images)
    if granted.shape[1:] != attacked.shape[1:]:
        raise ValueError(f"Expected auxiliary of shape {tuple(attacked.shape[1:])}, got {tuple(granted.shape[1:])}.")
    # To 8 bits a pixel, as images that went through other arithmetic differ in their last digits.
    private = {_bytes_of(x) for x in attacked}
    if (index := next((i for i, x in enumerate(granted) if _bytes_of(x) in private), None)) is not None:
        raise ValueError(f"Expected auxiliary images without the private ones, got one of them at {index}.")
    return granted


def _bytes_of(image: torch.Tensor) -> bytes:
    return (image * 255).round().byte().numpy().tobytes()


def _audited(defences: Sequence[str | Compressor]) -> list[Audited]:
    """Each once, the control first."""
    listed: dict[str, Audited] = {"none": Audited(parse_defence("none"), name="none")}
    for one in defences:
        if isinstance(one, str | Defence):
            defence = parse_defence(one) if isinstance(one, str) else one
            if not defence.plain or defence.start_step:
                listed.setdefault(defence.name, Audited(defence, name=defence.name))
            continue
        if not hasattr(one, "reduce") or isinstance(one, type):
            raise ValueError(f"Expected defence={one!r} to be a name such as 'powersgd:4', or a compressor.")
        inner = getattr(one, "inner", one)
        called = getattr(one, "name", type(inner).__name__ + " + EF" * (inner is not one))
        # Two of one type are two, and "none" is the control's alone.
        names = chain([called], (f"{called} ({k})" for k in count(2)))
        name = next(n for n in names if n not in listed)
        listed[name] = Audited(parse_defence("none"), copy.deepcopy(one), name)
    return list(listed.values())


def _hooked(hook: AnyHook, state: Any, network: nn.Module) -> Audited:
    # Its compressor can't be copied with it: what one private batch left there would be in the next.
    if getattr(hook, "__module__", "") == ddp_comm_hook.__module__:
        raise ValueError("Expected hook to be another's: give the compressor of ours among the defences.")
    compressor = copy.deepcopy(HookCompressor(hook, state, network))
    compressor.start_compressing()
    rank = getattr(state, "matrix_approximation_rank", None)
    name = compressor.name if rank is None else f"{compressor.name} rank {rank}"
    return Audited(parse_defence("none"), compressor, name)


def _portfolio(
    base: InversionConfig, victim: Victim, data: Private, threat: Threat, classes: int
) -> tuple[InversionConfig, ...]:
    """Attacks that ignore and that know the compressor, by two distances, in each way through local steps; and those
    for which the threat or the model gives an opening."""
    attacks = [replace(base, objective=o, matching=m) for o in ("naive", "aware") for m in ("cosine", "tensors")]
    if base.matching not in ("cosine", "tensors") or base.method != "optimise":
        attacks = [base, *(replace(a, method="optimise") for a in attacks)]
    if base.through == "steps":
        attacks = [*through_local_steps(attacks, victim.local, len(data.images), threat.labels == "known")]
    shape = (data.images.shape[1], data.images.shape[2], data.images.shape[3])
    further = further_attacks(
        attacks, threat, victim.known, shape, victim.local, victim.task, data.targets, classes or None
    )
    return (*attacks, *further)


def _by_channel(values: Sequence[float] | None, channels: int, name: str) -> torch.Tensor:
    default = 0.0 if name == "mean" else 1.0
    t = torch.full((channels,), default) if values is None else torch.as_tensor(values, dtype=torch.float32)
    # Given in units of bytes they would blank every image, and the attack would seem to fail by itself.
    valid = t.shape == (channels,) and bool(((t >= 0) & (t <= 1)).all()) and (name == "mean" or bool((t > 0).all()))
    if not valid:
        raise ValueError(f"Expected {name}={values} of {channels} numbers, one a channel of images in [0, 1].")
    return t
