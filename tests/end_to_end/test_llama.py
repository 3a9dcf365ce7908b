"""llama.cpp's server (xllamacpp) as people run it: asked while it loads, and told not to think."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import wait_for

SERVE = Path(__file__).parent.parent / "support" / "serve_llama.py"
# As Qwen's own does: reasoning is switched off by an empty one in front of the answer.
TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{%- endif -%}"""


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


@contextlib.contextmanager
def serving(model, *words):
    command = [sys.executable, str(SERVE), str(model), *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def run(url, *more):
    return [
        *("run", "--input", "data.jsonl", "--instruction", "Say hello to {{ code }}."),
        *("--provider", "openai", "--model", "smollm2", "--base-url", url, "--system-prompt", ""),
        *("--max-new-tokens", 8, "--on-truncated", "keep", "--status-field", "state", *more),
    ]


def listens(port) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
        return True
    return False


@pytest.mark.slow
def test_a_run_that_starts_with_the_server_waits_for_its_model(box, smollm):
    box.lines("data.jsonl", [{"code": name} for name in ("Ada", "Alan", "Grace")])
    port = free_port()
    with serving(smollm, 4, port):
        wait_for(lambda: listens(port))
        ended = box.fabe(*run(f"http://127.0.0.1:{port}/v1", "--retry", 0))
        assert ended.code == 0, ended
        states = [record["state"] for record in box.read("outputs/data.jsonl")]
        assert [state["state"] for state in states] == ["done"] * 3


@pytest.mark.slow
def test_thinking_is_switched_off_through_the_servers_template(box, smollm):
    box.lines("data.jsonl", [{"code": "Ada"}])
    with serving(smollm, 1, 0, TEMPLATE) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip() + "/v1"
        tokens = {}
        for level in ("on", "off"):
            ended = box.fabe(*run(url, "--thinking", level))
            assert ended.code == 0, ended
            (record,) = box.read("outputs/data.jsonl")
            tokens[level] = record["state"]["prompt_tokens"]
    assert tokens["on"] < tokens["off"]  # by those of the empty reasoning
