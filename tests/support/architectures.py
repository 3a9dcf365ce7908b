"""Every architecture that transformers generates texts with, as a tiny model of random weights.

    python tests/support/architectures.py        writes the table of fabe_ds/providers/ARCHITECTURES.md

tests/support/data/architectures.jsonl has a line for each: the settings of its configuration, what is done
to its weights so that answers are varied (a factor, or mean and deviation of new ones, for the
tensors whose names match), or why none is made.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "architectures.jsonl"
PAGE = Path(__file__).parents[2] / "fabe_ds" / "providers" / "ARCHITECTURES.md"
WAYS = {
    "loop": "Decoded by fabe-ds's own loop",
    "generate": "Decoded by transformers' generate, several prompts at once",
    "equal": "Decoded by transformers' generate, prompts of one length at once",
    "alone": "Decoded by transformers' generate, one by one",
    "refused": "Refused: they do not go on from a text",
}


@cache
def all_types() -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    return {row["type"]: row for row in rows}


def made() -> list[str]:
    return [name for name, row in all_types().items() if "config" in row]


@cache
def ways() -> dict[str, str]:
    """How each is decoded, as the page says."""
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        way = next((way for way, said in WAYS.items() if said == title), "")
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", text), way)
    return found


def loader(name: str) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto

    causal = name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if causal and all_types()[name].get("loads") != "image-text":
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


def tiny(name: str, **settings: Any) -> Any:
    """The model, in float32. `settings` are added to those of its configuration."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    row = all_types()[name]
    config = CONFIG_MAPPING[name](**{**row["config"], **settings})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = loader(name).from_config(config, dtype=torch.float32).float().eval()
        for pattern, what in row.get("after", {}).items():
            for tensor_name, tensor in model.named_parameters():
                if not re.search(pattern, tensor_name):
                    continue
                if isinstance(what, list):
                    tensor.normal_(what[1], what[2])
                else:
                    tensor.mul_(what)
    return model


def page(found: dict[str, str]) -> str:
    """The page of a table: how each type is decoded."""
    text = [
        "# Architectures\n",
        "What `--provider hf` and `modelscope` do with each model type of transformers (the "
        "`model_type` of config.json), found out with small models of random weights: the command "
        "line at batch sizes 1, 8 and 48 gives what transformers' generate gives each prompt "
        "alone, token for token, in float32. Prompts were longer than the models' windows. Made "
        "by tests/support/architectures.py; tests/unit/providers/test_architectures.py holds it.\n",
    ]
    for way, title in WAYS.items():
        names = sorted(name for name, its in found.items() if its == way)
        text.append(f"## {title}\n")
        text.append(", ".join(f"`{name}`" for name in names) + f" ({len(names)})\n")
    text.append("## Not tried\n")
    for name, row in all_types().items():
        if "skipped" in row:
            text.append(f"- `{name}`: {row['skipped']}")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    import sys
    import tempfile

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.conftest import Box
    from tests.providers.test_architectures import run

    found = {}
    for name in made():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run(Box(Path(folder)), name, [8])[0]
            print(name, found[name], flush=True)
    PAGE.write_text(page(found))
