"""The page about a run, in a real browser."""

from __future__ import annotations

import shutil

import pytest

from tests.support.server import ModelServer, completion, error, openai_run

NEEDS_BROWSER = pytest.mark.skipif(
    shutil.which("chromedriver") is None, reason="chromedriver is not installed"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run of 300 records, of which every 50th fails."""
    from tests.conftest import Box

    async def behave(call):
        number = int(call.prompt.rsplit(" ", 1)[1])
        if number % 50 == 49:
            return error(400, "<b>rude</b> & refused")
        return completion(call, f"def f():\n    return {number}  # <script>alert(1)</script>")

    box = Box(tmp_path_factory.mktemp("report"))
    box.lines("data.jsonl", [{"code": f"def f():\n    x = {i}"} for i in range(300)])
    with ModelServer(behave, latency=0.02) as server:
        assert box.fabe(*openai_run(server)).code == 1
    ended = box.fabe("report", "outputs.run.json")
    assert ended.code == 0, ended.err
    assert ended.out == "written: outputs.html\n"
    return box.path / "outputs.html"


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert "http://" not in text.split("<h2>Settings</h2>")[0]
    assert "https://" not in text
    assert "<script>alert" not in text
    assert len(text) < 2_000_000


@NEEDS_BROWSER
@pytest.mark.slow
def test_the_page_in_a_browser(page):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1200,2000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(page.as_uri())
        tiles = dict(
            tile.text.split("\n") for tile in driver.find_elements(By.CSS_SELECTOR, ".tiles div")
        )
        assert (tiles["records"], tiles["rewritten"], tiles["failed"]) == ("300", "294", "6")
        charts = driver.find_elements(By.CSS_SELECTOR, "svg[role=img]")
        assert [chart.get_attribute("aria-label") for chart in charts] == [
            "Throughput, records a second",
            "Requests that may be in flight",
            "Requests in flight",
            "Latency of an answer",
            "Prompt tokens of a record",
            "Completion tokens of a record",
        ]
        assert all(chart.size["height"] > 100 for chart in charts)
        failed = driver.find_element(By.CSS_SELECTOR, "details.failures")
        assert failed.text.startswith("rejected: 6 records")
        failed.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
        assert "<b>rude</b> & refused" in failed.text
        assert "data.jsonl:50" in failed.text
        held = failed.find_element(By.CSS_SELECTOR, ".held")
        assert "x = 49" not in held.text
        held.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
        assert "x = 49" in held.text
        samples = driver.find_elements(By.CSS_SELECTOR, ".sample")
        assert 100 < len(samples) <= 200
        assert "-     x = 0" in samples[0].find_element(By.CSS_SELECTOR, ".gone").text
        box = driver.find_element(By.ID, "filter")
        box.send_keys("x = 28")
        shown = [sample for sample in samples if sample.is_displayed()]
        assert 0 < len(shown) < 20
        assert all("x = 28" in sample.text for sample in shown)
        status = driver.find_element(By.ID, "shown").text
        assert status == f"{len(shown)} of {len(samples)} samples"
        assert not driver.get_log("browser")
        light = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
        )
        dark = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (light, dark) == ("rgb(250, 250, 248)", "rgb(20, 24, 28)")
        driver.save_screenshot(str(page.with_suffix(".png")))
    finally:
        driver.quit()


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
    assert "2 samples" in (box.path / "outputs.html").read_text()
