"""How sure a model is of its answer, by the probabilities of its tokens.

Source: OpenAI API reference, `logprobs` of a chat completion: the natural logarithm of each token's
probability; the probability of a text is the product of those of its tokens.
"""

from __future__ import annotations

import json
import math
from itertools import accumulate

from fabe_ds.request import Completion

LEAST = 1e-4
"""The least probability that is told. A model that is held to the choices by a grammar may have
wanted to say something else altogether: llama.cpp tells the probabilities from before its grammar,
which say nothing of how sure the model is among the choices."""


def confidence(completion: Completion, value: str) -> float | None:
    """The probability, from 0 to 1, that the model gave to `value`: a choice, or a text that stands
    in its answer. None where the server told no probabilities, or none that a choice can have."""
    if completion.logprobs is None:
        return None
    logprobs = json.loads(completion.logprobs)
    if isinstance(logprobs, dict):  # of all choices
        found = logprobs.get(value)
        return None if found is None else math.exp(found)
    texts = [token for token, _ in logprobs]
    start = "".join(texts).lower().rfind(value.lower())
    if start < 0:
        return None
    end, total = start + len(value), 0.0
    ends = accumulate(map(len, texts))
    for (token, logprob), token_end in zip(logprobs, ends, strict=True):
        if token_end > start and token_end - len(token) < end:
            total += logprob
    probability = min(1.0, math.exp(total))
    return probability if probability >= LEAST else None
