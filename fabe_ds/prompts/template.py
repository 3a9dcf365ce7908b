"""The instruction: a text or Jinja2 template that becomes the prompt of each record."""

from __future__ import annotations

import errno
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fabe_ds.errors import RecordFailed, TemplateError, UsageError, first_line, reason
from fabe_ds.fields import FieldPath, key_of
from fabe_ds.text import as_path

_FILE_SUFFIXES = (".j2", ".jinja", ".jinja2", ".txt", ".md", ".prompt")
_MAX_PROMPT = 64 << 20  # characters; a template can multiply text, and must not fill the memory


def load_instruction(instruction: str, flag: str = "--instruction") -> tuple[str, str]:
    """The template text, and the name to call it by: a file's path, or that of the flag.

    Raises: UsageError where what looks like a file cannot be read.
    """
    path, text_name = as_path(instruction), flag.removeprefix("--")
    looks_like_file = instruction.lower().endswith(_FILE_SUFFIXES) and "\n" not in instruction
    try:
        is_file = bool(instruction) and (path.is_symlink() or path.exists() or looks_like_file)
    except ValueError:  # a text with a NUL in it
        is_file = False
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # a text too long for a name is a text
            raise UsageError(f"{flag} {instruction}: {reason(error)}") from None
        is_file = False
    if not is_file:
        return instruction, text_name
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{flag} {instruction}: not UTF-8") from None
    except OSError as error:
        raise UsageError(f"{flag} {instruction}: {reason(error)}") from None
    if not text.strip():
        raise UsageError(f"{flag} {instruction}: an empty file")
    return text, instruction


class Instruction:
    """A template made ready: `prompt(text, record)` is what the model is asked.

    The template sees `variables`, the value as `text` and under the field's own name, and the
    record as `record`. A template that mentions none of these has the value appended after a
    blank line. Record text is data: it is never compiled, and rendered once.

    `more`: names of what is given when a prompt is made. Raises: TemplateError (syntax, or a
    variable that nothing gives).
    """

    def __init__(
        self,
        template: str,
        name: str,
        variables: Mapping[str, str],
        path: FieldPath,
        more: Collection[str] = (),
    ) -> None:
        self.name, self.variables, self.field = name, dict(variables), key_of(path)
        taken = {"text", "record", self.field, *more} & set(variables)
        if taken:
            raise TemplateError(f"--template-var {sorted(taken)[0]}: the name of the record's own")
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=False
        )
        try:
            tree = environment.parse(template, name, name)
            self._template = environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise TemplateError(f"{name}:{error.lineno}: {error.message}") from None
        except (RecursionError, SyntaxError, MemoryError, ValueError, OverflowError) as error:
            # Nested too deep for Python's compiler, or with a constant too large.
            raise TemplateError(f"{name}: cannot be compiled: {first_line(error)}") from None
        self._template.filename = self._template.name = name
        used = _undeclared(name, tree)
        self.needs_record = "record" in used
        mentions = used & {"text", self.field, *more}
        self._mentions = bool(mentions) or _record_mentions(tree, str(path[0]))
        alone = not self._mentions and not self.needs_record
        self._start = f"{self._render('', None).rstrip()}\n\n" if alone else None

    def prompt(self, text: str, record: str | Mapping[str, Any] | None, **more: str) -> str:
        """The prompt for one record; `record` is its JSON text, or the record itself.

        Raises: RecordFailed (kind "prompt") where this record's data cannot be rendered,
        TemplateError where no record's could.
        """
        if self._start is not None:
            return self._start + text
        rendered = self._render(text, record if self.needs_record else None, **more)
        return rendered if self._mentions else f"{rendered.rstrip()}\n\n{text}"

    def words(self, text: str, record: str | Mapping[str, Any] | None) -> str:
        """The same without the value, where the template does not mention it."""
        if self._start is not None:
            return self._start.rstrip()
        return self._render(text, record if self.needs_record else None).rstrip()

    def _render(self, text: str, record: str | Mapping[str, Any] | None, **more: str) -> str:
        names = {
            **self.variables,
            **more,
            "text": text,
            self.field: text,
            "record": parsed_record(record),
        }
        try:
            rendered = self._template.render(names)
        except UndefinedError as error:
            place = f"{self.name}:{self._line(error.__traceback__)}"
            message = f"{place}: {error.message}"
            if error.message and error.message.endswith(" is undefined"):
                raise TemplateError(f"{message}; give it with --template-var") from None
            raise RecordFailed("prompt", message) from None
        except SecurityError as error:
            place = f"{self.name}:{self._line(error.__traceback__)}"
            raise TemplateError(f"{place}: not allowed in a template: {error}") from None
        except Exception as error:  # a filter may raise anything on this record's data
            place = f"{self.name}:{self._line(error.__traceback__)}"
            raise RecordFailed("prompt", f"{place}: {error}") from None
        if len(rendered) > _MAX_PROMPT:
            raise RecordFailed("prompt", f"{self.name}: the prompt has {len(rendered)} characters")
        return rendered

    def _line(self, traceback: TracebackType | None) -> int | str:
        """The template's line in a traceback, which Jinja2 rewrites to hold it."""
        line: int | str = "?"
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename in (self.name, "<template>"):
                line = traceback.tb_lineno
            traceback = traceback.tb_next
        return line


