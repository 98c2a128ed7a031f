"""What the site takes from the repository when it is built: files outside docs/, options, docstrings as lists.

`on_page_markdown` and `on_page_content` are hooks of MkDocs, `Fields` is an extension of griffe, with which
mkdocstrings reads docstrings.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import griffe

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PROGRAMS = {
    "frontier": "privacy_frontier",
    "threats": "threats",
    "membership": "membership",
    "paper": "paper_tables",
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the lines `<!-- include: FILE -->` and `<!-- options: PROGRAM -->`; link files, not folders."""
    folder = (DOCS / page.file.src_uri).parent

    def line(name: str, text: Any) -> None:
        nonlocal markdown
        # A function, as what it returns may hold backslashes.
        markdown = re.sub(rf"^<!-- {name}: (\S+) -->$", lambda m: text(m[1]), markdown, flags=re.MULTILINE)

    alone = markdown.lstrip().startswith("<!-- include")
    # A page that has a heading of its own needs none from the file.
    line("include", lambda file: re.sub(r"\A# .*\n", lambda m: m[0] * alone, included(ROOT / file, folder)))
    line("options", options_of)
    return re.sub(r"\[([^\]]+)\]\(([\w/-]+)\)", lambda m: _files(m, folder), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Keep short code in one line: a browser would break `--tv` after its hyphens."""
    return re.sub(r"<code>([^<>\n]{1,28})</code>", r'<code class="short">\1</code>', html)


def included(file: Path, folder: Path) -> str:
    """The text of a file of the repository, with its links as they are from a page in `folder`."""

    def moved(link: re.Match[str]) -> str:
        target = (file.parent / link[1]).resolve()
        return f"]({os.path.relpath(target, folder)}" if target.exists() else link[0]

    return re.sub(r"\]\(([^)#:]+)", moved, file.read_text(encoding="utf-8"))


def _files(link: re.Match[str], folder: Path) -> str:
    if not (folder / link[2]).is_dir():
        return link[0]
    # A folder has no page on a site.
    listed = [f"[{path.name}]({link[2]}/{path.name})" for path in sorted((folder / link[2]).iterdir())]
    return f"{link[1]} ({', '.join(listed)})"


def options_of(program: str) -> str:
    """A table for each group of a program's options, in Markdown."""
    # The sources themselves, whatever is installed; to make a parser takes nothing but the standard library.
    for folder in (ROOT, ROOT / "sweeps"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    parser: argparse.ArgumentParser = importlib.import_module(PROGRAMS[program])._parser()
    formatter = parser._get_formatter()
    lines = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        rows = [f"| {_flags(action)} | {_cell(formatter._expand_help(action))} |" for action in actions]
        if rows:
            lines += [f"**{group.title}**", "", "| option | meaning |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _flags(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else ""
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    return ", ".join(_cell(f"`{flag} {value}`".replace(" `", "`")) for flag in action.option_strings)


def _cell(text: str) -> str:
    return _plain(text.replace("|", "\\|"))


def _plain(text: str) -> str:
    # Two brackets beside each other, as in a syntax, would be a link.
    return text.replace("][", "]\\[")


class Fields(griffe.Extension):
    """Makes items of a list of the lines of docstrings that begin with "name: ", of parameters and attributes."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None and isinstance(obj, griffe.Function | griffe.Class):
            names = {p.name for p in obj.parameters} if isinstance(obj, griffe.Function) else {*obj.members}
            obj.docstring.value = _plain(as_list(obj.docstring.value, names))


def as_list(text: str, names: set[str]) -> str:
    """The same text, in which an entry "name: text" with its indented lines is an item."""

    def entry(found: re.Match[str]) -> str:
        return f"\n{found[1]}: " if {*found[1].split(", ")} & names else found[0]

    lines: list[str] = []
    # Several short entries may stand in one line.
    for line in re.sub(r"(?<=[.)]) (\w+(?:, \w+)*): (?=\S)", entry, text).splitlines():
        found = re.match(r"(\w+(?:, \w+)*): (?=\S)", line)
        if found and {*found[1].split(", ")} & names:
            bold = ", ".join(f"**{name}**" for name in found[1].split(", "))
            # A list begins after an empty line, which between its items does no harm.
            lines += ["", f"- {bold}: {line[found.end() :]}"]
        elif line and not line[0].isspace() and lines and lines[-1].startswith(("- ", "    ")):
            lines += ["", line]
        else:
            lines.append(line)
    return "\n".join(lines)
