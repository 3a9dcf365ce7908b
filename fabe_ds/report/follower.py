"""The page of a run that goes on, served on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fabe_ds.errors import UsageError, reason
from fabe_ds.report.charts import charts_of
from fabe_ds.report.live import SECONDS
from fabe_ds.report.page import classes_told, page_data, page_of, samples_shown, tiles
from fabe_ds.report.run_report import RunReport
from fabe_ds.run_files import live_file, of_report

HOST = "127.0.0.1"


class Watched:
    """What there is to see of one run: what its live file says while it goes on; when that is gone,
    the report, if it is of this run, or else the last that was seen."""

    def __init__(self, report: Path, since: float = 0.0) -> None:
        """`since`: seconds since the epoch; a report that is older is of an earlier run."""
        self._report, self._since = report, since
        self._name = of_report(report, "x").stem
        self._last: dict[str, Any] | None = None

    def data(self) -> dict[str, Any]:
        """What the page shows. Raises: UsageError."""
        live = live_file(self._report)
        try:
            told = json.loads(live.read_text(encoding="utf-8"))
            is_there = _is_fresh(live) or _is_alive(told["pid"])
            shown = self._shown(told)
        except OSError:
            return self._ended()
        except (ValueError, KeyError, TypeError, AttributeError):  # not as a run writes it
            return self._ended()
        if not is_there:
            return _stopped(shown, "killed")
        self._since, self._last = told["began"], shown
        return shown

    def _ended(self) -> dict[str, Any]:
        try:
            # The clock of file systems is a little coarse.
            is_new = self._report.stat().st_mtime >= self._since - 0.01
        except OSError:
            is_new = False
        if is_new:
            return page_data(self._report)
        if self._last is not None:
            return _stopped(self._last, "stopped")
        waiting = {"done": 0, "total": 0, "line": "waiting for the run to begin"}
        return {**_EMPTY, "name": self._name, "state": "waiting", "progress": waiting}

    def _shown(self, told: dict[str, Any]) -> dict[str, Any]:
        run = _as_report(told)
        latest = [
            {"where": f"answer {number}", "before": before, "after": after}
            for number, (before, after) in enumerate(reversed(told["latest"]), 1)
        ]
        first = [
            {"kind": kind, "where": "the first", "message": text, "texts": [], "input": ""}
            for kind, text in told["messages"].items()
        ]
        return {
            **_EMPTY,
            "name": self._name,
            "about": told["about"],
            "state": "running",
            "progress": {name: told[name] for name in ("done", "total", "line")},
            "tiles": tiles(run),
            "notes": told["notes"],
            "charts": charts_of(run),
            "classes": classes_told(told["failures"]),
            "failures": first,
            "in_place": told["in_place"],
            "samples": samples_shown(latest, told["in_place"]),
        }


def _stopped(shown: dict[str, Any], how: str) -> dict[str, Any]:
    """The same of a run that did not come to its end."""
    progress = shown["progress"]
    line = f"{how} at {progress['line']}; run it again to go on"
    return {**shown, "state": how, "progress": {**progress, "line": line}}


_EMPTY: dict[str, Any] = {
    "about": "",
    "in_place": True,
    "tiles": [],
    "notes": [],
    "charts": [],
    "classes": [],
    "failures": [],
    "samples": [],
    "settings": [],
}


def _as_report(told: dict[str, Any]) -> RunReport:
    """The counts so far, as if the run had ended."""
    counts, (prompt, completion) = told["counts"], told["tokens"]
    settled = counts["done"] + counts["cached"] + counts["failed"] + told["skipped"]
    return RunReport(
        fabe_ds=told["fabe_ds"],
        config={},
        outputs=[],
        records=settled,
        skipped={"so far": told["skipped"]},
        seconds=told["seconds"],
        prompt_tokens=prompt,
        completion_tokens=completion,
        history=told["history"],
        latency=told["latency"],
        **counts,
    )


def _is_fresh(place: Path) -> bool:
    """Whether the file was written just now: its writer may be on another machine."""
    try:
        return time.time() - place.stat().st_mtime < 10 * SECONDS
    except OSError:
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


class Follower:
    """Serves the page of a run on this machine alone, until it is closed."""

    def __init__(self, report: Callable[[], Path | None], port: int = 0, since: float = 0) -> None:
        """`report` is where the run leaves its report, once that is known; `port` 0 is any that is
        free; of `since`, see `Watched`. Raises: UsageError where the port is taken."""
        self._report, self._since = report, since
        self._watched: Watched | None = None
        self._is_over = False
        follower = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                follower._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing of requests: standard error is the run's."""

        try:
            self._server = ThreadingHTTPServer((HOST, port), Handler)
        except OSError as error:
            raise UsageError(f"--port {port}: {reason(error)}") from None
        self._server.daemon_threads = True
        self.url = f"http://{HOST}:{self._server.server_port}/"
        self._asked = 0.0
        self._told_end = threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        # A page of elsewhere may not read this one through a name of its own for this machine.
        host = (request.headers.get("Host") or "").partition(":")[0]
        path = request.path.partition("?")[0]
        if host not in (HOST, "localhost") or path not in ("/", "/data.json"):
            request.send_error(404)
            return
        if path == "/":
            self._send(request, "text/html", page_of(None))
            return
        self._asked, was_over = time.monotonic(), self._is_over
        try:
            data = self._data()
        except UsageError as error:
            line = {"done": 0, "total": 0, "line": str(error)}
            data = {**_EMPTY, "name": "fabe-ds", "state": "gone", "progress": line}
        self._send(request, "application/json", json.dumps(data))
        if was_over:
            self._told_end.set()

    def _data(self) -> dict[str, Any]:
        report = self._report()
        if report is None:
            return _waiting()
        if self._watched is None:
            self._watched = Watched(report, self._since)
        return self._watched.data()

    def _send(self, request: BaseHTTPRequestHandler, kind: str, text: str) -> None:
        body = text.encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError):  # the browser has gone
            request.send_response(200)
            request.send_header("Content-Type", f"{kind}; charset=utf-8")
            request.send_header("Content-Length", str(len(body)))
            request.send_header("Cache-Control", "no-store")
            request.end_headers()
            request.wfile.write(body)

    def close(self) -> None:
        """Ends; a page that is open is first told how the run has ended."""
        self._is_over = True
        if self._asked and time.monotonic() - self._asked < 3 * SECONDS:
            self._told_end.wait(3 * SECONDS)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _waiting() -> dict[str, Any]:
    line = {"done": 0, "total": 0, "line": "loading"}
    return {**_EMPTY, "name": "fabe-ds", "state": "waiting", "progress": line}
