"""What a run says on a terminal, in a pipe, quietly, and to a script."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import signal
import subprocess
import termios

import pytest

from tests.conftest import COMMAND, Box
from tests.support.server import ModelServer, completion, error, openai_run

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def on_a_terminal(box: Box, *words: object, width: int = 80, **environment: str) -> str:
    """What a command writes to a terminal of this width."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, width))
    inherited = {name: value for name, value in box.environment.items() if name != "COLUMNS"}
    process = subprocess.Popen(
        [*COMMAND, *map(str, words)],
        cwd=box.path,
        env={**inherited, "TERM": "xterm-256color", **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 1 << 16):
            shown += part
    except OSError as closed:
        if closed.errno != errno.EIO:  # how Linux says that the other end is closed
            raise
    os.close(ours)
    process.wait(timeout=60)
    return shown.decode()


async def behave(call):
    if "x = 7" in call.prompt:
        return error(400, "this prompt is not for me, ask somebody else about such things please")
    return completion(call, "X = 2")


@pytest.fixture
def run(box):
    """The flags of a run of ten records, of which one fails and one has no text."""
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(9)] + [{"code": ""}])
    with ModelServer(behave, latency=0.5) as server:
        yield openai_run(server)


def panel(shown: str) -> list[str]:
    """The lines of the summary, as they stand on the screen."""
    lines = [CONTROL.sub("", line) for line in shown.split("\n")]
    first = next(n for n, line in enumerate(lines) if "╭" in line)
    last = next(n for n, line in enumerate(lines) if "╰" in line)
    return lines[first : last + 1]


def test_a_terminal_shows_a_bar_and_then_a_panel(box, run):
    shown = on_a_terminal(box, *run)
    assert "━" in shown
    assert re.search(r"\d/10, ", shown)
    lines = panel(shown)
    text = "\n".join(lines)
    assert "10 records" in lines[0]
    assert re.search(r"rewritten +8", text)
    assert re.search(r"failed +1 \(1 rejected\)", text)
    assert "record data.jsonl:8: " in text
    assert "refused by the server" in text
    assert re.search(r"skipped +1 \(1 empty\)", text)
    assert re.search(r"requests +9 \(0 retries\)", text)
    assert re.search(r"failures +outputs.failures.jsonl", text)
    # red means failed, green rewritten
    assert re.search(r"\x1b\[32mrewritten", shown)
    assert re.search(r"\x1b\[31mfailed", shown)


@pytest.mark.parametrize("width", [40, 60, 120])
def test_the_panel_keeps_to_the_width(box, run, width):
    lines = panel(on_a_terminal(box, *run, width=width))
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= width
    words = re.sub(r"[│╭╮╰╯─]", " ", " ".join(lines))
    assert "ask somebody else about such things please" in " ".join(words.split())


def test_no_color_means_no_colour(box, run):
    shown = on_a_terminal(box, *run, NO_COLOR="1")
    codes = {code for found in COLOUR.findall(shown) for code in found[2:-1].split(";")}
    assert codes <= {"", "0", "1", "2"}, codes  # bold and dim are no colours
    assert panel(shown)


def test_a_dumb_terminal_gets_plain_lines(box, run):
    shown = on_a_terminal(box, *run, TERM="dumb")
    assert "10 records: 8 rewritten, 0 from cache, 1 failed; 1 skipped (1 empty); " in shown
    assert "╭" not in shown


def test_a_pipe_gets_plain_lines(box, run):
    ended = box.fabe(*run)
    assert ended.out.startswith("10 records: 8 rewritten, 0 from cache, 1 failed; ")
    assert "\x1b" not in ended.out + ended.err


