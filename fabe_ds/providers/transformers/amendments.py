"""What a checkpoint's small files say that changes answers: settings, added tokens, templates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fabe_ds.providers.transformers.checkpoint import Checkpoint
from fabe_ds.providers.transformers.digests import Digests
from fabe_ds.providers.transformers.turns import Added, AddedToken, Marks, all_ends, opens_reasoning


def amended(base: Checkpoint, speaking: Checkpoint, known: Digests) -> list[str]:
    """Why answers of this model may differ from those that versions up to 0.1 gave; empty where
    they are the same. `speaking`: where its tokenizer is."""
    if speaking.gguf is not None:
        there = known.of(speaking.gguf).get("amended")
        if not isinstance(there, list):
            there = _amended(base, *_gguf_words(speaking.gguf))
            known.keep(speaking.gguf, "amended", there)
        return there
    return _amended(base, *_folder_words(speaking, known))


def own_settings(base: Checkpoint) -> dict[str, Any]:
    """The generation settings that a model's folder holds: in older ones, config.json has them."""
    file = "generation_config.json"
    there = base.gguf is None and (base.folder / file).is_file()
    return base.json(file if there else "config.json")


def added_tokens(found: Checkpoint, known: Digests) -> Added:
    """The added tokens of the tokenizer in a folder or a .gguf file."""
    words = _folder_words(found, known) if found.gguf is None else _gguf_words(found.gguf)
    return words[0]


def _amended(base: Checkpoint, added: Added, end: str | None, template: str | None) -> list[str]:
    own = own_settings(base)
    configured = own.get("eos_token_id", base.json("config.json").get("eos_token_id"))
    theirs = {added[end].number} if end is not None and end in added else set()
    before = set(as_list(configured)) or theirs
    ends = all_ends(before | theirs, added, template)
    why = []
    if ends != before:
        why.append(f"ends {sorted(ends)}")
    if settings := sorted(
        name for name in (*LEFT, *LEFT_SAMPLING, "stop_strings") if own.get(name)
    ):
        why.append(f"settings {settings}")
    if Marks.of(added):
        why.append("reasoning in special tokens")
    if opens_reasoning(template):
        why.append("reasoning opened by the template")
    if base.adapter is not None and not base.is_adapter:
        why.append("adapter")
    if _MIXED.search(json.dumps(base.json("config.json"))):
        why.append("rows apart")
    return why


_MIXED = re.compile(
    r'"(rope_)?type": "(longrope|su|dynamic)"|"(index_topk|keep_window_size)": \d'
    r'|"model_type": "(minimax|deepseek_v4|recurrent_gemma|llama4|blt|xlstm|rwkv|reformer)'
)
"""In config.json, what says that earlier versions may have let prompts beside one another change
each other's answers."""


LEFT = (
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
    *("min_new_tokens", "min_length", "forced_bos_token_id", "forced_eos_token_id"),
    *("exponential_decay_length_penalty", "guidance_scale", "encoder_repetition_penalty"),
    *("renormalize_logits", "remove_invalid_values"),
)
"""Generation settings that a model may come with and that our own loop leaves to transformers'
generate. Earlier versions passed them over."""


LEFT_SAMPLING = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
"""The same where tokens are sampled."""


PASSED_OVER = ("num_beams", "num_beam_groups", "penalty_alpha", "dola_layers")
"""Settings that a model may come with and that do not hold: the user asks for one greedy answer, or
for sampled ones."""


def _folder_words(found: Checkpoint, known: Digests) -> tuple[Added, str | None, str | None]:
    """A folder's added tokens, the text of its end token, and its chat template; nothing where
    its files are not of the kind, which is said when it is loaded."""
    try:
        return _words(found, known)
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}, None, None


def _words(found: Checkpoint, known: Digests) -> tuple[Added, str | None, str | None]:
    settings = found.json("tokenizer_config.json")
    added: dict[str, AddedToken] = {}
    file = found.folder / "tokenizer.json"
    if file.is_file():  # tens of megabytes, so what is wanted of it is remembered
        there = known.of(file).get("added")
        if not isinstance(there, list):
            entries = found.json(file.name).get("added_tokens") or []
            there = [[e["content"], e["id"], bool(e.get("special"))] for e in entries]
            known.keep(file, "added", there)
        added = {text: AddedToken(number, special) for text, number, special in there}
    for number, entry in (settings.get("added_tokens_decoder") or {}).items():
        added[entry["content"]] = AddedToken(int(number), bool(entry.get("special")))
    end = settings.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    for place in ("chat_template.jinja", "chat_template.json"):
        if (found.folder / place).is_file():
            text = (found.folder / place).read_text(encoding="utf-8")
            if place.endswith("json"):
                text = json.loads(text)["chat_template"]
            return added, end, text
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return added, end, template


def _gguf_words(path: Path) -> tuple[Added, str | None, str | None]:
    from transformers.integrations.gguf import read_gguf_metadata

    tokens = "tokenizer.ggml.tokens"
    try:
        facts, _ = read_gguf_metadata(str(path), (tokens,))
    except Exception:  # said when it is loaded
        return {}, None, None
    texts, kinds = facts.get(tokens), facts.get("tokenizer.ggml.token_type")
    added = {}
    if isinstance(texts, list) and kinds is not None and len(kinds) == len(texts):
        control, own = 3, 4
        for number, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
            if kind in (control, own):
                added[text] = AddedToken(number, kind == control)
    end = facts.get("tokenizer.ggml.eos_token_id")
    name = texts[end] if isinstance(texts, list) and isinstance(end, int) else None
    return added, name, facts.get("tokenizer.chat_template")


def as_list(ids: Any) -> list[int]:
    """Token ids that a configuration gives as one, as several, or not at all."""
    return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]
