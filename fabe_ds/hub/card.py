"""A dataset's card: where its records come from, and how they were made."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.config.settings import RunConfig, flag, setting
from fabe_ds.formats.hub import hub_errors

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard

    from fabe_ds.hub.push import Push
from fabe_ds.report.run_report import RunReport

_SHOWN = (
    "provider",
    "model",
    "max_new_tokens",
    "temperature",
    "top_p",
    "seed",
)
_KEPT = ("license", "language", "license_name", "license_link")


def complete_card(card: DatasetCard, run: RunReport, push: Push) -> None:
    """Adds to a card what is known of the source, and how the records were made.

    What else its text says stays, and so does what was said of other configurations.
    """
    for name, value in source_facts(run.config).items():
        setattr(card.data, name, value)
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), "fabe-ds", "synthetic"})
    begin, end = (f"<!-- {mark}fabe-ds: {push.config_name} -->" for mark in ("", "/"))
    before, _, rest = card.text.partition(begin)
    _, _, after = rest.partition(end)
    title = "" if before.strip() else f"# {push.repo.rsplit('/', 1)[-1]}\n"
    parts = (before.strip() or title, f"{begin}\n{card_text(run)}\n{end}", after.strip())
    card.text = "\n" + "\n\n".join(part for part in parts if part) + "\n"


def source_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Licence and language as the source states them; nothing where it does not."""
    from huggingface_hub import DatasetCard

    source = Path(config["input_path"])
    folder = source if source.is_dir() else source.parent
    try:
        if source.exists():
            card = DatasetCard.load(folder / "README.md")
        else:
            card = DatasetCard.load(str(source))
    except ValueError:  # no card there
        return {}
    except hub_errors():
        return {}
    facts = card.data.to_dict()
    return {name: facts[name] for name in _KEPT if facts.get(name)}


def card_text(run: RunReport) -> str:
    """How the records were made, in Markdown. The server's address is nobody else's business."""
    config = run.config
    shown = {name: config[name] for name in _SHOWN if config.get(name) is not None}
    shown["model"] = _model(config)
    settings = "".join(
        f"| {name.replace('_', ' ')} | `{value}` |\n" for name, value in shown.items() if value
    )
    instruction = run.instruction
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", instruction))])
    fields = ", ".join(f"`{name}`" for name in (config["field"], *config["also_fields"]))
    backup = config.get("backup_field")
    kept = f"\nThe originals of `{config['field']}` stand in `{backup}`.\n" if backup else ""
    return f"""
The records of `{_source(config)}` with {fields} rewritten by a language model under an
instruction, by fabe-ds {run.fabe_ds}. All else is as it was.
{kept}
| | |
| --- | --- |
{settings}| records | {run.records} |
| rewritten | {run.done + run.cached} |
| failed, and kept as they were | {run.failed} |
| skipped | {sum(run.skipped.values())} |
| prompt tokens of this run | {run.prompt_tokens} |
| completion tokens of this run | {run.completion_tokens} |

## Instruction

{fence}
{instruction.strip()}
{fence}

## Reproduce

With the instruction above in `prompt.txt`:

```
{command(config)}
```
"""


def command(config: dict[str, Any]) -> str:
    """The command line of a run: all that can change what comes out."""
    parts = ["fabe-ds run", f"--input {shlex.quote(_source(config))}"]
    for name, declared in RunConfig.model_fields.items():
        value = config.get(name)
        default = declared.get_default(call_default_factory=True)
        wanted = setting(name, "affects_output") or name in ("split", "config_name", "records_key")
        if not wanted or value in (None, default) or name in ("auto_extract_code", "base_url"):
            continue
        spelled = flag(name)
        if name == "instruction":
            parts.append(f"{spelled} prompt.txt")
        elif name == "model":
            parts.append(f"{spelled} {shlex.quote(_model(config))}")
        elif isinstance(value, bool):
            parts.append(spelled if value else f"--no-{spelled[2:]}")
        elif isinstance(value, dict):
            parts += [f"{spelled} {shlex.quote(f'{k}={v}')}" for k, v in value.items()]
        else:
            values = value if isinstance(value, list) else [value]
            parts += [f"{spelled} {shlex.quote(str(each))}" for each in values]
    return " \\\n  ".join([" ".join(parts[:2]), *parts[2:]])


def _source(config: dict[str, Any]) -> str:
    """Where the records came from: an id of the Hub, or a name without its folder."""
    path = Path(config["input_path"])
    return path.name if path.exists() or path.is_absolute() else str(path)


def _model(config: dict[str, Any]) -> str:
    """The model's name; of a local folder, the folder's."""
    model = str(config.get("model") or "")
    return Path(model).name if Path(model).exists() else model
