"""The scripts that a person starts by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "scripts/serve_and_run.sh"
SERVER = """
import sys, threading
sys.path.insert(0, {repo!r})
from tests.support.server import ModelServer
with ModelServer(port=int(sys.argv[1])):
    threading.Event().wait()
"""


def serve_and_run(box, *args):
    return subprocess.run(
        [SCRIPT, *map(str, args)],
        cwd=box.path,
        env=box.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def port_of_a_server_that_is_gone() -> int:
    from tests.support.server import ModelServer

    with ModelServer() as server:
        return int(server.root.rsplit(":", 1)[1])


def test_a_server_is_started_used_and_stopped(box):
    port = port_of_a_server_that_is_gone()
    box.write("server.py", SERVER.format(repo=str(REPO)))
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(5)])
    url = f"http://127.0.0.1:{port}/v1"
    server = (sys.executable, "server.py", port)
    run = ("--input", "data.jsonl", "--instruction", "Up", "--model", "m")
    ended = serve_and_run(box, "-u", url, *server, "--", *run)
    assert ended.returncode == 0, ended.stderr
    assert [record["code"] for record in box.read("outputs/data.jsonl")] == [
        f"X = {i}" for i in range(5)
    ]
    once_more = serve_and_run(box, "-u", url, *server, "--", *run, "--validate", "regex:^Q$")
    assert once_more.returncode == 1, "the port is free again, and the exit code is fabe-ds's"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "no -u"),
        (("-u", "http://127.0.0.1:1/v1"), "no server command"),
        (("-u", "http://127.0.0.1:1/v1", "false"), "no -- and flags"),
        (("-u", "http://127.0.0.1:1/v1", "false", "--"), "ended before it answered"),
        (("-u", "http://127.0.0.1:1/v1", "-w", "1", "sleep", "30", "--"), "no answer from"),
    ],
)
def test_what_is_wrong_is_one_line(box, args, said):
    ended = serve_and_run(box, *args)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_run_in_short_options_in_whatever_shell(box, shell):
    """as the seed starts it, with a shell that knows no pipefail."""
    box.lines("data.jsonl", [{"code": "x = 1"}])
    script = REPO / "scripts/run_infer.sh"
    ended = subprocess.run(
        [shell, script, "-i", "data.jsonl", "-P", "echo", "-o", "out"],
        cwd=box.path,
        env={**box.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    assert box.read("out/data.jsonl")[0]["original_code"] == "x = 1"
