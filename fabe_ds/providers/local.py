"""A causal language model run by transformers in this process: the engine of hf and modelscope."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fabe_ds.errors import RecordFailed, RunStopped, UsageError
from fabe_ds.providers.base import Completion, LocalProvider, Request, Requirement

log = logging.getLogger(__name__)

_SAMPLED_BYTES = 1 << 20
_SMALL_FILE = 64 << 20
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".onnx")


class TransformersProvider(LocalProvider):
    """What hf and modelscope share: all but how a model's name becomes a folder."""

    needs = (
        "torch and transformers: pip install 'fabe-ds[hf]'; a local folder, .gguf file or hub id"
    )

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
        return body

    def preflight(self) -> None:
        _ = self.model

    def prompt_tokens(self, request: Request) -> int | None:
        return len(self.prompt_ids(request))

    def shown(self, request: Request) -> str:
        settings = {
            name: value
            for name, value in self.body(request).items()
            if name not in ("messages", "prompt")
        }
        return f"{self.tokenizer.decode(self.prompt_ids(request))}\n{settings}"

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
                f"--model {self.endpoint.model}: no tokenizer: {_line(error)}"
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
        name = self.endpoint.model
        try:
            config = AutoConfig.from_pretrained(**self._source)
            if getattr(config, "is_encoder_decoder", False):
                raise RunStopped(
                    f"--model {name}: an encoder-decoder model ({config.model_type}); "
                    "a causal language model is needed"
                )
            model = AutoModelForCausalLM.from_pretrained(**self._source, dtype=self.dtype)
            model = model.to(self.device)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
            raise RunStopped(f"--model {name}: cannot be loaded: {_line(error)}") from None
        log.info("%s on %s as %s", name, self.device, self.dtype)
        self._own_settings = model.generation_config.to_dict()
        # What generate() finds unset it takes from here, sampling included; so nothing is here.
        model.generation_config = GenerationConfig()
        return model.eval()

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
            raise RecordFailed("prompt", f"chat template: {_line(error)}") from None
        return encoded["input_ids"]  # type: ignore[no-any-return]

    def complete(self, requests: Sequence[Request]) -> list[Completion | RecordFailed]:
        answers: dict[int, Completion | RecordFailed] = {}
        rows: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            try:
                rows[index] = self._fitting(request)
            except RecordFailed as error:
                answers[index] = error
        if rows:
            sampling = requests[0].sampling
            for index, answer in zip(
                rows, self._generate_or_halve(list(rows.values()), sampling), strict=True
            ):
                answers[index] = answer
        return [answers[index] for index in range(len(requests))]

    def _fitting(self, request: Request) -> list[int]:
        ids = self.prompt_ids(request)
        room = getattr(self.model.config, "max_position_embeddings", None)
        wanted = len(ids) + request.sampling.max_new_tokens
        if room and wanted > room:
            raise RecordFailed(
                "context",
                f"the prompt has {len(ids)} tokens, which with {request.sampling.max_new_tokens} "
                f"new ones is more than the model's {room}",
            )
        return ids

    def _generate_or_halve(
        self, rows: list[list[int]], sampling: Any
    ) -> list[Completion | RecordFailed]:
        try:
            return list(self.generate(rows, sampling))
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        _free_memory(self.device)
        if len(rows) == 1:
            return [RecordFailed("memory", "out of memory with this record alone")]
        log.warning("out of memory with %d records at once; trying half", len(rows))
        middle = len(rows) // 2
        return [
            *self._generate_or_halve(rows[:middle], sampling),
            *self._generate_or_halve(rows[middle:], sampling),
        ]

    def generate(self, rows: list[list[int]], sampling: Any) -> list[Completion]:
        """One padded batch: rows[n] of token ids -> n completions, new tokens only."""
        import torch

        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        extra: dict[str, Any] = {}
        if sampling.stop:
            extra = {"stop_strings": list(sampling.stop), "tokenizer": self.tokenizer}
        if sampling.samples and sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=self._generation_config(sampling),
                **extra,
            )
        new = output[:, longest:].tolist()
        return [self._completion(len(row), fresh) for row, fresh in zip(rows, new, strict=True)]

    def _generation_config(self, sampling: Any) -> Any:
        """The model's own generation settings (its end tokens among them) under ours."""
        from transformers import GenerationConfig

        keep = ("bos_token_id", "repetition_penalty", "no_repeat_ngram_size")
        settings = {name: self._own_settings.get(name) for name in keep}
        settings["eos_token_id"] = self._ends or None
        settings |= {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.samples,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        if sampling.samples:
            settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            **{key: value for key, value in settings.items() if value is not None}
        )

    @cached_property
    def _ends(self) -> list[int]:
        """The tokens that end an answer: the model's own, else the tokenizer's."""
        ends = self._own_settings.get("eos_token_id")
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    def _completion(self, prompt_tokens: int, fresh: list[int]) -> Completion:
        ends = self._ends
        stop = next((place for place, token in enumerate(fresh) if token in ends), None)
        tokens = fresh if stop is None else fresh[:stop]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        reason = "length" if stop is None else "stop"
        return Completion(text, reason, prompt_tokens, len(tokens) + (stop is not None))


def _quieten() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _cpu_has_bf16() -> bool:
    import torch

    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())


def _out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def _free_memory(device: str) -> None:
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
