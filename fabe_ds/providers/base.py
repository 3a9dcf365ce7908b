"""What a provider is: how a request is written down, and how its answer is read.

Sending policy (limits, retries, cache) stands around providers, once, in `fabe_ds.engine`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ValidationError

from fabe_ds.config.params import merged, without_nulls
from fabe_ds.config.sections import ModelSettings
from fabe_ds.errors import FabeError, RecordFailed, UsageError
from fabe_ds.request import Completion, Request


class Endpoint(ModelSettings):
    """Where and what the model is: the settings of the model, and what else a provider needs of a
    run. `device` is one device, `chat_template` the text of a template."""

    model: str = "local"
    base_url: str | None = None
    more_base_urls: tuple[str, ...] = ()
    """Other servers that have the same model."""
    sharers: int = 1
    """Processes that share this machine's processor for one run."""
    batches: int = 1
    """Batches of `batch_size` records that a local model holds at once."""
    chat: bool = True
    """Whether records are asked about through the model's chat template."""
    instruction: str | None = None
    """The user's own words of every prompt: the control tokens in it are meant as such."""
    max_new_tokens: int | None = None
    cache_dir: Path | None = None
    """Where digests of large files are remembered."""

    def __init__(self, model: str = "local", base_url: str | None = None, **more: Any) -> None:
        super().__init__(**{"model": model, "base_url": base_url, **more})

    @property
    def thinks(self) -> bool | None:
        """Whether the model is to reason first; None leaves it to its chat template."""
        return None if self.thinking is None else self.thinking != "off"


_canonical = json.JSONEncoder(sort_keys=True).encode


class Requirement(FabeError):
    """Something a provider needs that is not there; the message says how to get it."""

    exit_code = 2


WINDOW_ROWS = 16
"""Records that a local model looks at together, for each that it holds at once."""


