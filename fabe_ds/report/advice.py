"""What helps where records failed, by the class of the failure."""

from __future__ import annotations

from collections.abc import Mapping

from fabe_ds.request import LASTING

OFTEN, FEWEST = 0.1, 10  # share, and number, of records that fail in one way before it is said
HELPS = {
    "broken": "not JSON: mend those lines of the input; they were copied as they are",
    "truncated": "cut at --max-new-tokens: raise it",
    "empty": "empty, or nothing but reasoning: raise --max-new-tokens, or ask without thinking",
    "context": "too long for the model's context: shorten them, or give the server a longer one",
    "refused": "refused for what they say: another model or instruction",
    "invalid": "not what was asked for (--validate, --choices, ...): another instruction or model",
    "unfinished": "with a finish reason that is not known: see their messages in the failures file",
    "tool call": "calls of tools: another instruction or model",
    "fences": "of several code blocks: --fences first, last or longest",
    "proxy": "cut by a proxy: --stream, or fewer --max-new-tokens",
    "check": "on which --validate's own check raised: see their messages in the failures file",
    "prompt": "not to be put into the template: see their messages in the failures file",
    "rejected": "refused by the server: see their messages in the failures file",
}


def often_failing(failures: Mapping[str, int], records: int) -> str:
    """What to do where a good part of so many records fails in one way; empty where none does."""
    kind, count = max(failures.items(), key=lambda pair: pair[1], default=("", 0))
    if kind not in HELPS or count < max(FEWEST, OFTEN * records):
        return ""
    return f"{count} of {records} {HELPS[kind]}"


def what_helps(
    failures: Mapping[str, int], max_new_tokens: int, report: str = "outputs.run.json"
) -> list[str]:
    """A line for each class of failures that running again does not cure, and one for those that
    it may."""
    lines = []
    for kind, count in sorted(failures.items(), key=lambda pair: -pair[1]):
        if kind == "truncated":
            lines.append(
                f"{count} cut at the token limit: run again with --max-new-tokens "
                f"{2 * max_new_tokens}; what is whole is kept"
            )
        elif kind in HELPS:
            lines.append(f"{count} {HELPS[kind]}")
    passing = sum(count for kind, count in failures.items() if kind not in HELPS)
    if passing == sum(failures.values()):
        lines.append("run the same command again to send just the failed ones")
    elif passing:
        lines.append(f"run the same command again to send the other {passing}")
    if any(kind in LASTING for kind in failures):
        lines.append(f"fabe-ds retry {report} --all asks for all of them again")
    return lines
