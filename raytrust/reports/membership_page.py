"""From an audit's rows to text: the table for the terminal, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytrust.reports.frontier_table import human_bytes
from raytrust.reports.membership_control import control_lines
from raytrust.reports.membership_figures import message_figure
from raytrust.studies.membership.paper_cells import ATTACKS, floors, nearest_cells
from raytrust.studies.published import TABLE_2

Row = dict[str, Any]
Table = list[list[str]]

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.7rem 0 1.6rem;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}
th{border-bottom:2px solid #999}
img{max-width:100%}.wide{overflow-x:auto}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}p{max-width:60rem}"""


def membership_table(rows: Sequence[Row], left_out: Mapping[str, str] | None = None) -> str:
    """The main figures as plain text: AUC on final models and on messages side by side, with 95 % intervals, and
    whether the attacks work without compression.

    left_out: why a section has no figures, by its name, as in "property inference".
    """
    parts = [_text(table) for table in (side_by_side_table(rows), attack_table(rows), message_table(rows))]
    parts += ["\n".join(control_lines(rows))]
    parts += [f"Without {name}. {reason}" for name, reason in (left_out or {}).items()]
    return "\n\n".join(parts + [f"{r['name']} failed: {r['reason']}" for r in rows if r["status"] == "failed"])


def side_by_side_table(rows: Sequence[Row]) -> Table:
    """One line a defence: what it costs, and what the final model and the last captured messages give away."""
    found = [["defence", "bytes/step", "accuracy %", "training loss", "final: loss", "final: LiRA online"]]
    found[0] += ["messages: step 0", "messages: last", "SGD of equal fit: final loss", "its messages"]
    for row in _finished(rows):
        steps = sorted({m["step"] for m in row["messages"]})
        messages = (
            [
                _number(message_figure(row, step, "held-out points", "gradient difference")) if steps else "-"
                for step in (steps[0], steps[-1])
            ]
            if steps
            else ["-", "-"]
        )
        matched = row.get("matched")
        found.append(
            [
                row["name"],
                human_bytes(row["bytes_per_step"]) if steps else "-",
                _percent(row["accuracy"]),
                _number(row["train_loss"]),
                _number(row["final"]["loss"]["auc"]),
                _number(row["final"]["LiRA online"]["auc"]),
                *messages,
                _number(matched["loss_auc"]) if matched else "-",
                _number(matched["message_auc"]) if matched else "-",
            ]
        )
    return found


def attack_table(rows: Sequence[Row]) -> Table:
    """One line a defence and attack on final models."""
    found = [["defence", "attack", "AUC", "TPR % at 1 % FPR", "at 0.1 %", "epsilon >=", "vulnerable tenth"]]
    found[0] += ["mislabelled", "duplicated"]
    for row in _finished(rows):
        for name, report in row["final"].items():
            slices = report["slices"]
            found.append(
                [
                    row["name"],
                    name,
                    _number(report["auc"]),
                    _resolved(report["tpr"]["0.01"]),
                    _resolved(report["tpr"]["0.001"]),
                    _number(report["epsilon"]),
                    *(_number(slices[s]) for s in ("most vulnerable tenth", "mislabelled", "duplicated")),
                ]
            )
    return found


def message_table(rows: Sequence[Row]) -> Table:
    """One line a defence and captured step: AUC of each score against each control; and property inference."""
    scores = [
        ("held-out points", "gradient difference"),
        ("held-out points", "cosine"),
        ("held-out points", "loss at that step"),
        ("other training points", "gradient difference"),
        ("other training points", "cosine"),
        ("other training points", "loss at that step"),
    ]
    found = [["defence", "step", *(f"{score} | {control.split()[0]}" for control, score in scores)]]
    for row in _finished(rows):
        for step in sorted({m["step"] for m in row["messages"]}):
            cells = [_number(message_figure(row, step, control, score)) for control, score in scores]
            found.append([row["name"], str(step), *cells])
    return found


