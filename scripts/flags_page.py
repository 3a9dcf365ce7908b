"""Writes fabe_ds/docs/flags.md: every flag of a run, by group, out of the settings themselves.

python scripts/flags_page.py
"""

from __future__ import annotations

from pathlib import Path

from fabe_ds.cli.flags import run_signature
from fabe_ds.config.section import PANELS
from fabe_ds.config.settings import RunConfig, flag, setting

PAGE = Path(__file__).parents[1] / "fabe_ds" / "docs" / "flags.md"
HEAD = """\
# Flags: every flag of a run, by group

`fabe-ds run --help` prints the same. In a YAML file and in Python, a flag's name is written with
`_`. A flag of two ways is switched off with `--no-`.
"""


def page() -> str:
    """The page: a table for each group, in the order of `--help`."""
    groups: dict[str, list[str]] = {panel: [] for panel in PANELS}
    for name in run_signature().parameters:
        if name in RunConfig.model_fields:
            groups[setting(name, "panel")].append(_row(name))
    head = "| flag | default | what it does |\n| --- | --- | --- |\n"
    return "\n".join(
        [HEAD, *(f"## {panel}\n\n{head}{chr(10).join(rows)}\n" for panel, rows in groups.items())]
    )


def _row(name: str) -> str:
    declared = RunConfig.model_fields[name]
    text, _, said = (declared.description or "").partition("  [default: ")
    default = declared.get_default(call_default_factory=True)
    if said:
        shown = said.rstrip("]")
    elif default in (None, [], {}):
        shown = ""
    else:
        value = str(default).lower() if isinstance(default, bool) else str(default)
        shown = f"`{value}`" if value else ""
    variable = setting(name, "environment")
    more = f" Environment: `{variable}`." if variable else ""
    return f"| `{flag(name)}` | {shown} | {_cell(text)}{more} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
