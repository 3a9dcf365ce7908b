"""What the front pages and the reference show is run."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml

from fabe_ds.cli.docs import TOPICS
from fabe_ds.json_schema import least
from tests.support.hub import Hub
from tests.support.server import Call, ModelServer, completion, openai_run

REPO = Path(__file__).parents[2]
FABE = Path(sys.executable).parent / "fabe-ds"
LOCAL = "http://localhost:8000/v1"
FRONT, CHINESE = REPO / "README.md", REPO / ".github/README.zh-CN.md"
PAGES = [FRONT, CHINESE, *sorted((REPO / "fabe_ds/docs").glob("*.md"))]


def blocks(language: str, *pages: Path) -> dict[str, str]:
    """The blocks of code of the pages, by page and number."""
    return {
        f"{page.name}-{number}": block
        for page in pages
        for number, block in enumerate(
            re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
        )
    }


def commands(page: Path) -> list[str]:
    """The second cells of the tables of a page that are code alone."""
    return re.findall(r"^\| [^|]+ \| `([^`]+)` \|$", page.read_text(), re.MULTILINE)


SHELL, PYTHON = blocks("bash", *PAGES), blocks("python", *PAGES)
TASKS = commands(FRONT)
SURFACES = commands(REPO / "fabe_ds/docs/python.md")


@pytest.fixture
def folder(box, tiny):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(3)])
    box.lines("data/deep/d.jsonl", [{"code": "y = 1"}])
    box.write(
        "configs/prompts/refactor_python.j2",
        (REPO / "configs/prompts/refactor_python.j2").read_text(),
    )
    rows = [{"question": f"why {i}?", "answer": "so"} for i in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(str(box.path / "data.parquet"))
    box.lines("reviews.jsonl", [{"id": i, "text": f"I like it {i}"} for i in range(3)])
    box.lines("articles.jsonl", [{"id": i, "text": f"{i} of https://x.y, {{n}}"} for i in range(3)])
    products = [{"id": i, "description": f"A red pen for {i} euros"} for i in range(3)]
    datasets.Dataset.from_list(products).to_parquet(str(box.path / "products.parquet"))
    turns = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]
    box.lines("chats.jsonl", [{"conversations": turns}])
    box.lines("shots.jsonl", [{"input": "x = 1  # zwei", "output": "x = 1  # two"}])
    (schema,) = blocks("json", REPO / "fabe_ds/docs/answers.md").values()
    box.write("product.json", schema)
    (box.path / "models").mkdir()
    (box.path / "models/my-model").symlink_to(tiny)
    return box


async def helpful(call: Call):
    """The least answer that has the form which was asked for, or the text a little longer."""
    if (wanted := call.body.get("response_format")) is not None:
        return completion(call, json.dumps(least(wanted["json_schema"]["schema"])))
    if "Translate into" in call.prompt:
        return completion(call, call.prompt.rsplit("\n\n", 1)[-1] + "!")
    return None


def ran(folder, command: str, server: ModelServer, **environment: str):
    """How a line of a page ended in the shell of a person who has installed the package."""
    server.models, server.owner = ["qwen3:latest", "my-model"], "vllm"
    path = f"{FABE.parent}:{folder.environment['PATH']}"
    ended = subprocess.run(
        ["bash", "-ec", command.replace(LOCAL, server.url)],
        cwd=folder.path,
        env={**folder.environment, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    # A model of random weights answers with nothing that ends.
    allowed = (0, 1) if "--provider hf" in command else (0,)
    assert ended.returncode in allowed, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended


@pytest.mark.parametrize("block", SHELL.values(), ids=SHELL)
def test_the_shell_blocks(folder, block):
    with ModelServer(helpful) as server:
        assert "record" in ran(folder, block, server).stdout


@pytest.mark.parametrize("task", TASKS, ids=range(len(TASKS)))
def test_each_task_of_the_front_page_is_one_command(folder, task):
    with ModelServer(helpful) as server:
        ended = ran(folder, task, server, OPENAI_BASE_URL=server.url, MODEL_PATH="my-model")
        assert "records: " in ended.stdout
        assert server.calls or "--provider hf" in task
        assert "0 rewritten" not in ended.stdout or "--provider hf" in task


def test_the_chinese_page_has_the_same_commands_and_figures():
    assert commands(CHINESE) == TASKS
    assert len(TASKS) >= 8
    for language in ("bash", "python"):
        of_page = [list(blocks(language, page).values()) for page in (FRONT, CHINESE)]
        assert of_page[0] == of_page[1]
    table = [re.findall(r"\d[\d.,]*", page.read_text().split("##")[1]) for page in (FRONT, CHINESE)]
    assert sorted(table[0]) == sorted(table[1])


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_command_shows_the_reference(box):
    listed = box.fabe("docs")
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines() if line[:1].islower()][
        : len(TOPICS)
    ] == list(TOPICS)
    for topic in TOPICS:
        shown = box.fabe("docs", topic)
        assert shown.out == (REPO / f"fabe_ds/docs/{topic}.md").read_text()
        assert shown.out.startswith("# ")
        assert f"(fabe_ds/docs/{topic}.md)" in FRONT.read_text()
    assert {page.stem for page in PAGES[2:]} == set(TOPICS)
    wrong = box.fabe("docs", "servrs")
    assert wrong.code == 2
    assert (
        wrong.err
        == "fabe-ds: no topic 'servrs'; did you mean 'servers'? `fabe-ds docs` lists them\n"
    )


def test_the_page_of_flags_is_current():
    made = runpy.run_path(str(REPO / "scripts/flags_page.py"))
    assert made["PAGE"].read_text() == made["page"](), "run python scripts/flags_page.py"


@pytest.mark.parametrize("block", PYTHON.values(), ids=PYTHON)
def test_the_python_blocks(folder, block):
    with ModelServer() as server:
        script = folder.write("script.py", block.replace(LOCAL, server.url))
        ended = subprocess.run(
            [sys.executable, str(script)],
            cwd=folder.path,
            env=folder.environment,
            capture_output=True,
            text=True,
        )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("snippet", SURFACES)
def test_the_table_of_surfaces(folder, snippet):
    how = next(block for block in PYTHON.values() if "how = dict(" in block)
    with ModelServer() as server, Hub() as hub:
        environment = {**folder.environment, **hub.environment}
        if snippet.startswith("fabe-ds"):
            settings = dict(re.findall(r"(\w+)=\"(.*)\",\n", how)) | {"base_url": server.url}
            folder.write("how.yaml", yaml.safe_dump(settings))
            if "me/data" in snippet:
                push = "import datasets; datasets.Dataset.from_list([{'code': 'x'}]).push_to_hub('me/data')"
                subprocess.run([sys.executable, "-c", push], env=environment, check=True)
            command = ["bash", "-ec", snippet.replace("fabe-ds", str(FABE), 1)]
        else:
            preamble = how.replace(LOCAL, server.url)
            if "outputs.run.json" in snippet:
                folder.fabe(*openai_run(server))
            script = folder.write("script.py", f"{preamble}\nprint({snippet})")
            command = [sys.executable, str(script)]
        ended = subprocess.run(
            command, cwd=folder.path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout
        assert server.calls
        if "push" in snippet:
            assert any(name.endswith(".parquet") for name in hub.files("me/rewritten"))


def test_the_table_of_surfaces_is_found():
    assert len(SURFACES) >= 12


@pytest.mark.slow
def test_the_demo():
    ended = subprocess.run([REPO / "scripts/demo.sh"], capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    topics, again, killed, resumed, page = re.split(r"\n\d\. ", ended.stdout)[1:]
    assert "16 records: 16 rewritten" in topics
    for sentence, topic in (
        ("The coach left the club after seven defeats in a row.", "sports"),
        ("Serve the curry with rice, lime and a spoon of yoghurt.", "food"),
        ("Mortgage rates are at their lowest since 2019, brokers say.", "finance"),
        ("Geologists dated the oldest known crystal to 4.4 billion years.", "science"),
    ):
        assert f"  {sentence}\n+ {topic}, " in topics
    assert "the bytes they were: 16 of 16" in topics
    assert "0 rewritten, 16 from cache" in again
    kept = int(re.findall(r"answers on disk: (\d+)", killed)[0])
    assert 0 < kept < 12
    assert f"12 records: {12 - kept} rewritten, {kept} from cache" in resumed
    assert "+ Return the area of a rectangle with width and height.\n" in resumed
    assert "the bytes they were: 12 of 12" in resumed
    assert "written: outputs/demo/functions.jsonl.html" in page


@pytest.mark.parametrize("name", sorted(p.name for p in (REPO / "configs").glob("*.yaml")))
def test_every_shipped_configuration_is_valid(name):
    from fabe_ds.config.load import read_config

    config = read_config({}, REPO / "configs" / name)
    assert config.provider in name or name in ("demo.yaml", "large.yaml")
    assert Path(str(config.instruction)).is_file()


def test_the_demo_configuration_runs(box):
    ended = box.fabe(
        "run", "--config", REPO / "configs/demo.yaml", "--output", "out", "--cache-dir", ".cache"
    )
    assert ended.code == 0, ended
    assert "5 records: 4 rewritten" in ended.out
