"""Where a run's records come from, and where they and its report go."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fabe_ds.config.settings import STANDARD, RunConfig, flag
from fabe_ds.errors import InputError, UsageError
from fabe_ds.files import check_file_writable, check_writable
from fabe_ds.formats.discover import Source, discover, kind_of
from fabe_ds.formats.json.load import refuse_unread
from fabe_ds.run_files import DEFAULT_OUTPUT, LEFT_BEHIND, REPORT, beside
from fabe_ds.text import real_name

log = logging.getLogger(__name__)

NAME_BYTES = 200
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".arrow")


@dataclass(frozen=True)
class Plan:
    """`output` is the folder that mirrors the input, or, where `single`, the one file; None where
    the input files are replaced. `reports` is what the report stands beside."""

    root: Path
    sources: list[Source]
    output: Path | None
    reports: Path
    single: bool = False
    unread: list[InputError] = field(default_factory=list)

    @cached_property
    def places(self) -> dict[str, str]:
        """Where each file goes, by the name of its source."""
        if self.output is None:
            return {source.name: source.location for source in self.sources}
        output = os.fspath(self.output)
        if self.single:
            return {source.name: output for source in self.sources}
        return {source.name: f"{output}/{real_name(source.name)}" for source in self.sources}


def make_plan(config: RunConfig) -> Plan:
    """Raises: UsageError where input and output do not go together, before anything is sent;
    InputError where something cannot be read, unless that is to be left out."""
    root = config.input_path
    if root is None:
        raise UsageError("--input is required: a file, or a folder of files")
    for name in ("status_field", "output_format"):
        if getattr(config, name):
            raise UsageError(f"{flag(name)} goes with tables (Parquet, CSV, a Dataset), not JSON")
    if config.samples > 1:
        raise UsageError("--samples goes with tables (Parquet, CSV, a Dataset), not JSON")
    if config.inplace and len(config.devices) > 1:
        raise UsageError("--inplace goes with one device; write to --output")
    if config.inplace and config.output_path is not None:
        raise UsageError("--inplace and --output do not go together")
    output, single = (None, False) if config.inplace else output_of(config)
    if single and output is not None:
        _check_alike(root, output)
    reports = reports_of(config, output, single)
    ours = [config.cache_dir, *(beside(reports, name) for name in LEFT_BEHIND)]
    if output is not None:
        ours.append(output)
    found = discover(root, config.input_glob, ours)
    refuse_unread(found.unread, config.on_bad_input)
    plan = Plan(root, found.sources, output, reports, single, found.unread)
    _check_places(plan)
    _remark_on(plan)
    return plan


def _remark_on(plan: Plan) -> None:
    """Says what a run is about to do to files that are not of an earlier run over this input."""
    output = plan.output
    if output is None or plan.single or beside(plan.reports, REPORT).exists():
        return
    there = any(map(os.path.lexists, plan.places.values()))
    inside = output.absolute().is_relative_to(plan.root.absolute())
    if there and plan.reports.name != output.absolute().name:
        log.warning("%s: files that a run over another input has written are replaced", output)
    elif inside and output.is_dir() and any(output.iterdir()):
        log.warning("%s: what is in it is no input: it is written to", output)


def output_of(config: RunConfig) -> tuple[Path, bool]:
    """Where records are written to, and whether that is one file and not a folder.

    Raises: UsageError.
    """
    root, output = config.input_path, config.output_path or DEFAULT_OUTPUT
    assert root is not None
    if output == STANDARD:
        if root.is_dir() and not _is_table_folder(config):
            raise UsageError("--output -: the input is a folder, and one stream cannot mirror it")
        return config.cache_dir / "runs" / _own_name(config), False
    named = kind_of(output.name) or output.suffix.lower() in TABLE_SUFFIXES
    if not os.path.isdir(output):  # noqa: PTH112 - Path.is_dir raises where it may not look
        check_writable(output if named else output.parent)
    if named and not output.is_dir():
        if root.is_dir() and kind_of(output.name) and not _is_table_folder(config):
            raise UsageError(f"--output {output}: the input is a folder, so name a folder")
        return output, True
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output}: not a folder, nor a name of a file of records")
    return output, False


def _is_table_folder(config: RunConfig) -> bool:
    from fabe_ds.formats.table import is_table

    return is_table(config)


def reports_of(config: RunConfig, output: Path | None, single: bool) -> Path:
    """What the report of a run stands beside: its output, or a place in the cache folder. The
    report of another input there is left alone."""
    assert config.input_path is not None
    if output is None or config.output_path == STANDARD:
        return config.cache_dir / "runs" / _own_name(config)
    return output if single else _apart(output, config.input_path)


def _own_name(config: RunConfig) -> str:
    assert config.input_path is not None
    name = config.input_path.resolve().name or "root"
    if len(os.fsencode(name)) > NAME_BYTES:  # with what is put behind it, it would be too long
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    if config.output_path == STANDARD:  # two such runs at once must never meet
        return f"{name}-{_digest(config.input_path)}"
    return _apart(config.cache_dir / "runs" / name, config.input_path).name


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
        return str(json.loads(report.read_text(encoding="utf-8"))["config"]["input_path"])
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


def check_reports(reports: Path) -> None:
    """Raises: UsageError where the report cannot be written, or what stands beside it."""
    for name in LEFT_BEHIND:
        check_file_writable(beside(reports, name))


def _check_places(plan: Plan) -> None:
    """Raises: UsageError where the output would replace the input, or cannot be written."""
    names: dict[str, str] = {}
    folders: dict[str, bool] = {}  # and whether they are there
    check_reports(plan.reports)
    for source in plan.sources:
        other = names.setdefault(source.name.casefold(), source.name)
        if other != source.name:
            log.warning("%s and %s differ in case alone", other, source.name)
        place = plan.places[source.name]
        folder = os.path.split(place)[0] or "."
        if folder not in folders:  # a new file, in place too
            check_writable(Path(folder))
            folders[folder] = os.path.isdir(folder)  # noqa: PTH112
        if folders[folder] and os.path.lexists(place):
            if plan.output is not None and _is_same(place, source.path):
                raise UsageError(
                    f"--output {plan.output}: would replace the input {source.path}; ask for it "
                    "with --inplace"
                )
            check_file_writable(Path(place))


def _is_same(place: str, source: Path) -> bool:
    try:
        return os.path.samefile(place, source)  # noqa: PTH121
    except OSError:
        return False
