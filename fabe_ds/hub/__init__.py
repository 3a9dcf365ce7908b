"""What a run has written, as a dataset of a hub, with a card that says how it was made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fabe_ds.config import unknown
from fabe_ds.errors import FabeError, UsageError, first_line
from fabe_ds.result import RunResult, read_lines, read_report

if TYPE_CHECKING:
    from datasets import Dataset

_LOADERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".gz": "json"}


@dataclass(frozen=True, slots=True)
class Push:
    """Where a run's output goes, and how."""

    repo: str
    private: bool = True
    revision: str | None = None
    config_name: str = "default"
    split: str = "train"
    force: bool = False
    failures: bool = False
    hub: Literal["huggingface", "modelscope"] = "huggingface"


def push_to_hub(run: RunResult | str | Path, repo: str, **options: Any) -> str:
    """Pushes the records that a run has written to a hub; gives the dataset's address.

    `run` is what `fabe_ds.run` gave, or the path of a run's report. Options: private (True),
    revision, config_name, split, force (push a run with failed records too), failures (push those
    as a configuration of their own), hub ("huggingface" or "modelscope").

    Raises: UsageError, FabeError.
    """
    known = {field.name for field in fields(Push)} - {"repo"}
    for name in options:
        if name not in known:
            raise UsageError(unknown(name, sorted(known)))
    report = run.report if isinstance(run, RunResult) else Path(run)
    assert report is not None
    return push_run(report, Push(repo, **options))


def push_run(report: Path, push: Push) -> str:
    """Pushes the records that a run has written; gives the dataset's address.

    The token is that of HF_TOKEN or `hf auth login`, or of MODELSCOPE_API_TOKEN or `modelscope
    login`. Raises: UsageError (no such report, a run with failures that is not forced), FabeError
    (the hub refused).
    """
    run = read_report(report)
    if run["failed"] and not push.force:
        raise UsageError(
            f"{report}: {run['failed']} records failed and keep their originals; run it again, or "
            "push it all the same with --force"
        )
    import datasets

    from fabe_ds.hub import huggingface, modelscope

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    dataset = _load([Path(path) for path in run["outputs"]])
    failures = None
    if push.failures and run["failures_file"]:
        failures = datasets.Dataset.from_list(read_lines(Path(run["failures_file"])))
    if push.hub == "modelscope":
        return modelscope.push(dataset, failures, run, push)
    return huggingface.push(dataset, failures, run, push)


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
