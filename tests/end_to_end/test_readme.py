"""What the README shows is run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml

from fabe_ds.json_schema import least
from tests.support.hub import Hub
from tests.support.server import Call, ModelServer, completion, openai_run

REPO = Path(__file__).parents[2]
TEXT = (REPO / "README.md").read_text()
SHELL = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
SURFACES = re.findall(r"^\| [^|]+ \| `([^`]+)` \|$", TEXT, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
FABE = Path(sys.executable).parent / "fabe-ds"
LOCAL = "http://localhost:8000/v1"


@pytest.fixture
def folder(box):
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(3)])
    box.lines("data/deep/d.jsonl", [{"code": "y = 1"}])
    box.write(
        "configs/prompts/refactor_python.j2",
        (REPO / "configs/prompts/refactor_python.j2").read_text(),
    )
    rows = [{"question": f"why {i}?", "answer": "so"} for i in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(str(box.path / "data.parquet"))
    box.lines("reviews.jsonl", [{"id": i, "text": f"I like it {i}"} for i in range(3)])
    products = [{"id": i, "description": f"A red pen for {i} euros"} for i in range(3)]
    datasets.Dataset.from_list(products).to_parquet(str(box.path / "products.parquet"))
    turns = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]
    box.lines("chats.jsonl", [{"conversations": turns}])
    box.lines("shots.jsonl", [{"input": "x = 1  # zwei", "output": "x = 1  # two"}])
    (schema,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    box.write("product.json", schema)
    return box


async def formed(call: Call):
    """The least answer that has the form which was asked for."""
    if (wanted := call.body.get("response_format")) is None:
        return None
    return completion(call, json.dumps(least(wanted["json_schema"]["schema"])))


@pytest.mark.parametrize("block", SHELL, ids=range(len(SHELL)))
def test_the_shell_blocks(folder, block):
    with ModelServer(formed) as server:
        server.models = ["qwen3:latest"]
        command = block.replace(LOCAL, server.url).replace("fabe-ds", str(FABE))
        ended = subprocess.run(
            ["bash", "-ec", command],
            cwd=folder.path,
            env=folder.environment,
            capture_output=True,
            text=True,
        )
    assert ended.returncode == 0, ended.stderr
    assert "record" in ended.stdout


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
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
    how = next(block for block in PYTHON if "how = dict(" in block)
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
    assert len(SURFACES) >= 11


@pytest.mark.slow
def test_the_demo():
    ended = subprocess.run([REPO / "scripts/demo.sh"], capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert "--- before\ndef f(l):" in ended.stdout
    before, after = ended.stdout.split("--- after\n")
    assert after.strip()
    assert after.strip() not in before


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