def parsed_record(record: str | Mapping[str, Any] | None) -> Any:
    """The values of a record that may be JSON text. Raises: RecordFailed."""
    try:
        return json.loads(record) if isinstance(record, str) else record
    except (ValueError, RecursionError) as error:
        raise RecordFailed("prompt", f"the record cannot be shown whole: {error}") from None


class Condition:
    """A Jinja2 expression over a record and the text that may be asked about (--where).

    What a record lacks is undefined, and false. Raises: UsageError (syntax, an unknown name).
    """

    def __init__(self, expression: str, variables: Mapping[str, str], path: FieldPath) -> None:
        self._variables, self._field = dict(variables), key_of(path)
        environment = ImmutableSandboxedEnvironment()
        try:
            self._holds = environment.compile_expression(expression)
            used = meta.find_undeclared_variables(environment.parse(f"{{{{ {expression} }}}}"))
        except (TemplateSyntaxError, RecursionError, SyntaxError, ValueError) as error:
            raise UsageError(f"--where {expression}: {first_line(error)}") from None
        known = {"record", "text", self._field, *variables}
        if unknown := sorted(used - known):
            raise UsageError(
                f"--where {expression}: no {unknown[0]!r}; there are {', '.join(sorted(known))}"
            )
        self.needs_record = "record" in used

    def holds(self, text: str, record: str | Mapping[str, Any] | None) -> bool:
        """Raises: RecordFailed (kind "where") where it cannot be told of this record."""
        values = parsed_record(record) if self.needs_record else None
        names = {**self._variables, "text": text, self._field: text, "record": values}
        try:
            return bool(self._holds(**names))
        except Exception as error:  # an expression may raise anything on this record's data
            raise RecordFailed("where", f"--where: {first_line(error)}") from None


def _undeclared(name: str, tree: nodes.Template) -> set[str]:
    try:
        return meta.find_undeclared_variables(tree)
    except RecursionError:
        raise TemplateError(f"{name}: nested too deep") from None


def _record_mentions(tree: nodes.Template, key: str) -> bool:
    """Whether `record` is used whole, or its member `key` is."""
    parts = 0
    for node in tree.find_all((nodes.Getattr, nodes.Getitem)):
        assert isinstance(node, nodes.Getattr | nodes.Getitem)
        if isinstance(node.node, nodes.Name) and node.node.name == "record":
            parts += 1
            name = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", key)
            if name == key:
                return True
    uses = sum(1 for name in tree.find_all(nodes.Name) if name.name == "record")
    return uses > parts


def load_chat_template(name: str | None) -> str | None:
    """The chat template: a file's text, or what a spec has of one already.

    Raises: UsageError.
    """
    if name is None or "{" in name:
        return name
    try:
        template = Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--chat-template {name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--chat-template {name}: not UTF-8") from None
    if "{" not in template:
        raise UsageError(f"--chat-template {name}: no template of Jinja2 in it")
    return template
