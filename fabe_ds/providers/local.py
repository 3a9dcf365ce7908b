"""A causal language model run by transformers in this process: the engine of hf and modelscope."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.errors import RecordFailed, RunStopped, UsageError, first_line
from fabe_ds.providers.base import Completion, Endpoint, LocalProvider, Request, Requirement

if TYPE_CHECKING:
    from fabe_ds.providers.decode import Answer
    from fabe_ds.providers.generation import Generation
    from fabe_ds.providers.vllm import VllmGeneration

log = logging.getLogger(__name__)

_SAMPLED_BYTES = 1 << 20
_SMALL_FILE = 64 << 20
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".onnx")


class TransformersProvider(LocalProvider):
    """What hf and modelscope share: all but how a model's name becomes a folder."""

    needs = (
        "torch and transformers: pip install 'fabe-ds[hf]'; a local folder, .gguf file or hub id"
    )

    def __init__(self, endpoint: Endpoint) -> None:
        """Raises: Requirement where the engine is not installed."""
        if endpoint.engine == "vllm" and not importlib.util.find_spec("vllm"):
            raise Requirement("--engine vllm: not installed; pip install 'fabe-ds[vllm]'")
        super().__init__(endpoint)

    @classmethod
    def missing(cls) -> str | None:
        lacking = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
        if lacking:
            return f"{' and '.join(lacking)} not installed; pip install 'fabe-ds[{cls.name}]'"
        return None

    @abstractmethod
    def fetch(self) -> Path:
        """The folder of a model that is given by its name in a hub.

        Raises: Requirement where it is not on this machine and may not be fetched.
        """

    @cached_property
    def path(self) -> Path:
        """The folder or .gguf file that holds the model. Raises: Requirement."""
        model = self.endpoint.model
        path = Path(model).expanduser()
        if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
            return path
        if path.exists() or model.startswith((".", "/", "~")) or model.endswith(".gguf"):
            raise Requirement(f"--model {model}: no such model folder or .gguf file")
        return self.fetch()

    def identity(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        """A digest of the model's files, so that a moved folder is the same model and a changed
        one is not. Weights count by size, beginning and end."""
        total = hashlib.sha256()
        folder = self.path if self.path.is_dir() else self.path.parent
        files = sorted(folder.rglob("*")) if self.path.is_dir() else [self.path]
        for file in files:
            if not file.is_file() or file.name.startswith(".") or file.suffix == ".md":
                continue
            size = file.stat().st_size
            total.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
            with file.open("rb") as data:
                if file.suffix in _WEIGHTS or size > _SMALL_FILE:
                    total.update(data.read(_SAMPLED_BYTES))
                    data.seek(max(0, size - _SAMPLED_BYTES))
                total.update(data.read())
        return total.hexdigest()

    def body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = (
            {"messages": request.messages} if request.chat else {"prompt": request.plain}
        )
        body |= {"max_new_tokens": sampling.max_new_tokens, "dtype": self.endpoint.dtype}
        body["do_sample"] = sampling.samples
        if sampling.samples:
            body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if self.endpoint.engine != "transformers":
            body["engine"] = self.endpoint.engine
        if self.endpoint.on_long_prompt != "fail":
            body["on_long_prompt"] = self.endpoint.on_long_prompt
        return body

    def preflight(self) -> None:
        _ = self.generation

    def prompt_tokens(self, request: Request) -> int | None:
        return len(self.prompt_ids(request))

    def shown(self, request: Request) -> str:
        settings = {
            name: value
            for name, value in self.body(request).items()
            if name not in ("messages", "prompt")
        }
        own = f"\nthe model's own: {self._own_settings}" if self._own_settings else ""
        return f"{self.tokenizer.decode(self.prompt_ids(request))}\n{settings}{own}"

    @cached_property
    def _own_settings(self) -> dict[str, Any]:
        """The generation settings that came with the model's folder."""
        from transformers import GenerationConfig

        if not (self.path / "generation_config.json").is_file():
            return {}
        settings: dict[str, Any] = GenerationConfig.from_pretrained(str(self.path)).to_diff_dict()
        settings.pop("transformers_version", None)
        return settings

    @cached_property
    def _source(self) -> dict[str, Any]:
        """Arguments that both tokenizer and model are loaded with."""
        flags = {"local_files_only": True, "trust_remote_code": self.endpoint.trust_remote_code}
        if self.path.is_file():
            return {
                "pretrained_model_name_or_path": str(self.path.parent),
                "gguf_file": self.path.name,
                **flags,
            }
        return {"pretrained_model_name_or_path": str(self.path), **flags}

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        _quieten()
        try:
            tokenizer = AutoTokenizer.from_pretrained(**self._source)
        except (OSError, ValueError, ImportError) as error:
            raise RunStopped(
                f"--model {self.endpoint.model}: no tokenizer: {first_line(error)}"
            ) from None
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:  # masked out wherever it stands, so any token serves
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    @cached_property
    def device(self) -> str:
        import torch

        wanted = self.endpoint.device
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        if wanted == "auto":
            return "cuda" if cuda else "mps" if mps else "cpu"
        if wanted.startswith("cuda") and not cuda:
            raise Requirement(f"--device {wanted}: no CUDA device here; use --device cpu or auto")
        if wanted == "mps" and not mps:
            raise Requirement("--device mps: no Apple GPU here; use --device cpu or auto")
        return wanted

    @cached_property
    def dtype(self) -> Any:
        import torch

        wanted = self.endpoint.dtype
        if wanted == "auto":
            if self.device.startswith("cuda"):
                return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
            return torch.bfloat16 if self.device == "cpu" and _cpu_has_bf16() else torch.float32
        dtype = getattr(torch, wanted, None)
        if not isinstance(dtype, torch.dtype):
            raise UsageError(f"--dtype {wanted}: use auto, float32, bfloat16 or float16")
        return dtype

    @cached_property
    def model(self) -> Any:
        """The model, loaded when first asked for.

        Raises: RunStopped where it cannot be, or is not a causal language model.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        _quieten()
        name, endpoint = self.endpoint.model, self.endpoint
        _use_allowed_threads(endpoint.sharers)
        options: dict[str, Any] = {"dtype": self.dtype}
        if endpoint.attn_implementation != "auto":
            options["attn_implementation"] = endpoint.attn_implementation
        try:
            config = AutoConfig.from_pretrained(**self._source)
            if getattr(config, "is_encoder_decoder", False):
                raise RunStopped(
                    f"--model {name}: an encoder-decoder model ({config.model_type}); "
                    "a causal language model is needed"
                )
            spread = endpoint.device == "auto" and self.device == "cuda"
            if spread or getattr(config, "quantization_config", None) is not None:
                options["device_map"] = "auto" if spread else self.device
            model = AutoModelForCausalLM.from_pretrained(**self._source, **options)
            if "device_map" not in options:
                model = model.to(self.device)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
            raise RunStopped(f"--model {name}: cannot be loaded: {first_line(error)}") from None
        log.info("%s on %s as %s", name, self.device, self.dtype)
        self._loaded_settings = model.generation_config.to_dict()
        # What generate() finds unset it takes from here, sampling included; so nothing is here.
        model.generation_config = GenerationConfig()
        if endpoint.compile:
            model.compile(dynamic=True)
        return model.eval()

    @cached_property
    def generation(self) -> Generation | VllmGeneration:
        """What answers prompts: the model in this process, or vLLM's engine.

        Raises: RunStopped, Requirement.
        """
        if self.endpoint.engine == "vllm":
            from fabe_ds.providers.vllm import VllmGeneration

            return VllmGeneration(self.path, self.endpoint)
        from fabe_ds.providers.generation import Generation, Loaded

        model = self.model
        return Generation(
            Loaded(
                model,
                self.tokenizer,
                self.device,
                self._loaded_settings,
                self.endpoint.batch_size,
                self.endpoint.max_batch_tokens,
                plain=self.endpoint.attn_implementation != "auto",
            )
        )

    @cached_property
    def _system_is_refused(self) -> bool:
        """Whether the chat template raises on a system turn, or leaves it out."""
        probe = "Which system?"
        turns = [{"role": "system", "content": probe}, {"role": "user", "content": "Hello"}]
        try:
            return probe not in self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # templates raise what they like
            return True

    def prompt_ids(self, request: Request) -> list[int]:
        """The prompt's tokens. Record text never becomes a control token.

        Raises: RecordFailed where the chat template does not take it.
        """
        if not request.chat or not self.tokenizer.chat_template:
            return self.tokenizer(request.plain)["input_ids"]  # type: ignore[no-any-return]
        turns = request.messages
        if request.system_prompt and self._system_is_refused:
            turns = [{"role": "user", "content": request.plain}]
        try:
            encoded = self.tokenizer.apply_chat_template(
                turns,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                sanitize_control_tokens=True,
            )
        except Exception as error:  # templates raise what they like
            raise RecordFailed("prompt", f"chat template: {first_line(error)}") from None
        return encoded["input_ids"]  # type: ignore[no-any-return]

    def complete(self, requests: Sequence[Request]) -> list[Completion | RecordFailed]:
        answers = {index: answer for batch in self.stream(requests) for index, answer in batch}
        return [answers[index] for index in range(len(requests))]

    def stream(
        self, requests: Sequence[Request]
    ) -> Iterator[list[tuple[int, Completion | RecordFailed]]]:
        """Answers as they are ready, each with its request's index."""
        from fabe_ds.providers.decode import Prompt, seed_of

        prompts: list[Prompt] = []
        failed: list[tuple[int, Completion | RecordFailed]] = []
        for index, request in enumerate(requests):
            try:
                ids = self._fitting(request)
            except RecordFailed as error:
                failed.append((index, error))
            else:
                seed = seed_of(request.sampling.seed, request.sample, ids)
                prompts.append(Prompt(index, ids, seed))
        if failed:
            yield failed
        if not prompts:
            return
        lengths = {prompt.number: len(prompt.ids) for prompt in prompts}
        for given in self.generation.answers(prompts, requests[0].sampling):
            yield [
                (i, a if isinstance(a, RecordFailed) else self._completion(lengths[i], a))
                for i, a in given
            ]

    @cached_property
    def _context(self) -> int | None:
        """The most tokens that a prompt and its answer may have together."""
        if self.endpoint.engine == "vllm":
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(**self._source)
        else:
            config = self.model.config
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def _fitting(self, request: Request) -> list[int]:
        ids = self.prompt_ids(request)
        if not ids:
            raise RecordFailed("prompt", "the prompt has no tokens")
        room, new = self._context, request.sampling.max_new_tokens
        if not room or len(ids) + new <= room:
            return ids
        if self.endpoint.on_long_prompt == "truncate-left" and new < room:
            return ids[new - room :]
        raise RecordFailed(
            "context",
            f"the prompt has {len(ids)} tokens, which with {new} new ones is more than the "
            f"model's {room}",
        )

    def _completion(self, prompt_tokens: int, answer: Answer) -> Completion:
        text = answer.text
        if text is None:
            text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        # The token that ended it was computed too.
        count = len(answer.tokens) + (answer.reason == "stop" and answer.text is None)
        return Completion(text, answer.reason, prompt_tokens, count)


def _quieten() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _cpu_has_bf16() -> bool:
    import torch

    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())


def _use_allowed_threads(sharers: int) -> None:
    """No more threads than this process's share of what the container is given."""
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return
    allowed: float = torch.get_num_threads()
    with contextlib.suppress(OSError, ValueError):  # there is no such limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, int(quota) / int(period))
    torch.set_num_threads(max(1, round(allowed / sharers)))
