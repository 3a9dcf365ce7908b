"""What a local model is asked, as its cache keys have it."""

from __future__ import annotations

import re
from abc import abstractmethod
from functools import cached_property
from typing import Any

from fabe_ds.providers.dialects import EFFORTS
from fabe_ds.providers.transformers import amendments
from fabe_ds.providers.transformers.identity import CheckpointProvider
from fabe_ds.providers.transformers.turns import any_of, special_ids, split_controls
from fabe_ds.request import Request

ENGINE = "engine"
"""The parameter that holds arguments of vLLM's engine: --param engine.max_model_len=4096."""


class KeyedProvider(CheckpointProvider):
    """A local model that is told apart by its files, and its requests by all that changes an
    answer."""

    @abstractmethod
    def _is_cut(self, request: Request) -> bool:
        """Whether a prompt is longer than the model takes."""

    def former_key(self, request: Request) -> tuple[bytes, float] | None:
        former = self.former_identity()
        if former is None or self._amended or self.endpoint.given_params:
            return None
        if self._control_pattern.search(request.prompt):
            return None  # with transformers before 5.20, it became a control token
        body = self.body(request)
        if not body.keys().isdisjoint(("cut", "control", "choices", "schema")):
            return None
        return self._key_of(former, body, request.sample), self._changed

    @cached_property
    def _controls(self) -> dict[str, int]:
        """The special tokens of the tokenizer, read from its files."""
        return special_ids(amendments.added_tokens(self._speaking, self._digests))

    def _brings_controls(self, request: Request) -> bool:
        """Whether a record names control tokens."""
        instruction = self.endpoint.instruction
        pattern, plain = self._control_pattern, request.plain
        return bool(split_controls(pattern, plain, request.text, instruction)[1])

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return any_of(self._controls)

    def body(self, request: Request) -> dict[str, Any]:
        endpoint, sampling = self.endpoint, request.sampling
        body: dict[str, Any] = (
            {"messages": request.messages} if request.chat else {"prompt": request.plain}
        )
        body |= {"max_new_tokens": sampling.max_new_tokens, "dtype": endpoint.dtype}
        body["do_sample"] = sampling.is_sampling
        if sampling.is_sampling:
            own = self._own_settings.get("temperature", 0.0)
            body |= {"temperature": sampling.temperature or own, "top_p": sampling.top_p}
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
            if not self._controls.keys().isdisjoint(sampling.stop):
                body["control"] = "stops"  # earlier versions passed them over
        if not request.chat and self._brings_controls(request):
            body["control"] = "text"  # which earlier versions took for control tokens
        if endpoint.engine != "transformers":
            body["engine"] = endpoint.engine
        if endpoint.on_long_prompt != "fail":
            body["on_long_prompt"] = endpoint.on_long_prompt
            if self._is_cut(request):
                body["cut"] = "value"
        if request.chat and endpoint.chat_template is not None:
            body["chat_template"] = endpoint.chat_template
        if request.chat and endpoint.thinks is not None:
            level = endpoint.thinking
            body["thinking"] = level if level in EFFORTS else endpoint.thinks
        if request.form.choices:
            body["choices"] = list(request.form.choices)
        elif request.form.schema is not None:
            body["schema"] = request.form.schema
        return body

    def asked(self, request: Request) -> dict[str, Any]:
        given = self.endpoint.given_params
        if ENGINE in given:
            from fabe_ds.providers.transformers.vllm import without_machine

            given = without_machine(given)
        return {**self.body(request), "params": given} if given else self.body(request)

    @cached_property
    def _own_settings(self) -> dict[str, Any]:
        """The generation settings that came with the model's folder."""
        return amendments.own_settings(self.base)
