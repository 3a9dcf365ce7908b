"""Files and folders as people have them: everything is read, or is named."""

from __future__ import annotations

import gzip
import json
import os
import stat
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fabe_ds import export_records, load_records
from fabe_ds.files import replacing
from fabe_ds.text import real_name, shown_name
from tests.conftest import COMMAND, wait_for

ECHO = "# echo: local\n"


def new_values(path: Path) -> list[str]:
    return [json.loads(line)["code"] for line in path.read_text().splitlines()]


# What a folder holds.


def test_linked_folders_are_followed_and_loops_are_not(box):
    box.lines("in/a.jsonl", [{"code": "a"}])
    box.lines("elsewhere/b.jsonl", [{"code": "b"}])
    (box.path / "in/linked").symlink_to(box.path / "elsewhere")
    (box.path / "in/loop").symlink_to(box.path / "in")
    ended = box.fabe("run", "--input", "in")
    assert ended.code == 0, ended
    assert ended.out.startswith("2 records: 2 rewritten")
    assert "in/loop: a link to a folder that holds it" in ended.err
    assert new_values(box.path / "outputs/linked/b.jsonl") == [f"{ECHO}b"]
    assert not (box.path / "outputs/loop").exists()


def dangling(folder: Path) -> str:
    (folder / "gone.jsonl").symlink_to("nowhere.jsonl")
    return "gone.jsonl: a link to nothing (nowhere.jsonl)"


def dangling_folder(folder: Path) -> str:
    (folder / "disk").symlink_to("/nowhere/disk")
    return "disk: a link to nothing (/nowhere/disk)"


def circle(folder: Path) -> str:
    (folder / "self.jsonl").symlink_to("self.jsonl")
    return "self.jsonl: cannot be read: Too many levels of symbolic links"


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.jsonl")
    return "pipe.jsonl: a named pipe, not a regular file"


def utf16(folder: Path) -> str:
    (folder / "wide.jsonl").write_bytes('{"code": "x"}\n'.encode("utf-16"))
    return "wide.jsonl:1: UTF-16 or UTF-32, not UTF-8"


def cut_archive(folder: Path) -> str:
    whole = gzip.compress(b'{"code": "x"}\n' * 1000)
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return "cut.jsonl.gz: cannot be read: "


def broken_document(folder: Path) -> str:
    (folder / "bad.json").write_text('[{"code": "x"}, {"code"')
    return "bad.json:1:"


@pytest.mark.parametrize(
    "spoil", [dangling, dangling_folder, circle, pipe, utf16, cut_archive, broken_document]
)
def test_what_cannot_be_read_is_an_error_or_is_left_out_and_named(box, spoil):
    box.lines("in/good.jsonl", [{"code": "x"}])
    said = spoil(box.path / "in")
    ended = box.fabe("run", "--input", "in")
    assert ended.code == 2, ended
    assert said in ended.err
    assert not (box.path / "outputs").exists()
    for command in (["run"], ["run", "--dry-run"]):
        ended = box.fabe(*command, "--input", "in", "--on-bad-input", "skip")
        assert said in ended.out, ended
    ended = box.fabe("run", "--input", "in", "--on-bad-input", "skip")
    assert ended.code == 1
    assert new_values(box.path / "outputs/good.jsonl") == [f"{ECHO}x"]
    assert any(said in line for line in box.report()["bad_files"])


def test_what_is_left_out_on_purpose_is_told(box):
    for name in ("a.jsonl", "notes.txt", ".hidden.jsonl", ".git/b.jsonl"):
        box.lines(f"in/{name}", [{"code": "x"}])
    ended = box.fabe("run", "--input", "in")
    assert ended.code == 0
    assert "left out, not JSON or JSON lines: notes.txt" in ended.err
    assert "left out, hidden: .git, .hidden.jsonl" in ended.err


def test_suffixes_in_capitals_are_suffixes(box):
    box.lines("in/A.JSONL", [{"code": "x"}])
    assert box.fabe("run", "--input", "in").out.startswith("1 records: 1 rewritten")


