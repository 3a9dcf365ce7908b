"""The token ids of a request: through the model's chat template, or as plain text.

What a record says never becomes a control token, whatever it holds.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
import jinja2.meta

from fabe_ds.errors import RecordFailed, RunStopped, UsageError, first_line
from fabe_ds.providers.transformers.turns import (
    AddedToken,
    any_of,
    closer_awaited,
    special_ids,
    split_controls,
)
from fabe_ds.request import Request, Sampling

log = logging.getLogger(__name__)

_THINKING = {  # variables by which templates switch reasoning, and what turns it on and off
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning_effort": ("medium", "none"),
}
_EFFORT = "reasoning_effort"
_PROBE = "What is seven and five?"


class Chat:
    """Writes prompts for one tokenizer. `thinking`: whether the model is to reason; None leaves it
    to the model. `template`: one that takes the place of the model's own. `instruction`: the
    user's own words of every prompt, whose control tokens are meant as such; None takes all but a
    record's value for them. `variables`: more of what the template is given."""

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        template: str | None = None,
        thinking: bool | str | None = None,
        instruction: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self._name, self._instruction = tokenizer, name, instruction
        if template is not None:
            tokenizer.chat_template = template
        self.template = _default(tokenizer.chat_template)
        self._parameters = {**self._switched(thinking), **(variables or {})}
        self.notes: list[str] = []

    def _switched(self, thinking: bool | str | None) -> dict[str, Any]:
        """The variables of the template that switch reasoning on or off, or say how much of it.

        Raises: UsageError where it has none.
        """
        if thinking is None:
            return {}
        asked = _variables(self.template or "")
        switches = {name: values for name, values in _THINKING.items() if name in asked}
        if isinstance(thinking, str):
            if _EFFORT not in switches:
                raise UsageError(
                    f"--thinking {thinking}: the chat template of {self._name} knows no {_EFFORT}"
                )
            others = {name: on for name, (on, _) in switches.items()}
            return {**others, _EFFORT: thinking}
        for variable, (on, off) in switches.items():
            return {variable: on if thinking else off}
        said = "on" if thinking else "off"
        raise UsageError(
            f"--thinking {said}: the chat template of {self._name} has no switch for it"
        )

    @cached_property
    def added(self) -> dict[str, AddedToken]:
        """The tokenizer's added tokens, by their text."""
        tokens = {
            token.content: AddedToken(number, token.special)
            for number, token in self.tokenizer.added_tokens_decoder.items()
        }
        for text, number in zip(
            self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True
        ):
            tokens[text] = AddedToken(number, True)
        return tokens

    @cached_property
    def _as_parts(self) -> bool:
        """Whether the template takes a turn's content as a list of parts only, as those of models
        that see images may."""
        plain, parts = self._written(_PROBE), self._written(_part(_PROBE))
        return _PROBE not in plain and _PROBE in parts

    def _written(self, content: Any) -> str:
        turns = [{"role": "user", "content": content}]
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # templates raise what they like
            return ""

    @cached_property
    def _system_is_refused(self) -> bool:
        """Whether the chat template raises on a system turn, or leaves it out."""
        turns = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "Hello"}]
        try:
            return _PROBE not in self.tokenizer.apply_chat_template(
                self._turns(turns), tokenize=False
            )
        except Exception:  # templates raise what they like
            return True

    def _turns(self, messages: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
        if not self._as_parts:
            return list(messages)
        return [{**turn, "content": _part(turn["content"])} for turn in messages]

    def check(self) -> None:
        """Warns where there is no template. Raises: RunStopped where it cannot be used at all."""
        if not self.template:
            note = (
                f"{self._name} has no chat template: records are asked about as plain text; give "
                "one with --chat-template FILE, or --no-use-chat-template if that is meant"
            )
            self.notes.append(note)
            log.warning("%s", note)
            return
        request = Request(_PROBE, _PROBE, None, Sampling())
        try:
            ids = self.ids(request)
        except RecordFailed as error:
            raise RunStopped(
                f"--model {self._name}: its {error}; --chat-template FILE gives another, "
                "--no-use-chat-template none"
            ) from None
        if not ids or _PROBE not in self._written(_part(_PROBE) if self._as_parts else _PROBE):
            raise RunStopped(
                f"--model {self._name}: its chat template leaves out what it is asked; "
                "--chat-template FILE gives another, --no-use-chat-template none"
            )

    def ids(self, request: Request) -> list[int]:
        """The prompt's tokens. Raises: RecordFailed where the chat template does not take it."""
        if not request.chat or not self.template:
            return self._plain(request.plain, request.text)
        turns = request.messages
        if request.system_prompt and self._system_is_refused:
            turns = [{"role": "user", "content": request.plain}]
        try:
            encoded = self.tokenizer.apply_chat_template(
                self._turns(turns),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                sanitize_control_tokens=True,
                **self._parameters,
            )
        except Exception as error:  # templates raise what they like
            raise RecordFailed("prompt", f"chat template: {first_line(error)}") from None
        return list(encoded["input_ids"])

    def _plain(self, prompt: str, text: str) -> list[int]:
        """A plain prompt's tokens: those that the instruction names are taken as such, those that
        the record's text names are not."""
        meant, brought = split_controls(self._controls, prompt, text, self._instruction)
        if not brought:
            return list(self.tokenizer(prompt)["input_ids"])
        if not meant:
            return list(self.tokenizer(prompt, split_special_tokens=True)["input_ids"])
        own = prompt.split(text) if text else [prompt]
        words = "".join(own) if self._instruction is None else self._instruction
        outside = Counter(self._controls.findall("".join(own)))
        if any(count > words.count(name) for name, count in outside.items()):
            raise RecordFailed(
                "prompt",
                f"the record holds {', '.join(sorted(meant))}, a control token "
                "that the instruction uses too: they cannot be told apart",
            )
        ids = list(self.tokenizer(own[0])["input_ids"])
        for part in own[1:]:
            ids += self._more(text, split=True) + self._more(part, split=False)
        return ids

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        return any_of(special_ids(self.added))

    def _more(self, text: str, split: bool) -> list[int]:
        """The tokens of a text in the middle of others."""
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=split)
        return list(encoded["input_ids"])

    def fitting(self, request: Request, room: int) -> list[int] | None:
        """The tokens of a prompt whose value is cut at its beginning so that no more than `room`
        are left; None where the value does not stand in the prompt, or is too short for it.

        Raises: RecordFailed.
        """
        text = request.text
        if not text or text not in request.prompt:
            return None
        over, copies = len(self.ids(request)) - room, request.prompt.count(text)
        tokens = self._more(text, split=True)
        while 0 < over < len(tokens) * copies:
            tokens = tokens[-(-over // copies) :]
            kept = self.tokenizer.decode(tokens, skip_special_tokens=False).lstrip("\ufffd")
            cut = request._replace(text=kept, prompt=request.prompt.replace(text, kept))
            ids = self.ids(cut)
            if len(ids) <= room:
                return ids
            over = len(ids) - room
        return None

    def awaited(self, ids: Sequence[int]) -> str | None:
        """The mark that ends the reasoning which the end of a prompt has opened, or None."""
        return closer_awaited(self.tokenizer.decode(ids[-16:], skip_special_tokens=False))


def _variables(template: str) -> set[str]:
    """The variables that a chat template asks for."""
    environment = jinja2.Environment(  # noqa: S701 - it is read, not rendered
        extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]
    )
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateError:  # tags of transformers' own
        return set(re.findall(r"\w+", template))


def _default(template: Any) -> str | None:
    """The template itself, where a tokenizer has several by name."""
    if isinstance(template, dict):
        return template.get("default") or next(iter(template.values()), None)
    return template or None


def _part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
