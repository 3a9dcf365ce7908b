"""Every exception that fabe-ds raises on purpose. The command line prints the message alone."""

from __future__ import annotations

from pathlib import Path

RECORDS_FAILED = 1
USAGE = 2
INTERRUPTED = 130


class FabeError(Exception):
    """Base of the tree; `exit_code` is what the command line ends with."""

    exit_code = RECORDS_FAILED


class UsageError(FabeError):
    """The call itself is wrong: a flag, a configuration key, a path."""

    exit_code = USAGE


class TemplateError(UsageError):
    """An instruction template that cannot be rendered for any record."""


class InputError(FabeError):
    """A file that is not the JSON it claims to be."""

    exit_code = USAGE

    def __init__(
        self, path: Path | str, message: str, line: int | None = None, column: int | None = None
    ) -> None:
        place = ":".join(str(part) for part in (path, line, column) if part is not None)
        super().__init__(f"{place}: {message}")
        self.path, self.line, self.column, self.reason = path, line, column, message


class ExportError(FabeError):
    """Records that cannot be written back."""


class CacheError(FabeError):
    """The record cache cannot be used; nothing is sent until it can."""


class RunStopped(FabeError):
    """The whole run cannot go on (key refused, model unknown, server gone)."""


class ServerAway(RunStopped):
    """No server answers at an address."""


class RecordFailed(FabeError):
    """One record failed; the others go on.

    `kind` is the short class shown in the failures file: prompt, refused, truncated, empty, ...
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class MalformedResponse(FabeError):
    """A server's answer that does not follow its protocol; worth another try."""


READING_FAULTS = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What reading an answer may raise that is not as its protocol has it."""


def first_line(error: BaseException) -> str:
    """The first line an error has to say, else its name: libraries write many."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def reason(error: OSError | ValueError) -> str:
    """Why a file could not be read or written, as the system says it."""
    return getattr(error, "strerror", None) or first_line(error)
