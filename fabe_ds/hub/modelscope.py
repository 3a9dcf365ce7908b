"""Pushing to ModelScope's hub, through its own client."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.errors import FabeError, UsageError, first_line
from fabe_ds.hub.push import FAILURES, Push, public_already
from fabe_ds.report.run_report import RunReport

if TYPE_CHECKING:
    from datasets import Dataset

FILE_BYTES = 500_000_000
_NO_LICENCE = "other"  # without one, the client would say Apache-2.0


def push(dataset: Dataset, failures: Dataset | None, run: RunReport, push: Push) -> str:
    """Pushes the records and, as a configuration of their own, the failed ones, with the card.

    They stand there as on the Hugging Face Hub: Parquet files, which the card's YAML lists. Gives
    the dataset's address. Raises: UsageError, FabeError.
    """
    try:
        from modelscope_hub.api import HubApi
        from modelscope_hub.config import get_default_config
        from modelscope_hub.errors import (
            AlreadyExistsError,
            AuthenticationError,
            HubError,
            InvalidParameter,
        )
    except ImportError:
        raise UsageError(
            "--hub modelscope needs fabe-ds[modelscope]: pip install 'fabe-ds[modelscope]'"
        ) from None
    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
    api = HubApi()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = {push.config_name: _write(dataset, folder, push.config_name, push.split)}
        if failures is not None:
            written[FAILURES] = _write(failures, folder, FAILURES, push.split)
        try:
            if push.private and _is_public(api, push.repo):
                raise public_already(push)
            card = _card(_card_there(api, push), written, run, push)
            (folder / "README.md").write_text(str(card), encoding="utf-8")
            with contextlib.suppress(AlreadyExistsError):
                api.create_repo(
                    push.repo,
                    "dataset",
                    visibility="private" if push.private else "public",
                    license=card.data.to_dict().get("license") or _NO_LICENCE,
                )
            with contextlib.redirect_stdout(io.StringIO()):  # it prints a report of its own
                api.upload_folder(
                    push.repo,
                    "dataset",
                    folder,
                    commit_message="Upload by fabe-ds",
                    revision=push.revision,
                    use_cache=False,
                    disable_tqdm=True,
                )
        except AuthenticationError:
            raise UsageError(
                "ModelScope does not accept the token: set MODELSCOPE_API_TOKEN, or `modelscope "
                "login`"
            ) from None
        except InvalidParameter as error:
            raise UsageError(f"--push-to-hub {push.repo}: {first_line(error)}") from None
        except (HubError, OSError) as error:
            raise FabeError(f"{push.repo}: ModelScope refused: {first_line(error)}") from None
    return f"{get_default_config().endpoint.rstrip('/')}/datasets/{push.repo}"


def _is_public(api: Any, repo: str) -> bool:
    from modelscope_hub.constants import Visibility
    from modelscope_hub.errors import NotExistError

    try:
        return bool(api.get_repo(repo, "dataset").visibility == Visibility.PUBLIC)
    except NotExistError:
        return False


def _write(dataset: Dataset, folder: Path, config_name: str, split: str) -> dict[str, str]:
    """Parquet files of the records; gives how the card lists them."""
    place = "data" if config_name == "default" else config_name
    (folder / place).mkdir()
    count = max(1, math.ceil(dataset.data.nbytes / FILE_BYTES))
    for number in range(count):
        part = dataset.shard(count, number, contiguous=True)
        part.to_parquet(folder / place / f"{split}-{number:05}-of-{count:05}.parquet")
    return {"split": split, "path": f"{place}/{split}-*"}


def _card_there(api: Any, push: Push) -> str:
    """The card that the dataset has, if any."""
    from modelscope_hub.errors import NotExistError

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(NotExistError):
        if api.repo_exists(push.repo, "dataset"):
            path = api.download_file(
                push.repo, "dataset", "README.md", revision=push.revision, local_dir=folder
            )
            return Path(path).read_text(encoding="utf-8")
    return ""


def _card(there: str, written: dict[str, dict[str, str]], run: RunReport, push: Push) -> Any:
    """The card with what was written among the configurations it lists."""
    from huggingface_hub import DatasetCard

    from fabe_ds.hub.card import complete_card

    card = DatasetCard(there or "---\n{}\n---\n", ignore_metadata_errors=True)
    listed = {entry["config_name"]: entry for entry in card.data.get("configs") or ()}
    for name, files in written.items():
        others = [
            other
            for other in listed.get(name, {}).get("data_files", ())
            if other["split"] != files["split"]
        ]
        listed[name] = {"config_name": name, "data_files": [*others, files]}
    card.data["configs"] = list(listed.values())
    complete_card(card, run, push)
    return card
