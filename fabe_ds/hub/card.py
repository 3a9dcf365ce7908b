"""A dataset's card: where its records come from, and how they were made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.hub.huggingface import hub_errors
from fabe_ds.records.scan import parse_path

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard

_SHOWN = (
    "provider",
    "model",
    "base_url",
    "field",
    "max_new_tokens",
    "temperature",
    "top_p",
    "seed",
)
_KEPT = ("license", "language", "license_name", "license_link")


def complete_card(card: DatasetCard, run: dict[str, Any], repo: str) -> None:
    """Adds to a card what is known of the source, and writes its text."""
    for name, value in source_facts(run["config"]).items():
        setattr(card.data, name, value)
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), "fabe-ds", "synthetic"})
    card.text = card_text(run, repo)


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


def card_text(run: dict[str, Any], repo: str) -> str:
    """The body of the card: how the records were made, in Markdown."""
    config = run["config"]
    settings = "".join(
        f"| {name.replace('_', ' ')} | `{config[name]}` |\n"
        for name in _SHOWN
        if config.get(name) is not None
    )
    instruction = str(config.get("instruction") or "")
    file = Path(instruction) if "\n" not in instruction and len(instruction) < 1024 else None
    if file is not None and file.is_file():
        instruction = file.read_text(encoding="utf-8")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", instruction))])
    column = parse_path(config["field"])[0]
    source = Path(config["input_path"]).name
    return f"""
# {repo.rsplit("/", 1)[-1]}

The records of `{source}` with the field `{config["field"]}` rewritten by a language model under an
instruction, by fabe-ds {run["fabe_ds"]}. All else is as it was.

| | |
| --- | --- |
{settings}| records | {run["records"]} |
| rewritten | {run["done"] + run["cached"]} |
| failed, and kept as they were | {run["failed"]} |
| skipped (no text) | {sum(run["skipped"].values())} |

## Instruction

{fence}
{instruction.strip()}
{fence}

## Reproduce

```
fabe-ds run --input {source} --field {config["field"]} --instruction prompt.txt \\
  --provider {config["provider"]} --model {config.get("model")} \\
  --max-new-tokens {config["max_new_tokens"]} --temperature {config["temperature"]}
```

The original stands in `{config.get("backup_field") or column}`.
"""
