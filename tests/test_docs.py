"""What the README and docs/ say of the code is there, and what is in the code has its line in docs/."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrust.__main__ import COMMANDS
from raytrust.config import parse_defence
from raytrust.config.method import CompressorConfig, TransformConfig
from raytrust.studies.frontier import row as frontier
from raytrust.studies.membership import row as membership
from raytrust.studies.paper.rows import TABLE_1_COLUMNS, TABLE_2_COLUMNS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_one_page() -> None:
    lines = README.splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 140] == []


def prose(page: Path) -> list[str]:
    """The lines of a page that are neither of a table, nor of code, nor a picture."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [line for line in text.splitlines() if not re.match(r"\s*(\||!\[)", line)]


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", *(str(p.relative_to(ROOT)) for p in DOCS.rglob("*.md"))])
def test_prose_has_lines_that_a_diff_can_show(page: str) -> None:
    # Findings are as they were written on their day, and only the longest of their lines were broken.
    most = 180 if page == "docs/findings.md" else 140
    assert [line for line in prose(ROOT / page) if len(line) > most] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    links += re.findall(r'src="([^"]+)"', README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_shows_code_that_is_run() -> None:
    """By the tests of these pages."""
    pages = (DOCS / "audit.md").read_text(encoding="utf-8") + (DOCS / "hooks.md").read_text(encoding="utf-8")
    shown = "".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)).splitlines()
    assert len([line for line in shown if line]) == 6
    assert [line for line in shown if line not in pages.splitlines()] == []


def test_every_page_is_in_the_navigation() -> None:
    site = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry if isinstance(entry, list) else entry.values():
                yield from pages(inner)

    listed = list(pages(yaml.safe_load(site)["nav"]))
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_every_key_of_the_results_is_explained() -> None:
    text = (DOCS / "reference" / "results.md").read_text(encoding="utf-8")
    keys = {*frontier.Row.__annotations__, *membership.Row.__annotations__, *TABLE_1_COLUMNS, *TABLE_2_COLUMNS}
    assert sorted(key for key in keys if f"`{key}`" not in text) == []


@pytest.mark.parametrize(("kind", "page"), [(CompressorConfig, "compressors.md"), (TransformConfig, "transforms.md")])
def test_every_method_has_its_place(kind: type, page: str) -> None:
    text = (DOCS / "methods" / page).read_text(encoding="utf-8")
    ours = [k.method for k in kind.__subclasses__() if k.__module__.startswith("raytrust.")]  # type: ignore[attr-defined]
    assert len(ours) > 3
    # "half" is written by its formats, and shown as such.
    assert [method for method in ours if not re.search(rf"`{method}\b", text) and method != "half"] == []


def commands() -> list[str]:
    """All calls of our programs that the pages show, but for those of findings and results, which are of their day."""
    dated = (DOCS / "findings.md", DOCS / "results" / "README.md")
    pages = [ROOT / "README.md", *(path for path in DOCS.rglob("*.md") if path not in dated)]
    found: set[str] = set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        lines = [line.split("#")[0] for language, block in blocks if not language for line in block.splitlines()]
        inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        found |= {" ".join(line.split()) for line in (*lines, *inline)}
    start = re.compile(rf"(\S+=\S+ )*(raytrust ({'|'.join(COMMANDS)}) -|raytrust audit \S+:|python sweeps/\w+\.py -)")
    return sorted(line for line in found if start.match(line) and "--help" not in line)


@pytest.mark.parametrize("command", commands())
def test_every_command_has_options_that_there_are(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for word in shlex.split(command) if not re.match(r"\w+=", word)]
    program, rest = words[1], words[2:]
    if words[0] == "raytrust":
        program = COMMANDS[program][0]
        rest = ["--network", *rest] if not rest[0].startswith("-") else rest
    else:
        program = Path(program).stem
    monkeypatch.syspath_prepend(ROOT / "sweeps")
    options = importlib.import_module(program)._parser().parse_args([word for word in rest if word != "..."])
    for defence in getattr(options, "defence", []):
        if not defence.startswith("grid"):  # of docs/extend.md
            assert parse_defence(defence)
