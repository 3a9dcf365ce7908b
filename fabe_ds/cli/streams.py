"""Standard input and standard output in the place of files."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import BinaryIO

from fabe_ds.config.settings import STANDARD, RunConfig
from fabe_ds.errors import CacheError, UsageError, reason
from fabe_ds.scratch import scratch_in
from fabe_ds.store.layout import private_folder

CHUNK = 1 << 20


def stored_input(config: RunConfig, stream: BinaryIO, folder: Path) -> RunConfig:
    """The configuration with a file in the place of standard input: the bytes of `stream`, kept
    below `folder`. Where no output is named, it is standard output.

    Raises: UsageError, CacheError.
    """
    if config.input_path != STANDARD:
        return config
    if config.inplace:
        raise UsageError("--inplace: standard input cannot be replaced")
    scratch = scratch_in(private_folder(folder))
    digest, head = hashlib.sha256(), b""
    try:
        with scratch.open("wb") as file:
            while data := stream.read(CHUNK):
                head = head or data
                digest.update(data)
                file.write(data)
        place = private_folder(folder / digest.hexdigest()[:16]) / f"stdin{_suffix(head)}"
        scratch.replace(place)
    except OSError as error:
        raise CacheError(f"{folder}: standard input cannot be kept: {reason(error)}") from None
    finally:
        scratch.unlink(missing_ok=True)
    changes = {"input_path": place, "output_path": config.output_path or STANDARD}
    return config.model_copy(update=changes)


def _suffix(head: bytes) -> str:
    """What a file that begins like this is called."""
    if head.startswith(b"PAR1"):
        return ".parquet"
    if head.startswith(b"\x1f\x8b"):
        return ".jsonl.gz"
    line = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0]
    if not line.startswith((b"{", b"[")):
        return ".csv" if any(mark in line for mark in (b",", b";", b"\t")) else ".jsonl"
    try:
        return ".json" if isinstance(json.loads(line), list) else ".jsonl"
    except (ValueError, RecursionError):
        return ".json"  # it goes on in the next line


def copy_to(stream: BinaryIO, paths: list[Path]) -> None:
    """Writes the files to a stream, one after another."""
    for path in paths:
        with path.open("rb") as file:
            shutil.copyfileobj(file, stream, CHUNK)
    stream.flush()
