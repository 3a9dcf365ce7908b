"""Entry point of the command line: every error is one line, and an exit code."""

from __future__ import annotations

import difflib
import os
import sys
from typing import Any

import typer

from fabe_ds.cli.commands import app
from fabe_ds.cli.terminal import complain, flushed, terminating, unexpected, use_any_terminal
from fabe_ds.config.settings import VERY_NEAR
from fabe_ds.errors import INTERRUPTED, USAGE, FabeError, reason

# Typer comes with a click of its own, or uses the installed one, by its version.
_CallError: type[Any] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


def main() -> None:
    """Entry point of the commands. Every error is one line; exit codes are those of errors.py."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars would write over ours
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    use_any_terminal()
    try:
        with terminating():
            code = app(standalone_mode=False)
            sys.stdout.flush()
    except typer.Exit as error:
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except _CallError as error:
        _suggest_near_ones(error)
        if message := error.format_message():  # empty where it was just help that was shown
            complain(message)
        code = USAGE
    except FabeError as error:
        complain(str(error))
        code = error.exit_code
    except BrokenPipeError:
        code = 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        complain(place + reason(error))
        code = 1
    except MemoryError:
        complain("out of memory")
        code = 1
    except Exception as error:
        complain(unexpected(error))
        code = 1
    if code == INTERRUPTED:  # typer makes an Exit of KeyboardInterrupt
        print(
            "stopped; what was answered is kept, run the same command again to go on",
            file=sys.stderr,
        )
    sys.exit(flushed(code if isinstance(code, int) else 0))


def _suggest_near_ones(error: Any) -> None:
    """Leaves of the flags that may have been meant those that are very near."""
    name = getattr(error, "option_name", None)
    if name and getattr(error, "possibilities", None):
        error.possibilities = difflib.get_close_matches(name, error.possibilities, 1, VERY_NEAR)
