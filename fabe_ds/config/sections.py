"""The sections of a transform's settings: what is asked of which model, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr

from fabe_ds.config.files import as_list, auto_or_off, choices_of, examples_of, on_or_off, schema_of
from fabe_ds.config.params import headers_of, merged, object_of, params_of
from fabe_ds.config.section import IO, Section, setting_field
from fabe_ds.request import Sampling


class TargetSettings(Section):
    """Which fields of a record are asked about, and which fields it gains."""

    field: str = setting_field(
        IO,
        "Field to ask about; a dotted path reaches inside (meta.code, messages.0.content), * is "
        "every item of a list, and turns[from=gpt] those items whose key has the value.",
        "code",
        affects_output=True,
    )
    backup_field: str | None = setting_field(
        IO,
        "Field that keeps the original, put right after the rewritten one; '' for none.",
        "original_code",
        affects_output=True,
    )
    also_fields: list[str] = setting_field(
        IO,
        "One more field to rewrite in the same pass; repeatable. Its original is kept as original_ "
        "and its name.",
        [],
        flag="also-field",
        affects_output=True,
    )
    output_fields: list[str] = setting_field(
        IO,
        "Field that the answer goes into, put right after the field, which stays as it is; "
        "repeatable with --response-format: each takes the key of the answer that it is named for.",
        [],
        flag="output-field",
        affects_output="when set",
    )
    on_existing: Literal["overwrite", "skip"] = setting_field(
        IO,
        "A record that has the output field already: ask about it and put the new answer there, or "
        "leave it as it is.",
        "overwrite",
        affects_output="when set",
    )
    on_failure: Literal["keep", "null"] = setting_field(
        IO,
        "The value of a record that failed: what it was, or null.",
        "keep",
        affects_output="when set",
    )
    status_field: str | None = setting_field(
        IO,
        "Field that says what became of each record: its state, failure, finish reason, tokens, "
        "model.",
        affects_output=True,
    )
    reasoning_field: str | None = setting_field(
        IO,
        "Field that keeps what the model reasoned before its answer, put right after the answer.",
        affects_output="when set",
    )
    confidence_field: str | None = setting_field(
        IO,
        "Field of the probability of the choice (--choices), null where the server tells none.",
        affects_output="when set",
    )
    where: str | None = setting_field(
        IO,
        "Which texts are asked about: a Jinja2 expression of `record`, `text` and the field's own "
        "name (record.lang == 'python'); the others stay as they are.",
        affects_output="when set",
    )


class PromptSettings(Section):
    """What is asked."""

    instruction: str | None = setting_field(
        "Prompt", "Instruction: a text, or a Jinja2 template file.", affects_output=True
    )
    template_vars: dict[str, str] = setting_field(
        "Prompt",
        "Variable for the template, k=v; repeatable.",
        {},
        flag="template-var",
        affects_output=True,
    )
    system_prompt: str | None = setting_field(
        "Prompt",
        "System prompt: a text, or a Jinja2 template file; '' for none.",
        "You are a coding assistant. Output only the final code.",
        affects_output=True,
    )
    examples: Annotated[list[dict[str, Any]] | None, BeforeValidator(examples_of)] = setting_field(
        "Prompt",
        "Examples that go before each request as turns: JSON lines with `input` and `output`.",
        affects_output="when set",
    )
    context: Literal["turns"] | None = setting_field(
        "Prompt",
        "What is sent before the text: turns, those of a chat that stand before the one that is "
        "asked about, with the instruction as the system prompt.",
        affects_output="when set",
    )
    use_chat_template: bool = setting_field(
        "Model",
        "Ask through the model's chat template, where it has one.",
        True,
        affects_output=True,
    )


class AnswerSettings(Section):
    """What makes a value of an answer."""

    strip_fences: bool = setting_field(
        "Prompt", "Unwrap an answer that is one fenced code block.", True, affects_output=True
    )
    auto_extract_code: bool = setting_field(
        "Prompt", "The same as --strip-fences.", True, affects_output=True
    )
    on_truncated: Literal["fail", "keep"] = setting_field(
        "Prompt",
        "What to do with an answer that was cut at the token limit.",
        "fail",
        affects_output=True,
    )
    fences: Literal["keep", "first", "last", "longest", "fail"] = setting_field(
        "Prompt",
        "Which block of an answer of several code blocks is taken; keep takes the answer whole.",
        "keep",
        affects_output="when set",
    )
    good_ends: list[str] = setting_field(
        "Prompt",
        "A finish reason that means a whole answer, beside those that are known; repeatable.",
        [],
        flag="good-end",
        affects_output="when set",
    )
    response_format: Annotated[dict[str, Any] | None, BeforeValidator(schema_of)] = setting_field(
        "Prompt",
        "JSON schema that answers follow: a file, or module:Model of pydantic. Enforced by the "
        "server where it can, and checked.",
        affects_output="when set",
    )
    choices: Annotated[str | list[str] | None, BeforeValidator(choices_of)] = setting_field(
        "Prompt",
        "The answers that there are: a,b,c, or a file of one a line. The value is one of them.",
        affects_output="when set",
    )
    validate_with: Annotated[list[str], BeforeValidator(as_list)] = setting_field(
        "Prompt",
        "Check of an answer; repeatable: python-syntax, json, json-schema:FILE, regex:PATTERN, "
        "max-length-ratio:N, min-length-ratio:N, keeps:urls,placeholders,numbers,code, "
        "same-language.",
        [],
        flag="validate",
        affects_output=True,
    )
    max_reasks: int = setting_field(
        "Prompt", "Times to ask again, with what is wrong.", 2, affects_output=True, ge=0
    )

    @property
    def strips_fences(self) -> bool:
        return self.strip_fences and self.auto_extract_code


SECRETS = ("api_key", "fallback_api_key")
"""Settings that are kept in memory alone."""


class ServerSettings(Section):
    """Where the model is asked."""

    base_url: Annotated[list[str], BeforeValidator(as_list)] = setting_field(
        "Model",
        "Base URL of the server; repeatable, for several that have the same model: the least busy "
        "is asked next, and one that is gone is left out until it is back.",
        [],
        affects_output=True,
    )


class ModelSettings(Section):
    """Who is asked: the provider, and the model behind it."""

    provider: str = setting_field(
        "Model", "Who answers; see `fabe-ds providers`.", "echo", affects_output=True
    )
    model: str | None = setting_field(
        "Model", "Model name, folder or .gguf file.", affects_output=True, environment="MODEL_PATH"
    )
    endpoint_name: str | None = setting_field(
        "Model",
        "Name of who answers, for what is kept: under the same name, a run at other addresses asks "
        "nothing again.  [default: the first --base-url]",
        affects_output="when set",
    )
    provider_options: dict[str, Any] = setting_field(
        "Model",
        "Option that the provider has of its own, name=value; repeatable.",
        {},
        flag="provider-option",
        affects_output="when set",
    )
    params: Annotated[dict[str, Any], BeforeValidator(params_of)] = setting_field(
        "Model",
        "Parameter of each request, name=value; repeatable. Dots go inside (options.num_ctx=8192), "
        "values are JSON or text, null takes a parameter out. Of a local model: a generation "
        "setting, or chat_template_kwargs.NAME.",
        {},
        flag="param",
        affects_output="when set",
    )
    extra_body: Annotated[dict[str, Any] | None, BeforeValidator(object_of)] = setting_field(
        "Model", "The same as one JSON object.", affects_output="when set"
    )
    headers: Annotated[dict[str, str], BeforeValidator(headers_of)] = setting_field(
        "Model",
        "Header of each request, name=value; repeatable. A value env:NAME is read from the "
        "environment.",
        {},
        flag="header",
        repr=False,
    )
    fallback_models: list[str] = setting_field(
        "Model",
        "Model that is asked where the answer of the one before it failed its checks, was cut, "
        "refused or empty: MODEL, or MODEL@BASE_URL; repeatable, in order.",
        [],
        flag="fallback-model",
        affects_output="when set",
    )
    base_model: str | None = setting_field(
        "Model",
        "Model that an adapter (LoRA) given as --model goes on; by default, the one it names.",
        affects_output="when set",
    )
    chat_template: str | None = setting_field(
        "Model",
        "Chat template for a local model, instead of its own: a Jinja2 file.",
        affects_output="when set",
    )
    thinking: Literal["on", "off", "low", "medium", "high"] | None = setting_field(
        "Model",
        "Whether, or how hard, a model reasons first: told in the server's own way, or through the "
        "chat template of a local model.  [default: the model's own]",
        affects_output="when set",
    )
    dialect: str | None = setting_field(
        "Model",
        "How the server is told to think, where it is not known by its address or by what it says "
        "of itself: openai, vllm, sglang, llamacpp, ollama, dashscope, siliconflow, deepseek, "
        "zhipu, moonshot, volcengine or openrouter.",
    )
    api_key: SecretStr | None = setting_field(
        "Model", "Key for the server; better, OPENAI_API_KEY."
    )
    fallback_api_key: SecretStr | None = setting_field(
        "Model",
        "Key for fallback models at addresses of their own; better, FALLBACK_API_KEY.  [default: "
        "the same key]",
    )
    device: Annotated[str, Field(pattern=r"^(mps|auto|cpu(,cpu)*|cuda(:\d+(,(cuda:)?\d+)*)?)$")] = (
        setting_field(
            "Model",
            "Device: cpu, cuda, cuda:N, mps or auto; cuda:0,1 for a process on each.",
            "cpu",
            environment="DEVICE",
        )
    )
    dtype: str = setting_field(
        "Model",
        "Type of the weights: auto, float32, bfloat16, float16.",
        "auto",
        affects_output=True,
    )
    local_files_only: bool = setting_field(
        "Model", "Fetch no model from a hub.", True, environment="LOCAL_FILES_ONLY"
    )
    engine: Literal["transformers", "vllm"] = setting_field(
        "Model",
        "What runs a local model; vllm needs fabe-ds[vllm].",
        "transformers",
        affects_output=True,
    )
    attn_implementation: str = setting_field(
        "Model",
        "Attention of a local model: auto, or one of transformers' (sdpa, eager, ...), which "
        "then generates in its own way.",
        "auto",
    )
    compile: bool = setting_field("Model", "Compile a local model with torch.compile.", False)
    trust_remote_code: bool = setting_field("Model", "Run code that comes with the model.", False)
    on_long_prompt: Literal["fail", "truncate-left"] = setting_field(
        "Model",
        "A prompt that is too long for a local model: fail that record, or cut its value's "
        "beginning.",
        "fail",
        affects_output=True,
    )
    batch_size: int = setting_field("Execution", "Records of one batch of a local model.", 8, gt=0)
    max_batch_tokens: int | None = setting_field(
        "Execution",
        "Tokens a local model holds at once, at most; by default what half the free memory holds.",
        gt=0,
    )
    speculate: Annotated[
        Annotated[int, Field(gt=0, le=64)] | Literal["auto", "off"], BeforeValidator(auto_or_off)
    ] = setting_field(
        "Execution",
        "Tokens that a local model drafts by copying from the record, to verify them in one step: "
        "auto (as many as pay), off, or so many. Answers stay what they are.",
        "auto",
    )

    @property
    def given_params(self) -> dict[str, Any]:
        """The parameters that the user names."""
        return merged(self.extra_body or {}, self.params)

    @property
    def devices(self) -> list[str]:
        """The devices, each of which gets a process of its own where there are several."""
        kind, _, numbers = self.device.partition(":")
        if not numbers:
            return self.device.split(",")
        return [f"{kind}:{number.removeprefix('cuda:')}" for number in numbers.split(",")]


class SamplingSettings(Section):
    """How tokens are chosen."""

    max_new_tokens: int = setting_field(
        "Model",
        "Maximum number of new tokens.",
        128,
        affects_output=True,
        environment="MAX_NEW_TOKENS",
        gt=0,
    )
    temperature: float = setting_field(
        "Model",
        "Sampling temperature; none sends none, and leaves it to the server.",
        0.0,
        affects_output=True,
        environment="TEMPERATURE",
        words=("none",),
        ge=0,
    )
    top_p: float | None = setting_field(
        "Model", "Nucleus sampling.", affects_output=True, gt=0, le=1
    )
    do_sample: bool | None = setting_field(
        "Model", "Sample tokens; by default where the temperature is above 0.", affects_output=True
    )
    seed: int | None = setting_field("Model", "Seed for sampling.", affects_output=True)
    stop: list[str] = setting_field(
        "Model", "Text that ends an answer; repeatable.", [], affects_output=True
    )

    samples: int = setting_field(
        "Model",
        "Answers to each record; above 1 they are all listed in --samples-field.",
        1,
        affects_output=True,
        ge=1,
    )
    samples_field: str = setting_field(
        "Model", "Field of all answers where --samples is above 1.", "samples", affects_output=True
    )

    pick: Annotated[str, Field(pattern=r"^(first|vote|first-valid|judge:.+)$")] = setting_field(
        "Model",
        "Which of several answers is the value: first (of those that are all good), first-valid, "
        "vote (the most frequent), or judge:FILE, a template that asks for a score of `answer`.",
        "first",
        affects_output="when set",
    )
    judge_model: str | None = setting_field(
        "Model", "Model that judges (--pick judge:FILE).", affects_output="when set"
    )

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            **{name: getattr(self, name) for name in Sampling.__dataclass_fields__}
            | {"stop": tuple(self.stop)}
        )


class PolicySettings(Section):
    """How hard to try: requests at once, rates, retries, times."""

    concurrency: Annotated[int, Field(gt=0)] | Literal["auto"] = setting_field(
        "Execution",
        "Requests in flight at once; auto finds out what the server takes. For a local model: "
        "batches that it holds at once.",
        4,
    )
    batch_api: bool = setting_field(
        "Execution", "Send through the server's batch API: cheaper, and done within a day.", False
    )
    service_tier: str | None = setting_field(
        "Execution",
        "How the server ranks the requests: flex (cheaper, and waits), priority, or another of its "
        "own words.",
        pattern=r"^\S+$",
    )
    batches: int = setting_field("Execution", "Batches in flight at once (--batch-api).", 4, gt=0)
    batch_requests: int | None = setting_field(
        "Execution",
        "Requests of one batch, at most.  [default: what the server takes, up to 50,000 mostly]",
        gt=0,
    )
    batch_window: str = setting_field(
        "Execution",
        "Time within which the server is to be done with a batch.",
        "24h",
        pattern=r"^\S+$",
    )
    rpm: float | None = setting_field("Execution", "Maximum requests per minute.", gt=0)
    tpm: float | None = setting_field(
        "Execution", "Maximum tokens per minute, of prompts and answers.", gt=0
    )
    retry: int = setting_field("Execution", "Tries after a failed one.", 3, ge=0)
    timeout: float = setting_field("Execution", "Seconds one request may take.", 600.0, gt=0)
    give_up_after: float = setting_field(
        "Execution", "Seconds without a server after which the run stops.", 600.0, gt=0
    )
    stream: Annotated[Literal["auto", "on", "off"], BeforeValidator(on_or_off)] = setting_field(
        "Execution",
        "Let the server stream its answers, which keeps proxies from cutting long ones; auto does "
        "where a server asks for it, or a proxy has cut an answer. By itself, --stream is on.",
        "auto",
    )
    on_error: Literal["raise", "keep"] = setting_field(
        "Execution",
        "For transform_fn: raise after a batch with failed records, or keep their originals.",
        "raise",
        affects_output=True,
    )


class BudgetSettings(Section):
    """What may be spent."""

    max_requests: int | None = setting_field(
        "Execution", "Maximum number of requests to send.", ge=0
    )
    max_tokens_total: int | None = setting_field(
        "Execution", "Maximum tokens to use, of prompts and answers.", ge=0
    )
    max_cost: float | None = setting_field("Execution", "Maximum cost; needs --prices.", ge=0)
    prices: Path | None = setting_field(
        "Execution",
        "YAML of prices a million tokens, model: {prompt: .., completion: .., cached: ..}; auto "
        "for those that are published (fabe-ds[prices]).",
    )

    @property
    def capped(self) -> bool:
        """Whether there is a cap on what may be spent."""
        caps = (self.max_requests, self.max_tokens_total, self.max_cost)
        return any(cap is not None for cap in caps)


class StoreSettings(Section):
    """What earlier runs have answered, and what is done about it."""

    cache_dir: Path = setting_field(
        "Execution", "Folder for what is worth keeping.", Path(".cache")
    )
    resume: bool = setting_field("Execution", "Use what earlier runs have answered.", True)
    offline: bool = setting_field(
        "Execution",
        "Ask nobody: write what is answered already, and list the rest as failed.",
        False,
    )
    retry_all: bool = setting_field(
        "Execution",
        "Ask again for answers that failed and would fail the same (truncated, refused, invalid).",
        False,
    )
