"""The audit of a model in memory: capture what each defence would send, attack all of it, and judge.

It is the frontier's question, asked of a model that somebody else trains: with the same attacks, floors and rows, but
without a cluster, and without accuracy, as nothing is tested.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from raytrust.attacks.inversion.stacks import LARGEST
from raytrust.compress import Compressor, HookCompressor, Transformed
from raytrust.config import ONE_STEP, Defence, InversionConfig, LocalConfig, Threat
from raytrust.config.attacks import against_each, through_noise
from raytrust.config.register import METHODS
from raytrust.leak.observation import Capture
from raytrust.leak.rules import is_understood
from raytrust.leak.transformed import are_understood
from raytrust.networks.device import exact
from raytrust.studies.audit.private import Private
from raytrust.studies.audit.training import Training
from raytrust.studies.audit.victim import State, Victim, compressor_of
from raytrust.studies.evaluate import InversionFailure, InversionResult, evaluate_together
from raytrust.studies.frontier.jobs import Split, figures_of
from raytrust.studies.frontier.row import Row
from raytrust.studies.frontier.rows import NOT_UNDERSTOOD, assemble, best, best_attacks, naming
from raytrust.studies.frontier.verdicts import judge_rows

# Defences whose untrained models are attacked as one batch: small networks pay for calls.
TOGETHER = 4


@dataclass(eq=False)
class Audited:
    """One defence of an audit. method: a compressor that no `Defence` describes, under its own name."""

    defence: Defence
    method: Compressor | None = None
    name: str = ""
    captures: dict[int, list[Capture]] = field(default_factory=dict)  # by step
    sent_bytes: list[int] = field(default_factory=list)
    tuned: list[InversionResult] = field(default_factory=list)
    reported: list[InversionResult] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def understood(self) -> bool:
        """Whether attacks know what its messages reveal."""
        if isinstance(self.method, HookCompressor):
            return self.method.torch_hook is not None
        if self.method is not None:
            return is_understood(type(self.method))
        return is_understood(METHODS[self.defence.compressor.method]) and are_understood(self.defence.transforms)

    def figures(self, split: Split) -> list[dict[str, Any]]:
        return [figures_of(r, split) for r in (self.tuned if split == "tuning" else self.reported)]


@dataclass(frozen=True, eq=False)
class Audit:
    """How an audit is made.

    attacks: what every defence meets; further: besides, with settings that were drawn. tuning, evaluation: private
    batches that choose attacks, and that report them.
    classes: of the model, 0 where its loss is not of classes (`Victim.check`). auxiliary: images that the attacker has.
    local: the steps that the owner makes before it sends.
    """

    threat: Threat
    attacks: tuple[InversionConfig, ...]
    further: tuple[InversionConfig, ...]
    tuning: int
    evaluation: int
    seed: int
    device: str
    classes: int
    auxiliary: Tensor | None = None
    local: LocalConfig = ONE_STEP

    def run(
        self,
        victim: Victim,
        data: Private,
        references: Tensor | None,
        defences: Sequence[Audited],
        training: Training | None,
        say: Callable[[str], None],
    ) -> list[Row]:
        """The judged rows, a defence each; what was captured and reached is kept in `defences`."""
        state = State.of(victim.network)
        with exact(self.device):
            for audited in defences:
                self._capture(audited, victim, data, state, training)
            for split in ("tuning", "evaluation"):
                for step in sorted({step for audited in defences for step in audited.captures}):
                    self._attack(split, step, defences, references, say)
        dense = 4 * sum(w.numel() for w in state.weights.values())
        return judge_rows([self._row(audited, dense) for audited in defences])

    def _capture(
        self, audited: Audited, victim: Victim, data: Private, start: State, training: Training | None
    ) -> None:
        first = copy.deepcopy(audited.method)
        if isinstance(first, Transformed):
            first.seed = 0  # of private draws, which an attacker must not have
        compressor = audited.method or compressor_of(audited.defence, start, self.seed)
        networks = [(0, victim.network)] if training is None else training.networks(victim, compressor)
        try:
            for step, network in networks:
                # The untrained models of all defences are one, which is then attacked once for all.
                state = start if step == 0 else State.of(network)
                captured = victim.captures(
                    network, compressor, audited.defence, first, self.threat, data, self.classes, state, step,
                    self.auxiliary,
                )  # fmt: skip
                audited.captures[step] = captured
                audited.sent_bytes += [sum(m.sent_bytes for m in c.seen.messages) for c in captured]
        # A defence under which training diverges has no result, not even from the steps before.
        except FloatingPointError as error:
            audited.captures.clear()
            audited.reasons.append(str(error))

    def _attack(
        self,
        split: Split,
        step: int,
        defences: Sequence[Audited],
        references: Tensor | None,
        say: Callable[[str], None],
    ) -> None:
        """All defences on the images of this split, those of equal models together."""
        part = slice(0, self.tuning) if split == "tuning" else slice(self.tuning, None)
        asked = []
        for audited in defences:
            attacks = self._portfolio(audited, step, defences) if split == "tuning" else self._finalists(audited, step)
            if attacks and step in audited.captures:
                asked.append((audited, audited.captures[step][part], attacks))
        entries = sum(w.numel() for w in asked[0][1][0].seen.weights.values()) if asked else 0
        size = TOGETHER if step == 0 and entries <= LARGEST else 1
        for start in range(0, len(asked), size):
            group = asked[start : start + size]
            requests = [(captures, attacks) for _, captures, attacks in group]
            outcomes = evaluate_together(requests, self.device, references)
            for (audited, _, attacks), results in zip(group, outcomes, strict=True):
                self._keep(audited, split, results)
                reached = [r for r in results if isinstance(r, InversionResult)]
                top = max((float(np.mean(r.ssim)) for r in reached), default=float("nan"))
                at = f" at step {step}" if step else ""
                tried = "1 attack" if len(attacks) == 1 else f"{len(attacks)} attacks"
                say(f"{split}: {audited.name}{at}: {tried}, strongest SSIM {top:.2f}")

    @staticmethod
    def _keep(audited: Audited, split: Split, results: Sequence[InversionResult | InversionFailure]) -> None:
        for result in results:
            if isinstance(result, InversionFailure):
                audited.reasons.append(f"{result.attack.name} ({split}): {result.error}")
            else:
                (audited.tuned if split == "tuning" else audited.reported).append(result)

    def _portfolio(self, audited: Audited, step: int, defences: Sequence[Audited]) -> list[InversionConfig]:
        attacks = [replace(a, capture_step=step) for a in (*self.attacks, *self.further)]
        compared = [other.defence for other in defences]
        if audited.method is None:
            attacks = against_each(attacks, audited.defence, compared)
        elif any(defence.noisy for defence in compared):
            attacks += through_noise(attacks, ("naive", "aware"))
        return list(dict.fromkeys(_against(audited, a) for a in attacks))

    def _finalists(self, audited: Audited, step: int) -> list[InversionConfig]:
        attacks = [_against(audited, a) for a in best_attacks(audited.figures("tuning"))]
        return list(dict.fromkeys(a for a in attacks if a.capture_step == step))

    def _row(self, audited: Audited, dense: int) -> Row:
        measured = None
        if audited.sent_bytes:
            measured = {"bytes_per_step": float(np.mean(audited.sent_bytes)), "dense_bytes": dense}
        figures = audited.figures("evaluation")
        reason = None if figures else "; ".join(dict.fromkeys(audited.reasons)) or "no attack has a result"
        named: Row = naming(audited.defence, measured)
        if audited.method is not None:
            remarks = [] if audited.understood else [NOT_UNDERSTOOD]
            named |= {"name": audited.name, "compressor": audited.name, "remarks": remarks}
            named["understood"] = audited.understood
        if figures and audited.reasons:
            # What failed is no evidence, and must not go unsaid beside what worked.
            failed = f"{len(audited.reasons)} of the attacks failed: {audited.reasons[0]}"
            named["remarks"] = [*named["remarks"], failed.rstrip(".")]
        return assemble(
            named | {"reason": reason, "seeds": [self.seed], "run": audited.name},
            self.threat, measured, figures, audited.figures("tuning"), self.tuning * self.threat.batch_size, self.local,
        )  # fmt: skip


def _against(audited: Audited, attack: InversionConfig) -> InversionConfig:
    attack = attack if audited.method is not None else attack.against(audited.defence)
    return attack if audited.understood else replace(attack, objective="naive")


def drawn_attacks(count: int, base: InversionConfig, seed: int) -> tuple[InversionConfig, ...]:
    """Further settings of an attack, drawn from where the sweep searches (Bergstra & Bengio 2012)."""
    draw = np.random.default_rng(seed)
    chosen: Callable[[Sequence[str]], Any] = lambda values: str(draw.choice(values))  # noqa: E731
    return tuple(
        replace(
            base,
            objective=chosen(["naive", "aware"]),
            matching=chosen(["cosine", "tensors"]),
            tv=float(10 ** draw.uniform(-3, -1)),
            step_size=float(np.exp(draw.uniform(np.log(0.3), np.log(4.0)))),
            signed=chosen(["none", "hard", "soft"]),
            schedule=chosen(["steps", "cosine"]),
        )
        for _ in range(count)
    )


def strongest(audited: Audited, objective: str | None = None) -> InversionResult | None:
    """Of the attacks that are reported, on this defence."""
    chosen = best(audited.figures("evaluation"), objective)
    if chosen is None:
        return None
    return next(r for r, f in zip(audited.reported, audited.figures("evaluation"), strict=True) if f == chosen)
