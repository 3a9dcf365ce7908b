"""The turns of a chat that stand before one of them, as a model is sent them.

Sources: ShareGPT's layout (`from`, `value`) and OpenAI's (`role`, `content`); the role names that
the loaders of FastChat, axolotl and LLaMA-Factory take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fabe_ds.errors import RecordFailed
from fabe_ds.fields import FieldPath, found_in, inside, key_of

Turn = tuple[str, str]
"""A role and what was said."""

_ROLES = {
    "system": "system developer instruction",
    "assistant": "assistant gpt chatgpt model bing bard bot chatbot ai claude llm function_call "
    "tool_caller funccaller",
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names.split()}
_ROLE_KEYS = ("role", "from", "speaker", "author")
_CONTENT_KEYS = ("content", "value", "text")


def turns_before(record: Any, path: FieldPath, nth: int) -> list[Turn]:
    """The turns before the nth text of a field; none where it opens the chat. A role that is no
    model's is the user's.

    Raises: RecordFailed where the text stands in no list.
    """
    ways = found_in(record, path)
    way = ways[nth] if nth < len(ways) else ()
    at = next((n for n in reversed(range(len(way))) if _is_item(record, way[:n])), None)
    if at is None:
        raise RecordFailed("prompt", "the text stands in no list of turns")
    turns: Sequence[Any] = inside(record, way[:at])
    found = [_turn(turn, key_of(path)) for turn in turns[: int(way[at]) % len(turns)]]
    said = [turn for turn in found if turn is not None]
    return said if any(role != "system" for role, _ in said) else []


def _is_item(record: Any, way: Sequence[str]) -> bool:
    return isinstance(inside(record, way), list)


def _turn(turn: Any, key: str) -> Turn | None:
    if not isinstance(turn, Mapping):
        return None
    name = next((turn[k] for k in _ROLE_KEYS if isinstance(turn.get(k), str)), "user")
    content = next((turn[k] for k in (key, *_CONTENT_KEYS) if turn.get(k)), None)
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, Mapping))
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str) or not content.strip():
        return None
    return _ROLE_OF.get(name.lower(), "user"), content
