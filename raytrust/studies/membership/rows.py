"""From an audit's finished models to its figures: one row a defence.

Each model is attacked on its own, with the others as its shadows where the attack needs some, and the figures are
averaged over models. Canaries stand apart, in slices; all else is about the other points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytrust.attacks.membership.likelihood import LIRA_ONLINE, RULES, leave_one_out, vulnerability
from raytrust.attacks.membership.scores import AttackModel
from raytrust.attacks.membership.signals import SIGNALS, signals
from raytrust.config import Arm, Defence, DPSGDConfig, MembershipConfig, to_dict
from raytrust.jobs.store import JobStore
from raytrust.metrics import accountant
from raytrust.metrics.membership import AuditReport, pooled_audit
from raytrust.metrics.roc import Roc, auc, roc
from raytrust.metrics.statistics import mean_figure
from raytrust.metrics.thresholds import (
    ORIGINS,
    Origin,
    balanced_accuracy,
    best_thresholds,
    decide,
    null_floor,
    yeom_thresholds,
)
from raytrust.studies.membership.jobs import arm_key, load_shadows, property_models, reason_for_failure, shadow_models
from raytrust.studies.membership.pool import DUPLICATE, MISLABELLED, PLAIN, Pool
from raytrust.studies.membership.row import Curves, MatchedFit, MessageFigure, Property, Row, Rule
from raytrust.studies.membership.shadows import HELD_OUT, MEMBER, OTHER, Shadow, stack
from raytrust.train.dp_sgd import epsilon

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Against held-out points a message may look telling just because the model remembers its training set. Points of other
# batches are remembered as well: what sets a batch apart from them is the message alone.
CONTROLS = {"held-out points": HELD_OUT, "other training points": OTHER}
COLUMNS = {"cosine": 3, "gradient difference": 4, "loss at that step": 5}  # of `Shadow.messages`
# Of DP-SGD's own account: well below one over the number of points, as a guarantee for each of them asks.
DELTA = 1e-5
# Shadow outputs that an attack model is fitted on: its few coefficients need no more, and the shadows have as many as
# models times points.
_ATTACK_MODEL_POINTS = 4000


def row(store: JobStore, config: MembershipConfig, arm: Arm, pool: Pool, test_labels: NDArray[np.int64]) -> Row:
    """The figures of one arm; one that failed or isn't finished has a reason and no figures."""
    base: Row = {"name": arm.name, "arm": to_dict(arm), "run": arm_key(store, config, arm)}
    shadows = load_shadows(store, config, arm)
    reason = reason_for_failure(store, shadow_models(config, arm)) or (None if shadows else "not finished")
    if reason or shadows is None:
        return {**base, "status": "failed", "reason": reason or ""}
    scores = final_scores(shadows, pool, test_labels)
    figures: Row = {
        **base,
        "status": "finished",
        "models": len(shadows),
        "accuracy": mean_figure([float((s.test_logits.argmax(1) == test_labels).mean()) for s in shadows]),
        "train_loss": mean_figure([final_loss(s, pool, i) for i, s in enumerate(shadows)]),
        "bytes_per_step": float(shadows[0].sent_bytes),
        "compression_ratio": float(shadows[0].dense_bytes / shadows[0].sent_bytes),
        "final": {name: _report(config, s, pool, shadows) for name, s in scores.items()},
        "grid": grid(scores, pool),
        "messages": message_figures(shadows),
        "property": property_figures(store, config, arm),
        "curves": curves(scores[LIRA_ONLINE.name], pool, shadows),
    }
    privacy = privacy_of(config, pool, arm)
    return figures if privacy is None else figures | {"privacy": privacy}


def privacy_of(config: MembershipConfig, pool: Pool, arm: Arm) -> dict[str, float] | None:
    """What DP-SGD guarantees of the final model, as its account has it; None of others, and without training."""
    # The fewest points give the highest sampling rate and so the largest epsilon, which holds for every model.
    least = min(len(pool.rows(i, config.copies)) for i in range(config.models))
    if isinstance(arm, DPSGDConfig):
        return {"epsilon": epsilon(config.train, arm, least, DELTA), "delta": DELTA}
    if arm.dp_sgd is None or config.train.steps == 0:
        return None
    rate = config.train.batch_size / least
    return {"epsilon": accountant.epsilon(arm.dp_sgd.noise, rate, config.train.steps, DELTA), "delta": DELTA}


def final_scores(shadows: Sequence[Shadow], pool: Pool, test_labels: NDArray[np.int64]) -> dict[str, Array]:
    """Scores (models, n) of every attack on the final models, by the attack's name."""
    logits, test = stack(shadows)
    # RMIA compares with points that no model was trained on, which the test images are.
    values, population = signals(logits, pool.labels.numpy()), signals(test, test_labels)
    scores = {"attack model": _attack_model(logits, pool)} | {name: values[name] for name in SIGNALS}
    for rule in RULES:
        scores[rule.name] = leave_one_out(values[rule.signal], pool.keep, rule, population[rule.signal])
    return scores


