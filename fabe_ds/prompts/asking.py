"""What is asked about a text: the request that a model is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fabe_ds.config.settings import JUDGE_FILE, TransformConfig
from fabe_ds.errors import RecordFailed, UsageError
from fabe_ds.prompts.conversation import Turn, turns_before
from fabe_ds.prompts.form import form_of
from fabe_ds.prompts.template import Condition, Instruction, load_instruction, parsed_record
from fabe_ds.providers.forms import schema_words
from fabe_ds.request import FREE, LEAVE, Item, Request

JUDGED = "answer"
"""The name that a judge's template knows an answer by."""
Record = str | Mapping[str, Any] | None


class Texts(NamedTuple):
    """Templates, each as its text and a name to call it by. `system` is None where the system
    prompt is no file, and goes as it is."""

    instruction: tuple[str, str]
    system: tuple[str, str] | None = None
    judge: tuple[str, str] | None = None
    plain_system: str = ""

    @property
    def words(self) -> list[str]:
        """The user's own words of every prompt."""
        return [self.instruction[0], self.system[0] if self.system else self.plain_system]


def texts_of(config: TransformConfig) -> Texts:
    """The templates that a configuration names, read from their files. Raises: UsageError."""
    system = load_instruction(config.system_prompt or "", "--system-prompt")
    judge = config.pick.removeprefix(JUDGE_FILE) if config.pick.startswith(JUDGE_FILE) else None
    loaded = load_instruction(judge, "--pick") if judge is not None else None
    if loaded is not None and JUDGED not in loaded[0]:
        raise UsageError(f"--pick judge:{judge}: no such file, or a template without {JUDGED}")
    return Texts(
        load_instruction(config.instruction or ""),
        system if system[1] != "system-prompt" else None,
        loaded,
        config.system_prompt or "",
    )


class Asking:
    """Makes a request of each text that is to be asked about."""

    def __init__(self, config: TransformConfig, texts: Texts, takes_forms: bool = True) -> None:
        """`takes_forms`: the provider makes use of `Request.form`; else the prompt tells of it.

        Raises: UsageError, TemplateError.
        """
        self._paths = config.targets.paths
        variables = config.template_vars

        def made(template: tuple[str, str] | None, more: tuple[str, ...] = ()) -> list[Instruction]:
            if template is None:
                return []
            return [Instruction(*template, variables, path, more) for path in self._paths]

        self._instructions = made(texts.instruction)
        self._systems = made(texts.system)
        self.judging = made(texts.judge, (JUDGED,))
        self._conditions = (
            [Condition(config.where, variables, path) for path in self._paths]
            if config.where
            else []
        )
        self._turns = config.context == "turns"
        self._system, self._sampling = config.system_prompt or None, config.sampling
        self._chat, self._form = config.use_chat_template, form_of(config)
        self._words = ""
        if self._form.schema is not None and not takes_forms:
            self._words = f"\n\n{schema_words(self._form.schema)}"
        self._language = variables.get("language", "python")
        self._examples = [
            self._example_turns(instruction, config.examples or [])
            for instruction in self._instructions
        ]
        self._is_plain = not (
            self._conditions
            or self._turns
            or self._systems
            or config.examples
            or self._form is not FREE
        )
        self._parsed: tuple[Record, Any] = (None, None)

    @property
    def needs_record(self) -> bool:
        """Whether the whole record is looked at, and not its fields alone."""
        templates = [*self._instructions, *self._systems]
        conditions = (each.needs_record for each in self._conditions)
        return self._turns or any(each.needs_record for each in templates) or any(conditions)

    def item(
        self, text: Any, record: Record, field: int = 0, nth: int = 0, keep: bool = False
    ) -> Item:
        """What a text asks for: the nth of a field in its record. `keep`: the request goes with the
        record. Raises: TemplateError."""
        if not isinstance(text, str) or not text or text.isspace():
            return None
        try:
            if not self._is_plain:
                return self._special(text, record, field, nth, keep)
            prompt = self._instructions[field].prompt(text, record)
        except RecordFailed as error:
            return error
        request = Request(text, prompt, self._system, self._sampling, self._chat, self._language)
        return request._replace(record=record) if keep else request

    def _special(self, text: str, record: Record, field: int, nth: int, keep: bool) -> Item:
        """The same where more than an instruction and a text is sent, or not all is asked about."""
        if self._conditions and not self._conditions[field].holds(text, record):
            return LEAVE
        before = self._examples[field]
        if self._turns:
            turns = turns_before(self._values_of(record), self._paths[field], nth)
            if not turns:  # what opens a chat answers nothing
                return LEAVE
            system, before, prompt = self._opened(turns, before, text, record, field)
        else:
            prompt = self._instructions[field].prompt(text, record)
            system = self._system
            if self._systems:
                system = self._systems[field].words(text, record) or None
        return Request(
            text,
            f"{prompt}{self._words}",
            system,
            self._sampling,
            self._chat,
            self._language,
            record=record if keep else None,
            before=before,
            form=self._form,
        )

    def _opened(
        self, turns: list[Turn], examples: tuple[Turn, ...], text: str, record: Record, field: int
    ) -> tuple[str | None, tuple[Turn, ...], str]:
        """The system prompt, the turns before, and the last turn of a chat: the instruction stands
        before what the chat's own system turns say."""
        said = [self._instructions[field].words(text, record)]
        said += [content for role, content in turns if role == "system"]
        others = [turn for turn in turns if turn[0] != "system"]
        system = "\n\n".join(filter(None, said)) or None
        role, prompt = others[-1]
        if role != "user":
            return system, (*examples, *others), ""
        return system, (*examples, *others[:-1]), prompt

    def _values_of(self, record: Record) -> Any:
        """The values of a record, read once for all its turns."""
        if not isinstance(record, str):
            return record
        if self._parsed[0] is not record:
            self._parsed = (record, parsed_record(record))
        return self._parsed[1]

    def _example_turns(
        self, instruction: Instruction, examples: list[dict[str, Any]]
    ) -> tuple[Turn, ...]:
        turns: list[Turn] = []
        for example in examples:
            record = {instruction.field: example["input"], **example}
            asked = example["input"]
            if not self._turns:
                asked = instruction.prompt(asked, record)
            turns += [("user", asked), ("assistant", example["output"])]
        return tuple(turns)
