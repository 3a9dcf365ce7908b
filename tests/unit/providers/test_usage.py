"""Usage as servers write it. A unit test: a table of published shapes."""

from __future__ import annotations

import pytest

from fabe_ds.providers.usage import Usage, usage_of

SHAPES = {
    "OpenAI": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "total_tokens": 150,
            "prompt_tokens_details": {"cached_tokens": 64, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 30},
        },
        Usage(100, 50, 64, 30),
    ),
    "DeepSeek": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "prompt_cache_hit_tokens": 80,
            "prompt_cache_miss_tokens": 20,
            "completion_tokens_details": {"reasoning_tokens": 10},
        },
        Usage(100, 50, 80, 10),
    ),
    "Moonshot": (
        {"prompt_tokens": 9, "completion_tokens": 5, "cached_tokens": 4},
        Usage(9, 5, 4),
    ),
    "SGLang": (
        {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14, "reasoning_tokens": 3},
        Usage(9, 5, None, 3),
    ),
    "vLLM": (
        {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": None},
        Usage(9, 5),
    ),
    "xAI": (
        {
            "prompt_tokens": 2640,
            "completion_tokens": 182,
            "total_tokens": 3494,
            "completion_tokens_details": {"reasoning_tokens": 672},
        },
        Usage(2640, 854, None, 672),
    ),
    "a total that holds reasoning alone": (
        {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 40},
        Usage(10, 30),
    ),
    "reasoning beside what it is not in": (
        {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "completion_tokens_details": {"reasoning_tokens": 9},
        },
        Usage(10, 14, None, 9),
    ),
    "more cached than there are": (
        {"prompt_tokens": 10, "completion_tokens": 5, "cached_tokens": 99},
        Usage(10, 5, 10),
    ),
    "nonsense": (
        {"prompt_tokens": "many", "completion_tokens": -1, "total_tokens": True},
        Usage(),
    ),
    "nothing": (None, Usage()),
}


@pytest.mark.parametrize("name", SHAPES)
def test_usage_is_read_from_where_each_server_puts_it(name):
    given, expected = SHAPES[name]
    assert usage_of(given) == expected
