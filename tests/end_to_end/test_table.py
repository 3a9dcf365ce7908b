"""Tables: Parquet, CSV and Arrow files, saved Datasets, through the command and through map."""

from __future__ import annotations

import csv
import datetime
import decimal
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fabe_ds
from tests.support.server import ModelServer, completion, error

ROWS = [{"id": i, "code": f"x = {i}", "score": i / 3, "tags": ["a", None]} for i in range(25)]


def command(server, source, *more):
    return [
        *("run", "--input", source, "--instruction", "Up", "--provider", "openai"),
        *("--model", "m", "--base-url", server.url, *more),
    ]


def parquet(box, rows=ROWS, name="data.parquet"):
    path = box.path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_a_parquet_file(box, server):
    path = parquet(box)
    ended = box.fabe(*command(server, "data.parquet"))
    assert ended.code == 0, ended.err
    before, after = pq.read_table(path), pq.read_table(box.path / "outputs/data.parquet")
    assert after.column_names == [*before.column_names, "original_code"]
    for name in ("id", "score", "tags"):
        assert after[name].to_pylist() == before[name].to_pylist()
        assert after.schema.field(name).type == before.schema.field(name).type
    assert after["code"].to_pylist() == [f"X = {i}" for i in range(25)]
    assert after["original_code"].to_pylist() == before["code"].to_pylist()
    sent = len(server.calls)
    again = box.fabe(*command(server, "data.parquet"))
    assert "0 rewritten, 25 from cache" in again.out
    assert len(server.calls) == sent == 25


def test_a_folder_of_parquet_files_and_a_part_of_it(box, server):
    parquet(box, ROWS[:10], "tables/a.parquet")
    parquet(box, ROWS[10:], "tables/b.parquet")
    ended = box.fabe(*command(server, "tables", "--split", "train[:12]"))
    assert ended.code == 0, ended.err
    after = pq.read_table(box.path / "outputs/tables-train-12.parquet")
    assert after["id"].to_pylist() == list(range(12))


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_csv_comes_back_as_csv_and_as_it_was(box, server, suffix, separator):
    """Its fields are text: no number is spelled anew, and NA and nothing are what they say."""
    lines = [
        ["id", "code", "price", "note"],
        ["007", "x = 1", "1.10", "NA"],
        ["2", '"a, ""b"""', "1e-12", ""],
        ["3", "", "true", "2024-01-02"],
    ]
    text = "\n".join(separator.join(line) for line in lines) + "\n"
    box.write(f"data.{suffix}", text)
    ended = box.fabe(*command(server, f"data.{suffix}"))
    assert ended.code == 0, ended.err
    assert "1 skipped (1 no text)" in ended.out
    backups = ["original_code", "x = 1", '"a, ""b"""', ""]
    for line, backup in zip(lines, backups, strict=True):
        line.append(backup)
    lines[1][1], lines[2][1] = "X = 1", '"A, ""B"""'
    expected = "\n".join(separator.join(line) for line in lines) + "\n"
    assert (box.path / f"outputs/data.{suffix}").read_text() == expected


def test_a_table_as_json_lines_keeps_its_values(box, server):
    row = {
        "code": "x",
        "third": 1 / 3,
        "tiny": 1e-12,
        "nan": float("nan"),
        "day": datetime.date(2024, 1, 2),
        "at": datetime.datetime(2024, 1, 2, 3, 4, 5, 600),
        "price": decimal.Decimal("1.10"),
        "data": b"\0\xff",
        "list": [{"url": "a/b", "name": "é"}],
    }
    parquet(box, [row])
    ended = box.fabe(*command(server, "data.parquet", "--output-format", "jsonl"))
    assert ended.code == 0, ended.err
    text = (box.path / "outputs/data.jsonl").read_text()
    assert '"a/b"' in text
    assert '"é"' in text
    assert json.loads(text) == {
        **row,
        "code": "X",
        "original_code": "x",
        "nan": None,
        "day": "2024-01-02",
        "at": "2024-01-02T03:04:05.000600",
        "price": "1.10",
        "data": "AP8=",
    }


def test_a_status_in_csv_is_json(box, server):
    box.write("data.csv", "code\nx\n")
    assert box.fabe(*command(server, "data.csv", "--status-field", "how")).code == 0
    with (box.path / "outputs/data.csv").open() as lines:
        (row,) = csv.DictReader(lines)
    assert json.loads(row["how"])["state"] == "done"


