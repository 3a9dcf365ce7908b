"""`Dataset.map(fabe_ds.transform_fn(...))` as a pipeline uses it."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest

import fabe_ds
from fabe_ds import FabeError, UsageError, transform_fn
from fabe_ds.formats.columns import rows_of
from fabe_ds.store.completions import RecordCache
from tests.support.server import ModelServer, completion, error

ROWS = [{"id": i, "code": f"x = {i}"} for i in range(30)]


def options(server: ModelServer, tmp_path, **more):
    return {
        "field": "code",
        "instruction": "Up",
        "provider": "openai",
        "model": "m",
        "base_url": server.url,
        "cache_dir": tmp_path / "cache",
        **more,
    }


def test_the_public_names():
    assert sorted(fabe_ds.__all__) == [
        "FabeError",
        "InputError",
        "RunConfig",
        "RunResult",
        "RunStopped",
        "TemplateError",
        "UsageError",
        "__version__",
        "export_records",
        "load_records",
        "preview",
        "push_to_hub",
        "run",
        "transform_fn",
    ]
    assert all(hasattr(fabe_ds, name) for name in fabe_ds.__all__)


def test_the_field_is_rewritten_and_the_original_kept(tmp_path, server):
    rows = [*ROWS, {"id": 30, "code": None}, {"id": 31, "code": " "}]
    data = datasets.Dataset.from_list(rows)
    new = data.map(transform_fn(**options(server, tmp_path)), batched=True)
    assert new["code"][:30] == [f"X = {i}" for i in range(30)]
    assert new["code"][30:] == [None, " "]
    assert new["original_code"] == data["code"]
    assert new["id"] == data["id"]
    assert len(server.calls) == 30


SCRIPT = """
import sys, datasets, fabe_ds
data = datasets.load_from_disk(sys.argv[1])
fn = fabe_ds.transform_fn(field="code", instruction="Up", provider="openai", model="m",
                          base_url=sys.argv[2], cache_dir=sys.argv[3], concurrency=int(sys.argv[4]))
