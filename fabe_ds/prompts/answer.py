"""What is made of a model's answer before it goes into a record."""

from __future__ import annotations

import re
from collections.abc import Collection

from fabe_ds.errors import RecordFailed
from fabe_ds.prompts.fences import Several, SeveralBlocks, unwrap_fence
from fabe_ds.providers.finish import End, end_of
from fabe_ds.reasoning import strip_end_marks, strip_reasoning

_BROKEN = "\ufffd"  # what is left of a character that an answer was cut inside of
_blank_start = re.compile(r"\A(?:[ \t]*\r?\n)+")


def clean_answer(
    answer: str,
    finish_reason: str | None,
    *,
    original: str,
    strip_fences: bool,
    on_truncated: str,
    several: Several = "keep",
    good_ends: Collection[str] = (),
    in_place: bool = True,
) -> str:
    """The text that goes into the record, `in_place` of the original or elsewhere.

    `good_ends`: finish reasons that mean a whole answer beside those that are known to.

    Raises: RecordFailed with kind "truncated" (cut at the token limit or the context, unless
    on_truncated is "keep"), "refused" (a content filter), "unfinished" (a finish reason that is
    not known to mean a whole answer), "server" (broken off), "tool call", "fences" or "empty".
    """
    if finish_reason not in good_ends:
        _check_end(finish_reason, answer, original, on_truncated)
    if answer.endswith(_BROKEN) and end_of(finish_reason) in (End.CUT, End.CONTEXT):
        answer = answer.rstrip(_BROKEN)
    if answer == original:
        return original
    text = strip_end_marks(strip_reasoning(answer, original), original)
    if strip_fences:
        try:
            inside = unwrap_fence(text, original, several)
        except SeveralBlocks as error:
            raise RecordFailed("fences", f"{error} (--fences fail)") from None
        if inside is not text:
            text = strip_end_marks(inside, original)
        text = _blank_start.sub("", text).rstrip()
    if not text.strip():
        thought = "" if text.strip() == answer.strip() else " (nothing but reasoning or fences)"
        raise RecordFailed("empty", f"the model's answer is empty{thought}")
    return _ended_like(text, original) if strip_fences and in_place else text


def _check_end(reason: str | None, answer: str, original: str, on_truncated: str) -> None:
    end = end_of(reason)
    if end is End.CUT and on_truncated != "keep":
        thinking = "" if strip_reasoning(answer, original).strip() else ", still thinking"
        raise RecordFailed(
            "truncated", f"the answer was cut at the token limit (--max-new-tokens){thinking}"
        )
    if end is End.CONTEXT and on_truncated != "keep":
        raise RecordFailed("truncated", f"the answer was cut at the model's context ({reason})")
    if end is End.REFUSED:
        said = "" if reason == "content_filter" else f" ({reason})"
        raise RecordFailed("refused", f"the server's content filter stopped the answer{said}")
    if end is End.FAULT:
        raise RecordFailed("server", f"the server broke the answer off (finish reason {reason})")
    if end is End.CALL and answer.strip():
        raise RecordFailed("tool call", f"the model calls a tool (finish reason {reason})")
    if end is End.UNKNOWN:
        raise RecordFailed(
            "unfinished",
            f"the answer ended with {reason!r}, which is not known to mean a whole answer; "
            f"if it does, --good-end {reason}",
        )


def _ended_like(text: str, original: str) -> str:
    """The text with the line ends at its end that the original has there."""
    if text.strip() == original.strip() and text.lstrip("\r\n") == original.lstrip("\r\n").rstrip():
        return original
    return text + original[len(original.rstrip("\r\n")) :]