def test_a_saved_dataset_comes_back_as_one(box, server):
    saved = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])}
    )
    saved.save_to_disk(str(box.path / "saved"))
    files = sorted(path for path in (box.path / "saved").rglob("*"))
    ended = box.fabe(*command(server, "saved", "--split", "test"))
    assert ended.code == 0, ended.err
    back = datasets.load_from_disk(str(box.path / "outputs/saved-test"))
    assert back["code"][:] == ["X = 0", "X = 1", "X = 2"]
    assert back.features["tags"] == saved["test"].features["tags"]
    assert sorted(path for path in (box.path / "saved").rglob("*")) == files
    wrong = box.fabe(*command(server, "saved", "--split", "dev"))
    assert (wrong.code, wrong.err) == (2, "fabe-ds: --split dev: has train, test\n")


def test_a_failed_row_keeps_what_it_has(box):
    async def behave(call):
        return error(400, "too rude") if call.prompt.endswith("x = 3") else None

    parquet(box)
    with ModelServer(behave) as server:
        ended = box.fabe(*command(server, "data.parquet", "--status-field", "how"))
    assert ended.code == 1
    after = pq.read_table(box.path / "outputs/data.parquet").to_pylist()
    assert after[3]["code"] == after[3]["original_code"] == "x = 3"
    assert after[3]["how"]["state"] == "failed"
    assert "too rude" in after[3]["how"]["message"]
    assert after[4]["how"] == {
        "state": "done",
        "failure": None,
        "message": None,
        "finish_reason": "stop",
        "prompt_tokens": after[4]["how"]["prompt_tokens"],
        "completion_tokens": 3,
        "model": "m",
    }
    (failure,) = box.read("outputs.failures.jsonl")
    assert (failure["record"], failure["code"]) == (3, "x = 3")
    with ModelServer(port=int(server.root.rsplit(":", 1)[1])) as server:
        assert box.fabe(*command(server, "data.parquet")).code == 0
        assert len(server.calls) == 1
    assert not (box.path / "outputs.failures.jsonl").exists()


def test_several_fields_in_one_pass(box, server):
    parquet(box, [{"instruction": f"do {i}", "output": f"done {i}", "n": i} for i in range(4)])
    ended = box.fabe(
        *command(server, "data.parquet", "--field", "instruction", "--also-field", "output"),
        *("--output-format", "jsonl"),
    )
    assert ended.code == 0, ended.err
    assert box.read("outputs/data.jsonl")[2] == {
        "instruction": "DO 2",
        "output": "DONE 2",
        "n": 2,
        "original_code": "do 2",
        "original_output": "done 2",
    }


def test_several_samples_of_each(box):
    async def behave(call):
        return completion(call, f"{call.prompt[-5:]} {call.body['seed']}")

    parquet(box, ROWS[:3])
    more = ("--samples", 3, "--temperature", 1, "--seed", 5, "--output-format", "jsonl")
    with ModelServer(behave) as server:
        ended = box.fabe(*command(server, "data.parquet", *more))
        assert ended.code == 0, ended.err
        assert len(server.calls) == 9
        again = box.fabe(*command(server, "data.parquet", *more))
        assert "3 from cache" in again.out
        assert len(server.calls) == 9
        useless = box.fabe(*command(server, "data.parquet", "--samples", 3))
        assert useless.code == 2
        assert "give a --temperature" in useless.err
    row = box.read("outputs/data.jsonl")[1]
    assert row["samples"] == ["x = 1 5", "x = 1 6", "x = 1 7"]
    assert row["code"] == "x = 1 5"


def test_a_turn_of_a_chat(box, server):
    turns = [
        [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}]
        for i in range(3)
    ]
    parquet(box, [{"messages": chat} for chat in turns])
    more = ("--field", "messages.1.content", "--backup-field", "")
    ended = box.fabe(*command(server, "data.parquet", *more))
    assert ended.code == 0, ended.err
    after = pq.read_table(box.path / "outputs/data.parquet")
    assert after.column_names == ["messages"]
    assert after["messages"].to_pylist()[2] == [
        {"role": "user", "content": "q 2"},
        {"role": "assistant", "content": "A 2"},
    ]


def test_the_dry_run_of_a_table(box, server):
    parquet(box)
    ended = box.fabe(*command(server, "data.parquet", "--dry-run"))
    assert ended.code == 0, ended.err
    assert "25 records, 25 to do" in ended.out
    assert not server.calls


