"""A causal language model run by transformers in this process: the engine of hf and modelscope."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fabe_ds.errors import RecordFailed, UsageError
from fabe_ds.providers.dialects import EFFORTS
from fabe_ds.providers.transformers import amendments
from fabe_ds.providers.transformers import checkpoint as checkpoints
from fabe_ds.providers.transformers.amendments import PASSED_OVER
from fabe_ds.providers.transformers.checkpoint import Checkpoint
from fabe_ds.providers.transformers.devices import cpu_has_bf16, device_of
from fabe_ds.providers.transformers.keys import KeyedProvider
from fabe_ds.providers.transformers.reading import AnswerReader
from fabe_ds.providers.transformers.room import PromptRoom
from fabe_ds.providers.transformers.turns import all_ends
from fabe_ds.quiet import quiet_transformers
from fabe_ds.request import AnswerForm, Completion, Request, Sampling

if TYPE_CHECKING:
    from fabe_ds.providers.transformers.attention import Answer, Prompt
    from fabe_ds.providers.transformers.chat import Chat
    from fabe_ds.providers.transformers.formed import FormedAnswers
    from fabe_ds.providers.transformers.generation import Generation
    from fabe_ds.providers.transformers.vllm import VllmGeneration

log = logging.getLogger(__name__)

VLLM_WINDOW = 8192
"""Records that vLLM is given at once: the more, the less often its places stand empty."""
CHAT_TEMPLATE_KWARGS = "chat_template_kwargs"
"""The parameter that holds variables of the chat template, as vLLM's server calls it."""


