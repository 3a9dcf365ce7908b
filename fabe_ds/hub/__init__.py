"""What a run has written, as a dataset of a hub, with a card that says how it was made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fabe_ds.config.load import unknown
from fabe_ds.errors import UsageError
from fabe_ds.hub.push import Push, check_push
from fabe_ds.quiet import quiet_datasets
from fabe_ds.report.outputs import written_records
from fabe_ds.report.result import RunResult, read_lines
from fabe_ds.report.run_report import read_report


def push_to_hub(run: RunResult | str | Path, repo: str, **options: Any) -> str:
    """Pushes the records that a run has written to a hub; gives the dataset's address.

    `run` is what `fabe_ds.run` gave, or the path of a run's report. Options: private (True),
    revision, config_name and split (those that were read, else "default" and "train"), force
    (push a run with failed records too), failures (push those as a configuration of their own),
    hub ("huggingface" or "modelscope").

    The token is that of HF_TOKEN or `hf auth login`, or of MODELSCOPE_API_TOKEN or `modelscope
    login`. Raises: UsageError (no such report, a run with failures that is not forced), FabeError
    (the hub refused).
    """
    known = {field.name for field in fields(Push)} - {"repo"}
    for name in options:
        if name not in known:
            raise UsageError(unknown(name, sorted(known)))
    report = run.report if isinstance(run, RunResult) else Path(run)
    assert report is not None
    read = read_report(report)
    if read.failed and not options.get("force"):
        raise UsageError(
            f"{report}: {read.failed} records failed and keep their originals; run it again, "
            "or push it all the same with --force"
        )
    push = wanted_push(repo, read.config, options)
    import datasets

    from fabe_ds.hub import huggingface, modelscope

    with quiet_datasets():
        dataset = written_records(read)
        failures = None
        if push.failures and read.failures_file:
            failures = datasets.Dataset.from_list(read_lines(Path(read.failures_file)))
        if push.hub == "modelscope":
            return modelscope.push(dataset, failures, read, push)
        return huggingface.push(dataset, failures, read, push)


def wanted_push(repo: str, read: Mapping[str, Any], options: Mapping[str, Any]) -> Push:
    """The push that options of `push_to_hub` ask for, where a run has read the configuration and
    the split of `read`. Raises: UsageError."""
    place = {"config_name": read["config_name"] or "default"}
    if split := re.match(r"\w+", read["split"]):  # train of train[:100]
        place["split"] = split[0]
    given = {name: value for name, value in options.items() if value is not None}
    push = Push(repo, **{**place, **given})
    check_push(push)
    return push
