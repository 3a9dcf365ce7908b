"""Where records are written to, and where the report of a run goes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fabe_ds.config.settings import STANDARD, RunConfig
from fabe_ds.errors import UsageError
from fabe_ds.files import check_file_writable, check_writable
from fabe_ds.formats.base import Format, Source
from fabe_ds.formats.discover import kind_of
from fabe_ds.formats.registry import class_of
from fabe_ds.formats.table_output import kind_of_file
from fabe_ds.run_files import DEFAULT_OUTPUT, LEFT_BEHIND, REPORT, beside
from fabe_ds.store.layout import Layout
from fabe_ds.text import real_name

log = logging.getLogger(__name__)

NAME_BYTES = 200


@dataclass(frozen=True, slots=True)
class Destination:
    """`output` is the folder that records are written to, or, where `single`, the one file; None
    where the input is replaced. `reports` is what the report stands beside."""

    output: Path | None
    single: bool
    reports: Path

    def ours(self, config: RunConfig) -> list[Path]:
        """Files and folders that are never input, because the run writes there."""
        paths = [beside(self.reports, name) for name in LEFT_BEHIND]
        copies = Layout(config.cache_dir).remote
        if config.input_path is None or copies not in config.input_path.parents:
            paths.append(config.cache_dir)
        if self.output is None:
            return paths
        return [*paths, self.output, *(beside(self.output, name) for name in LEFT_BEHIND)]


def destination_of(config: RunConfig) -> Destination:
    """Raises: UsageError where nothing can be written there."""
    if config.input_path is None:
        raise UsageError("--input is required: a file, or a folder of files")
    output, single = (None, False) if config.inplace else _output_of(config)
    return Destination(output, single, _reports_of(config, output, single))


def _output_of(config: RunConfig) -> tuple[Path, bool]:
    """Where records are written to, and whether that is one file and not a folder.

    Raises: UsageError.
    """
    output = config.output_path or DEFAULT_OUTPUT
    if output == STANDARD:
        return Layout(config.cache_dir).runs / _own_name(config), False
    # A name of records is a file, whether or not it is there yet; any other is a folder.
    named = bool(kind_of_file(output.name) or class_of(output.name))
    if not os.path.isdir(output):  # noqa: PTH112 - Path.is_dir raises where it may not look
        check_writable(output if named else output.parent)
    if named and not output.is_dir():
        return output, True
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output}: not a folder, nor a name of a file of records")
    return output, False


def paths_of(config: RunConfig, to: Destination, kind: Format, source: Source) -> dict[str, str]:
    """Where each file of the input goes, by its name; of a format that does not mirror its input,
    the one path, under an empty name.

    Raises: UsageError where input and output do not go together, before anything is sent.
    """
    if to.output is None and not kind.replaceable:
        raise UsageError(
            f"--inplace: {source.root} is no file of ours to replace; give an --output"
        )
    if to.output is None:
        if not source.files:  # a saved Dataset, which is a folder
            check_writable(source.root.resolve().parent)
            check_writable(source.root)
        paths = {file.name: file.location for file in source.files}
    elif kind.mirrors:
        if config.output_format is not None:
            raise UsageError(
                f"--output-format goes with tables (Parquet, CSV, a Dataset), not {kind.name}"
            )
        paths = _mirrored(config, to, source)
    else:
        paths = {"": str(_table_path(config, to, kind))}
    _check_places(to, source, paths if kind.mirrors or to.output is None else {})
    return paths


def _mirrored(config: RunConfig, to: Destination, source: Source) -> dict[str, str]:
    """A folder like the input's, or one file of the same layout."""
    root = source.root
    if root.is_dir() and config.output_path == STANDARD:
        raise UsageError("--output -: the input is a folder, and one stream cannot mirror it")
    if root.is_dir() and to.single:
        raise UsageError(f"--output {to.output}: the input is a folder, so name a folder")
    if to.single:
        assert to.output is not None
        _check_alike(root, to.output)
        return {file.name: os.fspath(to.output) for file in source.files}
    output = os.fspath(to.output or "")
    return {file.name: f"{output}/{real_name(file.name)}" for file in source.files}


