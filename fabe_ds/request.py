"""What travels: a request, its completion, and what became of a record."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from fabe_ds.errors import RecordFailed


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. `do_sample` None means: where the temperature is above zero."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    do_sample: bool | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def is_sampling(self) -> bool:
        return self.temperature > 0 if self.do_sample is None else self.do_sample

    @property
    def repeats(self) -> bool:
        """Whether the same request has the same answer: greedy, or with a seed."""
        return not self.is_sampling or self.seed is not None


class AnswerForm(NamedTuple):
    """What an answer must be. `schema` is what a server enforces: the user's JSON schema, or an
    object of one of the `choices`. `logprobs`: its probabilities are asked for."""

    schema: Mapping[str, Any] | None = None
    choices: tuple[str, ...] = ()
    logprobs: bool = False


FREE = AnswerForm()


class Request(NamedTuple):  # built for every record, so a tuple: a third of a frozen dataclass
    """One question to a model. `text` is the record's own value, which `prompt` holds too.

    With `chat`, the model's chat template is applied to a system and a user turn; without it the
    prompt is completed as it is.
    """

    text: str
    prompt: str
    system_prompt: str | None
    sampling: Sampling
    chat: bool = True
    language: str = "python"
    sample: int = 0
    turns: tuple[tuple[str, str], ...] = ()
    """Answers that were no good and what was said to them: (answer, complaint), in order."""
    record: str | Mapping[str, Any] | None = None
    """The whole record (its JSON text, or the record), where a check of answers asks for it."""
    before: tuple[tuple[str, str], ...] = ()
    """Turns before the prompt, as (role, content): examples, or those of the record's own."""
    form: AnswerForm = FREE

    @property
    def messages(self) -> list[dict[str, str]]:
        messages = [{"role": role, "content": content} for role, content in self.before]
        if self.prompt or not self.before:
            messages.append({"role": "user", "content": self.prompt})
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        for answer, complaint in self.turns:
            messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": complaint})
        return messages

    @property
    def plain(self) -> str:
        """The prompt of a model that is not asked through a chat template."""
        said = [part for turn in self.turns for part in turn]
        before = [content for _, content in self.before]
        return "\n\n".join([*filter(None, [self.system_prompt]), *before, self.prompt, *said])


class Completion(NamedTuple):
    """What a model answered, as it came. `finish_reason`: the server's own word for how it ended
    (providers/finish.py says what each means), or None. `reasoning`: what was told apart from the
    answer before it became text."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning: str | None = None
    logprobs: str | None = None
    """Log probabilities, as JSON: of the tokens of the text, in order ([[token, logprob], ...]); or
    of the choices that a local model was given ({choice: logprob, ...})."""
    cached_tokens: int | None = None
    """Those of the prompt that the server had cached. It is told of new answers alone."""
    reasoning_tokens: int | None = None
    """Those of the answer that were reasoning; of new answers alone."""


class NotChosen:
    """Stands for a text that a run leaves out (--where, --limit)."""


LEAVE = NotChosen()


Item = Request | RecordFailed | NotChosen | None
"""What a record asks for: a request, a failure to write one, or nothing: it is left out, or has no
text and is skipped."""


Accept = Callable[[Request, Completion], str]
"""Makes a record's new text of a completion. Raises: RecordFailed."""


Reask = Callable[[Request, Completion, str, str], Request | None]
"""The request to send where an answer failed with this kind and message; None for no other."""


def never(request: Request, completion: Completion, kind: str, message: str) -> Request | None:
    return None


class Outcome(NamedTuple):
    """What became of one record. `text` is None where it keeps what it has; `original` is the text
    that was asked about, `score` what a judge gave the answer."""

    text: str | None = None
    completion: Completion | None = None
    kind: str | None = None
    message: str | None = None
    cached: bool = False
    original: str = ""
    score: float | None = None
    model: str | None = None
    """Who answered, where it was another than the run's own."""


SKIPPED = Outcome()


LASTING = ("check", "truncated", "context", "refused", "invalid", "unfinished", "tool call")
"""Classes of failures that have been answered and would be answered the same: they are not asked
again."""


NOT_CHOSEN = "not chosen"
LEFT_OUT = Outcome(message=NOT_CHOSEN)


UNANSWERED = Outcome(kind="unanswered", message="not answered yet, and --offline asks nobody")


LATEST_KEPT, LATEST_CHARACTERS = 8, 800


@dataclass(slots=True)
class Stats:
    """Counts of a run, in records but for `requests` and tokens. Read by the progress display."""

    done: int = 0
    cached: int = 0
    failed: int = 0
    skipped: int = 0
    not_chosen: int = 0
    requests: int = 0
    retries: int = 0
    refusals: int = 0
    """Answers that said: too much at once, or not now."""
    reasks: int = 0
    hedged: int = 0
    cost: float = 0.0
    in_flight: int = 0
    limit: int = 0
    """Requests that may be in flight just now."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    completion_tokens: int = 0
    state: str = ""
    """What holds the run up just now, for people; empty where nothing does."""
    loading: float = 0.0
    """Seconds in which a model was loaded and nothing could be answered."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of how the records were answered, a line each."""
    latency: Counter[int] = field(default_factory=Counter)
    """Answers by the time they took: those of up to 2**(n/4) seconds under n."""
    failures: Counter[str] = field(default_factory=Counter)
    """Failed records by class."""
    messages: dict[str, str] = field(default_factory=dict)
    """The message of the first failure of each class."""
    latest: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=LATEST_KEPT))
    """The beginnings of the last texts that were answered, and of the answers."""

    def answered(self, before: str, after: str) -> None:
        """Counts a new answer."""
        self.done += 1
        self.latest.append((before[:LATEST_CHARACTERS], after[:LATEST_CHARACTERS]))

    def failed_as(self, kind: str, message: str) -> None:
        """Counts a failure."""
        self.failed += 1
        self.failures[kind] += 1
        self.messages.setdefault(kind, message)

    def took(self, seconds: float) -> None:
        self.latency[math.ceil(4 * math.log2(max(1e-3, seconds)))] += 1

    def counts(self) -> dict[str, Any]:
        """All of it as plain values, to be sent elsewhere."""
        counts = {field.name: getattr(self, field.name) for field in fields(self)}
        # asdict spoils a Counter
        counts |= {"latency": dict(self.latency), "failures": dict(self.failures)}
        counts |= {"messages": dict(self.messages), "latest": list(self.latest)}
        return {**counts, "notes": list(self.notes)}

    @property
    def settled(self) -> int:
        return self.done + self.cached + self.failed + self.skipped + self.not_chosen
