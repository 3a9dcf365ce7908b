"""How a setting is declared."""

from __future__ import annotations

from itertools import count
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field

Panel = Literal["Input and output", "Prompt", "Model", "Execution", "Ray", "Hub"]


PANELS: tuple[str, ...] = get_args(Panel)
"""The groups of flags, in the order of --help."""


_order = count()  # of declaration, which is that of --help
IO: Panel = "Input and output"


def setting_field(
    panel: Panel,
    text: str,
    default: Any = None,
    *,
    flag: str | None = None,
    affects_output: bool | Literal["when set"] = False,
    environment: str | None = None,
    words: tuple[str, ...] = (),
    **limits: Any,
) -> Any:
    """A setting. `affects_output`: it can change what comes out, so it is part of the fingerprint;
    "when set", only where it is not the default: fingerprints from before there was it hold.
    `words`: what a flag of a number takes beside numbers."""
    extra: Any = {
        "panel": panel,
        "flag": flag,
        "affects_output": affects_output,
        "environment": environment,
        "words": words,
        "order": next(_order),
    }
    return Field(default, description=text, json_schema_extra=extra, **limits)


def in_capitals(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """Settings that belong together. A configuration is all of its sections, and is handed on as
    the one that is meant."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), frozen=True)

    def part(self, kind: type[S]) -> S:
        """The settings of one section alone."""
        # They have been validated with all others.
        return kind.model_construct(**{name: getattr(self, name) for name in kind.model_fields})
