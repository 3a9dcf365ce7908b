"""`fabe-ds docs`: the reference, as it is installed with the package."""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path

from fabe_ds.errors import UsageError

FOLDER = Path(__file__).parents[1] / "docs"
TOPICS = (
    *("files", "instructions", "answers", "servers", "local", "costs", "resume", "terminal"),
    *("python", "ray", "hub", "flags", "figures", "fabe-infer"),
)
"""In the order in which one would read them."""


def listed() -> str:
    """The topics, a line each with what it is about."""
    return "\n".join(f"{topic:<14} {_title(topic)}" for topic in TOPICS)


def text_of(topic: str) -> str:
    """The Markdown of a topic. Raises: UsageError."""
    if topic not in TOPICS:
        near = difflib.get_close_matches(topic, TOPICS, 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"no topic {topic!r}; {meant}`fabe-ds docs` lists them")
    return (FOLDER / f"{topic}.md").read_text(encoding="utf-8")


def show(text: str) -> None:
    """Prints Markdown: as it is, or, on a terminal, with its headings and tables drawn, page by
    page where it is long."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    import pydoc

    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    with console.capture() as drawn:
        console.print(Markdown(text))
    shown = drawn.get()
    if shown.count("\n") < console.height:
        sys.stdout.write(shown)
        return
    os.environ.setdefault("LESS", "-R")  # else less shows the codes of colours
    pydoc.pager(shown)


def _title(topic: str) -> str:
    with (FOLDER / f"{topic}.md").open(encoding="utf-8") as file:
        return file.readline().removeprefix("# ").strip().partition(": ")[2]
