"""Flags of the commands that run: made of the settings that `RunConfig` declares."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from fabe_ds.config.section import PANELS
from fabe_ds.config.settings import RunConfig, TransformConfig, flag, setting
from fabe_ds.errors import UsageError

_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


class ValuedFlags(TyperCommand):
    """Takes `--resume false` and `--resume=false` beside `--resume` and `--no-resume`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = {
            name
            for parameter in self.params
            if getattr(parameter, "is_flag", False) and parameter.secondary_opts
            for name in parameter.opts
        }
        given = Counter(arg.partition("=")[0] for arg in args if arg.startswith("--"))
        if given["--input"] > 1:
            raise UsageError("--input is given twice; for several files, a folder and --glob")
        for parameter in self.params:
            several = getattr(parameter, "multiple", False) or getattr(parameter, "is_flag", False)
            for name in () if several else parameter.opts:
                if given[name] > 1:
                    print(
                        f"fabe-ds: {name} is given {given[name]} times; the last one holds",
                        file=sys.stderr,
                    )
        return super().parse_args(ctx, list(_without_values(_worded(args), names)))


def _worded(args: list[str]) -> list[str]:
    """The arguments with a word behind --stream, which was a switch before it took one."""
    worded: list[str] = []
    for arg, following in zip_longest(args, args[1:], fillvalue=""):
        if arg == "--stream" and following.lower() not in _TRUE | _FALSE | {"auto"}:
            worded.append("--stream=on")
        else:
            worded.append("--stream=off" if arg == "--no-stream" else arg)
    return worded


def _without_values(args: list[str], names: set[str]) -> Iterator[str]:
    waiting = iter(range(len(args)))
    for index in waiting:
        name, equals, value = args[index].partition("=")
        if name not in names:
            yield args[index]
            continue
        if not equals and index + 1 < len(args):
            value = args[index + 1]
        if value.lower() in _TRUE | _FALSE:
            if not equals:
                next(waiting)
            yield name if value.lower() in _TRUE else f"--no-{name[2:]}"
        else:
            yield args[index]


def run_signature() -> inspect.Signature:
    """The run command's parameters, made of the settings that `RunConfig` declares."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    file = Annotated[
        Path | None,
        typer.Option("--config", help="YAML file of settings.", rich_help_panel="Input and output"),
    ]
    parameters = [inspect.Parameter("config", keyword, default=None, annotation=file)]
    for name in sorted(RunConfig.model_fields, key=_place):
        declared = RunConfig.model_fields[name]
        words = setting(name, "words")
        kind = str if words else _flag_type(declared.annotation)
        spelled = flag(name)
        names = [f"{spelled}/--no-{spelled[2:]}"] if kind is bool else [spelled]
        option = typer.Option(
            *names,
            help=_help(name, declared),
            rich_help_panel=setting(name, "panel"),
            show_default=False,
            metavar="|".join(["NUMBER", *words]) if words else _choices(declared.annotation),
            autocompletion=_completion(name, declared.annotation),
        )
        listed = list[str] if kind is list else kind
        annotation = Annotated[listed | None, option]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, keyword, default=None, annotation=annotation))
    return inspect.Signature(parameters)


def _flag_type(annotation: Any) -> type:
    """How a flag's text is read; pydantic does the rest."""
    options = get_args(annotation) if get_origin(annotation) is not None else (annotation,)
    if get_origin(annotation) in (list, dict):
        return list
    if any(get_origin(option) is Literal for option in options):
        return str
    for kind in (bool, int, float):
        if kind in options:
            return kind
    return str


def _place(name: str) -> tuple[int, bool, int]:
    """Where a flag stands in --help: its panel, and in the first what is read and written."""
    panel = setting(name, "panel")
    of_transform = panel == PANELS[0] and name in TransformConfig.model_fields
    return PANELS.index(panel), of_transform, setting(name, "order")


def _help(name: str, declared: FieldInfo) -> str:
    text = declared.description or ""
    default = declared.get_default(call_default_factory=True)
    if default not in (None, [], {}):
        shown = str(default).lower() if isinstance(default, bool) else default
        text += f"  [default: {shown}]"
    if variable := setting(name, "environment"):
        text += f"  [env: {variable}]"
    return text.replace("[", "\\[")  # else a style of rich's


def _choices(annotation: Any) -> str | None:
    """What --help shows for the values of a flag that takes but a few words."""
    options = _options(annotation)
    words = [value for option in options for value in _words(option)]
    if not words:
        return None
    numbers = any(not _words(option) and option is not type(None) for option in options)
    return "|".join(["NUMBER", *words] if numbers else words)


def _options(annotation: Any) -> tuple[Any, ...]:
    return (annotation,) if get_origin(annotation) is Literal else get_args(annotation)


def _words(option: Any) -> tuple[str, ...]:
    return get_args(option) if get_origin(option) is Literal else ()


def _completion(name: str, annotation: Any) -> Callable[[str], list[str]] | None:
    """What the shell offers for a flag's value; None leaves it the names of files."""
    words = [value for option in _options(annotation) for value in _words(option)]
    if not words and name != "provider":
        return None

    def complete(incomplete: str) -> list[str]:
        if name == "provider":
            from fabe_ds.providers import provider_names

            known: Iterable[str] = provider_names()
        else:
            known = words
        return [value for value in known if value.startswith(incomplete)]

    return complete