new = data.map(fn, batched=True)
print(new._fingerprint, new["code"][3])
"""


def test_the_fingerprint_is_the_same_in_every_process(tmp_path, server):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "data")
    seen = []
    for hash_seed, concurrency in (("1", "2"), ("2", "9")):
        command = [sys.executable, "-c", SCRIPT, tmp_path / "data", server.url, tmp_path / "cache"]
        ended = subprocess.run(
            [*map(str, command), concurrency],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "OPENAI_API_KEY": f"sk-{hash_seed}"},
        )
        assert ended.returncode == 0, ended.stderr
        seen.append(ended.stdout.split("\n")[0])
    assert seen[0] == seen[1]
    assert seen[0].endswith("X = 3")
    assert len(server.calls) == 30


def test_R10_a_second_map_makes_no_request(tmp_path, server):
    memory = datasets.Dataset.from_list(ROWS)
    memory.save_to_disk(tmp_path / "data")
    disk = datasets.load_from_disk(tmp_path / "data")
    first = disk.map(transform_fn(**options(server, tmp_path)), batched=True)
    assert len(server.calls) == 30
    again = disk.map(transform_fn(**options(server, tmp_path)), batched=True)
    assert again._fingerprint == first._fingerprint
    assert again.cache_files == first.cache_files
    in_memory = memory.map(transform_fn(**options(server, tmp_path)), batched=True)
    smaller = disk.map(transform_fn(**options(server, tmp_path)), batched=True, batch_size=7)
    assert in_memory["code"] == smaller["code"] == first["code"]
    assert len(server.calls) == 30


def test_the_pickle_is_configuration_without_the_key(tmp_path, server):
    fn = transform_fn(**options(server, tmp_path, api_key="sk-canary-42"))
    before = pickle.dumps(fn)
    fn({"code": ["x"]})
    assert pickle.dumps(fn) == before
    assert b"sk-canary-42" not in before
    assert "sk-canary-42" not in repr(fn) + repr(fn.config)
    again = pickle.loads(before)
    assert pickle.dumps(again) == before
    assert again({"code": ["y"]})["code"] == ["Y"]
    assert server.calls[-1].headers["Authorization"] == "Bearer sk-canary-42"


@pytest.mark.parametrize(
    "change",
    [
        {"instruction": "Down"},
        {"model": "n"},
        {"temperature": 0.5},
        {"field": "id"},
        {"base_url": "http://other/v1"},
        {"backup_field": "was"},
        {"strip_fences": False},
        {"system_prompt": None},
        {"template_vars": {"a": "b"}},
        {"on_truncated": "keep"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_fingerprint_changes_with_what_changes_the_result(tmp_path, server, change):
    hasher = datasets.fingerprint.Hasher
    fn = transform_fn(**options(server, tmp_path))
    assert hasher.hash(fn) != hasher.hash(transform_fn(**{**options(server, tmp_path), **change}))


@pytest.mark.parametrize(
    "change",
    [
        {"concurrency": 9},
        {"retry": 0},
        {"timeout": 9.0},
        {"cache_dir": "x"},
        {"api_key": "k"},
        {"batch_size": 99},
        {"resume": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_fingerprint_stays_with_what_does_not(tmp_path, server, change):
    hasher = datasets.fingerprint.Hasher
    fn = transform_fn(**options(server, tmp_path))
    assert hasher.hash(fn) == hasher.hash(transform_fn(**{**options(server, tmp_path), **change}))


def test_the_fingerprint_changes_with_the_transforms_version(tmp_path, server, monkeypatch):
    hasher = datasets.fingerprint.Hasher
    before = hasher.hash(transform_fn(**options(server, tmp_path)))
    monkeypatch.setattr("fabe_ds.transform.TRANSFORM_VERSION", 999)
    assert hasher.hash(transform_fn(**options(server, tmp_path))) != before


def test_the_fingerprint_changes_with_the_template_files_text(tmp_path):
    hasher = datasets.fingerprint.Hasher
    path, copy = tmp_path / "i.j2", tmp_path / "copy.j2"
    path.write_text("One")
    copy.write_text("One")
    one = hasher.hash(transform_fn(instruction=str(path)))
    assert hasher.hash(transform_fn(instruction=str(copy))) == one
    path.write_text("Two")
    assert hasher.hash(transform_fn(instruction=str(path))) != one


def test_failures_are_not_cached_by_a_map(tmp_path):
    broken = True

    async def one_fails(call):
        return error(400, "no such luck") if broken and call.prompt.endswith("= 7") else None

    with ModelServer(one_fails) as server:
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "data")
        data = datasets.load_from_disk(tmp_path / "data")
        with pytest.raises(FabeError, match=r"1 of 30 records of this batch failed.*no such luck"):
            data.map(transform_fn(**options(server, tmp_path)), batched=True)
        assert len(server.calls) == 30
        kept = data.map(transform_fn(**options(server, tmp_path, on_error="keep")), batched=True)
        assert kept["code"][6:9] == ["X = 6", "x = 7", "X = 8"]
        calls = len(server.calls)
        broken = False
        data.map(transform_fn(**options(server, tmp_path)), batched=True)
        assert len(server.calls) == calls + 1


def test_a_map_runs_inside_a_running_event_loop(tmp_path, server):
    async def notebook_cell():
        data = datasets.Dataset.from_list(ROWS)
        return data.map(transform_fn(**options(server, tmp_path)), batched=True)

    assert asyncio.run(notebook_cell())["code"][2] == "X = 2"


def test_a_nested_field_of_an_ordinary_dataset(tmp_path, server):
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(3)
    ]
    fn = transform_fn(**options(server, tmp_path, field="messages.0.content", backup_field="was"))
    new = datasets.Dataset.from_list(rows).map(fn, batched=True)
    assert new[1]["messages"] == [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "a"},
    ]
    assert new["was"] == ["q0", "q1", "q2"]


def test_a_template_sees_the_whole_row(tmp_path, server):
    fn = transform_fn(**options(server, tmp_path, instruction="Row {{ record.id }}:\n\n{{ code }}"))
    datasets.Dataset.from_list(ROWS[:2]).map(fn, batched=True)
    assert sorted(server.prompts) == ["Row 0:\n\nx = 0", "Row 1:\n\nx = 1"]


def test_a_stream_is_rewritten_too(tmp_path, server):
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    new = stream.map(transform_fn(**options(server, tmp_path)), batched=True, batch_size=10)
    assert [row["code"] for row in new] == [f"X = {i}" for i in range(30)]
    assert [row["code"] for row in new] == [f"X = {i}" for i in range(30)]
    assert len(server.calls) == 30


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_share_the_cache(tmp_path, server, method):
    script = f"""
