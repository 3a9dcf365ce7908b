"""Loads a checkpoint with transformers, and judges what comes of it.

transformers fills tensors that a checkpoint lacks at random and says so in a log: here that is an
error, and so is a tensor that found no place in the model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fabe_ds.errors import FabeError, RunStopped, first_line
from fabe_ds.providers.base import Requirement
from fabe_ds.providers.transformers.checkpoint import Checkpoint, few

LEAST_TRANSFORMERS = (5, 20)
"""The first version that keeps control tokens out of what a chat template is given."""
_OTHER_KINDS = {  # what a class that is no language model ends in, and what that is
    "ForSequenceClassification": "a classifier",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMaskedLM": "a model that fills gaps",
    "ForMaskedImageModeling": "a vision model",
    "ForImageClassification": "a vision model",
    "ForObjectDetection": "a vision model",
    "ForSpeechSeq2Seq": "a speech model",
    "ForCTC": "a speech model",
    "ForAudioClassification": "a speech model",
    "RewardModel": "a reward model",
    "ForRewardModel": "a reward model",
}
_OTHER_SENSES = re.compile(  # tensors that no text goes through
    r"(^|\.)(vision|visual|vit|image|audio|speech|video|mm_|multi_modal|connector|aligner|sam_)"
    r"|vision_|audio_|projector",
    re.IGNORECASE,
)
_UNUSED = re.compile(  # tensors that a model needs no place for: buffers, heads of training, drafts
    r"rotary_emb|rotary_pos_emb|inv_freq|masked_bias|attn\.bias$|attention\.bias$|position_ids$"
    r"|(^|\.)[kv]_scale$|(^|\.)(v_head|mtp|nextn|eagle)|decoder\.version$"
    r"|embed_positions\.weights$",
    re.IGNORECASE,
)
_MERGED = ("LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "VERA")
"""Kinds of adapters that can be merged into their model."""
_ADAPTERS = re.compile("lora_|hada_|lokr_|oft_|boft_|ia3_|vera_|modules_to_save|trainable_tokens")
"""What names of an adapter's tensors hold."""
_TWICE = re.compile(r"\.(modules_to_save|original_module)\.")
"""Modules that were trained whole are written under several names."""
_EMBEDDING = re.compile(
    r"\.(embed_tokens|wte|word_embeddings|embed_in)(\.modules_to_save)?\.weight$"
)
_VISION = "serve it (vLLM, llama.cpp, Ollama) and use --provider openai or ollama"


def check_version() -> None:
    """Raises: Requirement where transformers is too old to be trusted with records' text."""
    import transformers

    found = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if found < LEAST_TRANSFORMERS:
        least = ".".join(map(str, LEAST_TRANSFORMERS))
        raise Requirement(
            f"transformers {transformers.__version__}: {least} or later is needed, which keeps a "
            f"record's text from becoming control tokens; pip install 'transformers>={least}'"
        )


@contextlib.contextmanager
def one_line(name: str, what: str) -> Iterator[None]:
    """Makes one line of what goes wrong while a model is read: libraries raise what they like.

    Raises: RunStopped.
    """
    try:
        yield
    except FabeError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise RunStopped(
                f"--model {name}: it comes with code of its own; --trust-remote-code runs that, "
                "with all that it may do on this machine"
            ) from None
        kind = type(error).__name__
        said = first_line(error)
        if kind not in ("OSError", "ValueError", "ImportError", "RuntimeError"):
            said = f"{kind}: {said}"
        raise RunStopped(f"--model {name}: {what}: {said}") from None


def load_config(source: Mapping[str, Any], name: str) -> Any:
    """The model's configuration. Raises: RunStopped."""
    from transformers import AutoConfig

    with one_line(name, "cannot be loaded"), _parsed_once(), _heard():
        return AutoConfig.from_pretrained(**source)


def refuse_other_kinds(config: Any, name: str) -> None:
    """Raises: RunStopped where the model does not go on from a text, saying what it is."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise RunStopped(
            f"--model {name}: an encoder-decoder model ({kind}); a causal language model is needed"
        )
    architectures = getattr(config, "architectures", None) or []
    for architecture in architectures:
        for ending, what in _OTHER_KINDS.items():
            if architecture.endswith(ending):
                raise RunStopped(
                    f"--model {name}: {what} ({architecture}); a causal language model is needed"
                )


def model_class(config: Any, name: str) -> Any:
    """The auto class that loads the model for text. Raises: RunStopped where none does."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(config)
    named = set(getattr(config, "architectures", None) or [])
    maps = (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    )
    for mapping, loader in maps:  # the one that the checkpoint was saved by, of two
        if kind in mapping and mapping[kind].__name__ in named:
            return loader
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    for mapping, loader in maps:
        if kind in mapping:
            return loader
    architectures = ", ".join(sorted(named)) or "no architectures"
    raise RunStopped(
        f"--model {name}: {config.model_type} ({architectures}) is no causal language model that "
        f"transformers loads; if it answers texts, {_VISION}"
    )