class Provider(ABC):
    """Base of all providers. One instance serves one run; it is built anew in every process."""

    name: ClassVar[str]
    needs: ClassVar[str] = "nothing"
    cached: ClassVar[bool] = True
    """False where an answer costs less than looking it up."""
    asks: ClassVar[bool] = True
    """Whether there is a model to name, and an instruction to give it."""

    is_local: ClassVar[bool] = False
    """Whether the model is in this process."""
    has_batches: ClassVar[bool] = False
    """Whether its servers take batches of requests (--batch-api)."""

    batch_api: ClassVar[Literal["files", "messages"]] = "files"
    """Whose these are: OpenAI's, of files, or Anthropic's, of messages."""

    lacks: ClassVar[tuple[str, ...]] = ()
    """Settings that its servers know nothing of; given, they are refused."""

    has_tiers: ClassVar[bool] = False
    """Whether its servers rank requests (--service-tier)."""

    takes_forms: ClassVar[bool] = False
    """Whether `body` makes use of `Request.form`, a schema or choices; else the prompt tells it."""

    Options: ClassVar[type[BaseModel] | None] = None
    """A pydantic model of the provider's own options (--provider-option NAME=VALUE), if it has
    any. They reach the cache key by way of `body`, where they change it."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Raises: UsageError (an option that the provider has not, or not with this value)."""
        self.endpoint = endpoint
        self.options: Any = self._options_of(endpoint.provider_options)
        self.former_answers = 0  # that were found under the keys of earlier versions

    @classmethod
    def missing(cls) -> str | None:
        """What is not installed for this provider to run, or None."""
        return None

    @classmethod
    def _options_of(cls, given: Mapping[str, Any]) -> BaseModel | None:
        # Here and not by pydantic, which passes names that it does not know over.
        known = sorted(cls.Options.model_fields) if cls.Options is not None else []
        for name in given:
            if name not in known:
                has = f"; {cls.name} has {', '.join(known)}" if known else f"; {cls.name} has none"
                raise UsageError(f"--provider-option {name}: no such option{has}")
        try:
            return cls.Options(**given) if cls.Options is not None else None
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "?"
            raise UsageError(f"--provider-option {name}: {first['msg']}") from None

    @abstractmethod
    def body(self, request: Request) -> dict[str, Any]:
        """The request as it is sent: all that can change the answer."""

    def asked(self, request: Request) -> dict[str, Any]:
        """The body with the parameters that the user names in it."""
        given = self.endpoint.given_params
        return without_nulls(merged(self.body(request), given)) if given else self.body(request)

    def identity(self) -> str:
        """Who answers: an endpoint's address, a local model's digest. Part of the cache key."""
        return self.endpoint.model

    def key(self, request: Request) -> bytes:
        """The cache key: SHA-256 over who is asked, what is sent, and which sample it is."""
        return self._key_of(self.identity(), self.asked(request), request.sample)

    def _key_of(self, identity: str, body: Mapping[str, Any], sample: int) -> bytes:
        sent = [self.name, identity, body, sample]
        return hashlib.sha256(_canonical(sent).encode()).digest()

    def key_without_limit(self, request: Request) -> bytes:
        """The same for requests that differ in nothing but their limit on new tokens."""
        sampling = replace(request.sampling, max_new_tokens=0)
        return self.key(request._replace(sampling=sampling))

    def former_key(self, request: Request) -> tuple[bytes, float] | None:
        """The key under which earlier versions kept the very answer that this one would give, and
        since when: an older answer may be another's. None where there is none such."""
        return None

    def former_identity(self) -> str | None:
        """What earlier versions gave as the identity of the same model; None where it is this one,
        or where they may have been answered otherwise."""
        return None

    def lost_prompt(self, request: Request, completion: Completion) -> str | None:
        """What says that the model has not seen the whole prompt, or None."""
        return None

    def preflight(self) -> None:  # noqa: B027 - most have nothing to check
        """Checks, before the first record is spent, that the model can be reached.

        Raises: RunStopped, Requirement.
        """

    def prompt_tokens(self, request: Request) -> int | None:
        """The tokens of the prompt, where a tokenizer is at hand."""
        return None

    def shown(self, request: Request) -> str:
        """The request as a dry run shows it."""
        return written(self.asked(request))


def written(body: Mapping[str, Any]) -> str:
    """A body as a dry run shows it."""
    return json.dumps(body, ensure_ascii=False, indent=2)


class LocalProvider(Provider):
    """A model in this process."""

    is_local = True

    @property
    def resizes(self) -> bool:
        """Whether it may be told how many records to hold at once."""
        return False

    @property
    def rows(self) -> int:
        """Records that it holds at once, at most."""
        return self.endpoint.batch_size * self.endpoint.batches

    @property
    def window(self) -> int:
        """Records to look at together, so that those of like length find one another."""
        return WINDOW_ROWS * self.rows

    def resize(self, rows: int) -> None:
        """Holds so many records at once from now on."""
        raise NotImplementedError

    def asked(self, request: Request) -> dict[str, Any]:
        given = self.endpoint.given_params
        return {**self.body(request), "params": given} if given else self.body(request)

    def vouched(self) -> bool:
        """Whether it is known that the model can be loaded as it is, so that what is stored of its
        answers may be trusted before it is."""
        return True

    def notes(self) -> list[str]:
        """What a person should know of how the records were answered, a line each."""
        return []

    @abstractmethod
    def complete(self, requests: Sequence[Request]) -> list[Completion | RecordFailed]:
        """The answers to one batch: same length, same order."""

    def stream(
        self, requests: Sequence[Request]
    ) -> Iterator[list[tuple[int, Completion | RecordFailed]]]:
        """Answers as they are ready, each with its request's index. Longest prompts first, so
        that running out of memory shows at once and a batch's rows are of like length."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt), reverse=True)
        size = self.endpoint.batch_size
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            yield list(zip(batch, self.complete([requests[i] for i in batch]), strict=True))
