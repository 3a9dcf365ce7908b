"""Machines as they are: rights, full disks, terminals, homes, signals. One line, the right exit
code, nothing half written."""

from __future__ import annotations

import ctypes
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import AT_START, COMMAND, Box, Ended, wait_for
from tests.support.server import ModelServer
from tests.support.warm import WITHOUT_RIGHTS

ROOT = os.getuid() == 0
SETPRIV = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
ECHO = "# echo: local\n"


def ran(box: Box, *args: object, **environment: str) -> Ended:
    """The command, obeying the permissions of files even where we are root."""
    if not any(name.startswith(AT_START) for name in environment):
        return box.fabe(*args, **{WITHOUT_RIGHTS: "1"}, **environment)
    command = [*(SETPRIV if ROOT else []), *COMMAND, *map(str, args)]
    ended = subprocess.run(
        command, cwd=box.path, env={**box.environment, **environment}, capture_output=True,
        check=False, timeout=60,
    )  # fmt: skip
    out, err = (text.decode("utf-8", "replace") for text in (ended.stdout, ended.stderr))
    assert "Traceback" not in err, err
    assert "a fault of fabe-ds" not in err, err
    return Ended(ended.returncode, out, err)


def one_line(ended: Ended, code: int, *said: str) -> None:
    assert ended.code == code, ended
    (line,) = (line for line in ended.err.splitlines() if line.startswith("fabe-ds: "))
    for part in said:
        assert part in line, ended


@pytest.fixture
def closed() -> Iterator[list[Path]]:
    """Paths whose rights are taken; they are given back for the folder to be removed."""
    paths: list[Path] = []
    yield paths
    for path in reversed(paths):
        path.chmod(0o755)


RIGHTS = {
    "input file": ("d.jsonl", ["--input", "d.jsonl"], 2, "d.jsonl: cannot be read: Permission"),
    "input folder": ("in", ["--input", "in"], 2, "in: cannot be read: Permission denied"),
    "file in a closed folder": ("in", ["--input", "in/d.jsonl"], 2, "in/d.jsonl: Permission"),
    "subfolder": ("in/sub", ["--input", "in"], 2, "in/sub: cannot be read: Permission denied"),
    "csv": ("d.csv", ["--input", "d.csv"], 2, "d.csv: cannot be read: Permission denied"),
    "parquet": ("d.parquet", ["--input", "d.parquet"], 2, "d.parquet: cannot be read: Permission"),
    "csv in a closed folder": ("in", ["--input", "in/d.csv"], 2, "in/d.csv: "),
    "config": ("c.yaml", ["--config", "c.yaml"], 2, "c.yaml"),
    "instruction": (
        "p",
        ["--input", "e.jsonl", "--instruction", "p/i.j2"],
        2,
        "--instruction p/i.j2: Permission denied",
    ),
    "schema": (
        "s.json",
        ["--input", "e.jsonl", "--validate", "json-schema:s.json"],
        2,
        "json-schema:s.json: Permission denied",
    ),
    "prices": (
        "prices.yaml",
        ["--input", "e.jsonl", "--prices", "prices.yaml"],
        2,
        "--prices prices.yaml: Permission denied",
    ),
    "output below": ("o", ["--input", "e.jsonl", "--output", "o/deep/er"], 2, "o/deep"),
    "output": ("o", ["--input", "e.jsonl", "--output", "o"], 2, "cannot be written"),
    "cache": ("c", ["--input", "e.jsonl", "--cache-dir", "c"], 1, "c/datasets: Permission denied"),
    "cache below": ("c", ["--input", "e.jsonl", "--cache-dir", "c/d"], 1, "c/d: Permission"),
}


@pytest.mark.parametrize(("path", "args", "code", "said"), RIGHTS.values(), ids=RIGHTS)
def test_what_may_not_be_opened_is_one_line(box, closed, path, args, code, said):
    for name in ("d.jsonl", "e.jsonl", "in/d.jsonl", "in/sub/d.jsonl"):
        box.lines(name, [{"code": "x"}])
    for name in ("d.csv", "in/d.csv"):
        box.write(name, "code\nx\n")
    pq.write_table(pa.table({"code": ["x"]}), box.path / "d.parquet")
    box.write("c.yaml", "field: code\n")
    box.write("s.json", "{}")
    box.write("prices.yaml", "m: {prompt: 1, completion: 1}")
    box.write("p/i.j2", "Fix.")
    for name in ("o", "c"):
        (box.path / name).mkdir()
    (box.path / path).chmod(0)
    closed.append(box.path / path)
    one_line(ran(box, "run", *args), code, said)


