"""The page about a run: written, and served while a run goes on; in a real browser."""

from __future__ import annotations

import contextlib
import json
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Box, wait_for
from tests.support.browser import HAS_BROWSER, browser
from tests.support.server import ModelServer, completion, error, openai_run

NEEDS_BROWSER = pytest.mark.skipif(not HAS_BROWSER, reason="chromedriver is not installed")


async def behave(call):
    number = int(re.findall(r"x = (\d+)", call.prompt)[-1])
    if number % 50 == 49:
        return error(400, "<b>rude</b> & refused")
    if number % 100 == 10:
        return completion(call, "cut", "length")
    more = "\n    # more" * (number % 7)
    return completion(
        call, f"def f():\n    y = {number}\n    return y  # <script>alert(1)</script>{more}"
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run of 300 records, of which every 50th is refused, and 3 are cut."""
    box = Box(tmp_path_factory.mktemp("report"))
    box.lines(
        "data.jsonl",
        [{"id": i, "code": f"def f():\n    x = {i}\n    return x"} for i in range(300)],
    )
    with ModelServer(behave, latency=0.02) as server:
        assert box.fabe(*openai_run(server)).code == 1
    ended = box.fabe("report", "outputs.run.json")
    assert ended.code == 0, ended.err
    assert ended.out == "written: outputs.html\n"
    return box.path / "outputs.html"


def data_of(page: Path) -> dict[str, Any]:
    """What a page holds."""
    (found,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL
    )
    return dict(json.loads(found))


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=[\"'](?!data:,)", text)
    assert "@import" not in text
    assert "<script>alert" not in text
    assert len(text) < 2_000_000


def test_the_page_holds_what_the_run_has_left(page):
    data = data_of(page)
    assert dict(data["tiles"])["failed"] == "9"
    assert [(kind, count) for kind, count, _ in data["classes"]] == [
        ("rejected", 6),
        ("truncated", 3),
    ]
    first, second = data["failures"][:2]
    lines = (page.parent / "data.jsonl").read_text().splitlines()
    assert (first["where"], first["input"]) == ("data.jsonl:11", lines[10])
    assert (second["where"], second["input"]) == ("data.jsonl:50", lines[49])
    history = json.loads((page.parent / "outputs.run.json").read_text())["history"]
    assert all(in_flight <= limit for *_, limit, in_flight, _ in history)


def elements(driver: Any, selector: str) -> list[Any]:
    from selenium.webdriver.common.by import By

    return list(driver.find_elements(By.CSS_SELECTOR, selector))


def shown(driver: Any, selector: str) -> list[str]:
    return [each.text for each in elements(driver, selector)]


@NEEDS_BROWSER
@pytest.mark.slow
def test_the_page_in_a_browser(page):
    from selenium.webdriver.support.ui import Select

    with browser() as driver:
        driver.get(page.as_uri())
        tiles = dict(text.split("\n") for text in shown(driver, ".tiles div"))
        assert (tiles["records"], tiles["rewritten"], tiles["failed"]) == ("300", "291", "9")
        charts = elements(driver, "svg[role=img]")
        assert [chart.get_attribute("aria-label") for chart in charts] == [
            "Throughput, records a second",
            "Requests that may be in flight",
            "Requests in flight",
            "Latency of an answer",
            "Prompt tokens of a record",
            "Completion tokens of a record",
        ]
        assert all(chart.size["height"] > 100 for chart in charts)
        # Failures by class and by text.
        assert len(elements(driver, ".failure")) == 9
        assert "<b>rude</b> & refused" in shown(driver, ".failure")[1]
        Select(elements(driver, "#class")[0]).select_by_value("truncated")
        assert len(elements(driver, ".failure")) == 3
        Select(elements(driver, "#class")[0]).select_by_value("")
        elements(driver, "#failures-filter")[0].send_keys("x = 149")
        assert [text.split("\n")[0] for text in shown(driver, ".failure")] == ["data.jsonl:150"]
        assert shown(driver, "#failures-shown")[0].startswith("1 of 9 failures. ")
        # A record to try again with, alone.
        (copy,) = elements(driver, ".failure .head button")
        driver.execute_script(
            "navigator.clipboard.writeText = async (text) => { window.copied = text }"
        )
        copy.click()
        copied = driver.execute_script("return window.copied")
        assert json.loads(copied) == {"id": 149, "code": "def f():\n    x = 149\n    return x"}
        # Before and after, word by word.
        samples = elements(driver, ".sample")
        assert len(samples) == 30
        assert "-     x = 0" in samples[0].text
        assert shown(driver, ".sample .gone mark")[0]
        assert (
            shown(driver, "#shown")[0]
            == f"{len(data_of(page)['samples'])} of {len(data_of(page)['samples'])} samples"
        )
        elements(driver, "#filter")[0].send_keys("x = 28")
        found = shown(driver, ".sample")
        assert 0 < len(found) < 20
        assert all("x = 28" in text for text in found)
        elements(driver, "#filter")[0].clear()
        elements(driver, "#filter")[0].send_keys(" ", "\b")
        Select(elements(driver, "#sort")[0]).select_by_value("grown")
        changes = [
            int(text)
            for text in re.findall(
                r"([+-]?\d+) characters", " ".join(shown(driver, ".sample .head"))
            )
        ]
        assert changes == sorted(changes, reverse=True)
        assert changes[0] > changes[-1]


@NEEDS_BROWSER
@pytest.mark.slow
def test_the_page_by_keyboard(page):
    from selenium.webdriver.common.action_chains import ActionChains

    with browser() as driver:
        driver.get(page.as_uri())

        def press(*keys: str) -> None:
            ActionChains(driver).send_keys(*keys).perform()

        press("j", "j")
        assert driver.switch_to.active_element.text.startswith(shown(driver, ".failure h3")[1])
        press("k")
        assert driver.switch_to.active_element.text.startswith(shown(driver, ".failure h3")[0])
        assert not elements(driver, ".beside")
        press("s")
        left, right = elements(elements(driver, ".beside")[1], ":scope > div")
        assert left.rect["x"] < right.rect["x"]
        press("/")
        press("x = 2s")  # in a field, letters are letters
        assert driver.switch_to.active_element.get_attribute("value") == "x = 2s"
        press("\ue00c", "d")  # Escape leaves it
        assert driver.execute_script("return document.documentElement.dataset.colours") == "dark"


@NEEDS_BROWSER
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1400])
def test_the_page_fits(page, width, dark):
    """On a phone, a tablet and a desk: nothing is wider than the window, and all can be read."""
    with browser(width, 900, dark) as driver:
        driver.get(page.as_uri())
        elements(driver, "#beside")[0].click()
        wide = driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        colours = driver.execute_script("""
            const of = (selector) => getComputedStyle(document.querySelector(selector))
            return [of("body").backgroundColor, of("body").color, of(".gone").backgroundColor, of(".gone").color,
                    of(".new").backgroundColor, of(".new").color, of(".soft").color]""")
        ground, ink, gone_ground, gone, new_ground, new, soft = map(luminance, colours)
        assert (ground < 0.1) == dark
        for one, other in [(ground, ink), (gone_ground, gone), (new_ground, new), (ground, soft)]:
            assert contrast(one, other) >= 4.5  # WCAG 2.2, 1.4.3
        driver.save_screenshot(str(page.with_name(f"{width}-{'dark' if dark else 'light'}.png")))


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour, as WCAG 2.2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_a_run_without_a_model_has_a_page_too(box):
    box.lines("data.jsonl", [{"code": "x"}])
    assert box.fabe("run", "--input", "data.jsonl", "--instruction", "I").code == 0
    ended = box.fabe("report", "outputs.run.json", "--output", "page.html")
    assert ended.code == 0, ended.err
    assert "data.jsonl:1" in (box.path / "page.html").read_text()


def test_what_is_no_report(box):
    box.write("x.json", "[]")
    for name in ("x.json", "gone.json"):
        ended = box.fabe("report", name)
        assert ended.code == 2
        assert ended.err.startswith(f"fabe-ds: {name}: ")
        assert ended.err.count("\n") == 1


def test_a_line_separator_in_a_record(box):
    box.lines("data.jsonl", [{"code": "one\u2028two"}, {"code": "three\x85four"}])
    assert box.fabe("run", "--input", "data.jsonl", "--instruction", "I").code == 0
    ended = box.fabe("report", "outputs.run.json")
    assert ended.code == 0, ended.err
    assert len(data_of(box.path / "outputs.html")["samples"]) == 2
    assert "\u2028" not in (box.path / "outputs.html").read_text()


@pytest.mark.parametrize("text", ["x" * 79 + "\n", "汉字" * 39 + "\n", '\x01\\"<é\n' * 13])
def test_a_page_stays_below_three_megabytes(box, text):
    """Of long records in any script, many of which fail in several ways."""
    box.lines("data.jsonl", [{"code": f"# {i}\n{text * 100}"} for i in range(1500)])

    async def fail(call):
        number = int(re.findall(r"# (\d+)", call.prompt)[0])
        if number % 3:
            reasons = ["length", "content_filter", "tool_calls", "strange", "stop"]
            return completion(call, "" if number % 5 == 4 else text * 80, reasons[number % 5])
        return completion(call, text[::-1] * 90)

    with ModelServer(fail) as server:
        assert box.fabe(*openai_run(server, "--concurrency", 32)).code == 1
    assert box.fabe("report", "outputs.run.json").code == 0
    page = box.path / "outputs.html"
    assert page.stat().st_size < 3_000_000
    data = data_of(page)
    assert len(data["samples"]) >= 40
    assert {each["kind"] for each in data["failures"]} == {kind for kind, *_ in data["classes"]}


# While a run goes on.


def got(url: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
        return json.loads(answer.read()) if url.endswith("json") else answer.read().decode()


def test_a_page_follows_a_run(box):
    """From another terminal: before the run, while it goes on, and when it has ended."""
    follower = box.start("report", "--follow", "outputs.run.json")
    assert follower.stdout is not None
    (url,) = re.findall(r"http://127.0.0.1:\d+/", follower.stdout.readline())
    assert "<main" in got(url)
    assert got(f"{url}data.json")["state"] == "waiting"
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(60)])
    with ModelServer(behave, latency=0.3) as server:
        run = box.start(*openai_run(server))
        wait_for(lambda: got(f"{url}data.json")["state"] == "running")
        wait_for(lambda: dict(got(f"{url}data.json")["tiles"]).get("rewritten", "0") != "0")
        data = got(f"{url}data.json")
        assert data["progress"]["total"] == 60
        assert "records/s" in data["progress"]["line"]
        assert data["samples"]
        first = data["progress"]["done"]
        wait_for(lambda: got(f"{url}data.json")["progress"]["done"] > first)
        assert list(box.path.glob(".outputs*.live.json"))
        out, _ = run.communicate(timeout=60)
    assert run.returncode == 1, out
    assert not list(box.path.glob(".outputs*"))
    data = got(f"{url}data.json")
    assert data["state"] == "finished"
    assert dict(data["tiles"])["records"] == "60"
    with pytest.raises(urllib.error.HTTPError):
        got(f"{url}data.json", Host="evil.example")
    follower.send_signal(2)
    _, err = follower.communicate(timeout=10)
    assert (follower.returncode, err) == (0, "")


def test_a_killed_run_is_said_to_be_one(box, monkeypatch):
    from fabe_ds.report import follower

    monkeypatch.setattr(follower, "_is_fresh", lambda _: False)
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(60)])
    with ModelServer(behave, latency=0.3) as server:
        run = box.start(*openai_run(server))
        wait_for(lambda: bool(list(box.path.glob(".outputs*.live.json"))))
        box.kill(run)
        watched = follower.Watched(box.path / "outputs.run.json")
        data = watched.data()
        assert data["state"] == "killed"
        assert data["progress"]["line"].startswith("killed at ")
        assert box.fabe(*openai_run(server)).code == 1
    assert watched.data()["state"] == "finished"


@pytest.mark.parametrize("text", ["{}", "[]", "x", '{"pid": 1}'])
def test_a_damaged_live_file_is_none(box, text):
    from fabe_ds.report.follower import Watched

    box.write(".outputs.live.json", text)
    assert Watched(box.path / "outputs.run.json").data()["state"] == "waiting"


def test_a_stopped_run_is_not_mistaken_for_an_earlier_one(box):
    """Beside the report of a run that has come to its end, another is stopped."""
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(40)])
    with ModelServer(behave) as server:
        box.fabe(*openai_run(server))
        run = box.start(
            *openai_run(server, "--live", "--no-resume", "--max-requests", 12, "--concurrency", 4)
        )
        server.latency = 0.5
        assert run.stderr is not None
        (url,) = re.findall(r"live: (http://127.0.0.1:\d+/)", run.stderr.readline())
        seen = []
        while run.poll() is None:
            with contextlib.suppress(OSError):
                seen.append(got(f"{url}data.json"))
            time.sleep(0.1)
        run.communicate()
    assert run.returncode == 1
    assert "finished" not in {data["state"] for data in seen}
    assert seen[-1]["state"] == "stopped"
    assert re.match(r"stopped at \d+/40, .*; run it again to go on", seen[-1]["progress"]["line"])
    assert not (box.path / ".outputs.live.json").exists()


def test_a_live_file_is_never_input(box):
    box.lines("in/data.jsonl", [{"code": "x"}])
    box.write("in/.outputs.live.json", '{"code": "y"}')
    for more in ([], ["--glob", "*"], ["--glob", "*.json*"]):
        ended = box.fabe("run", "--input", "in", "--output", "out", *more)
        assert "1 records: " in ended.out
        assert ".live.json" not in ended.out + ended.err


@NEEDS_BROWSER
@pytest.mark.slow
def test_a_live_page_in_a_browser(box):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(80)])
    with ModelServer(behave, latency=0.3) as server, browser() as driver:
        run = box.start(*openai_run(server, "--live", "--quiet"))
        assert run.stderr is not None
        (url,) = re.findall(r"live: (http://127.0.0.1:\d+/)", run.stderr.readline())
        driver.get(url)
        wait_for(lambda: bool(elements(driver, "progress[value]")))
        wait_for(lambda: "records/s" in shown(driver, ".run p")[0])
        # A filter that somebody types in while the page is drawn anew.
        wait_for(lambda: bool(elements(driver, "#filter")))
        elements(driver, "#filter")[0].send_keys("answer")
        wait_for(lambda: not elements(driver, "progress"), 60)
        tiles = dict(text.split("\n") for text in shown(driver, ".tiles div"))
        assert tiles["records"] == "80"
        assert driver.switch_to.active_element.get_attribute("value") == "answer"
        run.communicate(timeout=60)
        driver.get_log("browser")  # the server is gone, which the page asks for once more


@pytest.mark.parametrize("words", [["gone/outputs.run.json"], ["data.jsonl"], ["--port", "99999"]])
def test_what_cannot_be_followed(box, words):
    box.lines("data.jsonl", [{"code": "x"}])
    ended = box.fabe("report", "--follow", *words)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "name where the run leaves its report" in ended.err or "65535" in ended.err
