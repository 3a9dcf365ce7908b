"""One thread a process that owns the event loop, whoever calls from wherever."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

STOP_SECONDS = 5.0


class LoopThread:
    """An event loop that runs in a daemon thread, uvloop's where it is installed."""

    _shared: LoopThread | None = None
    _guard = threading.Lock()

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = _new_loop()
        self.ended = False
        self._closing: set[asyncio.Task[object]] = set()
        self._thread = threading.Thread(target=self._run, name="fabe-ds-engine", daemon=True)
        self._thread.start()
        # A timer that woke the thread once the interpreter is gone would kill the process.
        atexit.register(self._end)

    @classmethod
    def shared(cls) -> LoopThread:
        """This process's one; a forked child gets its own."""
        with cls._guard:
            if cls._shared is None or cls._shared.pid != os.getpid():
                cls._shared = cls()
            return cls._shared

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _end(self) -> None:
        if self.pid == os.getpid():
            self.ended = True
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(STOP_SECONDS)

    def finish(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Runs something to its end, or lets the loop's own thread do so later: a finalizer may
        run on any thread, and the loop cannot wait for itself. After the loop's end it is dropped.
        """
        if self.ended or self.pid != os.getpid():  # Python's exit, or a forked child
            coroutine.close()
        elif threading.current_thread() is self._thread:
            task = self.loop.create_task(coroutine)
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        else:
            self.call(coroutine)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What the coroutine gives, run on the loop; the caller waits."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