class TransformersProvider(KeyedProvider):
    """What hf and modelscope share: all but how a model's name becomes a folder."""

    takes_forms = True

    def _is_cut(self, request: Request) -> bool:
        """Whether a prompt is longer than the model takes."""
        return self._room.is_over(self.chat, request)

    @property
    def resizes(self) -> bool:
        return self.endpoint.engine == "transformers"  # vLLM plans its batches itself

    @property
    def rows(self) -> int:
        loaded: Any = self.__dict__.get("generation")
        return loaded.room.rows if loaded is not None and self.resizes else super().rows

    @property
    def window(self) -> int:
        return super().window if self.resizes else VLLM_WINDOW

    def resize(self, rows: int) -> None:
        generation: Any = self.generation
        generation.room = replace(generation.room, rows=rows)

    # Loading.

    def preflight(self) -> None:
        self._room.check()
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
        from fabe_ds.providers.transformers.loaded_model import held

        settings = {**self._own_settings, **self._given_settings}
        sampling, own = request.sampling, held(settings, request.sampling.is_sampling)
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
    def _given_settings(self) -> dict[str, Any]:
        """The generation settings that the user names, which go over the model's own.

        Raises: UsageError where there is no such setting.
        """
        from fabe_ds.providers.transformers.loaded_model import KNOWN_SETTINGS

        given = dict(self.endpoint.given_params)
        given.pop(CHAT_TEMPLATE_KWARGS, None)
        for name in given if self.endpoint.engine == "transformers" else ():
            if name not in KNOWN_SETTINGS:
                raise UsageError(
                    f"--param {name}: no setting of a local model's; it has "
                    f"{', '.join(KNOWN_SETTINGS)} and {CHAT_TEMPLATE_KWARGS}.NAME"
                )
        return given

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
        more = endpoint.given_params.get(CHAT_TEMPLATE_KWARGS) or {}
        words, level = endpoint.instruction, endpoint.thinking
        thinks: bool | str | None = level if level in EFFORTS else endpoint.thinks
        return Chat(tokenizer, name, endpoint.chat_template, thinks, words, more)

    @property
    def tokenizer(self) -> Any:
        return self.chat.tokenizer

    def _check(self) -> None:
        """Raises: RunStopped where the model's files are not whole."""
        for found in {self.checkpoint, self.base}:
            found.check()

    @cached_property
    def device(self) -> str:
        return device_of(self.endpoint.device)

    @cached_property
    def dtype(self) -> Any:
        import torch

        wanted = self.endpoint.dtype
        if wanted == "auto":
            if self.device.startswith("cuda"):
                return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
            return torch.bfloat16 if self.device == "cpu" and cpu_has_bf16() else torch.float32
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
        ends = amendments.as_list(own.get("eos_token_id"))
        ends += amendments.as_list(self.tokenizer.eos_token_id)
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

            ends = self._ends(self._own_settings)
            given = self._given_settings
            return VllmGeneration(self.path, self.endpoint, self.tokenizer, ends, given)
        from fabe_ds.providers.transformers.generation import Generation
        from fabe_ds.providers.transformers.loaded_model import LoadedModel

        model = self.model
        own = {**self._loaded_settings, **self._given_settings}
        return Generation(
            LoadedModel(
                model,
                self.tokenizer,
                self.device,
                own,
                super().rows,
                self._ends(own),
                self.endpoint.max_batch_tokens,
                plain=self.endpoint.attn_implementation != "auto",
                speculate=self.endpoint.speculate,
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
        from fabe_ds.providers.transformers.attention import Prompt
        from fabe_ds.providers.transformers.decoder import seed_of
        from fabe_ds.providers.transformers.generation import Generation

        prompts: list[Prompt] = []
        choosing: list[Prompt] = []
        form = requests[0].form
        scores = self.endpoint.engine == "transformers"  # vLLM has its own way with forms
        grammar = self._formed.grammar(form) if scores and form.schema is not None else None
        failed: list[tuple[int, Completion | RecordFailed]] = []
        for index, request in enumerate(requests):
            try:
                ids = self._fitting(request)
            except RecordFailed as error:
                failed.append((index, error))
            else:
                seed = seed_of(request.sampling.seed, request.sample, ids)
                reasons = self._reasons(request, ids)
                if form.choices and not reasons and scores:
                    choosing.append(Prompt(index, ids, seed))
                else:
                    prompts.append(Prompt(index, ids, seed, None if reasons else grammar))
        if failed:
            yield failed
        if choosing:
            assert isinstance(self.generation, Generation)
            yield from self._formed.chosen(self.generation, choosing, requests[0])
        if not prompts:
            return
        ids_of = {prompt.number: prompt.ids for prompt in prompts}
        sampling = replace(requests[0].sampling, stop=self._reader.stops(requests[0]))
        for given in self._generated(prompts, sampling, form):
            yield [
                (
                    i,
                    a
                    if isinstance(a, RecordFailed)
                    else self._reader.completion(requests[i], ids_of[i], a),
                )
                for i, a in given
            ]

    def _generated(
        self, prompts: list[Prompt], sampling: Sampling, form: AnswerForm
    ) -> Iterator[list[tuple[int, Answer | RecordFailed]]]:
        if self.endpoint.engine == "vllm":
            return self.generation.answers(prompts, sampling, form)  # type: ignore[call-arg]
        return self.generation.answers(prompts, sampling)

    def _reasons(self, request: Request, ids: list[int]) -> bool:
        """Whether the model begins with reasoning, which no form of an answer may keep from it."""
        if self.endpoint.thinks:
            return True
        return bool(request.chat and self.chat.template) and self.chat.awaited(ids) is not None

    @cached_property
    def _formed(self) -> FormedAnswers:
        from fabe_ds.providers.transformers.formed import FormedAnswers

        return FormedAnswers(self.chat, self.model, self._ends(self._own_settings))

    @cached_property
    def _room(self) -> PromptRoom:
        return PromptRoom(self.endpoint, checkpoints.context(self.config.get_text_config()))

    def _fitting(self, request: Request) -> list[int]:
        return self._room.fitting(self.chat, request)

    @cached_property
    def _reader(self) -> AnswerReader:
        own = self._own_settings.get("stop_strings") or ()
        return AnswerReader(self.chat, (own,) if isinstance(own, str) else tuple(own))

    def notes(self) -> list[str]:
        notes = []
        if self.former_answers:
            notes.append(
                f"{self.former_answers} answers are of an earlier fabe-ds, which knew weights by "
                "their beginning and end (--no-resume asks again)"
            )
        loaded: Generation | VllmGeneration | None = self.__dict__.get("generation")
        if loaded is None:
            return notes
        return [*notes, *self.chat.notes, *self._passed_over, *loaded.notes()]
