"""Reasoning, channels and turn marks that models write into their answers.

Sources: the chat templates and model cards of the families named below, and the reasoning parsers
of vLLM, SGLang and Ollama.
"""

from __future__ import annotations

import re

_TAGS = r"(?:seed:|mm:)?(?:think|thinking|reasoning|thought)"
PAIRS = (  # opening and closing marks that are not tags
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel>thought", "<channel|>"),  # Gemma 4
)
_CLOSER_OF = {opener.lower(): closer.lower() for opener, closer in PAIRS}
_openers = "|".join(re.escape(opener) for opener, _ in PAIRS)
_closers = "|".join(re.escape(closer) for _, closer in PAIRS)
_fence = r"^(?P<indent>[ \t]*)(?P<ticks>`{3,}|~{3,})[ \t]*(?P<info>[^\n]*?)[ \t\r]*$"
_mark = re.compile(
    rf"^[ \t]*(?P<open><(?P<tag>{_TAGS})(?:>|(?=[ \n])[^>\n]*(?:>|$))|{_openers})"
    rf"|(?P<close></(?P<end>{_TAGS})>|{_closers})|{_fence}",
    re.MULTILINE | re.IGNORECASE,
)
_WRAPPERS = (  # what stands around the answer proper, behind the reasoning
    ("<answer>", "</answer>"),
    ("<response>", "</response>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|START_TEXT|>", "<|END_TEXT|>"),
)
_QUOTES = "\"'`"

_final = re.compile(r"<\|channel\|>final[^\n]*?<\|message\|>")
_analysis = re.compile(
    r"<\|channel\|>(?:analysis|commentary)[^\n]*?<\|message\|>(.*?)"
    r"(?=<\|(?:end|start|return)\|>|\Z)",
    re.DOTALL,
)
_channel_end = re.compile(r"<\|(?:end|return|call|start)\|>")
_granite = re.compile(
    r"\A\s*Here(?:'s| is) my thought process:.*?^Here(?:'s| is) my response:\s*",
    re.DOTALL | re.MULTILINE,
)

