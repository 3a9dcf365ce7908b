"""How servers that speak OpenAI's protocol are told to reason first, or not to.

Sources: OpenAI API reference (`reasoning_effort`); vLLM, SGLang and llama.cpp's server
(`chat_template_kwargs`); Alibaba Cloud Model Studio and SiliconFlow (`enable_thinking`); DeepSeek,
Zhipu, Moonshot and Volcengine (`thinking.type`); OpenRouter (`reasoning`); Ollama's /v1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fabe_ds.errors import UsageError

THINKING = "fabe_ds.thinking"
"""Stands in a body for what is wanted, in no server's own words: the cache key is the same for
all of them."""
DIALECT = "dialect"
"""The learned word for which of `DIALECTS` a server speaks."""
EFFORTS = ("low", "medium", "high")


class Dialect(NamedTuple):
    """`parameters` of a body for on, off, low, medium or high. `hosts`: ends of the host names of
    public servers that speak it; `owners`: what others say of themselves in their list of
    models."""

    parameters: Callable[[str], dict[str, Any]]
    hosts: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    has_efforts: bool = True


def _effort(level: str) -> dict[str, Any]:
    return {"reasoning_effort": {"off": "none", "on": "medium"}.get(level, level)}


def _template(level: str) -> dict[str, Any]:
    variables: dict[str, Any] = {"enable_thinking": level != "off"}
    if level not in EFFORTS:
        return {"chat_template_kwargs": variables}
    variables["reasoning_effort"] = level
    return {"chat_template_kwargs": variables, "reasoning_effort": level}


def _enable(level: str) -> dict[str, Any]:
    return {"enable_thinking": level != "off"}


def _type(level: str) -> dict[str, Any]:
    return {"thinking": {"type": "disabled" if level == "off" else "enabled"}}


def _reasoning(level: str) -> dict[str, Any]:
    return {"reasoning": {"effort": level} if level in EFFORTS else {"enabled": level == "on"}}


LEAST_BUDGET = 1024
"""Tokens that an Anthropic model which is given a budget reasons with, at least."""
_SHARES = {"low": 0.25, "medium": 0.5, "on": 0.5, "high": 0.8}


def anthropics_thinking(level: str, limit: int, by_budget: bool) -> dict[str, Any]:
    """The parameters for Anthropic's Messages. `limit`: tokens of the answer; `by_budget`: of a
    model that is told how many of them are for reasoning. Raises: UsageError.

    Source: Anthropic API reference, "Extended thinking", "Adaptive thinking".
    """
    if level == "off":
        return {"thinking": {"type": "disabled"}}
    if not by_budget:
        effort = {"output_config": {"effort": level}} if level in EFFORTS else {}
        return {"thinking": {"type": "adaptive"}, **effort}
    if limit <= LEAST_BUDGET:
        raise UsageError(
            f"--thinking {level}: this model reasons with {LEAST_BUDGET} tokens at least; raise "
            "--max-new-tokens above that"
        )
    tokens = max(LEAST_BUDGET, int(_SHARES[level] * limit))
    return {"thinking": {"type": "enabled", "budget_tokens": tokens}}


DIALECTS: Mapping[str, Dialect] = {
    "openai": Dialect(_effort, ("api.openai.com", ".openai.azure.com")),
    "vllm": Dialect(_template, owners=("vllm",)),
    "sglang": Dialect(_template, owners=("sglang",)),
    "llamacpp": Dialect(_template, owners=("llamacpp",)),
    "ollama": Dialect(_effort, ("ollama.com",), owners=("library",)),
    "dashscope": Dialect(_enable, (".aliyuncs.com", ".modelscope.cn"), has_efforts=False),
    "siliconflow": Dialect(_enable, (".siliconflow.cn", ".siliconflow.com"), has_efforts=False),
    "deepseek": Dialect(_type, (".deepseek.com",), has_efforts=False),
    "zhipu": Dialect(_type, (".bigmodel.cn", ".z.ai"), has_efforts=False),
    "moonshot": Dialect(_type, (".moonshot.cn", ".moonshot.ai"), has_efforts=False),
    "volcengine": Dialect(_type, (".volces.com", ".bytepluses.com"), has_efforts=False),
    "openrouter": Dialect(_reasoning, ("openrouter.ai",)),
}


def dialect_of_host(host: str) -> str | None:
    """The dialect that a public server speaks, by its host's name."""
    for name, dialect in DIALECTS.items():
        if any(f".{host}".endswith(end if end[0] == "." else f".{end}") for end in dialect.hosts):
            return name
    return None


def dialect_of_owner(owner: str) -> str | None:
    """The dialect of a server whose models are `owned_by` this."""
    return next((name for name, dialect in DIALECTS.items() if owner in dialect.owners), None)


def in_dialect(name: str, level: str) -> dict[str, Any]:
    """The parameters that tell a server of this dialect to think so. Raises: UsageError."""
    dialect = DIALECTS[name]
    if level in EFFORTS and not dialect.has_efforts:
        raise UsageError(f"--thinking {level}: this server ({name}) takes on or off")
    return dialect.parameters(level)
