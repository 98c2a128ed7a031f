"""From finished results to the rows of the frontier. Reads the store; needs no cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from raytrust.compress import expansion_remark
from raytrust.config import (
    ONE_STEP,
    Defence,
    DenseConfig,
    InversionConfig,
    LocalConfig,
    SweepConfig,
    Threat,
    TopKConfig,
    TrainConfig,
    digest,
    from_dict,
    to_dict,
)
from raytrust.config.register import METHODS
from raytrust.leak.rules import is_understood
from raytrust.leak.transformed import are_understood
from raytrust.metrics.statistics import bootstrap_interval, paired_difference, proportion_interval
from raytrust.metrics.verdict import Evidence, image_evidence
from raytrust.studies.frontier.row import MEASURED, Row
from raytrust.studies.frontier.store import Store

# What a row begins with, for whoever reads the file.
FIRST = (
    "name", "compressor", "rank", "level", "equal_to_rank", "equal_by", "error_feedback", "transforms", "noisy",
    "epsilon", "delta", "understood", "status", "reason", "seeds", "threat", "run", "untrained", "remarks",
)  # fmt: skip
NOT_UNDERSTOOD = "no attack here knows this method, and one that does may see more: register a view of its messages"
# Averaged with a case for None, as each may be unmeasured; SSIM and PSNR always are measured.
_MEANS = (
    "registered_psnr", "mse", "lpips", "st_lpips", "identified_mse", "identified_ssim", "identified_features",
    "mean_image_ssim", "other_image_ssim", "label_accuracy",
)  # fmt: skip


def row(store: Store, sweep: SweepConfig, defence: Defence) -> Row:
    """The frontier's row of a defence, from finished results alone. Verdicts need all rows: see `verdicts`."""
    train = replace(sweep.train, defence=defence)
    training, figures = store.training(train), store.attacks(train, "evaluation")
    reason = store.failure_of_run(train)
    if reason is None and (training is None or not figures):
        failures = [*store.attack_failures(train, "evaluation"), *store.attack_failures(train, "tuning")]
        reason = f"no attack has a result: {failures[0]}" if failures else "not finished"
    return assemble(
        naming(defence, training)
        | {
            "reason": reason,
            "seeds": [sweep.train.seed],
            "run": store.run_id(train),
            "untrained": sweep.train.steps == 0,
        },
        sweep.train.threat,
        training,
        figures,
        store.attacks(train, "tuning"),
        sweep.train.capture.tuning * sweep.train.threat.batch_size,
        sweep.train.local,
    )


