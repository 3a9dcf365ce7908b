"""Formats of other packages: what they lack, and what they do wrong, is said in a line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fabe_ds.errors import FabeError, RunStopped, first_line
from fabe_ds.formats.base import Format, Records, Row


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
    methods: dict[str, Any] = {name: _watched(cls, name, check) for name, check in _CHECKS.items()}
    methods["rows"] = _watched_rows(cls)
    # This class has no name that a worker could import it by.
    methods["__reduce__"] = lambda self: (_guarded_again, (cls, self.settings))
    return type(cls.__name__, (cls,), {**methods, "__module__": cls.__module__})


def _guarded_again(cls: type[Format], settings: Any) -> Format:
    return guarded(cls)(settings)


def _watched(cls: type[Format], name: str, check: Callable[[Any], str | None]) -> Any:
    method = getattr(cls, name)

    @functools.wraps(method)
    def watched(self: Format, *args: Any) -> Any:
        try:
            result = method(self, *args)
        except (FabeError, OSError):
            raise
        except Exception as error:
            raise _raised(cls, name, error) from error
        if wrong := check(result):
            raise RunStopped(f"format {cls.name}: {cls.__name__}.{name}() gave {wrong}")
        return result

    return watched


def _watched_rows(cls: type[Format]) -> Any:
    def rows(self: Format, table: Any, whole: bool) -> Iterator[Row]:
        fields = len(self.targets.names)
        count = 0
        try:
            for row in cls.rows(self, table, whole):
                if not isinstance(row, Row) or len(row.texts) != fields:
                    what = "no Row" if not isinstance(row, Row) else f"{len(row.texts)} texts"
                    message = f"gave {what}, where a record has {fields} fields"
                    raise RunStopped(f"format {cls.name}: {cls.__name__}.rows() {message}")
                count += 1
                yield row
        except FabeError:
            raise
        except Exception as error:
            raise _raised(cls, "rows", error) from error
        if count != len(table):
            message = f"gave {count} rows of {len(table)} records"
            raise RunStopped(f"format {cls.name}: {cls.__name__}.rows() {message}")

    return rows


def _raised(cls: type[Format], name: str, error: Exception) -> RunStopped:
    what = f"raised {type(error).__name__}: {first_line(error)}"
    return RunStopped(f"format {cls.name}: {cls.__name__}.{name}() {what}")


def _records(result: object) -> str | None:
    if not isinstance(result, Records):
        return f"{type(result).__name__}, not Records"
    count = sum(rows for _, rows in result.parts)
    return None if count == len(result) else f"parts of {count} rows, and {len(result)} records"


def _mapping(result: object) -> str | None:
    return None if isinstance(result, Mapping) else f"{type(result).__name__}, not a dict"


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "load": _records,
    "where": _mapping,
    "write": _mapping,
}