def test_quiet_says_what_went_wrong_and_nothing_else(box, run):
    ended = box.fabe(*run, "--quiet")
    assert (ended.code, ended.out) == (1, "")
    (line,) = ended.err.splitlines()
    assert line.startswith("fabe-ds: 1 of 10 records failed (1 rejected): ")
    box.lines("data.jsonl", [{"code": "x = 1"}])
    ended = box.fabe(*run, "-q")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    ended = box.fabe(*run, "-q", "--input", "gone.jsonl")
    assert ended.code == 2
    assert ended.err.count("\n") == 1


def test_a_run_that_asks_for_nothing_says_so(box):
    box.lines("data.jsonl", [{"code": 1}, {"code": ""}, {"code": None}])
    said = "nothing was asked for: no record has a text at code"
    ended = box.fabe("run", "--input", "data.jsonl")
    assert (ended.code, f"note: {said}\n" in ended.out) == (0, True)
    ended = box.fabe("run", "--input", "data.jsonl", "--quiet")
    assert (ended.out, ended.err) == ("", f"fabe-ds: {said}\n")


def test_json_is_one_object_on_standard_output(box, run):
    ended = box.fabe(*run, "--json")
    assert ended.code == 1
    told = json.loads(ended.out)
    assert told["exit_code"] == 1
    counts = {name: told[name] for name in ("records", "done", "cached", "failed", "requests")}
    assert counts == {"records": 10, "done": 8, "cached": 0, "failed": 1, "requests": 9}
    assert told["skipped"] == {"empty": 1}
    assert told["failures_by_kind"] == {"rejected": 1}
    assert told["outputs"] == ["outputs/data.jsonl"]
    assert box.read("outputs.failures.jsonl")[0]["line"] == 8
    assert "10 records: 8 rewritten" in ended.err
    again = box.fabe("retry", "outputs.run.json", "--json", "--quiet")
    assert json.loads(again.out)["cached"] == 8
    assert again.err.count("\n") == 1


def test_json_of_a_run_that_stopped(box, run, server):
    """A script reads one object whatever happens."""
    nowhere = "http://127.0.0.1:9/v1"
    for command, code, said in (
        ([*run, "--max-requests", 2], 1, "--max-requests"),
        (["gone.jsonl" if word == "data.jsonl" else word for word in run], 2, "gone.jsonl"),
        ([nowhere if "http" in str(word) else word for word in run], 1, "127.0.0.1:9"),
        ([*run, "--config", "gone.yaml"], 2, "gone.yaml"),
    ):
        ended = box.fabe(*command, "--json", "--give-up-after", 1)
        told = json.loads(ended.out)
        assert (ended.code, told["exit_code"]) == (code, code)
        assert said in told["error"]
        assert told["error"] in ended.err


def test_the_cursor_comes_back_after_two_interrupts(box, run):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, run), "--concurrency", "1"],
        cwd=box.path,
        env={**box.environment, "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):
        while part := os.read(ours, 1 << 16):
            shown += part
            if (b"records/s" in shown and b"stopping" not in shown) or b"stopping" in shown:
                process.send_signal(signal.SIGINT)
    os.close(ours)
    assert process.wait(timeout=30) == 130
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


def test_a_dry_run_tells_a_script_too(box, run):
    ended = box.fabe(*run, "--dry-run", "--json")
    assert ended.code == 0
    told = json.loads(ended.out)
    assert (told["records"], told["to_do"], told["to_send"]) == (10, 9, 9)
    assert told["tokens"]["prompt"] > 0
    quiet = box.fabe(*run, "--dry-run", "--quiet")
    assert quiet.out.startswith("dry run: 10 records, 9 to do")


def test_records_and_a_summary_do_not_share_standard_output(box, run):
    ended = box.fabe(*run, "--json", "--output", "-")
    assert ended.code == 2
    assert ended.err == "fabe-ds: --json: standard output is for the records (--output -)\n"


def test_the_command_alone_says_what_to_do_first(box):
    ended = box.fabe()
    assert ended.code == 0
    for words in ("fabe-ds run --input", "fabe-ds preview", "fabe-ds doctor", "fabe-ds --help"):
        assert words in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
