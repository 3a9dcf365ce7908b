"""Providers and checks of other packages: the README's are built, installed and run; what a plugin
lacks, or does wrong, is one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import Box, Ended

PACKAGE = Path(__file__).parents[2] / "fabe_ds"
README = (PACKAGE / "providers/README.md").read_text()


class Generate(BaseHTTPRequestHandler):
    """The README's server of one's own: upper case, and a link lost in the first answer."""

    asked: list[dict[str, object]]
    keys: list[str | None]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.keys.append(self.headers["Authorization"])
        value = body["messages"][1]["content"].rpartition("\n")[2]
        again = len(body["messages"]) > 2
        text = value.upper().replace("HTTP://A.B/C", "http://a.b/c" if again else "")
        answer = json.dumps({"text": text, "finish_reason": "stop", "tokens_in": 3}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def generate() -> Iterator[tuple[str, type[Generate]]]:
    handler = type("Handler", (Generate,), {"asked": [], "keys": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's package, built and installed by pip."""
    source, target = tmp_path_factory.mktemp("plugin"), tmp_path_factory.mktemp("site")
    (project,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (module,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if "class MyServer" in block
    )
    (source / "pyproject.toml").write_text(project)
    (source / "my_plugins.py").write_text(module)
    command = ["pip", "install", "-q", "--no-deps", "--target", str(target), str(source)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    return target


def test_a_server_of_ones_own(box, installed, generate):
    url, handler = generate
    box.lines("d.jsonl", [{"code": "see http://a.b/c"}, {"code": "x"}])
    command = ["run", "--input", "d.jsonl", "--provider", "my-server", "--model", "m"]
    command += ["--base-url", url, "--instruction", "Up", "--validate", "keeps-links"]
    environment = {"PYTHONPATH": str(installed), "MY_SERVER_KEY": "sk-1"}
    ended = box.fabe(*command, **environment)
    assert ended.code == 0, ended
    assert [row["code"] for row in box.read("outputs/d.jsonl")] == ["SEE http://a.b/c", "X"]
    assert handler.keys == ["Bearer sk-1"] * 3
    complaints = [body["messages"][-1]["content"] for body in handler.asked]
    assert any("missing the link http://a.b/c" in complaint for complaint in complaints)
    ended = box.fabe(*command, **environment)
    assert "0 rewritten, 2 from cache" in ended.out
    assert len(handler.asked) == 3


def test_a_model_of_ones_own(box, installed):
    box.lines("d.jsonl", [{"code": "x"}])
    command = ["--input", "d.jsonl", "--provider", "shout", "--model", "m", "--instruction", "Up"]
    environment = {"PYTHONPATH": str(installed)}
    assert box.fabe("run", *command, **environment).code == 0
    assert box.read("outputs/d.jsonl")[0]["code"] == "X"
    listed = box.fabe("providers", **environment).out
    assert "my-server    ready\n             needs my server, on port 9000" in listed
    assert "shout        ready" in listed
    assert '"prompt": "Up\\n\\nx"' in box.fabe("run", *command, "--dry-run", **environment).out


# Plugins that lack something.

HEAD = """
from fabe_ds.providers import Completion, HttpProvider, LocalProvider, Provider
from fabe_ds.errors import RecordFailed
class Good(LocalProvider):
    name = "broken"
    def body(self, request):
        return {"prompt": request.prompt}
    def complete(self, requests):
        return [Completion(r.text.upper(), "stop") for r in requests]
class Served(HttpProvider):
    name = "broken"
    default_base_url = "http://127.0.0.1:9"
    def preflight(self): pass
    def path(self, request): return "/g"
    def body(self, request): return {"messages": request.messages}
    def completion(self, payload): return Completion(payload["text"], payload["finish_reason"])
"""


def plugin(box: Box, code: str, group: str = "providers") -> dict[str, str]:
    """A package with one entry point, `broken`, as pip leaves it; gives the environment."""
    box.write("site/broken_plugin.py", HEAD + code)
    box.write(
        "site/broken-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: broken\nVersion: 1\n"
    )
    points = f"[fabe_ds.{group}]\nbroken = broken_plugin:Broken\n"
    box.write("site/broken-1.dist-info/entry_points.txt", points)
    return {"PYTHONPATH": str(box.path / "site")}


def run(box: Box, *more: str, **environment: str) -> Ended:
    box.lines("d.jsonl", [{"code": "x"}, {"code": "y"}])
    flags = ["--provider", "broken", "--model", "m", "--instruction", "Up"]
    return box.fabe("run", "--input", "d.jsonl", *flags, *more, **environment)


LACKING = {
    "no such module": ("import nothing_here", "cannot be imported: No module named 'nothing_here'"),
    "raises when imported": ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
    "no such name": ("", "cannot be imported: AttributeError"),
    "a function": ("def Broken(): pass", "is no class"),
    "another class": ("class Broken: pass", "is not derived from"),
    "the bare base": (
        "class Broken(Provider):\n    name = 'b'\n    def body(self, r): return {}",
        "is not derived from",
    ),
    "no methods": ("class Broken(HttpProvider): pass", "lacks body(), completion(), path(), name"),
    "no name": (
        "class Broken(LocalProvider):\n    def body(self, r): return {}\n"
        "    def complete(self, rs): return []",
        "lacks name",
    ),
    "missing() raises": (
        "class Broken(Good):\n    @classmethod\n    def missing(cls): return 1 / 0",
        "missing() raised ZeroDivisionError",
    ),
    "__init__ raises": (
        "class Broken(Good):\n    def __init__(self, endpoint): raise ValueError('no\\nway')",
        "Broken() raised ValueError: no",
    ),
    "something is not installed": (
        "class Broken(Good):\n    @classmethod\n    def missing(cls): return 'pip install it'",
        "--provider broken: pip install it",
    ),
}


@pytest.mark.parametrize(("code", "said"), LACKING.values(), ids=LACKING)
def test_what_a_provider_lacks_is_said_before_the_run(box, code, said):
    environment = plugin(box, code)
    ended = run(box, **environment)
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert said in ended.err
    assert not (box.path / "outputs").exists()
    listed = box.fabe("providers", **environment)
    assert listed.code == 0
    assert "echo         ready" in listed.out


WRONG = {
    "body raises": ("def body(self, r): return r.nothing", "Broken.body() raised AttributeError"),
    "body is no dict": ("def body(self, r): return 'x'", "Broken.body() gave str, not a dict"),
    "body is no JSON": ("def body(self, r): return {'a': {1}}", "gave what is no JSON"),
    "body is too deep": (
        "def body(self, r):\n        a = []\n        a.append(a)\n        return {'a': a}",
        "gave what is no JSON",
    ),
    "complete raises": ("def complete(self, rs): return rs[9]", "complete() raised IndexError"),
    "too few answers": ("def complete(self, rs): return []", "gave 0 answers to 2 requests"),
    "texts": ("def complete(self, rs): return [r.text for r in rs]", "gave str, not a Completion"),
    "nothing": ("def complete(self, rs): pass", "gave NoneType, not a list"),
    "no text": (
        "def complete(self, rs): return [Completion(None, 'stop') for r in rs]",
        "gave NoneType, not a text",
    ),
    "identity": ("def identity(self): return None", "identity() gave NoneType, not a text"),
    "preflight raises": ("def preflight(self): 1 / 0", "preflight() raised ZeroDivisionError"),
}


@pytest.mark.parametrize(("method", "said"), WRONG.values(), ids=WRONG)
def test_what_a_provider_does_wrong_stops_the_run_in_a_line(box, method, said):
    environment = plugin(box, f"class Broken(Good):\n    {method}\n")
    ended = run(box, **environment)
    assert (ended.code, ended.err.count("\n")) == (1, 1), ended
    assert said in ended.err
    assert not (box.path / "outputs").exists()


def test_answers_that_fail_are_records_that_fail(box):
    code = "class Broken(Good):\n    def complete(self, rs):\n        return [RecordFailed('odd', 'no') if r.text == 'x' else Completion('Y', 'stop') for r in rs]"
    ended = run(box, **plugin(box, code))
    assert ended.code == 1
    assert "2 records: 1 rewritten, 0 from cache, 1 failed" in ended.out


SERVED = {
    "path": ("def path(self, r): return 'g'", 1, "path() gave 'g', not a path"),
    "completion raises": (
        "def completion(self, p): return p['nothing']",
        1,
        "Broken.completion() raised KeyError: 'nothing'",
    ),
    "completion is a text": (
        "def completion(self, p): return p['text']",
        1,
        "completion() gave str, not a Completion",
    ),
    "headers": ("def headers(self): return 'x'", 1, "headers() gave str, not a dict"),
}


@pytest.mark.parametrize(("method", "code", "said"), SERVED.values(), ids=SERVED)
def test_what_an_http_provider_does_wrong(box, generate, method, code, said):
    url, _ = generate
    environment = plugin(box, f"class Broken(Served):\n    {method}\n")
    ended = run(box, "--base-url", url, "--retry", "0", **environment)
    assert ended.code == code, ended
    assert said in ended.err + ended.out


CHECKS = {
    "None": ("return None", 0, ""),
    "True": ("return True", 0, ""),
    "an empty text": ("return ''", 0, ""),
    "False": ("return False", 1, "not valid"),
    "a text": ("return 'too loud'", 1, "too loud"),
    "a number": ("return 1", 1, "gave int: it must give None or True for a good answer"),
    "a list": ("return []", 1, "gave list: it must give None or True for a good answer"),
    "raises": ("return 1 / 0", 1, "raised ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize(("body", "code", "said"), CHECKS.values(), ids=CHECKS)
def test_what_a_check_gives_means_what_people_write(box, server, body, code, said):
    environment = plugin(box, f"def Broken(answer): {body}\n", "validators")
    box.lines("d.jsonl", [{"code": "x"}, {"code": "y"}])
    command = ["run", "--input", "d.jsonl", "--provider", "openai", "--base-url", server.url]
    command += ["--model", "m", "--instruction", "Up", "--validate", "broken", "--max-reasks", "0"]
    ended = box.fabe(*command, **environment)
    assert ended.code == code, ended
    assert said in ended.out + ended.err
    if said and "must give" not in said:
        assert ended.out.startswith("2 records: 0 rewritten, 0 from cache, 2 failed")
        asked = len(server.calls)
        assert box.fabe(*command, **environment).code == 1
        assert len(server.calls) == asked  # the answers are kept, and would fail the same


def test_a_check_may_see_the_original_and_the_record(box, server):
    code = "def Broken(answer, *, original, record):\n    return answer == original.upper() and record['id'] == int(answer[-1])\n"
    environment = plugin(box, code, "validators")
    rows = [{"id": n, "code": f"x = {n}"} for n in range(3)] + [{"id": 9, "code": "x = 4"}]
    box.lines("d.jsonl", rows)
    box.write("d.csv", "id,code\n" + "".join(f"{row['id']},{row['code']}\n" for row in rows))
    command = ["--provider", "openai", "--base-url", server.url, "--model", "m"]
    command += ["--instruction", "Up", "--validate", "broken", "--max-reasks", "0"]
    ended = box.fabe("run", "--input", "d.jsonl", *command, **environment)
    assert (ended.code, ended.out[:23]) == (1, "4 records: 3 rewritten,"), ended
    code = code.replace("record['id']", "int(record['id'])")
    environment = plugin(box, code, "validators")
    ended = box.fabe("run", "--input", "d.csv", *command, **environment)
    assert ended.out.startswith("4 records: 0 rewritten, 3 from cache, 1 failed"), ended


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("Broken = 3", "is not a check: 3 is not a callable object"),
        ("def Broken(): pass", "is not a check: too many positional arguments"),
        ("def Broken(a, b): pass", "is not a check: missing a required argument: 'b'"),
        ("import nothing_here", "cannot be imported: No module named"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_what_is_no_check_is_said_before_anything_is_asked(box, server, code, said):
    environment = plugin(box, code, "validators")
    box.lines("d.jsonl", [{"code": "x"}])
    ended = box.fabe(
        *("run", "--input", "d.jsonl", "--provider", "openai", "--base-url", server.url),
        *("--model", "m", "--instruction", "Up", "--validate", "broken"),
        **environment,
    )
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert said in ended.err
    assert not server.calls
