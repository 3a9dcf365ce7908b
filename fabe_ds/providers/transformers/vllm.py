"""vLLM's offline engine in this process, for models that hf and modelscope name.

Prompts go in as token ids, made as for transformers; what comes out is read by two pure functions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fabe_ds.errors import RecordFailed, RunStopped, first_line
from fabe_ds.providers.base import Endpoint
from fabe_ds.providers.transformers.attention import Answer, Prompt
from fabe_ds.providers.transformers.stops import stop_tokens
from fabe_ds.request import FREE, AnswerForm, Sampling


def sampling_arguments(sampling: Sampling, seed: int, ends: Collection[int] = ()) -> dict[str, Any]:
    """The arguments of vllm.SamplingParams for one prompt. `ends`: tokens that end an answer."""
    arguments: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": 0.0}
    if sampling.is_sampling:
        arguments["temperature"] = sampling.temperature or 1.0
        arguments["seed"] = seed
        if sampling.top_p is not None:
            arguments["top_p"] = sampling.top_p
    if ends:
        arguments["stop_token_ids"] = sorted(ends)
    if sampling.stop:
        arguments["stop"] = list(sampling.stop)
    return arguments


def form_arguments(form: AnswerForm) -> dict[str, Any]:
    """What vllm.SamplingParams is told of the form of an answer."""
    if form is FREE or (form.schema is None and not form.choices):
        return {}
    wanted = {"choice": list(form.choices)} if form.choices else {"json": dict(form.schema or {})}
    from vllm import sampling_params

    if hasattr(sampling_params, "StructuredOutputsParams"):
        return {"structured_outputs": sampling_params.StructuredOutputsParams(**wanted)}
    return {"guided_decoding": sampling_params.GuidedDecodingParams(**wanted)}


def read_output(output: Any) -> tuple[int, Answer | RecordFailed]:
    """A finished vllm.RequestOutput; its request_id is the prompt's index."""
    index, best = int(output.request_id), output.outputs[0]
    reason = best.finish_reason
    if reason not in ("stop", "length"):
        return index, RecordFailed("engine", f"vLLM ended it: {reason or 'for no stated reason'}")
    tokens = list(best.token_ids)
    # A stop string is left out of the text; an ending token is among the tokens only.
    by_string = reason == "stop" and isinstance(best.stop_reason, str)
    if reason == "stop" and not by_string:
        tokens = tokens[:-1]
    return index, Answer(index, tokens, reason, best.text if by_string else None)


def engine_arguments(path: Path, endpoint: Endpoint) -> Mapping[str, Any]:
    """The arguments of vllm.LLM."""
    return {
        "model": str(path),
        "dtype": endpoint.dtype,
        "trust_remote_code": endpoint.trust_remote_code,
        "enable_prefix_caching": True,
        "max_num_seqs": max(endpoint.batch_size, 64),
        "disable_log_stats": True,
    }


class VllmGeneration:
    """Answers prompts; vLLM plans its batches itself."""

    def __init__(
        self,
        path: Path,
        endpoint: Endpoint,
        tokenizer: Any,
        ends: Collection[int],
        given: Mapping[str, Any] | None = None,
    ) -> None:
        """`given`: more arguments of vllm.SamplingParams."""
        from vllm import LLM, SamplingParams

        self._params, self._tokenizer, self._ends = SamplingParams, tokenizer, ends
        self._given = dict(given or {})
        try:
            self._engine = LLM(**engine_arguments(path, endpoint)).llm_engine
        except (ValueError, RuntimeError, OSError) as error:
            raise RunStopped(
                f"--model {endpoint.model}: vLLM cannot load it: {first_line(error)}"
            ) from None

    def notes(self) -> list[str]:
        return []

    def answers(
        self, prompts: Sequence[Prompt], sampling: Sampling, form: AnswerForm = FREE
    ) -> Iterator[list[tuple[int, Answer | RecordFailed]]]:
        ends = {*self._ends, *stop_tokens(self._tokenizer, sampling.stop)}
        for prompt in prompts:
            self._engine.add_request(
                str(prompt.number),
                {"prompt_token_ids": prompt.ids},
                self._params(
                    **{
                        **sampling_arguments(sampling, prompt.seed, ends),
                        **form_arguments(form),
                        **self._given,
                    }
                ),
            )
        while self._engine.has_unfinished_requests():
            ended = [read_output(output) for output in self._engine.step() if output.finished]
            if ended:
                yield ended
