"""The notebooks run from their first cell to the last."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2] / "examples" / "notebooks"


def executed(name: str, folder: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(ROOT / name, as_version=4)  # type: ignore[no-untyped-call]
    # Away from the repository: what a reader downloads is a single file.
    return NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each cell that prints prints."""
    outputs = ("".join(o.get("text", "") for o in cell.get("outputs", ())) for cell in notebook.cells)
    return [text for text in outputs if text]


@pytest.mark.slow
def test_a_gradient_is_inverted(tmp_path: Path) -> None:
    notebook = executed("invert_a_gradient.ipynb", tmp_path)
    whole, compressed = (
        int(line.split(": ")[1].split()[0].replace(",", "")) for line in printed(notebook)[0].splitlines()
    )
    assert compressed < whole / 2
    assert any("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", ()))


@pytest.mark.slow
def test_a_model_is_audited(tmp_path: Path) -> None:
    table, verdicts = printed(executed("audit_your_model.ipynb", tmp_path))
    assert all(name in table for name in ("none", "PowerSGD rank 1 + EF", "noise 0.01", "Soteria"))
    assert "works without a defence: True" in verdicts


@pytest.mark.slow
def test_a_compressor_is_written(tmp_path: Path) -> None:
    before, after = printed(executed("write_a_compressor.ipynb", tmp_path))
    assert "grid" in before.lower()
    assert before != after


def test_notebooks_are_kept_without_outputs() -> None:
    for path in ROOT.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
        assert all(
            not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code"
        )
