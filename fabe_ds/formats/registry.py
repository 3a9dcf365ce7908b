"""Formats by name; any package adds its own with the entry-point group fabe_ds.formats."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from fabe_ds import compression
from fabe_ds.config.settings import InputSettings
from fabe_ds.errors import UsageError
from fabe_ds.formats.arrow import SavedFormat, is_saved
from fabe_ds.formats.base import Format, Source
from fabe_ds.formats.discover import (
    InputFile,
    check_there,
    discovered,
    kind_of,
    refuse_unread,
    say_hidden,
    walk,
)
from fabe_ds.formats.hub import HubFormat, is_hub_id
from fabe_ds.formats.json.format import JsonFormat
from fabe_ds.formats.plugins import guarded, lacking
from fabe_ds.plugins import imported
from fabe_ds.text import shown_name

log = logging.getLogger(__name__)

GROUP = "fabe_ds.formats"
_INFOS = ("dataset_info.json", "dataset_infos.json")  # what datasets says beside Parquet files


@functools.cache
def format_classes() -> dict[str, type[Format]]:
    """The formats of files, by suffix. Raises: UsageError (a plugin that is no format)."""
    found: dict[str, type[Format]] = {}
    for entry in entry_points(group=GROUP):
        what = f"format {entry.name}: {entry.value}"
        loaded = imported(what, entry)
        if lacks := lacking(loaded):
            raise UsageError(f"{what} {lacks} (fabe_ds/formats/README.md)")
        own = loaded.__module__.startswith("fabe_ds.")
        for suffix in loaded.suffixes:
            # No plugin takes our own suffixes over.
            if own or suffix not in found:
                found[suffix] = loaded if own else guarded(loaded)
    return found


def open_source(
    settings: InputSettings, exclude: Sequence[Path] = ()
) -> tuple[type[Format], Source]:
    """What the input is, and its files.

    `exclude`: files and folders that are never input, which is where the output goes.
    Raises: UsageError where there is nothing to read; InputError where something cannot be read,
    unless that is to be left out.
    """
    root = settings.input_path
    if root is None:
        raise UsageError("--input is required: a file, or a folder of files")
    # A folder that is there goes before a dataset of the Hub with the same name.
    if os.path.isdir(root):  # noqa: PTH112 - Path.is_dir raises where it may not look
        return _open_folder(settings, root, exclude)
    if not os.path.lexists(root) and is_hub_id(root, tuple(format_classes())):
        return HubFormat, Source(root)
    check_there(root)
    file = InputFile(os.fspath(root), shown_name(root.name))
    found = class_of(root.name)
    if found is None:
        *known, last = sorted(format_classes(), key=lambda suffix: not kind_of(f"x{suffix}"))
        packed = ", ".join(compression.SUFFIXES)
        raise UsageError(
            f"--input {root}: not a {', '.join(known)} or {last} file (JSON also with {packed})"
        )
    return found, Source(root, [file])


def class_of(name: str) -> type[Format] | None:
    """The format of a file of this name. JSON may be compressed; other formats know their own."""
    if kind_of(name):
        return JsonFormat
    suffix = Path(name).suffix.lower()
    found = format_classes().get(suffix) if suffix else None
    return None if found is JsonFormat else found


def _open_folder(
    settings: InputSettings, root: Path, exclude: Sequence[Path]
) -> tuple[type[Format], Source]:
    if is_saved(root):
        return SavedFormat, Source(root)
    found = walk(root, settings.input_glob, exclude)
    names = [name for name in found.files if Path(name).name not in _INFOS]
    others = [name for name in names if class_of(name) not in (None, JsonFormat)]
    if not others or any(map(kind_of, names)):
        if others:
            log.warning("%s: JSON is read, and %d tables are left out", root, len(others))
            found.files = [name for name in found.files if name not in set(others)]
        files = discovered(root, settings.input_glob, found)
        refuse_unread(files.unread, settings.on_bad_input)
        return JsonFormat, Source(root, files.sources, files.unread)
    refuse_unread(found.unread, settings.on_bad_input)
    say_hidden(root, found)
    kind = class_of(others[0])
    assert kind is not None
    return kind, Source(root, _alike(root, others), found.unread)


def _alike(root: Path, names: Sequence[str]) -> list[InputFile]:
    """Those of the files that are of the first one's kind; says how many are left out."""
    suffix = Path(names[0]).suffix.lower()
    alike = [name for name in names if Path(name).suffix.lower() == suffix]
    if len(alike) < len(names):
        log.warning(
            "%s: %d files like %s are read, and %d others left out (--glob chooses)",
            *(root, len(alike), Path(names[0]).name, len(names) - len(alike)),
        )
    return [InputFile(os.fspath(root / name), shown_name(name)) for name in alike]
