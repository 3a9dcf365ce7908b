"""Ray, joined or started."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from fabe_ds.config.settings import RunConfig
from fabe_ds.errors import UsageError, first_line

CONNECT_SECONDS = 10.0


@contextlib.contextmanager
def cluster(config: RunConfig) -> Iterator[None]:
    """Ray, joined where there is an address and else started on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise UsageError("--runner ray needs fabe-ds[ray]: pip install 'fabe-ds[ray]'") from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # we say what is wrong, in a line
    if ray.is_initialized():
        yield
        return
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise UsageError(
            f"--ray-address {address}: start the command on a node of the cluster instead (ray job "
            "submit), where its files and its record cache are"
        )
    if address and (place := re.fullmatch(r"(.+):(\d+)", address)):
        try:  # Ray itself would try for minutes
            socket.create_connection((place[1], int(place[2])), CONNECT_SECONDS).close()
        except OSError as error:
            raise UsageError(f"--ray-address {address}: nothing answers there ({error})") from None
    options: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        with _own_handlers(), _without_stderr():
            ray.init(
                address or "local",
                log_to_driver=config.log_level == "DEBUG",
                logging_level=logging.ERROR,
                **options,
            )
    except (ConnectionError, ValueError, OSError, RuntimeError) as error:
        raise UsageError(f"--ray-address {address or 'local'}: {first_line(error)}") from None
    try:
        yield
    finally:
        with _own_handlers():
            ray.shutdown()


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray says at its start, past all of Python's logging, which level of logging it was given."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Puts our handlers of signals back where Ray sets its own."""
    ours = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in ours.items():
                signal.signal(number, handler)