def reference_table(rows: Sequence[Row]) -> Table:
    """Beside each compressor, the DP-SGD whose accuracy is nearest, and the epsilon that its own account claims."""
    references = [r for r in _finished(rows) if "privacy" in r]
    found = [["defence", "accuracy %", "final: LiRA online", "DP-SGD", "accuracy %", "final: LiRA online"]]
    found[0] += ["mislabelled", "DP-SGD, mislabelled", "accounted epsilon"]
    for row in _finished(rows):
        if not references or "privacy" in row:
            continue
        nearest = min(references, key=lambda r: abs(r["accuracy"]["value"] - row["accuracy"]["value"]))
        pair = [(_percent(r["accuracy"]), r["final"]["LiRA online"]) for r in (row, nearest)]
        found.append(
            [
                row["name"],
                pair[0][0],
                _number(pair[0][1]["auc"]),
                nearest["name"],
                pair[1][0],
                _number(pair[1][1]["auc"]),
                *(_number(report["slices"]["mislabelled"]) for _, report in pair),
                f"{nearest['privacy']['epsilon']:.3g} at delta {nearest['privacy']['delta']:g}",
            ]
        )
    return found if len(found) > 1 else []


def class_table(rows: Sequence[Row], attack: str = "LiRA online", most: int = 20) -> Table:
    """AUC by class, one line a defence; left out where there are more than `most` classes."""
    finished = _finished(rows)
    classes = [name for name in finished[0]["final"][attack]["slices"] if name.startswith("class ")] if finished else []
    if not 0 < len(classes) <= most:
        return []
    lines = [[r["name"], *(_number(r["final"][attack]["slices"][c]) for c in classes)] for r in finished]
    return [["defence", *classes], *lines]


def property_table(rows: Sequence[Row]) -> Table:
    """One line a defence; empty where it was not measured."""
    measured = [r for r in _finished(rows) if r["property"] is not None]
    if not measured:
        return []
    found = [["defence", "class", "attacker compresses its own batches", "attacker ignores the compressor"]]
    for r in measured:
        figures = r["property"]
        if "reason" in figures:
            found.append([r["name"], "-", f"failed: {figures['reason']}", "-"])
        else:
            found.append(
                [
                    r["name"],
                    figures.get("class", str(figures["label"])),
                    _number(figures["aware"]),
                    _number(figures["naive"]),
                ]
            )
    return found


def grid_table(rows: Sequence[Row]) -> Table:
    """Balanced accuracy in per cent of every cell, one column a defence; the floor beside what is in-sample."""
    finished = list(_finished(rows))
    found = [["signal", "thresholds", "origin", *(r["name"] for r in finished), "floor"]]
    for cells in zip(*(r["grid"] for r in finished), strict=True):
        first = cells[0]
        floor = f"{100 * first['floor']:.1f}" if first["origin"] == "in-sample" else ""
        kind = "per class" if first["per_class"] else "global"
        found.append([first["signal"], kind, first["origin"], *(_percent(c) for c in cells), floor])
    return found


def paper_table(rows: Sequence[Row]) -> Table:
    """The paper's figures beside the nearest cell's, per cent, ours less the shift that all cells share."""
    nearest = nearest_cells(list(rows))
    if not nearest:
        return []
    names = list(nearest[0]["ours"])
    found = [["the paper's attack", "nearest cell", "mean distance", *names]]
    for cell in nearest:
        kind = "per class" if cell["per_class"] else "global"
        where = f"{cell['signal']}, {kind}, {cell['origin']}"
        pairs = [f"{cell['paper'][n]:.1f} / {cell['ours'][n] - cell['shift']:.1f}" for n in names]
        found.append([cell["attack"], where, f"{cell['distance']:.2f}", *pairs])
    return found


