"""What is pushed where, and what no hub would take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fabe_ds.errors import UsageError, first_line

FAILURES = "failures"
"""The configuration of the failed records."""


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


def check_push(push: Push) -> None:
    """Raises: UsageError where a name is none for a dataset, a configuration or a split."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(push.repo)
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub {push.repo}: {first_line(error)}") from None
    taken = {"data", FAILURES} if push.failures else {"data"}  # data/ is where default stands
    if push.config_name in taken or not re.fullmatch(r"\w[\w.-]*", push.config_name):
        raise UsageError(
            f"--config-name {push.config_name}: reserved, or not a valid name (letters, digits, "
            "and . _ -)"
        )
    if not re.fullmatch(r"\w+(\.\w+)*", push.split):
        raise UsageError(f"--split {push.split}: letters, digits, _ and dots between them only")


def public_already(push: Push) -> UsageError:
    return UsageError(
        f"{push.repo} is there already, and everybody sees it: --public, or another name"
    )