def _attack_model(logits: NDArray[np.float32], pool: Pool) -> Array:
    """Each model's points, scored by an attack model that was fitted on the other models: (models, n)."""
    # A fixed seed, so that a report which is made again from the same models says the same.
    generator = np.random.default_rng(0)
    scores = []
    for i in range(len(logits)):
        # Without the model that is attacked, whose members are what the attacker wants to know.
        others = np.arange(len(logits)) != i
        x, y = logits[others].reshape(-1, logits.shape[-1]), pool.keep[others].ravel()
        some = generator.permutation(len(x))[:_ATTACK_MODEL_POINTS]
        scores.append(AttackModel().fit(x[some], y[some]).score(logits[i]))
    return np.stack(scores)


def grid(scores: dict[str, Array], pool: Pool) -> list[Rule]:
    """Balanced accuracy of signal x one threshold or one a class x the threshold's origin, averaged over models."""
    # Canaries are made to be found, and would raise the figures of the ordinary points.
    plain = pool.kinds == PLAIN
    keep, labels = pool.keep[:, plain], pool.labels.numpy()[plain]
    cells = []
    for name in ("attack model", *SIGNALS):
        s = scores[name][:, plain]
        for per_class in (False, True):
            groups = labels if per_class else np.zeros_like(labels)
            for origin in ORIGINS:
                results = [_cell(s, keep, groups, i, origin) for i in range(len(s))]
                mean = mean_figure([r[0] for r in results])
                floor = float(np.mean([r[1] for r in results]))
                cells.append(Rule(**vars(mean), signal=name, per_class=per_class, origin=origin, floor=floor))
    return cells


def _cell(s: Array, keep: Mask, groups: NDArray[np.int64], model: int, origin: Origin) -> tuple[float, float]:
    """(balanced accuracy, what a useless score reaches) of one model; above one half where it is chosen in-sample."""
    others = np.arange(len(s)) != model
    match origin:
        case "yeom":
            thresholds = yeom_thresholds(s[model], keep[model], groups)
        # Pooled over the attacker's own models, so that nothing of the attacked one enters its threshold.
        case "shadow":
            tiled = np.tile(groups, len(s) - 1)
            thresholds = best_thresholds(s[others].ravel(), keep[others].ravel(), tiled)
        # No attacker has this threshold, but the paper does not say that its own are not of this kind.
        case "in-sample":
            thresholds = best_thresholds(s[model], keep[model], groups)
    accuracy = balanced_accuracy(decide(s[model], thresholds, groups), keep[model])
    members = int(keep[model].sum())
    chosen = len(np.unique(groups))
    return accuracy, null_floor(members, len(groups) - members, chosen) if origin == "in-sample" else 0.5


def _report(config: MembershipConfig, scores: Array, pool: Pool, shadows: Sequence[Shadow]) -> AuditReport:
    """AUC, TPR at low FPR, one-run epsilon on all points, and AUC of slices: canaries, the vulnerable, each class."""
    labels, plain = pool.labels.numpy(), pool.kinds == PLAIN
    # Averages hide the exposed. They are found by the other models, since picking them by the attacked model would pick
    # by the result.
    exposed = vulnerability(signals(stack(shadows)[0], labels)["logit"], pool.keep)[:, plain]
    tenth = exposed >= np.quantile(exposed, 0.9, axis=1, keepdims=True)
    slices: dict[str, Any] = {"most vulnerable tenth": tenth}
    slices |= {f"class {k}": labels[plain] == k for k in range(int(labels.max()) + 1)}
    report = pooled_audit(scores[:, plain], pool.keep[:, plain], slices)
    canaries = {"mislabelled": pool.kinds == MISLABELLED, "duplicated": pool.kinds == DUPLICATE}
    # A bound on epsilon may use any point whose coin was its own: canaries too, which come nearest to the worst case.
    everyone = pooled_audit(scores, pool.keep, canaries, guesses=config.guesses)
    return replace(report, epsilon=everyone.epsilon, slices=everyone.slices | report.slices)


def message_figures(shadows: Sequence[Shadow]) -> list[MessageFigure]:
    """AUC of telling a batch's images by its messages, for each step, control and score.

    The mean over a model's batches is one model's figure.
    """
    steps = sorted({int(s) for shadow in shadows for s in shadow.steps})
    figures = []
    for step, (control, kind), (score, column) in product(steps, CONTROLS.items(), COLUMNS.items()):
        # Batches of one model share its training, so that the model is the unit of the interval.
        mean = mean_figure([area for s in shadows if (area := message_auc(s, step, kind, column)) is not None])
        figures.append(MessageFigure(**vars(mean), step=step, control=control, score=score))
    return figures