def assemble(
    named: Row,
    threat: Threat,
    training: dict[str, Any] | None,
    figures: Sequence[dict[str, Any]],
    tuned: Sequence[dict[str, Any]],
    n_tuning: int,
    local: LocalConfig = ONE_STEP,
) -> Row:
    """The row of a defence from what was measured.

    named: see `naming`, and `reason`, None unless it failed. training: bytes and, where it was measured, accuracy
    (see `jobs.train_and_capture`). figures, tuned: of attacks on the evaluation images and on the n_tuning others.
    local: steps of a worker, of which what was sent is made; several stand in the row's threat, in words.
    """
    by_objective = {o: best(figures, o) for o in ("naive", "aware")}
    # Where all is sent there is nothing to know: the two objectives are one. Behind noise or pruning they are two, and
    # one that failed is not the other.
    clipped_at_most = all(transform.startswith("clip ") for transform in named.get("transforms", []))
    if by_objective["aware"] is None and named["compressor"] == DenseConfig.method and clipped_at_most:
        by_objective["aware"] = by_objective["naive"]
    # Both took what is decoded for the gradient: none of them knows more.
    if named.get("understood") is False:
        by_objective = {"naive": best(figures), "aware": None}
    # By the evaluation images: on the tuning images an attack was chosen, and looks better than it is.
    worst, failed = best(figures), named["reason"] is not None
    base = named | {
        "status": "failed" if failed else "finished",
        "threat": to_dict(threat) | ({"local": local.title} if local.steps > 1 else {}),
        "bytes_per_step": training and _integer(training["bytes_per_step"]),
        "compression_ratio": training and training["dense_bytes"] / training["bytes_per_step"],
        # A finalist is run on the tuning images and on the evaluation images, and is one attack.
        "attacks_tried": len({digest(f["attack"]) for f in [*tuned, *figures]}),
        "n_tuning_images": n_tuning,
    }
    base = {name: base[name] for name in FIRST if name in base} | base
    if failed or training is None or worst is None:
        # None everywhere, never 0: a failure must not pass for a defence that leaks nothing.
        return cast(Row, base | dict.fromkeys(MEASURED))
    ssim = worst["ssim"]
    # The images are few and their SSIM skewed and bounded: the bootstrap stays within the values' range.
    interval = bootstrap_interval(_by_batch(ssim, threat.batch_size))
    measured = {
        **_accuracy(training),
        "leakage_ssim": float(np.mean(ssim)),
        "leakage_interval": interval and list(interval),
        "ssim_std": float(np.std(ssim, ddof=1)) if len(ssim) > 1 else 0.0,
        "psnr": float(np.mean(worst["psnr"])),
        "n_images": len(ssim),
        "naive_ssim": _mean_ssim(by_objective["naive"]),
        "aware_ssim": _mean_ssim(by_objective["aware"]),
        "oracle_ssim": float(np.mean(worst["oracle_ssim"])),
        "attack": worst["attack"],
        **{name: None if worst[name] is None else float(np.mean(worst[name])) for name in _MEANS},
        **_gain(by_objective["naive"], by_objective["aware"], threat.batch_size),
        **_evidence(worst, by_objective["naive"], threat.batch_size),
    }
    return cast(Row, base | measured)


def _accuracy(training: dict[str, Any]) -> Row:
    if "correct" not in training:
        return {}
    correct, n = training["correct"], training["n_test"]
    # Wilson's interval keeps its width at 0 and at 100 %, where the plain one vanishes.
    return {"accuracy": correct / n, "accuracy_interval": list(proportion_interval(correct, n)), "n_test": n}


def _evidence(worst: dict[str, Any], naive: dict[str, Any] | None, batch: int) -> Row:
    """What the verdict rests on, of the strongest attack and of the best one that ignores the compressor."""
    strongest, ignorant = evidence_of(worst, batch), None if naive is None else evidence_of(naive, batch)
    return {
        "floor_ssim": strongest.floor,
        "excess": strongest.excess,
        "excess_interval": strongest.interval and list(strongest.interval),
        "identified": strongest.identified,
        "candidates": strongest.candidates,
        "naive_excess_interval": None if ignorant is None or ignorant.interval is None else list(ignorant.interval),
        "naive_identified": None if ignorant is None else ignorant.identified,
    }


def evidence_of(figures: dict[str, Any], batch: int = 1) -> Evidence:
    """That of the stored figures of one attack on private batches of this many images."""
    names = ("ssim", "mean_image_ssim", "other_image_ssim", "identified_ssim", "candidates")
    ssim, mean_image, other_image, identified, candidates = (figures[name] for name in names)
    return image_evidence(ssim, mean_image, other_image, identified, candidates, batch)


def _by_batch(values: Sequence[float], batch: int) -> NDArray[np.float64]:
    """Means of private batches, which are what is independent."""
    return np.asarray(values, dtype=np.float64).reshape(-1, batch).mean(1)


def _gain(naive: dict[str, Any] | None, aware: dict[str, Any] | None, batch: int) -> Row:
    """How much the best aware attack gains over the best naive one, image by image."""
    # Where both objectives are one attack, a gain of exactly 0 would look like a measured one.
    if naive is None or aware is None or naive is aware:
        return {"aware_gain": None, "aware_gain_interval": None, "aware_gain_p": None}
    # Both met the same images, which differ among each other more than the two attacks do on one of them.
    gain = paired_difference(_by_batch(aware["ssim"], batch), _by_batch(naive["ssim"], batch))
    return {
        "aware_gain": gain.difference,
        "aware_gain_interval": gain.interval and list(gain.interval),
        "aware_gain_p": gain.p_value,
    }


