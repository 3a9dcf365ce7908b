"""Forms of answers in a local model: choices scored beside generated, JSON held to a schema beside
free, on the same records, in one run.

    python scripts/bench/choices.py [RECORDS]        (default: 96)

SmolLM2-135M says of functions of the standard library what they are about, one of four words, after
four examples. Scored is what `--choices` does; held is generation that a grammar lets write one of
the words alone; free is generation as it comes, of at most 8 tokens and of at most 128 (the
default), which may be none of them. Each line is one process that has loaded the model and answered
two records before the clock starts. Agreement is with the scored choices, in per cent of all
records; valid, how many answers were one of the words, or followed the schema.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.functions import functions
from tests.support.models import save_as_folder, smollm_gguf

CHOICES = ("dates", "text", "numbers", "files")
QUESTION = """\
Is the following Python function about dates, text, numbers or files? Think of what its arguments \
and its result are, and not of its name alone. Answer with one of these four words and nothing else.

"""
EXAMPLES = {
    "def area(width, height):\n    return width * height": "numbers",
    "def shout(words):\n    return words.upper() + '!'": "text",
    "def size_of(path):\n    return os.stat(path).st_size": "files",
    "def tomorrow(day):\n    return day + timedelta(days=1)": "dates",
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "arguments": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        "lines": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": list(CHOICES)},
        "pure": {"type": "boolean"},
    },
    "required": ["name", "arguments", "lines", "kind", "pure"],
    "additionalProperties": False,
}
AS_JSON = (
    "Describe the following Python function as one JSON object with the keys name, arguments, \
lines, kind and pure, and nothing else.\n\n"
)
WAYS = ("scored", "held", "free 8", "free 128")
OBJECTS = ("JSON held", "JSON free")


def answers(folder: str, way: str, count: int) -> dict[str, Any]:
    from fabe_ds.prompts.form import choice_in
    from fabe_ds.providers import Completion, Endpoint, Request, Sampling
    from fabe_ds.providers.transformers.hf import HFProvider
    from fabe_ds.request import FREE, AnswerForm

    form = AnswerForm(choices=CHOICES) if way == "scored" else FREE
    sampling = Sampling(int(way.split()[-1]) if way.startswith("free") else 8)
    provider = HFProvider(Endpoint(folder, dtype="bfloat16", batch_size=48))
    turns = (
        turn
        for code, word in EXAMPLES.items()
        for turn in (("user", QUESTION + code), ("assistant", word))
    )
    before = tuple(turns)
    asked = [
        Request("x", QUESTION + str(f["code"]), None, sampling, before=before, form=form)
        for f in functions(count)
    ]
    if way == "held":
        provider._formed.__class__ = held_to_words()
        asked = [request._replace(form=AnswerForm({})) for request in asked]
    provider.complete(asked[:2])
    started = time.perf_counter()
    given = provider.complete(asked)
    seconds = time.perf_counter() - started
    texts = [answer.text if isinstance(answer, Completion) else "" for answer in given]
    return {"seconds": seconds, "choices": [choice_in(text, CHOICES) for text in texts]}


def objects(folder: str, held: bool, count: int) -> dict[str, Any]:
    """JSON of at most 128 tokens a record: held to the schema while it is decoded, or free."""
    from fabe_ds.prompts.checks import schema_check
    from fabe_ds.providers import Completion, Endpoint, Request, Sampling
    from fabe_ds.providers.transformers.hf import HFProvider
    from fabe_ds.request import FREE, AnswerForm

    form = AnswerForm(SCHEMA) if held else FREE
    provider = HFProvider(Endpoint(folder, dtype="bfloat16", batch_size=48))
    asked = [
        Request("x", AS_JSON + str(f["code"]), None, Sampling(128), form=form)
        for f in functions(count)
    ]
    provider.complete(asked[:2])
    started = time.perf_counter()
    given = provider.complete(asked)
    seconds = time.perf_counter() - started
    check = schema_check(SCHEMA)
    good = [answer for answer in given if isinstance(answer, Completion)]
    tokens = sum(answer.completion_tokens or 0 for answer in good)
    valid = sum(check(answer.text) is None for answer in good)
    return {"seconds": seconds, "tokens": tokens, "valid": valid}


def held_to_words() -> type:
    """Local answers that a grammar holds to the bare words, without the quotes of JSON."""
    from llguidance import LLMatcher

    from fabe_ds.providers.transformers.formed import FormedAnswers
    from fabe_ds.providers.transformers.grammar import Matcher

    class Held(FormedAnswers):
        def grammar(self, form: Any) -> Matcher:
            tokens = self._grammars._tokens  # type: ignore[union-attr]
            words = " | ".join(f'"{choice}"' for choice in CHOICES)
            matcher = LLMatcher(tokens, LLMatcher.grammar_from_lark(f"start: {words}"))
            return Matcher(matcher, -(-tokens.vocab_size // 32))

    return Held


def main(count: int) -> None:
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_as_folder(smollm_gguf(), Path(scratch) / "model")
        for way in (*WAYS, *OBJECTS):
            command = [sys.executable, __file__, "--one", str(folder), way, str(count)]
            ended = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way] = json.loads(ended.stdout.splitlines()[-1])
    print(f"{count} records, {len(CHOICES)} choices")
    print(f"{'':10}{'records/s':>12}{'times free':>12}{'valid':>8}{'agreement':>12}")
    for way in WAYS:
        seconds, choices = found[way]["seconds"], found[way]["choices"]
        same = sum(a == b for a, b in zip(choices, found["scored"]["choices"], strict=True))
        valid = sum(choice is not None for choice in choices)
        ratio = found["free 128"]["seconds"] / seconds
        print(f"{way:10}{count / seconds:12.2f}{ratio:12.2f}{valid:8}{100 * same / count:11.0f}%")

    print(f"\n{count} records, JSON of at most 128 tokens")
    print(f"{'':10}{'records/s':>12}{'tokens/s':>12}{'valid':>8}")
    for way in OBJECTS:
        seconds, tokens = found[way]["seconds"], found[way]["tokens"]
        print(f"{way:10}{count / seconds:12.2f}{tokens / seconds:12.1f}{found[way]['valid']:8}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        folder, way, count = sys.argv[2], sys.argv[3], int(sys.argv[4])
        is_object = way in OBJECTS
        one = (
            objects(folder, way == OBJECTS[0], count) if is_object else answers(folder, way, count)
        )
        print(json.dumps(one))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 96)