import multiprocess, datasets, fabe_ds
if __name__ == "__main__":
    multiprocess.set_start_method({method!r})
    data = datasets.Dataset.from_list([{{"code": f"x = {{i % 10}}"}} for i in range(40)])
    fn = fabe_ds.transform_fn(field="code", instruction="Up", provider="openai", model="m",
        base_url={server.url!r}, cache_dir={str(tmp_path / "cache")!r}, api_key="sk-w")
    print(data.map(fn, batched=True, num_proc=2)["code"] == [f"X = {{i % 10}}" for i in range(40)])
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    ended = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=100)
    assert ended.stdout.strip() == "True", ended.stderr
    assert len(server.calls) == 10
    assert {call.headers["Authorization"] for call in server.calls} == {"Bearer sk-w"}


def test_load_map_export_by_hand(tmp_path, server):
    source = tmp_path / "d.json"
    source.write_text('[ {"code" : "x", "n": 1e-12} ]\n')
    records = fabe_ds.load_records(source, field="code", cache_dir=tmp_path / "cache")
    new = records.map(transform_fn(**options(server, tmp_path)), batched=True)
    fabe_ds.export_records(new, tmp_path / "out")
    assert (tmp_path / "out/d.json").read_text() == (
        '[ {"code" : "X", "original_code" : "x", "n": 1e-12} ]\n'
    )


def test_a_run_by_its_python_name(tmp_path, server):
    source = tmp_path / "d.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = fabe_ds.RunConfig(
        input_path=source, output_path=tmp_path / "out", **options(server, tmp_path)
    )
    result = fabe_ds.run(config)
    assert (result.records, result.done, result.failed, result.exit_code) == (30, 30, 0, 0)
    assert result.outputs == [tmp_path / "out/d.jsonl"]
    assert fabe_ds.run(config).cached == 30


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"modle": "x"}, "did you mean 'model'"),
        ({"retry": -1}, "retry -1"),
        ({"provider": "nope"}, "no such provider"),
    ],
)
def test_wrong_options_are_named(tmp_path, server, wrong, says):
    with pytest.raises(UsageError, match=says):
        transform_fn(**options(server, tmp_path, **wrong))


def test_a_column_that_is_not_there_is_named(tmp_path, server):
    data = datasets.Dataset.from_list([{"text": "x"}])
    with pytest.raises(UsageError, match="no column 'code'"):
        data.map(transform_fn(**options(server, tmp_path)), batched=True)


def test_a_second_map_sends_what_failed_in_the_first(tmp_path):
    async def behave(call):
        return error(400, "too rude") if call.number < 35 and "x = 7" in call.prompt else None

    with ModelServer(behave) as server:
        rewrite = transform_fn(**options(server, tmp_path))
        data = datasets.Dataset.from_list(ROWS)
        with pytest.raises(FabeError, match="1 of 30 records"):
            data.map(rewrite, batched=True)
        server.calls += server.calls[:10]
        new = data.map(rewrite, batched=True)
    assert new["code"][7] == "X = 7"
    assert len(server.calls) == 30 + 10 + 1


