"""How a model's answer may end: the words that servers use for it, each with what it means.

Sources: the API references of OpenAI, Anthropic, Google (Gemini), Mistral, Cohere, DeepSeek,
Zhipu, IBM watsonx, AWS Bedrock, Ollama and LM Studio; vLLM's, SGLang's and TGI's documentation.
"""

from __future__ import annotations

import enum


class End(enum.Enum):
    WHOLE = "whole"
    CUT = "cut at the token limit"
    CONTEXT = "cut at the model's context"
    REFUSED = "stopped by a content filter"
    FAULT = "broken off by the server"
    CALL = "a call of a tool"
    UNKNOWN = "unknown"


_WORDS = {
    End.WHOLE: """
        stop end_turn stop_sequence eos eos_token complete completed eos_found eosfound
        stop_string_found stopstringfound end stop_token finished null finish_reason_stop
        """,
    End.CUT: """
        length max_tokens max_output_tokens maxpredictedtokensreached max_completion_tokens
        max_new_tokens token_limit limit truncated repetition repetition_truncation
        finish_reason_max_tokens
        """,
    End.CONTEXT: """
        model_length model_context_window_exceeded contextlengthreached error_limit
        context_length_exceeded max_context_length
        """,
    End.REFUSED: """
        content_filter contentfilter content_filtered sensitive input_sensitive output_sensitive
        safety recitation blocklist prohibited_content spii language image_safety error_toxic
        refusal guardrail_intervened model_armor jailbreak moderation content_policy
        """,
    End.FAULT: """
        error network_error insufficient_system_resource timeout time_limit cancelled canceled
        user_cancel userstopped abort aborted failed modelunloaded unload load
        malformed_model_output engine_error interrupted
        """,
    End.CALL: """
        tool_calls tool_call function_call tool_use toolcalls malformed_function_call
        unexpected_tool_call too_many_tool_calls malformed_tool_use
        """,
}
_ENDS = {word: end for end, words in _WORDS.items() for word in words.split()}


def end_of(reason: str | None) -> End:
    """What a finish reason means. None, which many servers send, counts as whole."""
    if reason is None:
        return End.WHOLE
    word = reason.strip().lower().replace("-", "_").replace(" ", "_")
    word = word.removeprefix("finishreason.").removeprefix("finish_reason_")
    if word.startswith(("content_filter", "safety")):  # with its category behind it
        return End.REFUSED
    return _ENDS.get(word, End.UNKNOWN)


def ended_by_itself(reason: str | None) -> bool:
    """Whether the model ended the answer, so that a higher token limit would not change it."""
    return reason is not None and end_of(reason) is End.WHOLE
