"""What a server sent with status 200: JSON, or a stream of it, and the completion in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fabe_ds.engine.verdict import Verdict
from fabe_ds.errors import READING_FAULTS, MalformedResponse, RecordFailed
from fabe_ds.providers.finish import End, end_of
from fabe_ds.providers.http import HttpProvider, stream_parts
from fabe_ds.request import Completion
from fabe_ds.text import encodable, load_json


def payload_of(data: bytes, provider: HttpProvider) -> Any:
    """The JSON of a body, put together where the server streamed it.

    Raises: MalformedResponse.
    """
    try:
        return load_json(data)
    except (ValueError, RecursionError):
        pass
    text = encodable(data.decode("utf-8-sig", "replace"))
    if text.lstrip()[:1] == "<":
        raise MalformedResponse("the answer is an HTML page, not JSON")
    parts = stream_parts(text)
    if parts is None:
        raise MalformedResponse("the answer is not JSON, or cut off")
    if len(parts) == 1 and not _is_chunk(parts[0]):
        return parts[0]
    return provider.joined(parts)


def unlike_protocol(error: Exception) -> str:
    """What to say of an answer that reading raised this at."""
    return f"the answer is not as the protocol has it ({type(error).__name__})"


def _is_chunk(part: Mapping[str, Any]) -> bool:
    if str(part.get("type")).startswith(("response.", "message_", "error")):  # an event
        return True
    choices: Any = part.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return part.get("done") is False or (isinstance(first, Mapping) and "delta" in first)


def completion_in(payload: Mapping[str, Any], provider: HttpProvider) -> Completion | Verdict:
    """The completion of a payload that is no error, or what is to be done as there is none."""
    try:
        completion = provider.completion(payload)
    except MalformedResponse as error:
        return Verdict("retry", "malformed", str(error))
    except RecordFailed as error:
        return Verdict("fail", error.kind, str(error))
    except READING_FAULTS as error:
        return Verdict("retry", "malformed", unlike_protocol(error))
    if end_of(completion.finish_reason) is End.FAULT:
        message = f"the server broke the answer off (finish reason {completion.finish_reason})"
        return Verdict("retry", "server", message)
    return completion