def finalists(store: Store, sweep: SweepConfig, defence: Defence) -> tuple[TrainConfig, list[InversionConfig]]:
    """The attacks to run on the evaluation images, see `best_attacks`. Empty if no attack has a result."""
    train = replace(sweep.train, defence=defence)
    attacks = best_attacks(store.attacks(train, "tuning"))
    # Where the two objectives come to the same attack, as without a compressor, it is run once.
    return train, list(dict.fromkeys(attack.against(defence) for attack in attacks))


def best_attacks(tried: Sequence[dict[str, Any]]) -> list[InversionConfig]:
    """On the tuning images, whose figures these are, the best naive attack and the best aware one.

    An objective that was not tried takes the settings of the best attack.
    """
    winner = best(tried)
    if winner is None:
        return []
    return [
        from_dict(InversionConfig, {**(best(tried, objective) or winner)["attack"], "objective": objective})
        for objective in ("naive", "aware")
    ]


def best(figures: Sequence[dict[str, Any]], objective: str | None = None) -> dict[str, Any] | None:
    """The attack of greatest mean SSIM: leakage is a maximum."""
    eligible = [f for f in figures if objective in (None, f["attack"]["objective"])]
    return max(eligible, key=lambda f: float(np.mean(f["ssim"])), default=None)


def _mean_ssim(figures: dict[str, Any] | None) -> float | None:
    return None if figures is None else float(np.mean(figures["ssim"]))


def naming(defence: Defence, training: dict[str, Any] | None) -> Row:
    """What a defence is called, its method and options, and what is to be said of them."""
    compressor = defence.compressor
    columns: Row = {
        "compressor": compressor.method,
        "rank": getattr(compressor, "rank", None),
        "level": getattr(compressor, "level", None),
        "equal_to_rank": None,
        "equal_by": None,
        "error_feedback": defence.error_feedback,
        "transforms": [transform.name for transform in defence.transforms],
        "noisy": defence.noisy,
        "epsilon": (training or {}).get("epsilon"),
        "delta": (training or {}).get("delta"),
    }
    if isinstance(compressor, TopKConfig) and compressor.level is None:
        columns |= {"equal_to_rank": compressor.equal_to_rank, "equal_by": compressor.equal_by}
        if training is not None:
            # What was sent says which fraction it was: 8 bytes an entry sent, of 4 bytes an entry.
            columns["level"] = training["bytes_per_step"] / 8 / (training["dense_bytes"] / 4)
    remark = training and expansion_remark(defence, training["bytes_per_step"], training["dense_bytes"])
    if columns["epsilon"] is not None:
        spent = f"epsilon {columns['epsilon']:.3g} at delta {columns['delta']:g} for all messages of all workers"
        remark = f"{spent}, {remark}" if remark else spent
    understood = is_understood(METHODS[compressor.method]) and are_understood(defence.transforms)
    remarks = [*([remark] if remark else []), *([] if understood else [NOT_UNDERSTOOD])]
    named: Row = {"name": defence.name_with(columns["level"]), "remarks": remarks, "understood": understood}
    return columns | named


def _integer(value: float) -> float:
    # A mean of equal counts is a count of bytes, and reads better without a decimal point.
    return int(value) if float(value).is_integer() else value


def audited_defences(sweep: SweepConfig, store: Store) -> list[Defence]:
    """Those of the list first, then those that the search chose, in the order in which they were begun."""
    # The list comes first even where the search began earlier, so that reports keep the order that was asked for.
    return list(dict.fromkeys([*sweep.defences, *store.defences(sweep.train)]))


def trained_defences(sweep: SweepConfig, store: Store, defences: Sequence[Defence]) -> list[Defence]:
    configs = ((d, replace(sweep.train, defence=d)) for d in defences)
    return [d for d, train in configs if store.training(train) is not None and store.failure_of_run(train) is None]


def train_of(store: Store, sweep: SweepConfig, finished: Row) -> TrainConfig:
    configs = (replace(sweep.train, defence=d) for d in audited_defences(sweep, store))
    return next(train for train in configs if store.run_id(train) == finished["run"])
