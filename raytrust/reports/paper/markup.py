"""Pieces of HTML: the page's style, its tables and pictures."""

from __future__ import annotations

import base64
import html
import struct
from collections.abc import Sequence
from pathlib import Path

Lines = list[list[str]]

STYLE = """:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:1.2rem auto;padding:0 1rem;color:#1d1d1f;background:#fff}
h1{font-size:1.45rem;line-height:1.25;margin:.2rem 0 .4rem}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}p{max-width:62rem;margin:.4rem 0}
.warning{border-left:5px solid #D55E00;padding:.2rem .7rem}
.answer{font-size:1.08rem;max-width:62rem}
.cards{display:grid;grid-template-columns:repeat(3,1fr);gap:.8rem;margin:.6rem 0}
.card{border:1px solid #ccc;border-top:5px solid #777;border-radius:4px;padding:.5rem .8rem;min-width:0}
.card h3{margin:.1rem 0 .3rem}.card ul{margin:.2rem 0;padding-left:1.1rem;font-size:13.5px}.card p{font-size:13.5px}
.yes{border-top-color:#009E73}.seems{border-top-color:#D55E00}.price{border-top-color:#0072B2}
table{border-collapse:collapse;margin:.5rem 0 1.2rem;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .6rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
td.n,th.n{white-space:nowrap}td.long{min-width:20rem}
.card th,.card td{padding:.18rem .35rem}
th{border-bottom:2px solid #999}tbody tr:nth-child(even){background:#f7f7f8}
.wide{overflow-x:auto}img{height:auto}
.badge{display:inline-block;padding:.05rem .5rem;border-radius:3px;color:#fff;background:#666;font-size:12px}
.reproduced{background:#007a5a}.overturned{background:#b34700}.not-reproduced{background:#5b4a8a}
details{margin:.6rem 0}summary{cursor:pointer}.small{font-size:13px;color:#444}
@media(max-width:700px){.cards{grid-template-columns:1fr}body{font-size:14px;padding:0 .7rem}h1{font-size:1.2rem}
.claims td,.claims th{display:block;border:0;padding:.1rem 0}.claims tr{display:block;border-bottom:1px solid #ccc;
padding:.5rem 0}.claims thead{display:none}}"""


def image(path: Path, what: str) -> str:
    if not path.exists():
        return ""
    content = path.read_bytes()
    width = struct.unpack(">I", content[16:20])[0] * 2 // 3  # of a PNG at 150 dpi, so that its text is the page's size
    data = base64.b64encode(content).decode()
    return f'<div class="wide"><img alt="{escape(what)}" width="{width}" src="data:image/png;base64,{data}"></div>'


def table(lines: Lines) -> str:
    def cells(line: Sequence[str], tag: str) -> str:
        kinds = [' class="n"' if len(c) < 26 else ' class="long"' if len(c) > 60 else "" for c in line]
        return "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for c, k in zip(line, kinds, strict=True))

    head = cells(lines[0], "th")
    body = "".join(f"<tr>{cells(line, 'td')}</tr>" for line in lines[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def escape(text: str) -> str:
    return html.escape(str(text))