@pytest.mark.parametrize(
    ("source", "more", "said"),
    [
        ("data.parquet", ("--field", "no"), "--field no: no column 'no'; there are id, code"),
        ("data.parquet", ("--field", "id"), "--field id: the column is int64, not text"),
        ("data.parquet", ("--inplace", "--split", "train[:5]"), "--inplace replaces whole files"),
        (
            "data.parquet",
            ("--inplace", "--output-format", "csv"),
            "--inplace and --output-format do",
        ),
        ("data.parquet", ("--split", "dev"), "--split dev: has train"),
        ("broken.parquet", (), "broken.parquet"),
        ("org/name", (), "--input org/name: "),
        ("data/name", (), "--input data/name: no such file or directory"),
        ("data.jsonl", ("--status-field", "code"), "--status-field code: another field has"),
        ("data.jsonl", ("--samples", 2), "--samples: equal answers without sampling"),
    ],
)
def test_what_is_wrong_is_one_line(box, server, source, more, said):
    parquet(box)
    box.write("broken.parquet", b"PAR1 no")
    box.lines("data.jsonl", [{"code": "x"}])
    box.write("data/other.txt", "")
    environment = {"HF_HUB_OFFLINE": "1"}
    ended = box.fabe(*command(server, source, *more), **environment)
    assert ended.code == 2, ended
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert not server.calls
    assert not (box.path / "outputs").exists()


# The same through Dataset.map.


def options(server, tmp_path, **more):
    return {
        "instruction": "Up",
        "provider": "openai",
        "model": "m",
        "base_url": server.url,
        "cache_dir": tmp_path / "cache",
        **more,
    }


def test_a_dataset_dict(server, tmp_path):
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])}
    )
    after = both.map(fabe_ds.transform_fn(**options(server, tmp_path)), batched=True)
    assert after["train"]["code"][24] == "X = 24"
    assert after["test"]["original_code"][:] == ["x = 0", "x = 1", "x = 2"]
    assert len(server.calls) == 25


def test_a_stream(server, tmp_path):
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    after = stream.map(
        fabe_ds.transform_fn(**options(server, tmp_path)), batched=True, batch_size=10
    )
    first = next(iter(after))
    assert (first["code"], first["original_code"]) == ("X = 0", "x = 0")
    assert len(server.calls) == 10
    assert [row["code"] for row in after] == [f"X = {i}" for i in range(25)]
    assert len(server.calls) == 25


def test_fields_status_and_samples_of_a_map(server, tmp_path):
    rows = [{"q": f"ask {i}", "a": f"say {i}"} for i in range(4)]
    transform = fabe_ds.transform_fn(
        **options(
            server,
            tmp_path,
            field=["q", "a"],
            status_field="status",
            n=2,
            temperature=1.0,
            backup_field="original_q",
        )
    )
    after = datasets.Dataset.from_list(rows).map(transform, batched=True)
    assert after[1]["q"] == "ASK 1"
    assert after[1]["samples"] == ["ASK 1", "ASK 1"]
    assert (after[1]["original_q"], after[1]["original_a"]) == ("ask 1", "say 1")
    assert after[1]["status"]["state"] == "done"
    assert len(server.calls) == 16


def test_the_python_api_gives_failures_as_a_dataset(tmp_path):
    async def behave(call):
        return error(400, "no") if call.prompt.endswith("3") else None

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data.parquet")
    with ModelServer(behave) as server:
        config = fabe_ds.RunConfig(
            **options(server, tmp_path),
            input_path=tmp_path / "data.parquet",
            output_path=tmp_path / "out",
        )
        result = fabe_ds.run(config)
    assert (result.records, result.done, result.failed) == (25, 22, 3)
    failures = result.failures()
    assert failures["record"][:] == [3, 13, 23]
    assert set(failures["failure"][:]) == {"rejected"}
    written = result.dataset()
    assert written["code"][:4] == ["X = 0", "X = 1", "X = 2", "x = 3"]
    assert written.column_names == [*ROWS[0], "original_code"]
    report = json.loads(result.report.read_text())
    assert report["failed"] == 3


def saved(box, *splits):
    parts = {name: datasets.Dataset.from_list(ROWS[:6]) for name in splits}
    datasets.DatasetDict(parts).save_to_disk(str(box.path / "in/saved"))


def test_the_input_is_never_replaced(box, server):
    saved(box, "train", "test")
    parquet(box)
    for source, output in (("data.parquet", "."), ("in/saved", "in"), ("in", "in")):
        ended = box.fabe(*command(server, source, "--output", output))
        assert ended.code == 2, ended
    assert not server.calls
    assert sorted(datasets.load_from_disk(str(box.path / "in/saved"))) == ["test", "train"]