def _table_path(config: RunConfig, to: Destination, kind: Format) -> Path:
    """The file, or the folder, that a table is written to. Raises: UsageError."""
    path, output = config.input_path, to.output
    assert path is not None
    assert output is not None
    if to.single:
        written = kind_of_file(output.name)
        if written is None:
            raise UsageError(
                f"--output {output}: a table is written as .parquet, .csv, .tsv or .jsonl"
            )
        if config.output_format not in (None, written):
            raise UsageError(
                f"--output {output} and --output-format {config.output_format} do not go together"
            )
        place = output
    else:
        written = kind.output_kind(path)
        name = path.stem if path.is_file() else path.name or path.resolve().name
        # Two splits of one Dataset have the same name otherwise.
        if config.split != "train":  # beside what another split's run has written
            name = f"{name}-{re.sub(r'[^A-Za-z0-9_.]+', '-', config.split).strip('-')}"
        place = output / (name if written == "dataset" else f"{name}.{written}")
    source, target = path.resolve(), place.resolve()
    if target in (source, *source.parents) or (path.is_dir() and output.resolve() == source):
        raise UsageError(f"--output {output}: would replace the input {path}; name another")
    inside = path.is_dir() and target.is_relative_to(source) and target.is_file()
    if to.single and inside and not beside(to.reports, REPORT).exists():
        raise UsageError(f"--output {output}: would replace a file of the input; name another")
    if config.output_path == STANDARD and written == "dataset":
        raise UsageError("--output -: a saved Dataset is a folder; give an --output-format")
    if written == "dataset":
        check_writable(place)
    else:
        check_file_writable(place)
    return place


def _reports_of(config: RunConfig, output: Path | None, single: bool) -> Path:
    """What the report of a run stands beside: its output, or a place in the cache folder. The
    report of another input there is left alone."""
    assert config.input_path is not None
    if output is None or config.output_path == STANDARD:
        return Layout(config.cache_dir).runs / _own_name(config)
    return output if single else _apart(output, config.input_path)


def _own_name(config: RunConfig) -> str:
    assert config.input_path is not None
    name = config.input_path.resolve().name or "root"
    if len(os.fsencode(name)) > NAME_BYTES:  # with what is put behind it, it would be too long
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    if config.output_path == STANDARD:  # two such runs at once must never meet
        return f"{name}-{_digest(config.input_path)}"
    return _apart(Layout(config.cache_dir).runs / name, config.input_path).name


def _digest(source: Path) -> str:
    return hashlib.sha256(os.fsencode(source.absolute())).hexdigest()[:8]


def _apart(base: Path, source: Path) -> Path:
    """`base`, or a name like it, where the report of another input has that one already."""
    base = base.absolute()
    ends = (source.resolve().name, _digest(source))
    others = (base.with_name(f"{base.name}-{end}") for end in ends)
    taken = base
    for taken in (base, *others):
        if _input_of(beside(taken, REPORT)) in (None, str(source.absolute())):
            break
    return taken


def _input_of(report: Path) -> str | None:
    """The input of the run that has left this report; None where there is no such report."""
    try:
        run = json.loads(report.read_text(encoding="utf-8"))
        return str(run.get("input") or run["config"]["input_path"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _check_alike(root: Path, output: Path) -> None:
    """Raises: UsageError where a file's layout, which comes back, is not what the output's name
    says."""
    wanted = kind_of(root.name)
    if wanted and kind_of(output.name) != wanted:
        suffixes = ".json" if wanted == "json" else ".jsonl or .ndjson"
        raise UsageError(
            f"--output {output}: the layout of {root} comes back, so name it {suffixes}"
        )


def _check_places(to: Destination, source: Source, paths: Mapping[str, str]) -> None:
    """Raises: UsageError where the output would replace the input, or cannot be written."""
    names: dict[str, str] = {}
    folders: dict[str, bool] = {}  # and whether they exist
    # Said now: at the end of a night it would cost the report.
    for name in LEFT_BEHIND:
        check_file_writable(beside(to.reports, name))
    replaced = False
    for file in source.files if paths else ():
        other = names.setdefault(file.name.casefold(), file.name)
        if other != file.name:
            log.warning("%s and %s differ in case alone", other, file.name)
        path = paths[file.name]
        folder = os.path.split(path)[0] or "."
        if folder not in folders:  # a new file, in place too
            check_writable(Path(folder))
            folders[folder] = os.path.isdir(folder)  # noqa: PTH112
        if folders[folder] and os.path.lexists(path):
            replaced = True
            if to.output is not None and _is_same(path, file.path):
                raise UsageError(
                    f"--output {to.output}: would replace the input {file.path}; ask for it "
                    "with --inplace"
                )
            check_file_writable(Path(path))
    if paths:
        _remark_on(to, source, replaced)


def _remark_on(to: Destination, source: Source, replaced: bool) -> None:
    """Says what a run is about to do to files that are not of an earlier run over this input."""
    output = to.output
    if output is None or to.single or beside(to.reports, REPORT).exists():
        return
    inside = output.absolute().is_relative_to(source.root.absolute())
    if replaced and to.reports.name != output.absolute().name:
        log.warning("%s: files that a run over another input has written are replaced", output)
    elif inside and output.is_dir() and any(output.iterdir()):
        log.warning("%s: what is in it is no input: it is written to", output)


def _is_same(path: str, source: Path) -> bool:
    try:
        return os.path.samefile(path, source)  # noqa: PTH121
    except OSError:
        return False
