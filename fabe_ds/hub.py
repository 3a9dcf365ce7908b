"""What a run has written, as a dataset of the Hub, with a card that says how it was made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.errors import FabeError, UsageError, first_line
from fabe_ds.records.scan import parse_path
from fabe_ds.result import read_lines, read_report

if TYPE_CHECKING:
    from datasets import Dataset

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
_LOADERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".gz": "json"}
CONFIG = "default"


@dataclass(frozen=True, slots=True)
class Push:
    """Where a run's output goes, and how."""

    repo: str
    private: bool = True
    revision: str | None = None
    config_name: str = CONFIG
    split: str = "train"
    force: bool = False
    failures: bool = False


def push_run(report: Path, push: Push) -> str:
    """Pushes the records that a run has written; gives the dataset's address.

    The token is that of HF_TOKEN or of `hf auth login`. Raises: UsageError (no such report, a run
    with failures that is not forced), FabeError (the Hub refused).
    """
    run = read_report(report)
    if run["failed"] and not push.force:
        raise UsageError(
            f"{report}: {run['failed']} records failed and keep their originals; run it again, or "
            "push it all the same with --force"
        )
    import datasets
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    dataset = _load([Path(path) for path in run["outputs"]])
    try:
        info = dataset.push_to_hub(
            push.repo,
            config_name=push.config_name,
            split=push.split,
            private=push.private,
            revision=push.revision,
        )
        failed = Path(run["failures_file"]) if run["failures_file"] else None
        if push.failures and failed is not None:
            # Of other columns than the records, so no split of theirs.
            datasets.Dataset.from_list(read_lines(failed)).push_to_hub(
                push.repo,
                config_name="failures",
                split=push.split,
                private=push.private,
                revision=push.revision,
            )
        _push_card(run, push)
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub {push.repo}: {first_line(error)}") from None
    except LocalTokenNotFoundError:
        raise UsageError("no token for the Hub: set HF_TOKEN, or `hf auth login`") from None
    except hub_errors() as error:
        raise FabeError(f"{push.repo}: the Hub refused: {first_line(error)}") from None
    return str(info.repo_url)


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises where the Hub refuses, or cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its versions are built on one HTTP library or another, whose own errors share this base.
    bases = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    return (HfHubHTTPError, OSError, *bases)


def _load(outputs: list[Path]) -> Dataset:
    """The written records, with columns of their own types."""
    import datasets

    if not outputs:
        raise UsageError("the run has written nothing")
    first = outputs[0]
    try:
        if first.is_dir():
            saved = datasets.load_from_disk(str(first))
            assert isinstance(saved, datasets.Dataset)
            return saved
        loader = _LOADERS.get(first.suffix.lower(), "parquet")
        return datasets.load_dataset(loader, data_files=[str(path) for path in outputs])["train"]
    except FileNotFoundError:
        raise UsageError(f"{first}: what the run has written is gone") from None
    except datasets.exceptions.DatasetGenerationError as error:
        reason = first_line(error.__cause__ or error)
        raise FabeError(
            f"{first}: the records have no columns of one type each: {reason}"
        ) from None


def _push_card(run: dict[str, Any], push: Push) -> None:
    from huggingface_hub import DatasetCard, HfApi

    pushed = HfApi().hf_hub_download(
        push.repo, "README.md", repo_type="dataset", revision=push.revision
    )
    card = DatasetCard(Path(pushed).read_text(encoding="utf-8"))
    for name, value in _source_facts(run["config"]).items():
        setattr(card.data, name, value)
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), "fabe-ds", "synthetic"})
    card.text = card_text(run, push.repo)
    HfApi().upload_file(
        path_or_fileobj=str(card).encode(),
        path_in_repo="README.md",
        repo_id=push.repo,
        repo_type="dataset",
        revision=push.revision,
        commit_message="Dataset card",
    )


def _source_facts(config: dict[str, Any]) -> dict[str, Any]:
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
