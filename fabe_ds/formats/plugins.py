"""Formats of other packages: what they lack, and what they do wrong, is said in a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fabe_ds.errors import FabeError, RunStopped, first_line
from fabe_ds.formats.base import Format, Records, Row, Source, Tick, states_of
from fabe_ds.plugins import watched


def lacking(found: object) -> str | None:
    """What a class lacks to be a format, for people; None where nothing."""
    if not isinstance(found, type) or not issubclass(found, Format):
        return "is not a class derived from fabe_ds.formats.Format"
    lacks = [f"{name}()" for name in sorted(found.__abstractmethods__)]
    if not isinstance(getattr(found, "name", None), str):
        lacks.append("name")
    suffixes = found.suffixes
    if not isinstance(suffixes, tuple) or not all(
        isinstance(suffix, str) and suffix.startswith(".") for suffix in suffixes
    ):
        lacks.append("suffixes, a tuple of texts like '.txt'")
    return f"lacks {', '.join(lacks)}" if lacks else None


def guarded(cls: type[Format]) -> type[Format]:
    """The class with its methods watched: what they raise, and give, that they should not."""
    passes = (FabeError, OSError)
    methods: dict[str, Any] = {
        name: watched(_where(cls, name), getattr(cls, name), check, passes=passes)
        for name, check in _CHECKS.items()
    }
    methods["load"] = _with_states(methods["load"])
    methods["rows"] = _watched_rows(cls)
    # This class has no name that a worker could import it by.
    methods["__reduce__"] = lambda self: (_guarded_again, (cls, self.settings))
    return type(cls.__name__, (cls,), {**methods, "__module__": cls.__module__})


def _where(cls: type[Format], name: str) -> str:
    return f"format {cls.name}: {cls.__name__}.{name}()"


def _with_states(load: Callable[..., Records]) -> Any:
    """Looks at the files before they are loaded, so that one that changes meanwhile is noticed."""

    def loading(self: Format, source: Source, tick: Tick) -> Records:
        states = states_of(source.files)
        records = load(self, source, tick)
        if not records.states:
            files = {location for location, _ in records.parts}
            records.states = {name: state for name, state in states.items() if name in files}
        return records

    return loading


def _guarded_again(cls: type[Format], settings: Any) -> Format:
    return guarded(cls)(settings)


def _watched_rows(cls: type[Format]) -> Any:
    def rows(self: Format, table: Any, whole: bool) -> Iterator[Row]:
        where, fields, count = _where(cls, "rows"), len(self.targets.names), 0
        try:
            for row in cls.rows(self, table, whole):
                if not isinstance(row, Row) or len(row.texts) != fields:
                    what = "no Row" if not isinstance(row, Row) else f"{len(row.texts)} texts"
                    message = f"gave {what}, where a record has {fields} fields"
                    raise RunStopped(f"{where} {message}")
                count += 1
                yield row
        except FabeError:
            raise
        except Exception as error:
            what = f"raised {type(error).__name__}: {first_line(error)}"
            raise RunStopped(f"{where} {what}") from error
        if count != len(table):
            message = f"gave {count} rows of {len(table)} records"
            raise RunStopped(f"{where} {message}")

    return rows


def _records(result: object, *_: object) -> str | None:
    if not isinstance(result, Records):
        return f"{type(result).__name__}, not Records"
    count = sum(rows for _, rows in result.parts)
    return None if count == len(result) else f"parts of {count} rows, and {len(result)} records"


def _mapping(result: object, *_: object) -> str | None:
    return None if isinstance(result, Mapping) else f"{type(result).__name__}, not a dict"


_CHECKS: dict[str, Callable[..., str | None]] = {
    "load": _records,
    "where": _mapping,
    "write": _mapping,
}
