"""From an audit's rows to tables of text: for the terminal, and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raytrust.metrics.statistics import Figure
from raytrust.metrics.verdict import Evidence, control_of
from raytrust.reports.text import Lines, capital, human_bytes, text_table
from raytrust.studies.membership.paper_cells import nearest_cells
from raytrust.studies.membership.row import Row, finished, messages_of

LIRA = "LiRA online"
_SCORES = ("gradient difference", "cosine", "loss at that step")
_CONTROLS = ("held-out points", "other training points")


def membership_table(rows: Sequence[Row], left_out: Mapping[str, str] | None = None) -> str:
    """The main figures as plain text: AUC on final models and on messages side by side, with 95 % intervals, and
    whether the attacks work without compression.

    left_out: why a section has no figures, by its name, as in "property inference".
    """
    parts = [text_table(table) for table in (side_by_side_table(rows), attack_table(rows), message_table(rows))]
    parts += ["\n".join(control_lines(rows))]
    parts += [f"Without {name}. {reason}" for name, reason in (left_out or {}).items()]
    return "\n\n".join(parts + [f"{r['name']} failed: {r['reason']}" for r in rows if r["status"] == "failed"])


def control_lines(rows: Sequence[Row]) -> list[str]:
    """A line for the final models and one for the messages: whether the attack beats chance without compression.

    Where it doesn't, with its 95 % interval over models, nothing that it says of a defence may be called protective.
    """
    # Noise that is sent whole has no compressor, either.
    defences = (
        (row, row["arm"]) for row in finished(rows) if "privacy" not in row and not row["arm"].get("transforms")
    )
    plain = next((row for row, arm in defences if (arm.get("compressor") or {}).get("method") == "none"), None)
    if plain is None:
        return ["No control: uncompressed training was not audited. Nothing here may be called protective."]
    lines = [_control_line(f"final models ({LIRA})", plain["final"][LIRA].auc)]
    return lines + [_control_line(f"messages ({m.score}, step {m.step})", m) for m in messages_of(plain)[-1:]]


def _control_line(where: str, auc: Figure) -> str:
    # Of the excess over chance, as for images over their floor: one rule judges both.
    interval = None if auc.low is None or auc.high is None else (auc.low - 0.5, auc.high - 0.5)
    control = control_of(None if auc.value is None else Evidence(auc.value, 0.5, interval, auc.n or 0, measure="AUC"))
    if control.works:
        return f"Control, {where}: the attack works {control.reason}."
    return (
        f"The attack on {where} fails here: nothing that it says of a defence may be called protective; give it more "
        f"models or longer training. {capital(control.reason)}."
    )


def side_by_side(row: Row) -> dict[str, Figure]:
    """The four figures of a finished row that stand beside each other; those of messages only where there are any."""
    figures = {"final model, loss": row["final"]["loss"].auc, f"final model, {LIRA}": row["final"][LIRA].auc}
    messages = messages_of(row)
    for message in dict.fromkeys(messages[:1] + messages[-1:]):
        figures[f"messages, {'untrained model' if message.step == 0 else 'last captured step'}"] = message
    return figures


def side_by_side_table(rows: Sequence[Row]) -> Lines:
    """One line a defence: what it costs, and what the final model and the last captured messages give away."""
    lines = [["defence", "bytes/step", "accuracy %", "training loss", "final: loss", f"final: {LIRA}"]]
    lines[0] += ["messages: step 0", "messages: last", "SGD of equal fit: final loss", "its messages"]
    for row in finished(rows):
        messages, fit = messages_of(row), row.get("matched")
        figures = [row["train_loss"], row["final"]["loss"].auc, row["final"][LIRA].auc]
        figures += [messages[0], messages[-1]] if messages else [Figure(None)] * 2
        figures += [fit["loss_auc"], fit["message_auc"]] if fit else [Figure(None)] * 2
        # Without messages it is DP-SGD, which was trained by itself and sent nothing.
        size = human_bytes(row["bytes_per_step"]) if messages else "-"
        lines.append([row["name"], size, f"{row['accuracy']:.1%}", *map(str, figures)])
    return lines


def attack_table(rows: Sequence[Row]) -> Lines:
    """One line a defence and attack on final models."""
    lines = [["defence", "attack", "AUC", "TPR % at 1 % FPR", "at 0.1 %", "epsilon >=", "vulnerable tenth"]]
    lines[0] += ["mislabelled", "duplicated"]
    for row in finished(rows):
        for name, report in row["final"].items():
            rates = ["not resolvable" if tpr.value is None else f"{tpr:.1%}" for tpr in report.tpr.values()]
            slices = [report.slices[part] for part in ("most vulnerable tenth", "mislabelled", "duplicated")]
            lines.append([row["name"], name, str(report.auc), *rates, str(report.epsilon), *map(str, slices)])
    return lines


def message_table(rows: Sequence[Row]) -> Lines:
    """One line a defence and captured step: AUC of each score against each control."""
    kinds = [(control, score) for control in _CONTROLS for score in _SCORES]
    lines = [["defence", "step", *(f"{score} | {control.split()[0]}" for control, score in kinds)]]
    for row in finished(rows):
        # Each kind has the same steps in the same order, or the lines would mix them.
        steps = zip(*(messages_of(row, *kind) for kind in kinds), strict=True)
        lines += [[row["name"], str(figures[0].step), *map(str, figures)] for figures in steps]
    return lines


def reference_table(rows: Sequence[Row]) -> Lines:
    """Beside each compressor, the DP-SGD whose accuracy is nearest, and the epsilon that its own account claims."""
    references = [row for row in finished(rows) if "privacy" in row]
    lines = [["defence", "accuracy %", f"final: {LIRA}", "DP-SGD", "accuracy %", f"final: {LIRA}"]]
    lines[0] += ["mislabelled", "DP-SGD, mislabelled", "accounted epsilon"]
    for row in finished(rows) if references else ():
        if "privacy" in row:
            continue
        nearest = min(references, key=lambda r: abs((r["accuracy"].value or 0) - (row["accuracy"].value or 0)))
        cells = [
            cell for r in (row, nearest) for cell in (r["name"], f"{r['accuracy']:.1%}", str(r["final"][LIRA].auc))
        ]
        cells += [str(r["final"][LIRA].slices["mislabelled"]) for r in (row, nearest)]
        privacy = nearest["privacy"]
        lines.append([*cells, f"{privacy['epsilon']:.3g} at delta {privacy['delta']:g}"])
    return lines if len(lines) > 1 else []


def class_table(rows: Sequence[Row], attack: str = LIRA, most: int = 20) -> Lines:
    """AUC by class, one line a defence; left out where there are more than `most` classes."""
    done = finished(rows)
    classes = [name for name in done[0]["final"][attack].slices if name.startswith("class ")] if done else []
    if not 0 < len(classes) <= most:
        return []
    return [
        ["defence", *classes],
        *([r["name"], *(str(r["final"][attack].slices[name]) for name in classes)] for r in done),
    ]


def property_table(rows: Sequence[Row]) -> Lines:
    """One line a defence; empty where it was not measured."""
    lines = [["defence", "class", "attacker compresses its own batches", "attacker ignores the compressor"]]
    for row in finished(rows):
        if (measured := row["property"]) is None:
            continue
        if "reason" in measured:
            lines.append([row["name"], "-", f"failed: {measured['reason']}", "-"])
        else:
            name = measured.get("class", str(measured["label"]))
            lines.append([row["name"], name, str(measured["aware"]), str(measured["naive"])])
    return lines if len(lines) > 1 else []


def grid_table(rows: Sequence[Row]) -> Lines:
    """Balanced accuracy in per cent of every rule, one column a defence; the floor beside what is in-sample."""
    done = finished(rows)
    lines = [["signal", "thresholds", "origin", *(row["name"] for row in done), "floor"]]
    for rules in zip(*(row["grid"] for row in done), strict=True):
        signal, per_class, origin = rules[0].key
        floor = f"{100 * rules[0].floor:.1f}" if origin == "in-sample" else ""
        lines.append([signal, "per class" if per_class else "global", origin, *(f"{r:.1%}" for r in rules), floor])
    return lines


def paper_table(rows: Sequence[Row]) -> Lines:
    """The paper's figures beside the nearest rule's, per cent, ours less the shift that all rules share."""
    nearest = nearest_cells(rows)
    if not nearest:
        return []
    names = list(nearest[0].ours)
    lines = [["the paper's attack", "nearest cell", "mean distance", *names]]
    for rule in nearest:
        where = f"{rule.signal}, {'per class' if rule.per_class else 'global'}, {rule.origin}"
        pairs = [f"{rule.paper[name]:.1f} / {rule.ours[name] - rule.shift:.1f}" for name in names]
        lines.append([rule.attack, where, f"{rule.distance:.2f}", *pairs])
    return lines
