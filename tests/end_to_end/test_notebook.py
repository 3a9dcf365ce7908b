"""A real kernel, headless: what a person sees in a notebook, and what an interrupt leaves."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

import fabe_ds
from tests.conftest import Box, wait_for
from tests.support.server import ModelServer, completion, error

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


def executed(box: Box, *cells: str) -> list[Any]:
    """The outputs of each cell of a notebook that ran in the box."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(box.path)}}
    nbclient.NotebookClient(book, timeout=60, resources=resources).execute()
    return [cell.outputs for cell in book.cells]


def asked(server: ModelServer, **more: Any) -> str:
    """The keywords of a run, as code."""
    how = {"provider": "openai", "base_url": server.url, "model": "m", "instruction": "f", **more}
    return ", ".join(f"{name}={value!r}" for name, value in how.items())


def htmls(outputs: list[Any]) -> list[str]:
    return [each["data"]["text/html"] for each in outputs if "text/html" in each.get("data", {})]


async def behave(call):
    if "x = 7" in call.prompt:
        return error(400, "<b>no</b>")
    return completion(call, "X = <2>")


def test_a_run_shows_its_progress_and_its_result(box):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(10)])
    with ModelServer(behave, latency=0.3) as server:
        (outputs,) = executed(
            box, f"import fabe_ds\nfabe_ds.run(input='data.jsonl', {asked(server)})"
        )
    bar, result = htmls(outputs)
    assert "<progress" in bar
    assert 'value="10" max="10"' in bar
    assert "9 done, 1 failed, " in bar
    assert "<b>10 records</b>" in result
    assert "1 (1 rejected)" in result
    assert "data.jsonl:8" in result
    assert "&lt;b&gt;no&lt;/b&gt;" in result
    assert "<b>no" not in result
    assert "- x = 0" in result
    assert "+ X = &lt;2&gt;" in result
    assert '<a href="outputs/data.jsonl">' in result
    assert '<a href="outputs.run.json">' in result
    # Without ipywidgets, tqdm remarks that its own bars are plain ones.
    said = [each["text"] for each in outputs if each["output_type"] == "stream"]
    assert all("IProgress not found" in text for text in said)


@pytest.mark.parametrize("text", [None, "", "{}\n", "[]\n", "x\n", '{"record": 1}\n'])
def test_a_result_shows_itself_whatever_became_of_its_files(box, text):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(10)])
    with ModelServer(behave) as server:
        how = {"provider": "openai", "base_url": server.url, "model": "m", "instruction": "f"}
        places = {name: box.path / name for name in ("output", "cache_dir")}
        result = fabe_ds.run(input=box.path / "data.jsonl", progress=False, **how, **places)
    for path in (result.failures_file, result.report, box.path / "output.samples.jsonl"):
        path.unlink()
        if text is not None:
            path.write_text(text)
    assert "<b>10 records</b>" in result._repr_html_()


def test_a_preview_shows_itself_and_writes_nothing(box):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(10)])
    with ModelServer(behave) as server:
        code = f"import fabe_ds\nfabe_ds.preview(count=2, input='data.jsonl', {asked(server)})"
        (outputs,) = executed(box, code)
        assert len(server.calls) == 2
    (shown,) = htmls(outputs)
    assert "record 1: done, " in shown
    assert "- x = 1" in shown
    assert "10 in all, 10 were to be asked for" in shown
    assert not (box.path / "outputs").exists()


def test_the_bar_of_a_map_counts_inside_a_batch(box):
    """`datasets` moves its bar once a batch; what is done of the batch stands behind it."""
    code = """\
import datasets, fabe_ds
data = datasets.Dataset.from_list([{"code": f"y = {i}"} for i in range(30)])
rewrite = fabe_ds.transform_fn({}, concurrency=2)
data = data.map(rewrite, batched=True)
assert data[0]["code"] == "X = <2>"
"""
    with ModelServer(behave, latency=0.2) as server:
        (outputs,) = executed(box, code.replace("{}", asked(server)))
    told = "".join(each.get("text", "") for each in outputs)
    assert re.search(r"Map: +0%.* 0/30 .*, [1-9]\d? done, [\d.]+ records/s, .*0:0\d left", told), (
        told
    )
    assert re.search(r"Map: 100%.* 30/30 .*30 done", told), told


@pytest.fixture
def kernel(box: Box) -> Iterator[Any]:
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(cwd=str(box.path))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_an_interrupt_stops_politely_and_the_next_cell_goes_on(box, kernel):
    manager, client = kernel
    box.lines("data.jsonl", [{"code": f"y = {i}"} for i in range(60)])
    with ModelServer(behave, latency=0.2) as server:
        run = f"fabe_ds.run(input='data.jsonl', {asked(server, concurrency=4)})"
        asking = client.execute(f"import fabe_ds\nresult = {run}")
        wait_for(lambda: len(server.calls) >= 12)
        began = time.monotonic()
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=20)
        assert reply["parent_header"]["msg_id"] == asking
        assert time.monotonic() - began < 10
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        sent = len(server.calls)
        assert sent < 60
        client.execute(
            f"result = {run}\nassert (result.done, result.cached) == (60 - {sent}, {sent})"
        )
        reply = client.get_shell_msg(timeout=60)
        assert reply["content"]["status"] == "ok", reply
        assert len(server.calls) == 60
