"""Answers judged: a model gives each of several answers a score (--pick judge:FILE)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from fabe_ds.config.settings import TransformConfig
from fabe_ds.engine.budget import Budget
from fabe_ds.engine.runtime import Runtime, in_groups
from fabe_ds.errors import RecordFailed
from fabe_ds.prompts.acceptance import INVALID, asking_again
from fabe_ds.prompts.answer import clean_answer
from fabe_ds.prompts.asking import JUDGED
from fabe_ds.prompts.template import Instruction
from fabe_ds.providers import Provider
from fabe_ds.request import Completion, Item, Outcome, Request, Sampling, Stats
from fabe_ds.store.completions import Completions

WINDOW = 256
"""Answers that are judged together."""
_number = re.compile(r"-?\d+(?:\.\d+)?")


class Judge:
    """Asks for a score of each answer. Greedy, and kept in the record cache as all answers are."""

    def __init__(
        self,
        config: TransformConfig,
        provider: Provider,
        open_cache: Callable[[TransformConfig], Completions],
        instructions: list[Instruction],
        budget: Budget,
    ) -> None:
        """`instructions`: the judge's template, made ready for each field."""
        self._instructions = instructions
        self._sampling = Sampling(max_new_tokens=config.max_new_tokens)
        asking = asking_again(config)
        self._runtime = Runtime(
            config, provider, open_cache, _accept, asking, budget, name="-judge"
        )

    def scored(
        self,
        items: Iterable[Item],
        ask: Callable[[Iterable[Item]], Iterator[Outcome]],
        stats: Stats,
    ) -> Iterator[Outcome]:
        """The outcomes that `ask` gives of items, each with its score. `stats` is told of what the
        judge was sent."""
        for asked, group in in_groups(items, ask, WINDOW):
            judged = self._runtime.outcomes(map(self._item, asked, group))
            given = list(judged)
            self._runtime.tell(stats)
            yield from map(_judged, group, given)

    def _item(self, item: Item, outcome: Outcome) -> Item:
        if not isinstance(item, Request) or outcome.text is None:
            return None
        instruction = self._instructions[0]
        try:
            prompt = instruction.prompt(item.text, item.record, **{JUDGED: outcome.text})
        except RecordFailed as error:
            return error
        return Request(item.text, prompt, None, self._sampling, item.chat, item.language)

    def begin(self) -> None:
        """A new pass over records."""
        self._runtime.begin()

    def close(self) -> None:
        self._runtime.close()


def _accept(request: Request, completion: Completion) -> str:
    """The score that an answer names first. Raises: RecordFailed."""
    text = clean_answer(
        completion.text,
        completion.finish_reason,
        original=request.text,
        strip_fences=True,
        on_truncated="keep",
        in_place=False,
    )
    found = _number.search(text)
    if found is None:
        raise RecordFailed(INVALID, "no number")
    return found[0]


def _judged(outcome: Outcome, judged: Outcome) -> Outcome:
    """The outcome with its score; an answer that the judge could not score is not good."""
    if judged.text is not None:
        return outcome._replace(score=float(judged.text))
    if outcome.text is None:
        return outcome
    message = f"the judge gave no score: {judged.message or judged.kind}"
    return outcome._replace(text=None, kind="judge", message=message)