def load_model(
    checkpoint: Checkpoint, source: Mapping[str, Any], config: Any, options: Mapping[str, Any]
) -> Any:
    """The model with all the tensors of its checkpoint, and no others.

    Raises: RunStopped where a tensor is missing, has another shape, or has no place in the model.
    """
    name = checkpoint.name
    loader = model_class(config, name)
    beside = checkpoint.adapter is not None and not checkpoint.is_adapter
    with contextlib.ExitStack() as stack:
        if beside:
            folder = stack.enter_context(checkpoint.without_adapter())
            source = {**source, "pretrained_model_name_or_path": str(folder)}
        stack.enter_context(one_line(name, "cannot be loaded"))
        stack.enter_context(_parsed_once())
        records = stack.enter_context(_heard())
        if checkpoint.gguf is None:  # what it was told already it need not parse again
            source = {**source, "config": config}
        try:
            model, info = loader.from_pretrained(**source, **options, output_loading_info=True)
        except RuntimeError as error:
            if "above report" in str(error):
                raise RunStopped(f"--model {name}: {_reported(records)}") from None
            raise
        _judge(info, checkpoint)
    return model


def _judge(info: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises: RunStopped where tensors are missing, of another shape, or left over."""
    missing = sorted(key for key in info["missing_keys"] if not _OTHER_SENSES.search(key))
    left_over = sorted(
        key
        for key in info["unexpected_keys"]
        if not _UNUSED.search(key) and not _OTHER_SENSES.search(key)
    )
    if missing:
        wrapped = any(key.startswith("base_model.model.") for key in left_over)
        hint = (
            "; its names begin with base_model.model., as an adapter leaves them: merge it again"
            if wrapped
            else "; transformers would fill them at random"
        )
        raise RunStopped(
            f"--model {checkpoint.name}: the checkpoint lacks {len(missing)} of the model's "
            f"tensors ({few(missing)}){hint}"
        )
    if info["mismatched_keys"]:
        key, theirs, ours = sorted(info["mismatched_keys"])[0]
        raise RunStopped(
            f"--model {checkpoint.name}: {key} is {_shape(theirs)} in the checkpoint and "
            f"{_shape(ours)} by config.json"
        )
    if left_over:
        raise RunStopped(
            f"--model {checkpoint.name}: {len(left_over)} tensors of the checkpoint have no place "
            f"in the model that config.json describes ({few(left_over)}); is it the right one?"
        )


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """What transformers warns of while the block runs, instead of printing it."""
    import transformers

    heard: list[str] = []

    class Ears(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    root = logging.getLogger("transformers")
    ears, before, level = Ears(logging.WARNING), list(root.handlers), root.level
    transformers.logging.set_verbosity_warning()
    root.handlers = [ears]
    try:
        yield heard
    finally:
        root.handlers = before
        root.setLevel(level)


def _reported(heard: list[str]) -> str:
    """The first line of transformers' report that names a tensor."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(heard))
    rows = [
        " ".join(part.strip() for part in line.split("|") if part.strip())
        for line in plain.splitlines()
        if re.search(r"\b(MISMATCH|CONVERSION|MISSING)\b", line) and "|" in line
    ]
    return few(rows) if rows else "tensors of other shapes than config.json says"


def load_adapter(model: Any, adapter: Checkpoint) -> Any:
    """The model with an adapter of peft's merged into it.

    Raises: RunStopped where the adapter does not fit the model; Requirement without peft.
    """
    try:
        import peft
    except ImportError:
        raise Requirement(
            f"--model {adapter.name}: it has an adapter (adapter_config.json), which needs peft: "
            "pip install 'fabe-ds[hf]'"
        ) from None
    name = adapter.name
    with one_line(name, "the adapter cannot be loaded"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PeftConfig.from_pretrained(str(adapter.folder))
        if config.peft_type not in _MERGED:
            raise RunStopped(
                f"--model {name}: an adapter of the kind {config.peft_type}, which cannot be "
                "merged into its model; LoRA and its like can"
            )
        config.inference_mode = True
        weights = peft.utils.load_peft_weights(str(adapter.folder), device="cpu")
        _resize(model, weights)
        wrapped = peft.get_peft_model(model, config)
        result: Any = peft.set_peft_model_state_dict(wrapped, weights)
        ours = {key for key, _ in wrapped.named_parameters() if _ADAPTERS.search(key)}
        lacking = sorted(ours & set(result.missing_keys))
        left_over = sorted(key for key in result.unexpected_keys if not _TWICE.search(key))
        if lacking or left_over:
            what = (
                f"it lacks {len(lacking)} tensors ({few(lacking)})"
                if lacking
                else f"the model has no place for {few(left_over)}"
            )
            raise RunStopped(f"--model {name}: the adapter does not fit {adapter.base}: {what}")
        return wrapped.merge_and_unload(safe_merge=True)


def _resize(model: Any, weights: Mapping[str, Any]) -> None:
    """Gives the model as many embeddings as the adapter was trained with, where it brings them."""
    for key, value in weights.items():
        if _EMBEDDING.search(key):
            if len(value) != model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(value), mean_resizing=False)
            return


def refuse_what_looks_ahead(model: Any, device: Any, name: str) -> None:
    """Raises: RunStopped where what a token is scored depends on the tokens behind it."""
    from fabe_ds.providers.transformers.agreement import is_causal

    if not is_causal(model, device):
        raise RunStopped(
            f"--model {name}: {type(model).__name__} looks at the whole text at once and does not "
            "go on from it; a causal language model is needed"
        )


def load_tokenizer(source: Mapping[str, Any], name: str) -> Any:
    """The tokenizer, which pads on the left. Raises: RunStopped."""
    from transformers import AutoTokenizer

    with one_line(name, "no tokenizer"), _parsed_once(), _heard():
        tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.padding_side = "left"
    return tokenizer


def check_vocabulary(tokenizer: Any, model: Any, name: str, template: str) -> None:
    """Sees to it that the tokenizer writes no token that the model has no embedding for, and that
    there is a token to pad with. Special tokens that the chat template does not write are never
    written.

    Raises: RunStopped.
    """
    most = model.get_input_embeddings().num_embeddings
    pad = tokenizer.pad_token_id
    if pad is None or pad >= most:  # masked out wherever it stands, so any token serves
        end = tokenizer.eos_token_id
        serves = end if isinstance(end, int) and end < most else 0
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(serves)
    added = tokenizer.added_tokens_decoder
    beyond = {
        text: number
        for text, number in tokenizer.get_vocab().items()
        if number >= most
        and not (number in added and added[number].special and text not in template)
    }
    if beyond:
        worst = max(beyond, key=lambda text: beyond[text])
        raise RunStopped(
            f"--model {name}: the tokenizer has {len(beyond)} tokens beyond the model's {most} "
            f"embeddings ({worst!r} is {beyond[worst]}); tokenizer and weights do not belong "
            "together"
        )


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Lets transformers parse a .gguf file once, whatever it reads of it while such blocks run.

    Its config, its tokenizer and its weights are each read by a parse of their own, in Python,
    element by element: seconds each where a vocabulary is large.
    """
    try:
        gguf: Any = importlib.import_module("gguf")
        from transformers import modeling_gguf_pytorch_utils as legacy
    except ImportError:
        yield
        return

    def loaded(path: Any, return_tensors: bool = False, **more: Any) -> Any:
        if return_tensors:
            return load(path, return_tensors=True, **more)
        path = str(path)
        if path not in _headers:
            _headers.clear()
            _headers[path] = load(path, return_tensors=False)
        return copy.deepcopy(_headers[path])

    with _parsing:
        names, load = gguf.get_tensor_name_map, legacy.load_gguf_checkpoint
        reader, bar = gguf.GGUFReader, legacy.tqdm
        gguf.GGUFReader, legacy.tqdm = _reader, lambda tensors, **_: tensors
        gguf.get_tensor_name_map = functools.cache(names)
        legacy.load_gguf_checkpoint = loaded
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
            legacy.load_gguf_checkpoint, legacy.tqdm = load, bar


@functools.lru_cache(maxsize=1)
def _reader(path: Any, *more: Any) -> Any:
    from gguf.gguf_reader import GGUFReader

    return GGUFReader(path, *more)


_headers: dict[str, Any] = {}
_parsing = threading.RLock()


def forget_headers() -> None:
    """Gives up what was kept of a .gguf file for the next thing that is read of it."""
    _headers.clear()
    _reader.cache_clear()
