"""What tests share: the command in a subprocess, records, a real model, servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Tests run side by side, and threads of OpenMP spin while they wait: with one for each core,
# every process that runs a model takes the cores from the others. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.models import save_as_folder, smollm_gguf, tiny_model
from tests.support.server import ModelServer
from tests.support.warm import WarmCommand

AT_START = ("HF_", "RAY", "PYTHON", "LC_", "LANG", "MODELSCOPE", "_FABE")
"""What the names of variables begin with that are read once, at the start."""
COMMAND = [str(Path(sys.executable).parent / "fabe-ds")]
_FORGET = (
    "MODEL_PATH",
    "DEVICE",
    "LOCAL_FILES_ONLY",
    "MAX_NEW_TOKENS",
    "TEMPERATURE",
    "DRY_RUN",
    "LOG_LEVEL",
    "OPENAI_API_KEY",
    *("OPENAI_BASE_URL", "OPENAI_API_BASE", "OLLAMA_HOST", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"),
    *("CURL_CA_BUNDLE", "SSL_CERT_DIR"),
    *(f"{kind}_proxy" for kind in ("http", "https", "all", "no")),
    *(f"{kind}_PROXY" for kind in ("HTTP", "HTTPS", "ALL", "NO")),
)


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Box:
    """A folder to run commands in."""

    path: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in _FORGET}
        return {**kept, "HF_HOME": str(self.path / "hf-home"), "COLUMNS": "200"}

    def start(self, *args: Any, **environment: str) -> subprocess.Popen[str]:
        """The command, begun: forked from a process that is warm (tests/support/warm.py), or afresh where
        something is read when an interpreter or a library starts."""
        words = [*map(str, args)]
        fresh = "ray" in words or any(
            name.startswith(AT_START) and name != "PYTHONPATH" for name in environment
        )
        begin = subprocess.Popen if fresh else WarmCommand
        return begin(
            [*COMMAND, *words] if fresh else words,
            cwd=self.path,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def fabe(self, *args: Any, timeout: float = 120, **environment: str) -> Ended:
        with self.start(*args, **environment) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert "Traceback" not in err, err
        assert "a fault of fabe-ds" not in err, err
        return Ended(process.returncode, out, err)

    def kill(self, process: subprocess.Popen[str]) -> None:
        process.send_signal(signal.SIGKILL)
        process.communicate()

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def lines(self, name: str, records: list[Any]) -> Path:
        return self.write(name, "".join(json.dumps(record) + "\n" for record in records))

    def read(self, name: str) -> list[Any]:
        with (self.path / name).open() as lines:  # splitlines would split at U+2028 too
            return [json.loads(line) for line in lines]

    def report(self, name: str = "outputs.run.json") -> dict[str, Any]:
        return dict(json.loads((self.path / name).read_text()))


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


def wait_for(true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def smollm() -> Path:
    return smollm_gguf()


@pytest.fixture(scope="session")
def smollm_folder(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_as_folder(smollm, tmp_path_factory.mktemp("models") / "smollm2")


@pytest.fixture(scope="session")
def llama_server(smollm: Path) -> Iterator[str]:
    """A real OpenAI-compatible server; gives its base URL."""
    command = [
        sys.executable,
        str(Path(__file__).parent / "support" / "serve_llama.py"),
        str(smollm),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip() + "/v1"
        process.terminate()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose answers are never empty (and always cut)."""
    return tiny_model(tmp_path_factory.mktemp("models") / "talkative", ends=False)