@pytest.mark.parametrize(
    ("glob", "said"),
    [
        ("*.jsonl", "--glob '**/*.jsonl' takes 1 deeper down"),
        ("../*", "a pattern of files inside the input folder"),
        ("/etc/*", "a pattern of files inside the input folder"),
        ("", "a pattern of files inside the input folder"),
        ("**/*.nothing", "no file matches --glob **/*.nothing"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_patterns_that_find_nothing(box, kind, glob, said):
    """`../*` once wrote the new values over the input."""
    box.write("a.jsonl", '{"code": "x"}\n')
    box.write("in/deep/a.jsonl" if kind == "jsonl" else "in/deep/a.csv", '{"code": "x"}\n')
    glob = glob.replace("*.jsonl", f"*.{kind}")
    ended = box.fabe("run", "--input", "in", "--glob", glob)
    assert ended.code == 2, ended
    assert said.replace("*.jsonl", f"*.{kind}") in ended.err
    assert (box.path / "a.jsonl").read_text() == '{"code": "x"}\n'


def test_a_pattern_of_any_depth_takes_hidden_files_too(box):
    for name in ("a.jsonl", "x/b.jsonl", "x/y/c.jsonl", ".h/d.jsonl", "x/e.json"):
        box.lines(f"in/{name}", [{"code": "x"}])
    for glob, count in [("**/*.jsonl", 4), ("x/**", 3), ("x/*", 2), ("[ax]*", 1), ("*/*/c*", 1)]:
        ended = box.fabe("run", "--input", "in", "--glob", glob, "--dry-run")
        assert f"dry run: {count} records" in ended.out, (glob, ended)


# Lines.

BAD_LINES = {
    "no JSON": (b'{"code": bad}', "not JSON: Expecting value (column 12)"),
    "cut off": (b'{"code": "x', "not JSON: Unterminated string"),
    "two on a line": (b'{"code": "x"} {"code": "y"}', "not JSON: Extra data on the line"),
    "not UTF-8": (b'{"code": "\xe9\xff"}', "not UTF-8: byte 0xe9 (byte 13)"),
    "half a character": (b'{"code": "\xe4\xb8"}', "not UTF-8"),
    "a surrogate's bytes": (b'{"code": "\xed\xa0\x80"}', "not UTF-8"),
    "a word": (b"hello", "not JSON"),
}


@pytest.mark.parametrize(("line", "said"), BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("inplace", [False, True])
def test_one_bad_line_costs_one_record(box, line, said, inplace):
    before = b'{"code": "a"}\r\n\n \t' + line + b'\t\r\n{"code": "b"}'
    box.write("d.jsonl", before)
    assert box.fabe("run", "--input", "d.jsonl").code == 2
    where = ["--inplace"] if inplace else ["--output", "o.jsonl"]
    skip = ["run", "--input", "d.jsonl", "--on-bad-input", "skip", "--backup-field", ""]
    ended = box.fabe(*skip, *where)
    assert ended.code == 1
    assert "3 records: 2 rewritten" in ended.out
    assert "1 not JSON: mend those lines of the input" in ended.out
    after = before.replace(b'"a"', b'"# echo: local\\na"').replace(b'"b"', b'"# echo: local\\nb"')
    assert (box.path / ("d.jsonl" if inplace else "o.jsonl")).read_bytes() == after
    folder = box.path / ".cache/runs" if inplace else box.path
    (failed,) = box.read(next(folder.glob("*.failures.jsonl")))
    assert (failed["record"], failed["line"], failed["failure"]) == (1, 3, "broken")
    assert failed["message"].startswith(said)
    assert failed["text"] == line.strip().decode("latin-1" if "UTF-8" in said else "utf-8")


def test_a_bad_line_fails_once_however_many_fields(box):
    box.write("d.jsonl", '{"code": "a", "more": "b"}\nbad\n')
    both = ["--also-field", "more", "--on-bad-input", "skip"]
    ended = box.fabe("run", "--input", "d.jsonl", *both)
    assert "2 records: 1 rewritten, 0 from cache, 1 failed" in ended.out
    assert len(box.read("outputs.failures.jsonl")) == 1
    ended = box.fabe("run", "--input", "d.jsonl", *both, "--dry-run")
    assert "dry run: 2 records, 2 to do; 1 failing (1 broken)" in ended.out


def test_where_all_readable_records_lack_the_field_it_is_said(box):
    box.write("d.jsonl", '{"other": "a"}\nbad\n')
    ended = box.fabe("run", "--input", "d.jsonl", "--on-bad-input", "skip")
    assert ended.code == 2
    assert "no record has it; the first one has other" in ended.err


# Names.


@pytest.mark.parametrize("name", [b"\xca\xfd\xbe\xdd", b"\\xca", "数据".encode(), b"a b\n", b"\\"])
def test_names_are_shown_as_text_and_found_again(name):
    name = os.fsdecode(name)
    shown = shown_name(name)
    shown.encode()
    assert real_name(shown) == name


GBK = os.fsdecode(b"\xca\xfd\xbe\xdd.jsonl")


@pytest.mark.parametrize("inplace", [False, True])
def test_names_that_are_no_utf8_are_read_and_mirrored(box, inplace):
    for name in (GBK, "a.jsonl"):
        box.lines(f"in/{name}", [{"code": "x"}, {"code": None}])
    box.write(f"in/{GBK}.jsonl", '{"code": "x"}\nbad\n')
    where = ["--inplace"] if inplace else []
    ended = box.fabe("run", "--input", "in", *where, "--on-bad-input", "skip")
    assert ended.code == 1, ended
    folder = box.path / ("in" if inplace else "outputs")
    assert new_values(folder / GBK) == [f"{ECHO}x", None]
    assert "the first: record \\xca\\xfd\\xbe\\xdd.jsonl.jsonl:2: not JSON" in ended.out


def test_names_that_are_no_utf8_by_hand(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / GBK).write_text('{"code": "x"}\n')
    (tmp_path / "in/a.jsonl").write_text('{"code": "y"}\n')
    records = load_records(tmp_path / "in", cache_dir=tmp_path / "cache")
    answers = records.map(lambda _: {"completion": "new"})
    (first, second) = export_records(answers, tmp_path / "out")
    assert {first.name, second.name} == {GBK, "a.jsonl"}


def test_a_file_named_in_no_utf8_from_end_to_end(box):
    box.lines(GBK, [{"code": "x"}])
    out = os.fsdecode(b"\xca\xe4\xb3\xf6")
    ended = box.fabe("run", "--input", GBK, "--output", out)
    assert ended.code == 0, ended
    assert "written: \\xca\\xe4\\xb3\\xf6/\\xca\\xfd\\xbe\\xdd.jsonl" in ended.out
    assert new_values(box.path / out / GBK) == [f"{ECHO}x"]
    again = box.fabe("retry", f"{out}.run.json")
    assert again.code == 0, again
    assert box.fabe("report", f"{out}.run.json").code == 0


@pytest.mark.parametrize(
    "flag", ["--instruction", "--field", "--backup-field", "--system-prompt", "--validate"]
)
def test_settings_that_are_no_utf8_are_one_line(box, flag):
    box.lines("d.jsonl", [{"code": "x"}])
    ended = box.fabe("run", "--input", "d.jsonl", flag, os.fsdecode(b"regex:\xca\xfd"))
    assert (ended.code, ended.err) == (2, f"fabe-ds: {flag}: not UTF-8\n")


def test_a_name_of_255_bytes(box):
    name = "n" * 249 + ".jsonl"
    box.lines(name, [{"code": "x"}])
    ended = box.fabe("run", "--input", name, "--output", "o")
    assert ended.code == 0, ended
    assert box.fabe("run", "--input", name, "--inplace").code == 0


# Where it goes.


def test_output_may_be_a_file(box):
    box.lines("d.jsonl", [{"code": "x"}])
    ended = box.fabe("run", "--input", "d.jsonl", "--output", "deep/r.jsonl.gz")
    assert ended.code == 0, ended
    assert "written: deep/r.jsonl.gz\n" in ended.out
    assert "report: deep/r.jsonl.gz.run.json (fabe-ds report" in ended.out
    with gzip.open(box.path / "deep/r.jsonl.gz", "rt") as lines:
        assert json.loads(next(lines))["code"] == f"{ECHO}x"
    assert box.fabe("retry", "deep/r.jsonl.gz.run.json").code == 0
    (box.path / "folder.jsonl").mkdir()
    assert box.fabe("run", "--input", "d.jsonl", "--output", "folder.jsonl").code == 0
    assert (box.path / "folder.jsonl/d.jsonl").exists()


@pytest.mark.parametrize(
    ("source", "output", "said"),
    [
        ("d.jsonl", "r.json", "the layout of d.jsonl comes back, so name it .jsonl or .ndjson"),
        ("d.json", "r.jsonl", "the layout of d.json comes back, so name it .json"),
        ("in", "r.jsonl", "the input is a folder, so name a folder"),
        ("in", "-", "the input is a folder, and one stream cannot mirror it"),
        ("d.jsonl", "d.jsonl", "would replace the input"),
        ("d.jsonl", "notes.txt", "not a folder, nor a name of a file of records"),
        ("d.csv", "r.json", "a table is written as .parquet, .csv, .tsv or .jsonl"),
        ("d.jsonl", "pipe.jsonl", "a device, a pipe or a socket, which is never replaced"),
    ],
)
def test_outputs_that_do_not_go_with_the_input(box, source, output, said):
    box.lines("d.jsonl", [{"code": "x"}])
    box.lines("in/d.jsonl", [{"code": "x"}])
    box.write("d.json", '[{"code": "x"}]')
    box.write("d.csv", "code\nx\n")
    box.write("notes.txt", "mine")
    os.mkfifo(box.path / "pipe.jsonl")
    ended = box.fabe("run", "--input", source, "--output", output)
    assert ended.code == 2, ended
    assert said in ended.err
    assert (box.path / "notes.txt").read_text() == "mine"
    assert stat.S_ISFIFO((box.path / "pipe.jsonl").stat().st_mode)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            '{"code": "x"}\n{"code": "y"}',
            '{"code": "# echo: local\\nx"}\n{"code": "# echo: local\\ny"}',
        ),
        ('[{"code": "x"}]', '[{"code": "# echo: local\\nx"}]'),
        ('{\n "code": "x"\n}\n', '{\n "code": "# echo: local\\nx"\n}\n'),
        ("a,code\r\n1,x\r\n", 'a,code\r\n1,"# echo: local\nx"\r\n'),
        ("", ""),
    ],
    ids=["lines", "list", "object", "csv", "nothing"],
)
def test_standard_input_and_output(box, given, expected):
    command = [*COMMAND, "run", "--input", "-", "--backup-field", ""]
    for more in ([], ["--output", "-"], ["--output", "named"]):
        ended = subprocess.run(
            [*command, *more], cwd=box.path, env=box.environment, input=given.encode(),
            capture_output=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended
        if "named" not in more:
            assert ended.stdout == expected.encode()
            assert b" records: " in ended.stderr
        else:
            (written,) = (box.path / "named").iterdir()
            assert written.read_bytes() == expected.encode()
    ended = subprocess.run(
        [*command, "--inplace"], cwd=box.path, env=box.environment, input=b"", capture_output=True,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 2


def test_reports_of_two_inputs_do_not_replace_each_other(box):
    for name, count in [("a", 1), ("b", 2), ("x/a", 3)]:
        box.lines(f"{name}.jsonl", [{"code": "x"}] * count)
    for inplace in ([], ["--inplace"]):
        for _ in range(2):
            for name in ("a", "b", "x/a"):
                assert box.fabe("run", "--input", f"{name}.jsonl", *inplace).code == 0
        folder = box.path / ".cache/runs" if inplace else box.path
        reports = [json.loads(path.read_text()) for path in folder.glob("*.run.json")]
        assert sorted(report["records"] for report in reports) == [1, 2, 3]


# How it is written.


@pytest.mark.parametrize("number", ["EINVAL", "ENOTSUP", "EACCES"])
def test_folders_that_cannot_be_synced(tmp_path, monkeypatch, number):
    import errno

    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(getattr(errno, number), "no")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(tmp_path / "a") as file:
        file.write(b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_disk_that_does_not_take_the_data_is_an_error(tmp_path, monkeypatch):
    import errno

    from fabe_ds.errors import ExportError

    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a").write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", fsync)
    said = pytest.raises(ExportError, match="a: cannot be written: Input/output error")
    with said, replacing(tmp_path / "a") as file:
        file.write(b"x")
    assert (tmp_path / "a").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_modes_are_kept(box):
    source = box.lines("d.jsonl", [{"code": "x"}])
    source.chmod(0o640)
    assert box.fabe("run", "--input", "d.jsonl", "--inplace").code == 0
    assert stat.S_IMODE(source.stat().st_mode) == 0o640


def test_what_killed_runs_left_is_cleared(box):
    from fabe_ds.scratch import scratch_in

    dead = subprocess.Popen(["true"])
    dead.wait()
    box.lines("d.jsonl", [{"code": "x"}])
    for folder in ("outputs", ".cache/datasets", ".cache/tables"):
        (box.path / folder).mkdir(parents=True)
        left = scratch_in(box.path / folder)
        name = left.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
        left.with_name(name).write_text("half")
        left.with_name(name + "0").mkdir()
        left.write_text("of a living process")
    box.write("d.csv", "code\nx\n")
    for source in ("d.jsonl", "d.csv"):
        assert box.fabe("run", "--input", source).code == 0
    for folder in ("outputs", ".cache/datasets", ".cache/tables"):
        left = [p.name for p in (box.path / folder).iterdir() if p.name.startswith(".fabe-ds")]
        assert left == [next(name for name in left if f"-{os.getpid()}-" in name)]


# What is kept.


def damage_carrier(folder: Path) -> None:
    (path,) = folder.glob("datasets/*/records.arrow")
    path.write_bytes(path.read_bytes().replace(b"keepme", b"KEEPme"))


def cut_carrier(folder: Path) -> None:
    (path,) = folder.glob("datasets/*/records.arrow")
    path.write_bytes(path.read_bytes()[:100])


def lose_carrier(folder: Path) -> None:
    (path,) = folder.glob("datasets/*/records.arrow")
    path.unlink()


def spoil_list(folder: Path) -> None:
    (path,) = folder.glob("datasets/*/files.json")
    path.write_text("[1")


def lose_list(folder: Path) -> None:
    (path,) = folder.glob("datasets/*/files.json")
    path.unlink()


def damage_answers(folder: Path) -> None:
    (path,) = folder.glob("answers/*/answers-*.arrow")
    path.write_bytes(path.read_bytes().replace(b"echo", b"ECHO"))


def cut_answers(folder: Path) -> None:
    (path,) = folder.glob("answers/*/answers-*.arrow")
    path.write_bytes(path.read_bytes()[:50])


def spoil_state(folder: Path) -> None:
    (path,) = folder.glob("answers/*/finished-*.json")
    path.write_text('{"answers": 3, "exports": [')


def state_folder(folder: Path) -> None:
    (path,) = folder.glob("answers/*/finished-*.json")
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        *(damage_carrier, cut_carrier, lose_carrier, spoil_list, lose_list),
        *(damage_answers, cut_answers, spoil_state, state_folder),
    ],
)
def test_a_damaged_cache_is_made_anew(box, damage):
    box.lines("d.jsonl", [{"note": "keepme", "code": f"x = {i}"} for i in range(3)])
    assert box.fabe("run", "--input", "d.jsonl").code == 0
    good = (box.path / "outputs/d.jsonl").read_bytes()
    for again in range(2):
        damage(box.path / ".cache") if not again else None
        (box.path / "outputs/d.jsonl").unlink()
        ended = box.fabe("run", "--input", "d.jsonl")
        assert ended.code == 0, ended
        assert (box.path / "outputs/d.jsonl").read_bytes() == good


@pytest.mark.parametrize(
    "change", [lambda data: data[:60], lambda data: data.replace(b"a,", b"b,")]
)
def test_a_damaged_table_in_the_cache_is_made_anew(box, change):
    box.write("d.csv", "n,code\na,x\n")
    assert box.fabe("run", "--input", "d.csv").code == 0
    good = (box.path / "outputs/d.csv").read_bytes()
    (kept,) = (box.path / ".cache/tables").glob("csv-*.arrow")
    kept.write_bytes(change(kept.read_bytes()))
    ended = box.fabe("run", "--input", "d.csv")
    assert ended.code == 0, ended
    assert (box.path / "outputs/d.csv").read_bytes() == good


def test_the_cache_folder_is_counted_and_pruned_whole(box):
    box.lines("d.jsonl", [{"code": "x"}])
    box.write("d.csv", "code\nx\n")
    for source, more in [("d.jsonl", ()), ("d.csv", ()), ("d.jsonl", ("--inplace",))]:
        assert box.fabe("run", "--input", source, *more).code == 0
    ended = box.fabe("cache", "stats")
    assert ended.code == 0
    assert "loaded records: " in ended.out
    assert "reports and outputs of runs in place: 2, " in ended.out
    assert "in all: " in ended.out
    assert " 0 loaded" not in box.fabe("cache", "prune", "--older-than", 1).out
    gone = box.fabe("cache", "prune", "--older-than", 0)
    assert "loaded inputs and reports; " in gone.out
    left = [path.name for path in (box.path / ".cache").rglob("*") if path.is_file()]
    assert all(name.startswith(("records.sqlite", "opening.lock", "models.json")) for name in left)
    assert box.fabe("run", "--input", "d.csv").code == 0


def test_what_a_run_is_using_is_not_pruned(box):
    from fabe_ds.scratch import scratch_in

    (box.path / ".cache/datasets/used").mkdir(parents=True)
    scratch_in(box.path / ".cache/datasets/used").mkdir()
    (box.path / ".cache/datasets/unused").mkdir()
    assert box.fabe("cache", "prune", "--older-than", 0).code == 0
    assert [path.name for path in (box.path / ".cache/datasets").iterdir()] == ["used"]


# While a run goes on.


@pytest.mark.parametrize("change", ["append", "remove"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_an_input_that_changes_under_a_run_is_not_written_over(box, server, kind, change):
    """What somebody appended in the meantime would be lost, or other rows' answers put beside it."""
    server.latency = 0.3
    if kind == "parquet":
        pq.write_table(pa.table({"code": [f"x = {i}" for i in range(8)]}), box.path / "d.parquet")
    elif kind == "csv":
        box.write("d.csv", "code\n" + "".join(f"x = {i}\n" for i in range(8)))
    else:
        box.lines("d.jsonl", [{"code": f"x = {i}"} for i in range(8)])
    source = box.path / f"d.{kind}"
    flags = ["--provider", "openai", "--model", "m", "--base-url", server.url, "--instruction", "f"]
    where = ["--inplace"] if kind == "jsonl" else []
    process = box.start("run", "--input", source.name, *flags, *where, "--concurrency", 2)
    wait_for(lambda: len(server.calls) > 3)
    if change == "append":
        with source.open("ab") as file:
            file.write(b'{"code": "mine"}\n')
    else:
        source.unlink()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1, err
    assert "it was changed while the run went on" in err
    assert not (box.path / "outputs").exists()
    if change == "append":
        assert source.read_bytes().endswith(b'{"code": "mine"}\n')


def test_two_runs_over_standard_input_do_not_meet(box):
    command = [*COMMAND, "run", "--input", "-", "--backup-field", ""]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(command, cwd=box.path, env=box.environment, **pipes) for _ in range(2)]
    for name, process in zip("ab", both, strict=True):
        process.stdin.write(f'{{"code": "{name}"}}\n'.encode() * 3000)
        process.stdin.flush()
    for name, process in zip("ab", both, strict=True):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out == f'{{"code": "# echo: local\\n{name}"}}\n'.encode() * 3000


def test_the_process_number_of_one_that_was_killed(tmp_path):
    """In a container, every process may be number 1."""
    from fabe_ds import scratch

    mine, other = scratch.scratch_in(tmp_path), scratch.scratch_in(tmp_path)
    other = other.with_name(other.name.replace(scratch._TOKEN, "0" * 8))
    for path in (mine, other):
        path.write_text("half")
    scratch.clear_scratch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [mine.name]


def test_a_table_never_replaces_a_file_of_its_input(box):
    box.write("t/a.csv", "code\nx\n")
    box.write("t/b.csv", "code\ny\n")
    ended = box.fabe("run", "--input", "t", "--output", "t/a.csv")
    assert ended.code == 2
    assert "would replace a file of the input" in ended.err
    assert (box.path / "t/a.csv").read_text() == "code\nx\n"


def test_parquet_files_of_other_columns_are_named(box):
    (box.path / "t").mkdir()
    maps = [pa.map_(pa.string(), kind) for kind in (pa.int64(), pa.string())]
    pq.write_table(pa.table({"code": ["x"], "m": pa.nulls(1, maps[0])}), box.path / "t/a.parquet")
    for other, said in [
        ({"code": ["x"], "m": pa.nulls(1, maps[1])}, "t/b.parquet: column 'm' is map<string, str"),
        ({"code": ["x"]}, "t/b.parquet: other columns than t/a.parquet has"),
        ({"code": ["x"], "m": pa.nulls(1, maps[0]), "n": [1]}, "t/b.parquet: other columns than"),
    ]:
        pq.write_table(pa.table(other), box.path / "t/b.parquet")
        ended = box.fabe("run", "--input", "t")
        assert (ended.code, said in ended.err) == (2, True), ended