def curves(scores: Array, pool: Pool, shadows: Sequence[Shadow]) -> Curves:
    """Mean TPR at each of a range of FPRs: of `scores` over models, of the last step's messages over all of them."""
    plain = pool.kinds == PLAIN
    # On a logarithmic axis: an attacker who is sure of a few members does harm that an average hides.
    fpr = np.geomspace(1e-3, 1, 61)
    final = [roc(s[plain], k[plain]) for s, k in zip(scores, pool.keep, strict=True)]
    least = {"final": float(1 / (~pool.keep[:, plain]).sum(axis=1).min())}
    tables = [t for s in shadows if len(s.steps) for t in _messages(s, int(s.steps[-1]), HELD_OUT)]
    if tables:
        least["messages"] = float(1 / min((t[:, 2] == HELD_OUT).sum() for t in tables))
    messages = [roc(t[:, COLUMNS["gradient difference"]], t[:, 2] == MEMBER) for t in tables]
    return {
        "fpr": fpr.tolist(),
        "final": _mean_tpr(final, fpr),
        "messages": _mean_tpr(messages, fpr) if tables else None,
        "least": least,
    }


def _mean_tpr(drawn: Sequence[Roc], fpr: Array) -> list[float]:
    """The greatest TPR at an FPR of at most each of `fpr`, mean over the curves."""
    # The slack keeps rounding from putting a point of the curve just beyond the rate that it belongs to.
    reached = [curve.tpr[np.searchsorted(curve.fpr, fpr * (1 + 1e-9), side="right") - 1] for curve in drawn]
    return np.asarray(np.mean(reached, axis=0)).tolist()


def message_auc(shadow: Shadow, step: int, control: int, column: int) -> float | None:
    """AUC of a column of `Shadow.messages` for members against one kind of control, mean over the step's batches.

    None if no batch has both: canaries are left out, and a small pool may have no other points.
    """
    # Batch by batch, as the scores against two messages have scales of their own and can't be pooled.
    areas = [auc(table[:, column], table[:, 2] == MEMBER) for table in _messages(shadow, step, control)]
    return float(np.mean(areas)) if areas else None


def _messages(shadow: Shadow, step: int, control: int) -> list[Array]:
    """Of each message of a step its rows: members of its batch, and controls of one kind, if it has both."""
    table = shadow.messages[(shadow.messages[:, 0] == step) & np.isin(shadow.messages[:, 2], (MEMBER, control))]
    batches = [table[table[:, 1] == batch] for batch in np.unique(table[:, 1])]
    return [rows for rows in batches if len(np.unique(rows[:, 2])) == 2]


def matched_fit(uncompressed: Sequence[Shadow], shadows: Sequence[Shadow], pool: Pool) -> MatchedFit:
    """Uncompressed SGD stopped where it fits its training points as well as the final model of a defence does.

    The same model index means the same points and seed. Of the captured steps and the end, the one with the nearest
    mean loss over members is taken, model by model. AUCs: of the negative loss, on plain points; and of gradient
    difference against held-out points, at the last captured step up to there.
    """
    plain = pool.kinds == PLAIN
    losses, areas, messages, steps = [], [], [], []
    for i, (plainly_trained, defended) in enumerate(zip(uncompressed, shadows, strict=True)):
        # Compression also slows the fit, which lowers membership by itself: a comparison at equal fit leaves what is
        # the compressor's own.
        points = np.vstack([plainly_trained.step_losses, -signals(plainly_trained.logits, pool.labels)["loss"]])
        fits = points[:, pool.keep[i]].mean(axis=1)
        best = int(np.abs(fits - final_loss(defended, pool, i)).argmin())
        # At the end of training no message is captured, so that the last one before stands for it.
        captured = plainly_trained.steps[min(best, len(plainly_trained.steps) - 1)]
        steps.append(int(captured) if best < len(plainly_trained.steps) else len(plainly_trained.losses))
        losses.append(float(fits[best]))
        areas.append(auc(-points[best, plain], pool.keep[i, plain]))
        messages.append(message_auc(plainly_trained, int(captured), HELD_OUT, COLUMNS["gradient difference"]))
    return {
        "steps": sorted(steps),
        "train_loss": mean_figure(losses),
        "loss_auc": mean_figure(areas),
        "message_auc": mean_figure([area for area in messages if area is not None]),
    }


def property_figures(store: JobStore, config: MembershipConfig, arm: Arm) -> Property | None:
    """AUC of property inference by attacker; the reason if a model of it failed; None where it was not measured."""
    if not isinstance(arm, Defence) or config.property_models == 0:
        return None
    if (reason := reason_for_failure(store, property_models(config, arm))) is not None:
        return {"reason": reason}
    finished = [store.arrays(model) for model in property_models(config, arm) if store.finished(model)]
    if not finished:
        return {"reason": "not finished"}
    # An AUC needs batches with and without the property.
    told = [m for m in finished if m["holds"].any() and not m["holds"].all()]
    aware, naive = (mean_figure([auc(m[name], m["holds"]) for m in told]) for name in ("aware", "naive"))
    return {"aware": aware, "naive": naive, "label": int(finished[0]["label"])}


def final_loss(shadow: Shadow, pool: Pool, model: int) -> float:
    """Mean loss of the final model over the points that it was trained on, in nats."""
    return float(-signals(shadow.logits, pool.labels)["loss"][pool.keep[model]].mean())
