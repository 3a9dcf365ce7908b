"""What a notebook shows: a run's progress, and results as HTML."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Sequence
from typing import Any

DIFF_STYLES = {
    "same": "",
    "gone": "background:rgba(220,70,60,.18)",
    "new": "background:rgba(40,160,80,.2)",
}


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return type(running).__name__ == "ZMQInteractiveShell"


class Shown:
    """A piece of HTML below the running cell, which changes in its place.

    Needs nothing but IPython, which a kernel has: bars made of widgets need an extension of the
    notebook's page, and are gone when a notebook is opened again.
    """

    def __init__(self, text: str) -> None:
        from IPython import display

        parts: Any = display  # which has no types
        self._html = parts.HTML
        self._handle = parts.display(self._html(text), display_id=True)

    def show(self, text: str) -> None:
        self._handle.update(self._html(text))


def bar_html(line: str, done: int, total: int) -> str:
    """A bar, and the line behind it; without a total, a bar that only moves."""
    value = f' value="{min(done, total)}" max="{total}"' if total else ""
    return (
        f'<div style="display:flex;flex-wrap:wrap;gap:.3em .8em;align-items:center">'
        f'<progress{value} style="width:16em"></progress><span>{html.escape(line)}</span></div>'
    )


def table_html(rows: Iterable[tuple[str, str]]) -> str:
    """A table of two columns: a name, and HTML."""
    cells = (
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{value}</td></tr>'
        for name, value in rows
    )
    return f"<table>{''.join(cells)}</table>"


def diff_html(where: str, lines: Sequence[tuple[str, str]]) -> str:
    """Lines of two texts as `diff.diff_lines` gives them, below a heading, folded."""
    marks = {"same": "  ", "gone": "- ", "new": "+ "}
    shown = "".join(
        f'<div style="{DIFF_STYLES[kind]}">{html.escape(marks[kind] + line)}</div>'
        for kind, line in lines
    )
    return (
        f"<details open><summary>{html.escape(where)}</summary>"
        f'<pre style="white-space:pre-wrap;margin:.3em 0">{shown}</pre></details>'
    )


def link_html(path: Any, name: str = "") -> str:
    """A link to a file, from the folder that the kernel runs in, where notebooks look from."""
    from fabe_ds.files import from_here

    near = str(from_here(path))
    return f'<a href="{html.escape(near)}">{html.escape(name or near)}</a>'