def test_splits_of_a_saved_dataset(box, server):
    saved(box, "train", "test")
    ended = box.fabe(*command(server, "in/saved", "--split", "train[:2]+test[4:]"))
    assert ended.code == 0, ended
    assert datasets.load_from_disk(str(box.path / "outputs/saved-train-2-test-4"))["id"][:] == [
        0,
        1,
        4,
        5,
    ]
    ended = box.fabe(*command(server, "in/saved"))
    assert "split train of train, test" in ended.err
    datasets.Dataset.from_list(ROWS).save_to_disk(str(box.path / "one"))
    assert box.fabe(*command(server, "one", "--split", "train[:3]")).code == 0
    assert len(datasets.load_from_disk(str(box.path / "outputs/one-train-3"))) == 3
    assert box.fabe(*command(server, "one", "--split", "other")).code == 2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_second_run_over_a_folder_reads_what_the_first_did(box, server, suffix):
    """Neither the cache nor what earlier runs have written is input."""
    if suffix == "jsonl":
        box.lines("data.jsonl", ROWS)
    else:
        parquet(box)
    for output in ("outputs", "outputs", "more/deep"):
        ended = box.fabe(*command(server, ".", "--output", output))
        assert ended.code == 0, ended
        assert ended.out.startswith("25 records: ")
    assert len(server.calls) == 25


def test_what_is_left_out_of_a_folder_is_told(box, server):
    parquet(box, ROWS[:3], "in/a.PARQUET")
    parquet(box, ROWS[3:5], "in/b.parquet")
    box.write("in/c.csv", "code\nx\n")
    box.write("in/dataset_infos.json", "{}")
    ended = box.fabe(*command(server, "in"))
    assert ended.err.count("2 files like a.PARQUET are read, and 1 others left out") == 1
    assert ended.out.startswith("5 records")
    one = box.fabe(*command(server, "in", "--glob", "*.csv"))
    assert one.out.startswith("1 records")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("code,x\na,1,\n", "data.csv:2: 3 fields, where the first line has 2"),
        ("code,x\na,1\nb\n", "data.csv:3: 1 fields, where the first line has 2"),
        ("code,code\na,b\n", "data.csv:1: two columns are called 'code'"),
        ("", "data.csv: empty: its first line must name the columns"),
        (b"code\n\xff\n", "data.csv: not UTF-8"),
        ('code\n"a', "data.csv:2: unexpected end of data"),
    ],
)
def test_a_broken_csv_is_one_line(box, server, text, said):
    box.write("data.csv", text)
    ended = box.fabe(*command(server, "data.csv"))
    assert ended.code == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert not server.calls


def test_odd_csv_and_names(box, server):
    box.write("d[1].csv", '\ufeffcode,x\r\n"a\rb","1\n2"\r\n\r\nc,\r\n')
    ended = box.fabe(*command(server, "d[1].csv", "--backup-field", ""))
    assert ended.code == 0, ended
    written = (box.path / "outputs/d[1].csv").read_bytes().decode()
    assert written == '\ufeffcode,x\r\n"A\rB","1\n2"\r\n\r\nC,\r\n'
    parquet(box, ROWS[:2], "d[1].parquet")
    assert box.fabe(*command(server, "d[1].parquet")).code == 0


def test_a_record_of_a_table_is_explained(box, server):
    box.write("d.csv", "id,code\n1,x\n2,\n")
    assert box.fabe(*command(server, "d.csv")).code == 0
    box.write("d.csv", "id,code\n1,x\n2,\n3,new\n")
    for record, said in [(0, "record 0: hit, key "), (1, "is empty"), (2, "record 2: miss: ")]:
        ended = box.fabe("cache", "explain", "outputs.run.json", "--record", record)
        assert (ended.code, said in ended.out) == (0, True), ended
    assert box.fabe("cache", "explain", "outputs.run.json", "--record", 3).code == 2


def test_a_table_without_rows(box, server):
    pq.write_table(pa.schema([("code", pa.string())]).empty_table(), box.path / "none.parquet")
    box.write("none.csv", "code\n")
    for source in ("none.parquet", "none.csv"):
        ended = box.fabe(*command(server, source))
        assert ended.code == 0, ended
        assert ended.out.startswith("0 records")
    assert pq.read_table(box.path / "outputs/none.parquet").column_names == [
        "code",
        "original_code",
    ]


def test_columns_of_ones_own_are_not_replaced(box, server):
    parquet(box, [{"code": "x", "samples": 1, "how": 2, "original_code": None}])
    taken = ("--samples", 2, "--temperature", 1), ("--status-field", "how")
    for more in taken:
        ended = box.fabe(*command(server, "data.parquet", *more))
        assert ended.code == 2
        assert "there is such a column; name another" in ended.err
    assert not server.calls
    ended = box.fabe(*command(server, "data.parquet"))
    assert ended.code == 0, ended
    assert (box.path / "outputs.run.json").exists()
