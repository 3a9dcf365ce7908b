"""Pushing to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fabe_ds.errors import FabeError, UsageError, first_line
from fabe_ds.formats.hub import hub_errors
from fabe_ds.hub.push import FAILURES, Push, public_already
from fabe_ds.report.run_report import RunReport

if TYPE_CHECKING:
    from datasets import Dataset


def push(dataset: Dataset, failures: Dataset | None, run: RunReport, push: Push) -> str:
    """Pushes the records and, as a configuration of their own, the failed ones; then the card.

    Gives the dataset's address. Raises: UsageError, FabeError.
    """
    from huggingface_hub.errors import LocalTokenNotFoundError

    place = {"split": push.split, "private": push.private, "revision": push.revision}
    try:
        if push.private and _is_public(push.repo):
            raise public_already(push)
        info = dataset.push_to_hub(push.repo, config_name=push.config_name, **place)
        if failures is not None:
            # Of other columns than the records, so no split of theirs.
            failures.push_to_hub(push.repo, config_name=FAILURES, **place)
        _push_card(run, push)
    except LocalTokenNotFoundError:
        raise UsageError("no token for the Hub: set HF_TOKEN, or `hf auth login`") from None
    except hub_errors() as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UsageError(
                f"{push.repo}: the Hub does not accept the token ({status}): set HF_TOKEN to one "
                "that may write there, or `hf auth login`"
            ) from None
        raise FabeError(f"{push.repo}: the Hub refused: {first_line(error)}") from None
    except ValueError as error:  # columns that do not go with those of the other splits
        raise UsageError(f"--push-to-hub {push.repo}: {first_line(error)}") from None
    return str(info.repo_url)


def _is_public(repo: str) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return not HfApi().dataset_info(repo).private
    except RepositoryNotFoundError:
        return False


def _push_card(run: RunReport, push: Push) -> None:
    from huggingface_hub import DatasetCard, HfApi

    from fabe_ds.hub.card import complete_card

    pushed = HfApi().hf_hub_download(
        push.repo, "README.md", repo_type="dataset", revision=push.revision
    )
    card = DatasetCard(Path(pushed).read_text(encoding="utf-8"))
    complete_card(card, run, push)
    HfApi().upload_file(
        path_or_fileobj=str(card).encode(),
        path_in_repo="README.md",
        repo_id=push.repo,
        repo_type="dataset",
        revision=push.revision,
        commit_message="Dataset card",
    )
