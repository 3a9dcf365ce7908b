"""vLLM's offline engine in this process, for models that hf and modelscope name.

Prompts go in as token ids, made as for transformers; what comes out is read by two pure functions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fabe_ds.errors import RecordFailed, RunStopped, UsageError, first_line
from fabe_ds.providers.base import Endpoint
from fabe_ds.providers.transformers.attention import Answer, Prompt
from fabe_ds.providers.transformers.keys import ENGINE
from fabe_ds.providers.transformers.stops import stop_tokens
from fabe_ds.request import FREE, AnswerForm, Sampling

_VLLM_ROWS = 256  # sequences at once that vLLM plans for by itself, at least
_NGRAM = 4  # tokens of a match that a draft follows, at most


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


_OF_THE_MACHINE = (
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
    *("distributed_executor_backend", "gpu_memory_utilization", "cpu_offload_gb", "swap_space"),
    *("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "enforce_eager"),
    *("enable_prefix_caching", "enable_chunked_prefill", "speculative_config", "load_format"),
)
"""Those that say how the machine is used, and nothing of what is answered."""


def without_machine(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as a key has them."""
    engine = params.get(ENGINE)
    if not isinstance(engine, Mapping):
        return dict(params)
    kept = {name: value for name, value in engine.items() if name not in _OF_THE_MACHINE}
    others = {name: value for name, value in params.items() if name != ENGINE}
    return others | ({ENGINE: kept} if kept else {})


def engine_arguments(path: Path, endpoint: Endpoint) -> dict[str, Any]:
    """The arguments of vllm.LLM: the user's own over ours. Raises: UsageError."""
    given = endpoint.given_params.get(ENGINE) or {}
    if not isinstance(given, Mapping):
        raise UsageError(f"--param {ENGINE}: give its arguments by name, {ENGINE}.NAME=VALUE")
    arguments = {
        "model": str(path),
        "dtype": endpoint.dtype,
        "trust_remote_code": endpoint.trust_remote_code,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if (rows := endpoint.batch_size * endpoint.batches) > _VLLM_ROWS:
        arguments["max_num_seqs"] = rows
    if isinstance(endpoint.speculate, int):
        arguments["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": endpoint.speculate,
            "prompt_lookup_max": _NGRAM,
            "prompt_lookup_min": 1,
        }
    return {**arguments, **given}


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
        self._given = {name: value for name, value in (given or {}).items() if name != ENGINE}
        try:
            self._engine = LLM(**engine_arguments(path, endpoint)).llm_engine
        except (ValueError, TypeError, RuntimeError, OSError) as error:
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