def membership_page(
    rows: Sequence[Row], setting: str, figures: Sequence[Path], left_out: Mapping[str, str] | None = None
) -> str:
    """The whole audit on one page. setting: in words. figures: PNG files, which the page takes in. left_out: see
    `membership_table`."""
    images = [base64.b64encode(path.read_bytes()).decode() for path in figures]
    drawn = [
        f'<img alt="{path.stem}" src="data:image/png;base64,{i}">' for path, i in zip(figures, images, strict=True)
    ]
    nearest = nearest_cells(list(rows))
    paper = [v for figures_ in TABLE_2["cifar10"].values() for v in figures_]
    floor = floors()
    notes = (
        f"The paper's CIFAR-10 figures lie between {min(paper):.1f} and {max(paper):.1f} %. A score that knows nothing "
        f"reaches {floor[1]:.1f} % with one threshold chosen in-sample and {floor[10]:.1f} % with ten, at 10,000 "
        "members and as many others; the paper does not say how its thresholds were chosen, nor on how many points."
    )
    shift = f" Ours are shown less {nearest[0]['shift']:.1f} points, the mean difference." if nearest else ""
    failed = "".join(f"<p><b>{_escape(r['name'])}</b> failed: {_escape(r['reason'])}</p>" for r in _failed(rows))
    sections = [
        ("Messages and final models side by side", side_by_side_table(rows), "AUC of gradient difference against "
         "held-out points, and of the final models. Equal fit: uncompressed SGD stopped at the training loss that the "
         "defence ends with."),
        ("Attacks on final models", attack_table(rows), "Epsilon: mean over models of the bound that one run refutes, "
         "all points, the number of guesses fixed beforehand. Not resolvable: fewer than 10 / FPR non-members."),
        ("DP-SGD of the nearest accuracy", reference_table(rows), "AUC on final models, all plain points and "
         "mislabelled ones. The account is DP-SGD's own, an upper bound."),
        ("By class: LiRA online on final models", class_table(rows), "AUC."),
        ("Attacks on messages", message_table(rows), "AUC by step. Against other training points, which the model has "
         "seen as often, only the message can tell; the loss at that step is what the model alone says."),
        ("Property inference from messages", property_table(rows), "Does a batch hold an image of this class, in a "
         "model that is trained for something else? AUC."),
        (f"The paper's grid: balanced accuracy, {', '.join(ATTACKS)}", grid_table(rows), "Floor: what a score that "
         "knows nothing is expected to reach with thresholds chosen on the very points that are judged."),
        ("Nearest to the paper's Table 2 (paper / ours)", paper_table(rows), notes + shift),
    ]  # fmt: skip
    for name, reason in (left_out or {}).items():
        sections.append((name.capitalize(), [], f"Left out. {reason}"))
    control = "".join(f"<p><b>{_escape(line)}</b></p>" for line in control_lines(rows))
    body = "".join(
        f"<h2>{_escape(t)}</h2><p>{_escape(note)}</p>{_html(table) if table else ''}"
        for t, table, note in sections
        if table or note.startswith("Left out.")
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Membership audit</title><style>{_STYLE}</style>"
        f"<h1>Membership audit</h1><p>{_escape(setting)}</p>{control}{failed}{''.join(drawn)}{body}</html>\n"
    )


def _finished(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r["status"] == "finished"]


def _failed(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r["status"] == "failed"]


def _number(found: Row, scale: float = 1.0, digits: int = 2) -> str:
    """0.65 [0.63, 0.67]; without its interval where there is none; - where there is no figure."""
    if found["value"] is None:
        return "-"
    text = f"{scale * found['value']:.{digits}f}"
    if found["low"] is None:
        return text
    return f"{text} [{scale * found['low']:.{digits}f}, {scale * found['high']:.{digits}f}]"


def _percent(found: Row) -> str:
    return _number(found, 100, 1)


def _resolved(found: Row) -> str:
    return "not resolvable" if found["value"] is None else _percent(found)


def _text(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _html(table: Table) -> str:
    head = "".join(f"<th>{_escape(c)}</th>" for c in table[0])
    lines = "".join("<tr>" + "".join(f"<td>{_escape(c)}</td>" for c in line) + "</tr>" for line in table[1:])
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'


def _escape(text: str) -> str:
    return html.escape(str(text))
