"""A causal language model run by transformers in this process: the engine of hf and modelscope."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.errors import RecordFailed, RunStopped, UsageError
from fabe_ds.providers.base import Endpoint, LocalProvider, Requirement
from fabe_ds.providers.transformers import checkpoint as checkpoints
from fabe_ds.providers.transformers.checkpoint import PASSED_OVER, Checkpoint, Digests
from fabe_ds.providers.transformers.stops import before_stop
from fabe_ds.providers.transformers.turns import (
    Marks,
    Piece,
    all_ends,
    any_of,
    special_ids,
    split_controls,
)
from fabe_ds.quiet import quiet_transformers
from fabe_ds.request import Completion, Request

if TYPE_CHECKING:
    from fabe_ds.providers.transformers.chat import Chat
    from fabe_ds.providers.transformers.decoder import Answer
    from fabe_ds.providers.transformers.generation import Generation
    from fabe_ds.providers.transformers.vllm import VllmGeneration

log = logging.getLogger(__name__)


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
    def fetch(self, model: str, one: str | None = None) -> Path:
        """The folder of a model that is given by its name in a hub. `one`: the file of it that is
        asked for.

        Raises: Requirement where it is not on this machine and may not be fetched.
        """

    @cached_property
    def path(self) -> Path:
        """The folder or .gguf file that holds the model. Raises: Requirement."""
        return self._path_of(self.endpoint.model, Path())

    def _path_of(self, model: str, beside: Path) -> Path:
        """Where a model is that is given by its path, from here or from `beside`, or its name."""
        for path in (_expanded(model), beside / _expanded(model)):
            if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
                return path
            if path.exists():
                raise Requirement(f"--model {model}: not a model folder or a .gguf file")
        if model.startswith((".", "/", "~")):
            raise Requirement(f"--model {model}: no such model folder or .gguf file")
        if model.endswith(".gguf"):
            owner, _, rest = model.partition("/")
            name, _, file = rest.partition("/")
            if not file:
                raise Requirement(f"--model {model}: no such model folder or .gguf file")
            return self.fetch(f"{owner}/{name}", file) / file
        return self.fetch(model)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What --model names: a model, or an adapter. Raises: Requirement, RunStopped."""
        found = checkpoints.at(self.path, self.endpoint.model)
        if self.endpoint.base_model and not found.is_adapter:
            raise UsageError(
                f"--base-model: {self.endpoint.model} is a model and no adapter of one"
            )
        return found

    @cached_property
    def base(self) -> Checkpoint:
        """The model itself: that which the adapter is for, where --model names one.

        Raises: Requirement, RunStopped.
        """
        adapter = self.checkpoint
        if not adapter.is_adapter:
            return adapter
        if self.endpoint.engine == "vllm":
            raise Requirement(
                f"--model {adapter.name}: an adapter, which --engine vllm does not load; merge it"
            )
        name = self.endpoint.base_model or adapter.base
        if not name:
            raise Requirement(
                f"--model {adapter.name}: an adapter that does not name its model; give it with "
                "--base-model"
            )
        try:
            return checkpoints.at(self._path_of(name, adapter.folder), name)
        except Requirement as error:
            raise Requirement(
                f"--model {adapter.name}: an adapter of {name}, which is not here "
                f"({str(error).partition(': ')[2]}); give its folder with --base-model"
            ) from None

    # Identity.

    def identity(self) -> str:
        return self._identity

    @cached_property
    def _identity(self) -> str:
        """Names the model by its contents, and by what this version makes of them otherwise than
        earlier ones did."""
        try:
            digest = self._digest
            if self._amended:
                digest = hashlib.sha256(f"{digest} {self._amended}".encode()).hexdigest()
        except OSError as error:
            raise RunStopped(
                f"--model {self.endpoint.model}: {error.filename}: {error.strerror}"
            ) from None
        self._digests.save()
        return digest

    @cached_property
    def _digests(self) -> Digests:
        return Digests.below(self.endpoint.cache_dir)

    @cached_property
    def _digest(self) -> str:
        digest = self.checkpoint.digest(self._digests)
        if self.base is not self.checkpoint:
            digest = f"{self.base.digest(self._digests)} with {digest}"
        return digest

    @cached_property
    def _amended(self) -> list[str]:
        return checkpoints.amended(self.base, self._speaking, self._digests)

    @property
    def _speaking(self) -> Checkpoint:
        """Where tokenizer and chat template are taken from: the adapter, where it has them."""
        has_tokenizer = (self.checkpoint.folder / "tokenizer_config.json").is_file()
        return self.checkpoint if has_tokenizer else self.base

    def former_key(self, request: Request) -> tuple[bytes, float] | None:
        former = self.former_identity()
        if former is None or self._amended:
            return None
        if self._control_pattern.search(request.prompt):
            return None  # with transformers before 5.20, it became a control token
        body = self.body(request)
        if "cut" in body or "control" in body:
            return None
        return self._key_of(former, body, request.sample), self._changed

    @cached_property
    def _controls(self) -> dict[str, int]:
        """The special tokens of the tokenizer, read from its files."""
        return special_ids(checkpoints.added_tokens(self._speaking, self._digests))

    def _brings_controls(self, request: Request) -> bool:
        """Whether a record names control tokens."""
        instruction = self.endpoint.instruction
        pattern, plain = self._control_pattern, request.plain
        return bool(split_controls(pattern, plain, request.text, instruction)[1])

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return any_of(self._controls)

    @cached_property
    def _changed(self) -> float:
        return self.checkpoint.changed

    def former_identity(self) -> str | None:
        """How earlier versions named this very model."""
        return self._former_identity

    @cached_property
    def _former_identity(self) -> str | None:
        if self.checkpoint.is_adapter:
            return None
        former = self.checkpoint.former_digest()
        return None if former == self._identity else former

    def body(self, request: Request) -> dict[str, Any]:
        endpoint, sampling = self.endpoint, request.sampling
        body: dict[str, Any] = (
            {"messages": request.messages} if request.chat else {"prompt": request.plain}
        )
        body |= {"max_new_tokens": sampling.max_new_tokens, "dtype": endpoint.dtype}
        body["do_sample"] = sampling.samples
        if sampling.samples:
            own = self._own_settings.get("temperature", 0.0)
            body |= {"temperature": sampling.temperature or own, "top_p": sampling.top_p}
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
            if not self._controls.keys().isdisjoint(sampling.stop):
                body["control"] = "stops"  # earlier versions passed them over
        if not request.chat and self._brings_controls(request):
            body["control"] = "text"  # which earlier versions took for control tokens
        if endpoint.engine != "transformers":
            body["engine"] = endpoint.engine
        if endpoint.on_long_prompt != "fail":
            body["on_long_prompt"] = endpoint.on_long_prompt
            if self._is_cut(request):
                body["cut"] = "value"
        if request.chat and endpoint.chat_template is not None:
            body["chat_template"] = endpoint.chat_template
        if request.chat and endpoint.thinking is not None:
            body["thinking"] = endpoint.thinking
        return body

    def _is_cut(self, request: Request) -> bool:
        """Whether a prompt is longer than the model takes. A token is a byte at least, so most
        prompts are known to fit without counting."""
        room = self._context
        if not room or len(request.plain.encode()) + 512 + request.sampling.max_new_tokens <= room:
            return False
        return self._over(self.prompt_ids(request), request) > 0

    # Loading.

    def preflight(self) -> None:
        self._check_room()
        _ = self.generation
        for found in {self.checkpoint, self.base}:
            self._digests.keep(found.weights[0], "loaded", self._identity)
        self._digests.save()

    def vouched(self) -> bool:
        return all(
            self._digests.of(found.weights[0]).get("loaded") == self._identity
            for found in {self.checkpoint, self.base}
        )

    def prompt_tokens(self, request: Request) -> int | None:
        return len(self.prompt_ids(request))

    def shown(self, request: Request) -> str:
        settings = {
            name: value
            for name, value in self.body(request).items()
            if name not in ("messages", "prompt", "chat_template")
        }
        own = self._shown_settings(request)
        shown = f"\nthe model's own: {own}" if own else ""
        shown += "".join(f"\n{line}" for line in self._passed_over)
        return f"{self.tokenizer.decode(self.prompt_ids(request))}\n{settings}{shown}"

    def _shown_settings(self, request: Request) -> dict[str, Any]:
        """Those of the model's own settings that hold for a request."""
        from fabe_ds.providers.transformers.generation import held

        sampling, own = request.sampling, held(self._own_settings, request.sampling.samples)
        if sampling.top_p is not None:
            own.pop("top_p", None)
        if sampling.temperature:
            own.pop("temperature", None)
        if stops := self._own_settings.get("stop_strings"):
            own["stop_strings"] = stops
        if ends := sorted(self._ends(self._own_settings)):
            own["eos_token_id"] = ends
        return own

    @cached_property
    def _own_settings(self) -> dict[str, Any]:
        """The generation settings that came with the model's folder."""
        return checkpoints.own_settings(self.base)

    @property
    def _passed_over(self) -> list[str]:
        """Which of them hold here not, in a line."""
        names = [name for name in PASSED_OVER if (self._own_settings.get(name) or 0) not in (0, 1)]
        return [f"the model's own {', '.join(names)} is not used"] if names else []

    @cached_property
    def _source(self) -> dict[str, Any]:
        """Arguments that the model is loaded with."""
        return self._source_of(self.base)

    def _source_of(self, found: Checkpoint) -> dict[str, Any]:
        flags = {"local_files_only": True, "trust_remote_code": self.endpoint.trust_remote_code}
        source = {"pretrained_model_name_or_path": str(found.folder), **flags}
        return source if found.gguf is None else {**source, "gguf_file": found.gguf.name}

    @cached_property
    def chat(self) -> Chat:
        """What writes the prompts. Raises: RunStopped, Requirement, UsageError."""
        from fabe_ds.providers.transformers import loading
        from fabe_ds.providers.transformers.chat import Chat

        loading.check_version()
        _ = self.config  # what is no language model is said first
        name, endpoint = self.endpoint.model, self.endpoint
        with quiet_transformers():
            tokenizer = loading.load_tokenizer(self._source_of(self._speaking), name)
        return Chat(
            tokenizer, name, endpoint.chat_template, endpoint.thinking, endpoint.instruction
        )

    @property
    def tokenizer(self) -> Any:
        return self.chat.tokenizer

    def _check(self) -> None:
        """Raises: RunStopped where the model's files are not whole."""
        for found in {self.checkpoint, self.base}:
            found.check()

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
    def config(self) -> Any:
        """The model's configuration. Raises: RunStopped."""
        from fabe_ds.providers.transformers import loading

        name = self.endpoint.model
        if not self.base.has_config():
            self._check()
        with quiet_transformers():
            config = loading.load_config(self._source, name)
        loading.refuse_other_kinds(config, name)
        self._check()
        return config

    @cached_property
    def model(self) -> Any:
        """The model, loaded when first asked for.

        Raises: RunStopped where it cannot be, or is not a causal language model.
        """
        from transformers import GenerationConfig

        from fabe_ds.providers.transformers import loading, threads

        loading.check_version()
        name, endpoint, config = self.endpoint.model, self.endpoint, self.config
        used = threads.use_granted(endpoint.sharers)
        options: dict[str, Any] = {"dtype": self.dtype}
        if endpoint.attn_implementation != "auto":
            options["attn_implementation"] = endpoint.attn_implementation
        spread = endpoint.device == "auto" and self.device == "cuda"
        if spread or getattr(config, "quantization_config", None) is not None:
            options["device_map"] = "auto" if spread else self.device
        with quiet_transformers():
            model = loading.load_model(self.base, self._source, config, options)
            if self.checkpoint.adapter is not None:
                model = loading.load_adapter(model, self.checkpoint)
        with loading.one_line(name, "cannot be used"):
            if "device_map" not in options:
                model = model.to(self.device)
            loading.check_vocabulary(self.tokenizer, model, name, self.chat.template or "")
            model.eval()
            loading.refuse_what_looks_ahead(model, self.device, name)
        on = f"{self.device}, {used} threads" if self.device == "cpu" else self.device
        log.info("%s on %s as %s", name, on, str(self.dtype).removeprefix("torch."))
        self._loaded_settings = dict(vars(model.generation_config))
        # What generate() finds unset it takes from here, sampling included; so nothing is here.
        model.generation_config = GenerationConfig()
        if endpoint.compile:
            model.compile(dynamic=True)
        loading.forget_headers()
        return model

    def _ends(self, own: dict[str, Any]) -> frozenset[int]:
        """The tokens that end an answer: those of the model's settings, of its tokenizer, and of
        its chat template. Folders of fine-tuned models name different ones in each."""
        ends = checkpoints.as_list(own.get("eos_token_id"))
        ends += checkpoints.as_list(self.tokenizer.eos_token_id)
        return all_ends(ends, self.chat.added, self.chat.template)

    @cached_property
    def generation(self) -> Generation | VllmGeneration:
        """What answers prompts: the model in this process, or vLLM's engine.

        Raises: RunStopped, Requirement.
        """
        if self.endpoint.chat:
            self.chat.check()
        if self.endpoint.engine == "vllm":
            from fabe_ds.providers.transformers.vllm import VllmGeneration

            return VllmGeneration(
                self.path, self.endpoint, self.tokenizer, self._ends(self._own_settings)
            )
        from fabe_ds.providers.transformers.generation import Generation, Loaded

        model = self.model
        own = self._loaded_settings
        return Generation(
            Loaded(
                model,
                self.tokenizer,
                self.device,
                own,
                self.endpoint.batch_size * self.endpoint.batches,
                self._ends(own),
                self.endpoint.max_batch_tokens,
                plain=self.endpoint.attn_implementation != "auto",
            )
        )

    # Answering.

    def prompt_ids(self, request: Request) -> list[int]:
        """The prompt's tokens. Raises: RecordFailed where the chat template does not take it."""
        return self.chat.ids(request)

    def complete(self, requests: Sequence[Request]) -> list[Completion | RecordFailed]:
        answers = {index: answer for batch in self.stream(requests) for index, answer in batch}
        return [answers[index] for index in range(len(requests))]

    def stream(
        self, requests: Sequence[Request]
    ) -> Iterator[list[tuple[int, Completion | RecordFailed]]]:
        """Answers as they are ready, each with its request's index."""
        from fabe_ds.providers.transformers.decoder import Prompt, seed_of

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
        ids_of = {prompt.number: prompt.ids for prompt in prompts}
        sampling = replace(requests[0].sampling, stop=self._stops(requests[0]))
        for given in self.generation.answers(prompts, sampling):
            yield [
                (
                    i,
                    a
                    if isinstance(a, RecordFailed)
                    else self._completion(requests[i], ids_of[i], a),
                )
                for i, a in given
            ]

    @cached_property
    def _context(self) -> int | None:
        """The most tokens that a prompt and its answer may have together."""
        return checkpoints.context(self.config.get_text_config())

    def _check_room(self) -> None:
        """Raises: UsageError where an answer alone may fill the model's context."""
        room, new = self._context, self.endpoint.max_new_tokens
        if room and new is not None and new >= room:
            raise UsageError(
                f"--max-new-tokens {new}: the context of {self.endpoint.model} is {room} tokens, "
                "prompt and answer together; take fewer"
            )

    def _over(self, ids: list[int], request: Request) -> int:
        """By how many tokens a prompt is too long."""
        room = self._context
        return len(ids) + request.sampling.max_new_tokens - room if room else 0

    def _fitting(self, request: Request) -> list[int]:
        ids = self.prompt_ids(request)
        if not ids:
            raise RecordFailed("prompt", "the prompt has no tokens")
        if self._over(ids, request) <= 0:
            return ids
        room, new = self._context or 0, request.sampling.max_new_tokens
        why = (
            f"the prompt has {len(ids)} tokens, which with {new} new ones (--max-new-tokens) is "
            f"more than the model's {room}"
        )
        if self.endpoint.on_long_prompt == "truncate-left":
            cut = self.chat.fitting(request, room - new)
            if cut is not None:
                return cut
            why += ", and cutting the value does not help"
        raise RecordFailed("context", why)

    def _completion(self, request: Request, prompt: list[int], answer: Answer) -> Completion:
        """The answer as text, and its reasoning apart where the model writes its marks as special
        tokens, or the prompt has opened it."""
        text, reasoning = answer.text, None
        awaited = self.chat.awaited(prompt) if request.chat and self.chat.template else None
        closer = self._specials.get(awaited) if awaited else None
        if self._marks or closer is not None:
            pieces, thought = self._marks.split(answer.tokens, closer, self._decoded, request.text)
            if thought or text is None:
                reasoning = self._decoded(thought) if thought else None
                whole = "".join(self._joined(pieces))
                before = before_stop(whole, self._stops(request))
                text = whole if before is None else before
        if text is None:
            text = self._decoded(answer.tokens)
        if awaited is not None and closer is None:
            thoughts, found, rest = text.partition(awaited)
            text, reasoning = (rest.lstrip("\r\n"), thoughts) if found else ("", text)
        # The token that ended it was computed too.
        count = len(answer.tokens) + (answer.reason == "stop" and answer.text is None)
        return Completion(text, answer.reason, len(prompt), count, reasoning)

    def _joined(self, pieces: Sequence[Piece]) -> Iterator[str]:
        """The texts of an answer's tokens, and the marks between them."""
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            if is_text:
                yield from (str(mark) for mark in group)
            else:
                yield self._decoded([piece for piece in group if isinstance(piece, int)])

    def _stops(self, request: Request) -> tuple[str, ...]:
        """The stop strings of the user and those of the model's own settings."""
        own = self._own_settings.get("stop_strings") or ()
        return (*request.sampling.stop, *((own,) if isinstance(own, str) else own))

    @cached_property
    def _marks(self) -> Marks:
        return Marks.of(self.chat.added)

    @cached_property
    def _specials(self) -> dict[str, int]:
        return special_ids(self.chat.added)

    def _decoded(self, tokens: Sequence[int]) -> str:
        """The text of tokens without special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def told(self) -> list[str]:
        notes = []
        if self.former_answers:
            notes.append(
                f"{self.former_answers} answers are of an earlier fabe-ds, which knew weights by "
                "their beginning and end (--no-resume asks again)"
            )
        loaded: Generation | VllmGeneration | None = self.__dict__.get("generation")
        if loaded is None:
            return notes
        return [*notes, *self.chat.notes, *self._passed_over, *loaded.told()]


def _expanded(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError:  # the home of a user that is not there
        return Path(model)


def _cpu_has_bf16() -> bool:
    import torch

    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())
