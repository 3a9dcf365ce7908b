"""Answers of a local model that must have a form: a choice, or JSON that follows a schema."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fabe_ds.errors import RecordFailed, first_line
from fabe_ds.providers.transformers.choosing import Choice, Tree
from fabe_ds.providers.transformers.grammar import Grammars, Matcher
from fabe_ds.request import AnswerForm, Completion, Request

if TYPE_CHECKING:
    from fabe_ds.providers.transformers.attention import Prompt
    from fabe_ds.providers.transformers.chat import Chat
    from fabe_ds.providers.transformers.generation import Generation

log = logging.getLogger(__name__)


class FormedAnswers:
    """What one loaded model does where answers must have a form."""

    def __init__(self, chat: Chat, model: Any, ends: Collection[int]) -> None:
        """`ends`: tokens that end an answer."""
        self._chat, self._model, self._ends = chat, model, ends

    def grammar(self, form: AnswerForm) -> Matcher | None:
        """What answers follow while they are decoded; None where they can only be checked, which is
        said."""
        if form.schema is None or form.choices or self._grammars is None:
            return None
        try:
            return self._grammars.of(form.schema)
        except ValueError as error:
            self._say_unconstrained(error)
            return None

    @cached_property
    def _grammars(self) -> Grammars | None:
        width = self._model.get_output_embeddings().weight.shape[0]
        try:
            return Grammars(self._chat.tokenizer, width, self._ends)
        except Exception as error:  # of tokenizers of many kinds
            self._say_unconstrained(error)
            return None

    def _say_unconstrained(self, why: Exception) -> None:
        line = f"answers are only checked, not held to the schema while decoded: {first_line(why)}"
        if line not in self._chat.notes:
            self._chat.notes.append(line)
            log.warning("%s", line)

    def chosen(
        self, generation: Generation, prompts: list[Prompt], request: Request
    ) -> Iterator[list[tuple[int, Completion | RecordFailed]]]:
        """A choice for each prompt, by the model's scores."""
        from fabe_ds.providers.transformers.scoring import Scoring

        tokenizer, sampling = self._chat.tokenizer, request.sampling
        tokens: dict[str, list[int]] = {
            choice: tokenizer(choice, add_special_tokens=False)["input_ids"]
            for choice in request.form.choices
        }
        tree = Tree(tokens, self._ends)
        temperature = (sampling.temperature or 1.0) if sampling.is_sampling else None
        lengths = {prompt.number: len(prompt.ids) for prompt in prompts}

        def completion(number: int, found: Choice | RecordFailed) -> Completion | RecordFailed:
            if isinstance(found, RecordFailed):
                return found
            count, scores = len(tokens[found.choice]), json.dumps(found.logprobs)
            return Completion(found.choice, "stop", lengths[number], count, logprobs=scores)

        for given in Scoring(generation).chosen(prompts, tree, temperature):
            yield [(number, completion(number, found)) for number, found in given]