def test_unreadable_parts_are_left_out_and_named(box, closed):
    for name in ("in/a.jsonl", "in/sub/b.jsonl", "in/c.jsonl"):
        box.lines(name, [{"code": "x"}])
    for name in ("in/sub", "in/c.jsonl"):
        (box.path / name).chmod(0)
        closed.append(box.path / name)
    ended = ran(box, "run", "--input", "in", "--on-bad-input", "skip")
    assert ended.code == 1
    assert "left out: in/sub: cannot be read: Permission denied" in ended.out
    assert "left out: in/c.jsonl: cannot be read: Permission denied" in ended.out
    assert [path.name for path in (box.path / "outputs").iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("outputs.run.json", "a folder has that name"),
        ("outputs.samples.jsonl", "a folder has that name"),
        ("outputs/d.jsonl", "a folder has that name"),
    ],
)
def test_what_stands_in_the_way_is_said_before_anything_is_asked(box, server, made, said):
    box.lines("d.jsonl", [{"code": "x"}])
    (box.path / made).mkdir(parents=True)
    ended = box.fabe(*openai(server, "d.jsonl"))
    one_line(ended, 2, made, said)
    assert not server.calls


def test_reports_that_cannot_be_written_are_said_before_anything_is_asked(box, server, closed):
    box.lines("d.jsonl", [{"code": "x"}])
    (box.path / "p/out").mkdir(parents=True)
    (box.path / "p").chmod(0o555)
    closed.append(box.path / "p")
    ended = ran(box, *openai(server, "d.jsonl", "--output", "p/out"))
    one_line(ended, 2, "p/out.run.json: cannot be written")
    assert not server.calls


def test_a_folder_of_ones_own_keeps_its_mode(box):
    """As root, `--cache-dir /tmp` would have closed it to everyone."""
    box.lines("d.jsonl", [{"code": "x"}])
    (box.path / "c").mkdir(mode=0o775)
    (box.path / "c").chmod(0o775)
    assert box.fabe("run", "--input", "d.jsonl", "--cache-dir", "c").code == 0
    assert (box.path / "c").stat().st_mode & 0o777 == 0o775
    assert (box.path / "c/datasets").stat().st_mode & 0o777 == 0o700


def openai(server: ModelServer, source: str, *more: object) -> list[object]:
    flags = ["--provider", "openai", "--model", "m", "--base-url", server.url, "--instruction", "f"]
    return ["run", "--input", source, *flags, *more]


# A disk that is full.