END_MARKS = (
    *(
        "</s>",
        "<eos>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
    ),
    *("<|eot|>", "<|eom|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<turn|>"),
    *("<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>", "<|EOT|>", "<EOT>"),
    *("[|endofturn|]", "[e~[", "<seed:eos>", "<end_of_utterance>", "[EOS]", "<|endofassistant|>"),
)
"""What ends a turn, in the text of models whose server lets it through."""
_STARTS = (
    *("<|im_start|>", "<|start_header_id|>", "<|header_start|>", "<start_of_turn>", "<|turn>"),
    *("<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "[INST]", "<｜User｜>"),
    *("<|START_OF_TURN_TOKEN|>", "]~b]", "<|start|>", "[|user|]", "<seed:bos>"),
    *("<|start_of_role|>", "<｜Assistant｜>", "<|eot_id|>"),
)
_ends = "|".join(map(re.escape, END_MARKS))
_ran_on = re.compile(rf"(?:{_ends})\s{{0,9}}(?:{'|'.join(map(re.escape, _STARTS))})")
_apostrophe = re.compile(r"(?<=\w)'(?=\w)")
_PART_OF_CODE = ("=", ":", "}}", "(", ",", "|")
"""Behind these a mark is a value, not the end of a turn."""


def strip_reasoning(answer: str, original: str = "") -> str:
    """The answer without its reasoning: tags, channels, unclosed or never opened ones too.

    A block counts where its mark begins a line outside code fences. A closing mark with no opening
    one (the chat template wrote it) ends reasoning; where `original` holds that mark itself, or
    the answer an opening one, only if nothing else of its line follows.
    """
    stripped = answer.lstrip()
    if stripped.startswith(("<|channel|>", "<|start|>")) and "<|channel|>" not in original:
        return _final_channel(answer)
    unmarked = stripped.startswith("analysis") and "assistantfinal" not in original
    if unmarked and "assistantfinal" in answer:  # channels whose marks were dropped
        return answer.rpartition("assistantfinal")[2]
    if found := _granite.match(answer):
        return answer[found.end() :]
    if not any(sign in answer for sign in "<[◁"):
        return answer
    text, found_any = _without_blocks(answer, original)
    return _unwrapped(text, original) if found_any else text


def reasoning_of(answer: str, original: str = "") -> str | None:
    """What `strip_reasoning` takes out of an answer, without its marks; None where that is none."""
    text = strip_reasoning(answer, original)
    if text == answer:
        return None
    if thoughts := _analysis.findall(answer):
        return "\n".join(map(str.strip, thoughts)) or None
    proper = text.strip()
    before = answer[: answer.rfind(proper)] if proper else answer
    for opener, _ in _WRAPPERS:
        before = before.rstrip().removesuffix(opener)
    for mark in sorted(_mark.finditer(before), key=lambda found: -found.start()):
        if mark["open"] or mark["close"]:
            before = before[: mark.start()] + before[mark.end() :]
    for marker in ("Here's my response:", "Here is my response:", "assistantfinal"):
        before = before.rstrip().removesuffix(marker)
    return before.strip() or None


def _final_channel(answer: str) -> str:
    """The final channel of an answer in OpenAI's harmony format; nothing where it has none."""
    finals = list(_final.finditer(answer))
    if not finals:
        return ""
    last = finals[-1]
    end = _channel_end.search(answer, last.end())
    return answer[last.end() : end.start() if end else len(answer)]


def _without_blocks(answer: str, original: str) -> tuple[str, bool]:
    """The answer without blocks of reasoning, and whether there were any."""
    kept: list[str] = []
    position = 0
    fence: str | None = None
    waiting_for: str | None = None  # the mark that ends the reasoning that we are in
    opened = 0
    for mark in _mark.finditer(answer):
        if mark["open"]:
            if waiting_for is None and fence is None and _opens(answer, mark, original):
                kept.append(answer[position : mark.start()])
                waiting_for, opened = _closer_of(mark), mark.start()
        elif mark["close"]:
            if waiting_for is not None:
                if mark["close"].lower() == waiting_for:
                    waiting_for, position = None, mark.end()
            elif _ends_reasoning(answer, mark, original) and (fence is None or not kept):
                kept, position, fence = [""], mark.end(), None
        elif waiting_for is None:
            if fence is None:
                fence = mark["ticks"]
            elif mark["ticks"].startswith(fence) and not mark["info"]:
                fence = None
    if waiting_for is not None and "".join(kept).strip():  # no reasoning, but text with a tag
        position, waiting_for = opened, None
    if waiting_for is None:
        kept.append(answer[position:])
    text = "".join(kept)
    found = len(kept) > 1 or waiting_for is not None
    return (text.lstrip("\r\n") if found else text), found


def _closer_of(mark: re.Match[str]) -> str:
    if mark["tag"]:
        return f"</{mark['tag'].lower()}>"
    return _CLOSER_OF[mark["open"].strip().lower()]


def _opens(answer: str, mark: re.Match[str], original: str) -> bool:
    """Whether an opening mark begins reasoning: the original has none such, and one that is no
    whole tag (`<think hm`) stands at the very beginning of the answer."""
    opener = mark["open"].strip()
    start = f"<{mark['tag']}" if mark["tag"] else opener
    if start.lower() in original.lower() or opener.endswith("/>"):
        return False
    whole = not mark["tag"] or opener.lower() == f"<{mark['tag'].lower()}>"
    return whole or not answer[: mark.start()].strip()


def _ends_reasoning(answer: str, mark: re.Match[str], original: str) -> bool:
    """Whether a closing mark that nothing opened ends reasoning all the same."""
    rest = answer[mark.end() :].split("\n", 1)[0].strip()
    closer = mark["close"]
    if closer in original:
        return not rest and answer.count(closer) > original.count(closer)
    before = answer[: mark.start()]
    opened = f"<{mark['end']}" in before if mark["end"] else False
    return not opened and (not rest or not _in_quotes(before))


def _in_quotes(before: str) -> bool:
    """Whether a quotation is open at the end of a text's last line."""
    line = _apostrophe.sub("", before[before.rfind("\n") + 1 :])
    return any(line.count(quote) % 2 for quote in _QUOTES)


def _unwrapped(text: str, original: str) -> str:
    """The answer proper, where marks of its own stand around it."""
    inside = text.strip()
    for opener, closer in _WRAPPERS:
        if inside.startswith(opener) and inside.endswith(closer) and opener not in original:
            return inside[len(opener) : -len(closer)].strip("\r\n")
    return text


def strip_end_marks(answer: str, original: str) -> str:
    """The answer up to the mark that ends the model's turn.

    A mark that stands at the very end is cut, unless the original ends in it or it closes a tag of
    the answer's own (`<s>...</s>`); where another turn begins behind a mark, all of that is.
    """
    if "<" not in answer and "[" not in answer:
        return answer
    for found in _ran_on.finditer(answer):
        before = answer[: found.start()]
        fenced = before.count("\n```") % 2 or before.startswith("```")
        turns = any(start in before for start in _STARTS)  # a text about turns, or a template
        if found[0] not in original and not turns and not fenced and not _in_quotes(before):
            answer = before
        break
    text = answer.rstrip()
    whole = original.rstrip()
    while mark := next((mark for mark in END_MARKS if text.endswith(mark)), None):
        rest = text.removesuffix(mark).rstrip()
        paired = mark == "</s>" and len(re.findall(r"<s\b", text)) >= text.count("</s>")
        if whole.endswith(mark) or paired or rest.endswith(_PART_OF_CODE):
            break
        text = rest
    return answer if text == answer.rstrip() else text
