"""What is published: a wheel and a source distribution, each in an environment with nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from fabe_ds.cli.docs import TOPICS
from fabe_ds.version import __version__
from tests.conftest import Box

REPO = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".*cache*", "outputs*", "build", "dist", "*.egg-info"
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging"), pytest.mark.timeout(600)]


def called(*words: object, **more: object) -> str:
    ended = subprocess.run([*map(str, words)], capture_output=True, text=True, **more)  # type: ignore[call-overload]
    assert ended.returncode == 0, ended.stderr
    return str(ended.stdout)


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """What `python -m build` makes of this checkout."""
    source = tmp_path_factory.mktemp("source") / "fabe-ds"
    shutil.copytree(REPO, source, ignore=LEFT_OUT)
    called(sys.executable, "-m", "build", "--outdir", source / "made", cwd=source)
    return source / "made"


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Path:
    """The programs of an environment that has the wheel, and what it asks for."""
    place = tmp_path_factory.mktemp("empty")
    venv.create(place, with_pip=True)
    pip = [place / "bin/python", "-m", "pip", "install", "--quiet"]
    called(*pip, "--constraint", REPO / "scripts/constraints.txt", *dist.glob("*.whl"))
    return place / "bin"


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == f"fabe_ds-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fabe_ds", f"fabe_ds-{__version__}.dist-info"}
    wanted = [f"docs/{topic}.md" for topic in TOPICS]
    wanted += ["py.typed", "report/page.html", "report/page.css", "report/page.js", "README.md"]
    wanted += ["providers/README.md", "formats/README.md", "providers/ARCHITECTURES.md"]
    assert {f"fabe_ds/{name}" for name in wanted} <= set(names)


def test_the_metadata_is_whole(dist):
    (wheel,) = dist.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    told = Parser().parsestr(archive.read(f"fabe_ds-{__version__}.dist-info/METADATA").decode())
    assert told["Version"] == __version__
    assert told["License-Expression"] == "MIT"
    assert told["Description-Content-Type"] == "text/markdown"
    assert {link.split(", ")[0] for link in told.get_all("Project-URL")} >= {
        *("Source", "Documentation", "Changelog", "Issues"),
    }
    assert {"hf", "modelscope", "ray", "vllm", "all"} <= set(told.get_all("Provides-Extra"))
    changes = (REPO / ".github/CHANGELOG.md").read_text()
    assert changes.split("\n## ")[1].startswith(__version__)


def test_the_wheel_runs_in_an_empty_environment(installed, tmp_path):
    fabe = installed / "fabe-ds"
    Box(tmp_path).lines("data.jsonl", [{"code": "x = 1", "n": 1.5}])
    assert called(fabe, "--version").strip() == __version__
    assert "1 records: 1 rewritten" in called(fabe, "run", "--input", "data.jsonl", cwd=tmp_path)
    assert called(installed / "fabe-infer", "docs", "files").startswith("# Files")
    assert "written: " in called(fabe, "report", "outputs.run.json", cwd=tmp_path)
    assert "run --input" in called(fabe)
    python = called(
        installed / "python",
        "-c",
        "import fabe_ds; print(fabe_ds.run(input='data.jsonl').cached)",
        cwd=tmp_path,
    )
    assert python.strip() == "1"
    # Heavy libraries belong to extras.
    assert (
        called(
            installed / "python", "-c", "import importlib.util as u; print(u.find_spec('torch'))"
        ).strip()
        == "None"
    )


def test_the_source_distribution_installs_too(dist, installed):
    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = archive.getnames()
    assert f"fabe_ds-{__version__}/LICENSE" in names
    called(
        *(
            installed / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--force-reinstall",
        ),
        source,
    )
    assert called(installed / "fabe-ds", "docs", "flags").startswith("# Flags")