class Disk:
    """A file system of so many bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._libc = ctypes.CDLL(None, use_errno=True)
        path.mkdir()

    def mount(self, size: str) -> None:
        if self._libc.mount(b"none", bytes(self.path), b"tmpfs", 0, f"size={size}".encode()):
            pytest.skip("no file system may be mounted here")

    def enlarge(self, size: str) -> None:
        remount = 32
        options = f"size={size}".encode()
        assert not self._libc.mount(b"none", bytes(self.path), b"tmpfs", remount, options)

    def unmount(self) -> None:
        self._libc.umount2(bytes(self.path), 2)


@pytest.fixture
def disk(box) -> Iterator[Disk]:
    made = Disk(box.path / "m")
    yield made
    made.unmount()


def records(box: Box, kind: str, size: int) -> str:
    """A file of about so many kB."""
    rows = [{"id": n, "code": f"x = {n}  # " + "y" * 980} for n in range(size)]
    name = f"d.{kind}"
    if kind == "jsonl":
        box.lines(name, rows)
    elif kind == "csv":
        box.write(name, "id,code\n" + "".join(f"{r['id']},{r['code']}\n" for r in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), box.path / name, compression="none")
    return name


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("where", ["cache", "output", "both"])
@pytest.mark.parametrize("size", [60, 120, 200, 260, 600])
def test_a_full_disk_is_one_line_and_then_the_run_goes_on(box, disk, kind, where, size):
    """300 kB, which inputs of many sizes fill in one phase or another: while they are loaded,
    answered, written, reported."""
    disk.mount("300k")
    source = records(box, kind, size)
    args = ["run", "--input", source]
    args += ["--cache-dir", "m/c"] if where != "output" else []
    args += ["--output", "m/out"] if where != "cache" else []
    clean = box.fabe("run", "--input", source, "--output", "clean", "--cache-dir", "clean-cache")
    assert clean.code == 0
    ended = box.fabe(*args)
    if ended.code:
        one_line(ended, 1, "No space left on device" if "space" in ended.err else "full")
        left = [p.name for p in (box.path / "m").rglob("*")]
        assert not [name for name in left if name.startswith((".fabe-ds", ".new", "tmp"))]
        disk.enlarge("8m")
        ended = box.fabe(*args)
    assert ended.code == 0, ended
    out = box.path / ("outputs" if where == "cache" else "m/out") / f"d.{kind}"
    assert out.read_bytes() == (box.path / f"clean/d.{kind}").read_bytes()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_disk_that_fills_while_answers_arrive(box, disk, server, kind):
    disk.mount("600k")
    source = records(box, kind, 300)
    args = openai(server, source, "--cache-dir", "m/c", "--concurrency", 4, "--backup-field", "")
    first = box.fabe(*args)
    one_line(first, 1)
    asked = len(server.calls)
    disk.enlarge("16m")
    ended = box.fabe(*args)
    assert ended.code == 0, ended
    assert len(server.calls) <= 300 + asked
    if kind == "jsonl":
        assert all(row["code"].startswith("X = ") for row in box.read("outputs/d.jsonl"))


def test_in_place_a_full_disk_keeps_the_file(box, disk):
    disk.mount("500k")
    source = records(box, "jsonl", 200)
    before = (box.path / source).read_bytes()
    (box.path / "m/d.jsonl").write_bytes(before)
    ended = box.fabe("run", "--input", "m/d.jsonl", "--inplace")
    one_line(ended, 1, "m/d.jsonl: cannot be written: No space left on device")
    assert (box.path / "m/d.jsonl").read_bytes() == before
    assert [path.name for path in (box.path / "m").iterdir()] == ["d.jsonl"]


def test_standard_output_that_is_full(box):
    box.lines("d.jsonl", [{"code": "x"}])
    for args in (["run", "--input", "d.jsonl"], ["run", "--input", "d.jsonl", "--output", "-"],
                 ["run", "--input", "d.jsonl", "--dry-run"], ["providers"], ["--help"]):  # fmt: skip
        with Path("/dev/full").open("wb") as full:
            ended = subprocess.run(
                [*COMMAND, *args], cwd=box.path, env=box.environment, stdout=full,
                stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
        assert ended.returncode == 1, (args, ended)
        assert "No space left on device" in ended.stderr
        assert "Exception ignored" not in ended.stderr


def test_a_reader_that_is_gone(box):
    box.lines("d.jsonl", [{"code": "x"}])
    for args in (["run", "--input", "d.jsonl"], ["--help"], ["cache", "stats"]):
        reader, writer = os.pipe()
        os.close(reader)
        ended = subprocess.run(
            [*COMMAND, *args], cwd=box.path, env=box.environment, stdout=writer,
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        os.close(writer)
        assert ended.returncode == 1
        assert not [line for line in ended.stderr.splitlines() if "Exception" in line]


# Terminals.

ASCII = {
    "PYTHONIOENCODING": {"PYTHONIOENCODING": "ascii"},
    "C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("environment", ASCII.values(), ids=ASCII)
def test_a_terminal_that_is_ascii(box, environment):
    box.lines("数据.jsonl", [{"code": "变量 = 1"}])
    box.write("提示.j2", "改写")
    commands = [
        ["run", "--input", "数据.jsonl", "--dry-run"],
        ["preview", "--input", "数据.jsonl", "--instruction", "提示.j2"],
        ["run", "--input", "数据.jsonl", "--output", "输出", "--instruction", "提示.j2"],
        ["retry", "输出.run.json"],
        ["report", "输出.run.json"],
        ["cache", "explain", "输出.run.json"],
        ["init", "新"],
        ["doctor", "--cache-dir", "缓"],
        ["run", "--help"],
        ["run", "--input", "没有.jsonl"],
    ]
    for args in commands:
        ended = ran(box, *args, **environment)
        wrong = "没有.jsonl" in args
        assert ended.code == (2 if wrong else ended.code if args[0] == "doctor" else 0), (
            args,
            ended,
        )
        assert ended.out.isascii()
        assert ended.err.isascii()
    (row,) = box.read("输出/数据.jsonl")
    assert row["code"] == f"{ECHO}变量 = 1"


@pytest.mark.parametrize("columns", ["60", "20"])
def test_a_narrow_terminal(box, columns):
    """In a real terminal: the bar and its line fit, and the cursor comes back."""
    box.lines("d.jsonl", [{"code": f"x = {i}"} for i in range(2000)])
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "run", "--input", "d.jsonl"], cwd=box.path, stdout=slave, stderr=slave,
        env={**box.environment, "COLUMNS": columns, "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
    assert process.wait() == 0
    assert b"Traceback" not in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", shown.decode())
    assert re.search(r"rewritten +2,000", text)
    panel = [line for line in text.split("\n") if line[:1] in "╭│╰"]
    assert max(map(len, panel)) <= int(columns)


def test_streams_that_are_closed(box):
    box.lines("d.jsonl", [{"code": "x"}])
    for closed_ones in (">&-", "2>&-", "<&-", ">&- 2>&- <&-"):
        line = f"{COMMAND[0]} run --input d.jsonl {closed_ones}"
        ended = subprocess.run(
            ["bash", "-c", line], cwd=box.path, env=box.environment, capture_output=True,
            check=False,
        )  # fmt: skip
        assert ended.returncode == 0, (closed_ones, ended)
        assert b"Traceback" not in ended.stderr


# Homes and folders.


@pytest.mark.parametrize("home", ["none", "missing", "read-only"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_without_a_home(box, closed, home, kind):
    source = records(box, kind, 3)
    environment = {key: value for key, value in box.environment.items() if key != "HF_HOME"}
    environment.pop("HOME", None)
    if home == "read-only":
        (box.path / "home").mkdir(mode=0o555)
        closed.append(box.path / "home")
    if home != "none":
        environment["HOME"] = str(box.path / "home")
    command = [*(SETPRIV if ROOT else []), *COMMAND, "run", "--input", source]
    ended = subprocess.run(
        command, cwd=box.path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended
    assert "3 records: 3 rewritten" in ended.stdout


def test_a_folder_that_is_gone(box):
    box.lines("d.jsonl", [{"code": "x"}])
    line = f"mkdir gone; cd gone; rmdir ../gone; {COMMAND[0]} run --input {box.path}/d.jsonl"
    ended = subprocess.run(
        ["bash", "-c", line], cwd=box.path, env=box.environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended
    assert "the folder that this command runs in is gone" in ended.stderr


@pytest.mark.parametrize("name", ["file", "a::b", "n" * 300, os.fsdecode(b"\xca\xfd")])
def test_cache_folders_that_cannot_be(box, name):
    box.write("file", "")
    box.lines("d.jsonl", [{"code": "x"}])
    for args in (["run", "--input", "d.jsonl"], ["cache", "stats"], ["doctor"]):
        ended = ran(box, *args, "--cache-dir", name)
        assert ended.code in (1, 2), ended
        assert len(ended.err.splitlines()) <= 1
    assert sorted(path.name for path in box.path.iterdir()) == ["d.jsonl", "file"]


# Signals.


def test_a_terminal_that_hangs_up_ends_a_run_politely(box, server):
    server.latency = 0.05
    box.lines("d.jsonl", [{"code": f"x = {i}"} for i in range(400)])
    process = box.start(*openai(server, "d.jsonl", "--concurrency", 2))
    wait_for(lambda: len(server.calls) > 10)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "run the same command again to go on" in err
    server.latency = 0.0
    assert box.fabe(*openai(server, "d.jsonl", "--concurrency", 2)).code == 0
    assert len(server.calls) <= 402


def test_nohup_is_obeyed(box, server):
    server.latency = 0.02
    box.lines("d.jsonl", [{"code": f"x = {i}"} for i in range(60)])
    command = ["nohup", *COMMAND, *map(str, openai(server, "d.jsonl"))]
    process = subprocess.Popen(
        command, cwd=box.path, env=box.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for(lambda: len(server.calls) > 10)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.mark.parametrize("phase", ["loading", "answering", "writing"])
def test_killed_in_any_phase_nothing_is_left_and_the_next_run_is_whole(box, phase):
    box.lines("d.jsonl", [{"code": f"x = {i}" + "y" * 500} for i in range(60_000)])
    where = {"loading": ".cache/datasets", "answering": ".cache/answers/*", "writing": "outputs"}
    folder = where[phase]
    process = box.start("run", "--input", "d.jsonl")
    wait_for(lambda: any(box.path.glob(f"{folder}/.fabe-ds-*")), 30)
    box.kill(process)
    ended = box.fabe("run", "--input", "d.jsonl")
    assert ended.code == 0, ended
    assert (box.path / "outputs/d.jsonl").read_bytes().count(b"\n") == 60_000
    assert not list(box.path.rglob(".fabe-ds-*"))


def test_ctrl_c_while_the_program_is_read(tmp_path):
    """Before its own handlers are there: no traceback of ours either."""
    for wait in (0.03, 0.1, 0.2):
        process = subprocess.Popen(
            [*COMMAND, "providers"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert "fabe_ds/cli.py" not in err, err
        # In the first moments it is the interpreter that reads its own files, and says so with a 1.
        is_before_us = process.returncode == 1 and "<frozen site>" in err
        assert process.returncode in (0, 130, -signal.SIGINT) or is_before_us, err


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_a_pipe_is_no_table(box):
    for name in ("d.parquet", "d.csv"):
        os.mkfifo(box.path / name)
        one_line(box.fabe("run", "--input", name, timeout=20), 2, f"{name}: a named pipe")


def test_the_report_never_replaces_a_device(box):
    box.lines("d.jsonl", [{"code": "x"}])
    assert box.fabe("run", "--input", "d.jsonl").code == 0
    (box.path / "full").symlink_to("/dev/full")
    ended = box.fabe("report", "outputs.run.json", "--output", "full")
    one_line(ended, 2, "a device, a pipe or a socket, which is never replaced")
    assert Path("/dev/full").is_char_device()
    assert json.loads((box.path / "outputs.run.json").read_text())["done"] == 1