def test_a_second_map_finds_its_samples(tmp_path):
    async def behave(call):
        return completion(call, f"{call.number}")

    with ModelServer(behave) as server:
        rewrite = transform_fn(**options(server, tmp_path, temperature=1.0))
        data = datasets.Dataset.from_list([{"code": "same"}] * 20)
        first, second = (
            data.map(rewrite, batched=True, batch_size=5, load_from_cache_file=False)["code"][:]
            for _ in range(2)
        )
    assert len(set(first)) == 20
    assert second == first
    assert len(server.calls) == 20


def test_a_map_goes_on_where_another_was_interrupted(tmp_path):
    """As in a notebook: the callable, and what it has open, outlive the map."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with ModelServer(latency=0.2) as server:
        rewrite = transform_fn(**options(server, tmp_path))
        data = datasets.Dataset.from_list(ROWS)
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.7)
        try:
            with pytest.raises(KeyboardInterrupt):
                data.map(rewrite, batched=True)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert 0 < len(server.calls) < 30
        assert data.map(rewrite, batched=True)["code"][:] == [f"X = {i}" for i in range(30)]
        assert len(server.calls) == 30


def test_threads_share_the_limit_and_ask_once(tmp_path):
    batch = {"code": [row["code"] for row in ROWS]}
    with ModelServer(latency=0.05) as server:
        rewrite = transform_fn(**options(server, tmp_path, concurrency=3))
        _ = rewrite.runtime
        with ThreadPoolExecutor(4) as pool:
            for result in pool.map(rewrite, [batch] * 4):
                assert result["code"] == [f"X = {i}" for i in range(30)]
    assert server.most_in_flight == 3
    assert len(server.calls) == 30


def test_a_thread_takes_over_what_another_leaves(tmp_path):
    batch = {"code": [row["code"] for row in ROWS]}
    with ModelServer(latency=0.1) as server:
        rewrite = transform_fn(**options(server, tmp_path, concurrency=3))
        leaving = rewrite.outcomes(rows_of(batch, rewrite.targets, whole=False))
        next(leaving)
        with ThreadPoolExecutor(1) as pool:
            staying = pool.submit(rewrite, batch)
            leaving.close()
            assert staying.result(30)["code"] == [f"X = {i}" for i in range(30)]
    assert len(server.calls) == 30


def test_a_map_over_single_records_is_refused(tmp_path, server):
    data = datasets.Dataset.from_list([{"code": "x = 1"}])
    for mapped in (data, data.to_iterable_dataset()):
        with pytest.raises(UsageError, match="batched=True"):
            list(mapped.map(transform_fn(**options(server, tmp_path))))
    assert not server.calls


def test_indices_and_ranks_are_taken_as_they_come(tmp_path, server):
    data = datasets.Dataset.from_list(ROWS)
    rewrite = transform_fn(**options(server, tmp_path))
    for more in (
        {"with_indices": True},
        {"with_rank": True},
        {"with_indices": True, "with_rank": True},
    ):
        assert data.map(rewrite, batched=True, **more)["code"][3] == "X = 3"
    assert len(server.calls) == 30


def test_a_column_that_is_no_text_is_named(tmp_path, server):
    data = datasets.Dataset.from_list(ROWS)
    with pytest.raises(UsageError, match=r"--field id: its values are not text \(int\)"):
        data.map(transform_fn(**options(server, tmp_path, field="id")), batched=True)
    with pytest.raises(UsageError, match="an empty list"):
        transform_fn(**options(server, tmp_path, field=[]))


def test_columns_called_as_ours_are_only_columns(tmp_path, server):
    rows = [{"raw": "r", "text": "t", "index": 1, "joint": "", "code": "x"}]
    rewrite = transform_fn(**options(server, tmp_path))
    new = datasets.Dataset.from_list(rows).map(rewrite, batched=True)
    assert new[0] == {**rows[0], "code": "X", "original_code": "x"}


def test_many_may_make_one_cache_at_once(tmp_path):
    def opened(number: int) -> int:
        cache = RecordCache(tmp_path / f"{number // 8}")
        cache.close()
        return number

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(opened, range(160))) == list(range(160))
