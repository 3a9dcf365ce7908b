"""Formats of other packages: that of fabe_ds/formats/README.md is built, installed and run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "fabe_ds/formats/README.md").read_text()
TEXT = "One line,\nand another.\n\n\nSecond é.\n \nThird"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("plugin"), tmp_path_factory.mktemp("site")
    (project,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (module,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (source / "pyproject.toml").write_text(project)
    (source / "my_formats.py").write_text(module)
    command = ["pip", "install", "-q", "--no-deps", "--target", str(target), str(source)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    return target


def run(box, installed, *more):
    return box.fabe("run", "--input", "in", "--field", "text", *more, PYTHONPATH=str(installed))


def test_a_format_of_ones_own(box, installed):
    box.write("in/a.txt", TEXT)
    box.write("in/deep/b.txt", "x\n")
    ended = run(box, installed)
    assert ended.code == 0, ended
    assert "4 records: 4 rewritten" in ended.out
    expected = TEXT
    for text in ("One line,\nand another.", "Second é.", "Third"):
        expected = expected.replace(text, f"# echo: local\n{text}")
    assert (box.path / "outputs/a.txt").read_text() == expected
    assert (box.path / "outputs/deep/b.txt").read_text() == "# echo: local\nx\n"
    before = (box.path / "outputs/a.txt").stat().st_mtime_ns
    again = run(box, installed)  # a finished run is answered at once, and written once
    assert "0 rewritten, 4 from cache" in again.out
    assert "written: outputs/ (2 files)" in again.out
    assert (box.path / "outputs/a.txt").stat().st_mtime_ns == before


def test_what_falls_to_a_format_of_ones_own(box, installed):
    box.write("in/a.txt", TEXT)
    assert "3 records, 3 to do" in run(box, installed, "--dry-run").out
    assert not (box.path / "outputs").exists()
    both = run(box, installed, "--device", "cpu,cpu", "--output", "two")
    assert both.code == 0, both
    assert run(box, installed, "--inplace").code == 0
    whole = (box.path / "in/a.txt").read_text()
    assert (box.path / "two/a.txt").read_text() == whole
    again = run(box, installed, "--inplace")
    assert "3 skipped (3 done before)" in again.out
    assert (box.path / "in/a.txt").read_text() == whole


HEAD = """
from datasets import Dataset
from fabe_ds.formats import Format, Records, Row
class Good(Format):
    name = "broken"
    suffixes = (".txt",)
    def load(self, source, tick):
        data = Dataset.from_dict({"text": ["x"]})
        return Records(data, "f" * 32, [(source.files[0].location, 1)])
    def rows(self, table, whole):
        yield Row(["x"])
    def where(self, row, field=0):
        return {}
    def write(self, records, answers, paths, tick):
        return {}
"""
WRONG = {
    "no class": ("Broken = 3", "is not a class derived from fabe_ds.formats.Format"),
    "no methods": (
        "class Broken(Format):\n    name = 'b'",
        "lacks load(), rows(), where(), write()",
    ),
    "no name": ("class Broken(Good):\n    name = None", "lacks name"),
    "no dot": ("class Broken(Good):\n    suffixes = ('txt',)", "lacks suffixes"),
    "no module": ("import no_such_module", "cannot be imported: No module named"),
    "load raises": (
        "class Broken(Good):\n    def load(self, source, tick): return 1 / 0",
        "format broken: Broken.load() raised ZeroDivisionError: division by zero",
    ),
    "load gives nothing": (
        "class Broken(Good):\n    def load(self, source, tick): return None",
        "Broken.load() gave NoneType, not Records",
    ),
    "parts": (
        "class Broken(Good):\n    def load(self, source, tick):\n"
        "        return Records(Dataset.from_dict({'text': ['x']}), 'f' * 32)",
        "Broken.load() gave parts of 0 rows, and 1 records",
    ),
    "rows raises": (
        "class Broken(Good):\n    def rows(self, table, whole): yield table['no']",
        "Broken.rows() raised KeyError",
    ),
    "too few rows": (
        "class Broken(Good):\n    def rows(self, table, whole): return iter(())",
        "Broken.rows() gave 0 rows of 1 records",
    ),
    "too many texts": (
        "class Broken(Good):\n    def rows(self, table, whole): yield Row(['a', 'b'])",
        "Broken.rows() gave 2 texts, where a record has 1 fields",
    ),
    "write raises": (
        "class Broken(Good):\n    def write(self, *_): raise LookupError('nothing there')",
        "Broken.write() raised LookupError: nothing there",
    ),
    "write gives nothing": (
        "class Broken(Good):\n    def write(self, *_): pass",
        "Broken.write() gave NoneType, not a dict",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_format_lacks_or_does_wrong_is_one_line(box, what):
    code, said = WRONG[what]
    folder = box.path / "site"
    info = folder / "broken-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[fabe_ds.formats]\nbroken = broken_format:Broken\n")
    (folder / "broken_format.py").write_text(f"{HEAD}\n{code}\n")
    box.write("in/a.txt", "x")
    ended = run(box, folder)
    assert ended.code in (1, 2), ended
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) == 1
