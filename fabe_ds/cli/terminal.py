"""The process's surroundings: signals, streams, log, and how errors are said."""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from typing import TextIO

from fabe_ds.errors import INTERRUPTED, first_line, reason

LINE_SHOWN = 1000
"""Characters of a complaint."""


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is when a line is logged: a progress bar stands in for it, and
    puts the line above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def log_to_stderr(level: str) -> None:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[_ToStderr()],
        force=True,
    )
    logging.getLogger("fabe_ds").setLevel(level)
    if level != "DEBUG":
        for noisy in ("datasets", "transformers", "modelscope"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


@contextlib.contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM, and SIGHUP where it is not ignored (nohup), end a run as Ctrl-C does; a second
    signal of these ends it at once."""

    def interrupt(number: int, frame: object) -> None:
        for either in before:
            signal.signal(either, _drop)
        print("stopping: waiting for what is on its way (again to drop it)", file=sys.stderr)
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drop(*_: object) -> None:
    """Ends at once; a bar may have hidden the cursor."""
    with contextlib.suppress(OSError):
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), b"\x1b[?25h\n")
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def ended_by_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets while the block runs, in which nothing is lost."""
    over = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: over.set()) for number in numbers}
    try:
        yield over
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def use_any_terminal() -> None:
    """What a terminal cannot show is written as an escape; a stream that is closed is none."""
    codecs.register_error("fabe-ds", _escaped)
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - until we end
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fabe-ds")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Bytes of a file's name that are no UTF-8 as \\xNN, other characters as Python has them."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    shown = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text)
    return shown.encode("ascii", "backslashreplace").decode(), error.end


def complain(message: str) -> None:
    """Says what is wrong, in one line."""
    message = " ".join(message.split("\n"))
    if len(message) > LINE_SHOWN:
        message = f"{message[:LINE_SHOWN]}..."
    with contextlib.suppress(OSError):  # standard error is full: the exit code says it
        print(f"fabe-ds: {message}", file=sys.stderr, flush=True)


def unexpected(error: Exception) -> str:
    """What is said of a fault of ours. Where it is goes into a file."""
    what = f"a fault of fabe-ds: {type(error).__name__}: {first_line(error)}"
    try:
        handle, name = tempfile.mkstemp(prefix="fabe-ds-", suffix=".txt")
        with os.fdopen(handle, "w", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return what
    return f"{what}; please report it, with {name}"


def flushed(code: int) -> int:
    """The exit code, when what was printed is where it belongs."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            complain(f"standard output: {reason(error)}")
        with contextlib.suppress(OSError):  # or the interpreter complains of it once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 1
    return code
