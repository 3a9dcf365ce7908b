"""Classes of other packages: found by entry points, and watched while they work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

from fabe_ds.errors import FabeError, RunStopped, UsageError, first_line


def imported(what: str, entry: EntryPoint) -> Any:
    """What an entry point names. Raises: UsageError, which begins with `what`."""
    try:
        return entry.load()
    except Exception as error:  # it runs another package's code
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        message = f"{what} cannot be imported: {kind}{first_line(error)}"
        raise UsageError(message) from error


def watched(
    where: str,
    method: Callable[..., Any],
    check: Callable[..., str | None],
    raises: type[FabeError] = RunStopped,
    passes: tuple[type[Exception], ...] = (FabeError,),
) -> Callable[..., Any]:
    """A method that raises `raises`, which begins with `where`, for any error but those of
    `passes`, and RunStopped for a result of which `check`, given it and the arguments, says that
    it is wrong."""

    @functools.wraps(method)
    def watching(self: object, *args: Any) -> Any:
        try:
            result = method(self, *args)
        except passes:
            raise
        except Exception as error:
            what = f"{where} raised {type(error).__name__}: {first_line(error)}"
            raise raises(what) from error
        if wrong := check(result, *args):
            raise RunStopped(f"{where} gave {wrong}")
        return result

    return watching
