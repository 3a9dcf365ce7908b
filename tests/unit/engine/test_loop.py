"""The loop's thread and the end of the interpreter."""

from __future__ import annotations

import subprocess
import sys

# Sixty loops, each with one timer that fires at another moment of Python's way down: a thread that
# one of them wakes too late finds no interpreter, and dies of a segmentation fault.
SCRIPT = """
import time
import datasets
from fabe_ds.engine.loop import LoopThread

for number in range(60):
    loop = LoopThread().loop
    delay = 0.05 + 0.005 * number
    loop.call_soon_threadsafe(lambda loop=loop, delay=delay: loop.call_later(delay, int))
time.sleep(0.03)
"""


def test_no_timer_outlives_the_interpreter():
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")
