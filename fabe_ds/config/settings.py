"""The configuration: declared once, read from flags, environment and YAML, validated once."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from fabe_ds.errors import UsageError, reason
from fabe_ds.files import is_text, read_yaml

C = TypeVar("C", bound=BaseModel)
Panel = Literal["Input and output", "Prompt", "Model", "Execution", "Ray", "Hub"]
PANELS: tuple[str, ...] = get_args(Panel)
"""The groups of flags, in the order of --help."""


def _setting(
    panel: Panel,
    text: str,
    default: Any = None,
    *,
    flag: str | None = None,
    changes: bool | Literal["when set"] = False,
    environment: str | None = None,
    **limits: Any,
) -> Any:
    """A setting. `changes`: it can change what comes out, so it is part of the fingerprint; "when
    set", only where it is not the default, so that fingerprints from before there was it hold."""
    extra: Any = {"panel": panel, "flag": flag, "changes": changes, "environment": environment}
    return Field(default, description=text, json_schema_extra=extra, **limits)


_IO: Panel = "Input and output"
STANDARD = Path("-")
"""Standard input, and standard output."""
VERY_NEAR = 0.8
"""Likeness of two names, from 0 to 1, of which one may be meant by the other."""
VALUE_SHOWN = 100
"""Characters of a wrong value."""
SCHEMA_FILE = "json-schema:"
"""How a check begins that is a file."""


def _in_capitals(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


class TransformConfig(BaseModel):
    """What is asked of which model, and how. The options of `transform_fn`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), frozen=True)

    field: str = _setting(
        _IO,
        "Field to rewrite; a dotted path reaches inside (meta.code, messages.0.content).",
        "code",
        changes=True,
    )
    backup_field: str | None = _setting(
        _IO,
        "Field that keeps the original, put right after the rewritten one; '' for none.",
        "original_code",
        changes=True,
    )
    also_fields: list[str] = _setting(
        _IO,
        "One more field to rewrite in the same pass; repeatable. Its original is kept as original_ "
        "and its name.",
        [],
        flag="also-field",
        changes=True,
    )
    status_field: str | None = _setting(
        _IO,
        "Column that says what became of each record (failure, finish reason, tokens); for tables.",
        changes=True,
    )
    instruction: str | None = _setting(
        "Prompt", "Instruction: a text, or a Jinja2 template file.", changes=True
    )
    template_vars: dict[str, str] = _setting(
        "Prompt",
        "Variable for the template, k=v; repeatable.",
        {},
        flag="template-var",
        changes=True,
    )
    system_prompt: str | None = _setting(
        "Prompt",
        "System prompt; '' for none.",
        "You are a coding assistant. Output only the final code.",
        changes=True,
    )
    strip_fences: bool = _setting(
        "Prompt", "Unwrap an answer that is one fenced code block.", True, changes=True
    )
    auto_extract_code: bool = _setting("Prompt", "The same as --strip-fences.", True, changes=True)
    on_truncated: Literal["fail", "keep"] = _setting(
        "Prompt",
        "What to do with an answer that was cut at the token limit.",
        "fail",
        changes=True,
    )
    fences: Literal["keep", "first", "last", "longest", "fail"] = _setting(
        "Prompt",
        "Which block of an answer of several code blocks is taken; keep takes the answer whole.",
        "keep",
        changes="when set",
    )
    good_ends: list[str] = _setting(
        "Prompt",
        "A finish reason that means a whole answer, beside those that are known; repeatable.",
        [],
        flag="good-end",
        changes="when set",
    )
    validate_with: str | None = _setting(
        "Prompt",
        "Check of an answer: python-syntax, json, json-schema:FILE, regex:PATTERN.",
        flag="validate",
        changes=True,
    )
    max_reasks: int = _setting(
        "Prompt", "Times to ask again, with what is wrong.", 2, changes=True, ge=0
    )
    provider: str = _setting("Model", "Who answers; see `fabe-ds providers`.", "echo", changes=True)
    model: str | None = _setting(
        "Model", "Model name, folder or .gguf file.", changes=True, environment="MODEL_PATH"
    )
    base_url: str | None = _setting("Model", "Base URL of the server.", changes=True)
    base_model: str | None = _setting(
        "Model",
        "Model that an adapter (LoRA) given as --model goes on; by default, the one it names.",
        changes="when set",
    )
    chat_template: str | None = _setting(
        "Model",
        "Chat template for a local model, instead of its own: a Jinja2 file.",
        changes="when set",
    )
    thinking: Literal["on", "off"] | None = _setting(
        "Model",
        "Whether a local model reasons first, where its chat template has a switch for it.  "
        "[default: as the template has it]",
        changes="when set",
    )
    api_key: SecretStr | None = _setting("Model", "Key for the server; better, OPENAI_API_KEY.")
    device: Annotated[str, Field(pattern=r"^(mps|auto|cpu(,cpu)*|cuda(:\d+(,(cuda:)?\d+)*)?)$")] = (
        _setting(
            "Model",
            "Device: cpu, cuda, cuda:N, mps or auto; cuda:0,1 for a process on each.",
            "cpu",
            environment="DEVICE",
        )
    )
    dtype: str = _setting(
        "Model", "Type of the weights: auto, float32, bfloat16, float16.", "auto", changes=True
    )
    local_files_only: bool = _setting(
        "Model", "Fetch no model from a hub.", True, environment="LOCAL_FILES_ONLY"
    )
    engine: Literal["transformers", "vllm"] = _setting(
        "Model", "What runs a local model; vllm needs fabe-ds[vllm].", "transformers", changes=True
    )
    attn_implementation: str = _setting(
        "Model",
        "Attention of a local model: auto, or one of transformers' (sdpa, eager, ...), which "
        "then generates in its own way.",
        "auto",
    )
    compile: bool = _setting("Model", "Compile a local model with torch.compile.", False)
    trust_remote_code: bool = _setting("Model", "Run code that comes with the model.", False)
    max_new_tokens: int = _setting(
        "Model",
        "Most tokens an answer may have.",
        128,
        changes=True,
        environment="MAX_NEW_TOKENS",
        gt=0,
    )
    temperature: float = _setting(
        "Model", "Sampling temperature.", 0.0, changes=True, environment="TEMPERATURE", ge=0
    )
    top_p: float | None = _setting("Model", "Nucleus sampling.", changes=True, gt=0, le=1)
    do_sample: bool | None = _setting(
        "Model", "Sample tokens; by default where the temperature is above 0.", changes=True
    )
    seed: int | None = _setting("Model", "Seed for sampling.", changes=True)
    on_long_prompt: Literal["fail", "truncate-left"] = _setting(
        "Model",
        "A prompt that is too long for a local model: fail that record, or cut its value's "
        "beginning.",
        "fail",
        changes=True,
    )
    stop: list[str] = _setting("Model", "Text that ends an answer; repeatable.", [], changes=True)
    samples: int = _setting(
        "Model",
        "Answers to each record; above 1 they are listed in --samples-field, for tables.",
        1,
        changes=True,
        ge=1,
    )
    samples_field: str = _setting(
        "Model", "Column of all answers where --samples is above 1.", "samples", changes=True
    )
    use_chat_template: bool = _setting(
        "Model", "Ask through the model's chat template, where it has one.", True, changes=True
    )
    concurrency: Annotated[int, Field(gt=0)] | Literal["auto"] = _setting(
        "Execution",
        "Requests in flight at once; auto finds out what the server takes. For a local model: "
        "batches that it holds at once.",
        4,
    )
    batch_api: bool = _setting(
        "Execution", "Send through the server's batch API: cheaper, and done within a day.", False
    )
    rpm: float | None = _setting("Execution", "Most requests a minute.", gt=0)
    tpm: float | None = _setting("Execution", "Most tokens a minute, prompts and answers.", gt=0)
    batch_size: int = _setting("Execution", "Records of one batch of a local model.", 8, gt=0)
    max_batch_tokens: int | None = _setting(
        "Execution",
        "Tokens a local model holds at once, at most; by default what half the free memory holds.",
        gt=0,
    )
    retry: int = _setting("Execution", "Tries after a failed one.", 3, ge=0)
    max_requests: int | None = _setting("Execution", "Most requests to send.", ge=0)
    max_tokens_total: int | None = _setting("Execution", "Most tokens to use.", ge=0)
    max_cost: float | None = _setting("Execution", "Most to spend; needs --prices.", ge=0)
    prices: Path | None = _setting(
        "Execution", "YAML of prices a million tokens, model: {prompt: .., completion: ..}."
    )
    timeout: float = _setting("Execution", "Seconds one request may take.", 600.0, gt=0)
    give_up_after: float = _setting(
        "Execution", "Seconds without a server after which the run stops.", 600.0, gt=0
    )
    cache_dir: Path = _setting("Execution", "Folder for what is worth keeping.", Path(".cache"))
    resume: bool = _setting("Execution", "Use what earlier runs have answered.", True)
    offline: bool = _setting(
        "Execution",
        "Ask nobody: write what is answered already, and list the rest as failed.",
        False,
    )
    retry_all: bool = _setting(
        "Execution",
        "Ask again for answers that failed and would fail the same (truncated, refused, invalid).",
        False,
    )
    stream: bool = _setting(
        "Execution",
        "Let the server stream its answers; keeps proxies from cutting long ones.",
        False,
    )
    on_error: Literal["raise", "keep"] = _setting(
        "Execution",
        "For transform_fn: raise after a batch with failed records, or keep their originals.",
        "raise",
        changes=True,
    )

    @property
    def devices(self) -> list[str]:
        """The devices, each of which gets a process of its own where there are several."""
        kind, _, numbers = self.device.partition(":")
        if not numbers:
            return self.device.split(",")
        return [f"{kind}:{number.removeprefix('cuda:')}" for number in numbers.split(",")]

    @property
    def capped(self) -> bool:
        """Whether there is a cap on what may be spent."""
        caps = (self.max_requests, self.max_tokens_total, self.max_cost)
        return any(cap is not None for cap in caps)

    @property
    def strips_fences(self) -> bool:
        return self.strip_fences and self.auto_extract_code

    @property
    def backup(self) -> str | None:
        return self.backup_field or None


class RunConfig(TransformConfig):
    """A whole run: the transform, and the files it reads and writes."""

    input_path: Path | None = _setting(
        _IO,
        "File, folder, saved Dataset, or dataset of the Hub (org/name) to read; - for standard "
        "input.",
        flag="input",
    )
    input_glob: list[str] = _setting(
        _IO, "Pattern of files in a folder (*.jsonl, **/*.json); repeatable.", [], flag="glob"
    )
    records_key: str | None = _setting(
        _IO, "Key of the list of records, in files that wrap it in an object."
    )
    output_path: Path | None = _setting(
        _IO,
        "Folder to write to, which mirrors the input; for one file, also a file, or - for standard "
        "output.  [default: outputs]",
        flag="output",
    )
    split: str = _setting(
        _IO, "Split of a Hub or saved Dataset, as datasets writes it (train, train[:100]).", "train"
    )
    config_name: str | None = _setting(_IO, "Configuration of a Hub dataset.")
    output_format: Literal["jsonl", "parquet", "csv", "tsv", "dataset"] | None = _setting(
        _IO, "What a table is written as.  [default: parquet, or what a CSV or a Dataset is]"
    )
    inplace: bool = _setting(_IO, "Replace the input files.", False)
    on_bad_input: Literal["fail", "skip"] = _setting(
        _IO,
        "What cannot be read: stop, or leave it out, a line of JSON lines (which is copied, and "
        "fails) or a file.",
        "fail",
    )
    push_to_hub: str | None = _setting(
        "Hub", "Dataset of the Hub (org/name) to push the records to; private unless --public."
    )
    hub: Literal["huggingface", "modelscope"] = _setting(
        "Hub", "Whose hub; modelscope needs fabe-ds[modelscope].", "huggingface"
    )
    public: bool = _setting("Hub", "Let everybody see it.", False)
    revision: str | None = _setting("Hub", "Branch to push to.")
    push_config_name: str | None = _setting(
        "Hub", "Configuration to push as.  [default: that of --config-name, else default]"
    )
    force: bool = _setting("Hub", "Push a run with failed records too.", False)
    push_failures: bool = _setting(
        "Hub", "Push the failed records too, as a configuration of their own (failures).", False
    )
    runner: Literal["local", "ray"] = _setting(
        "Ray",
        "Where the transform runs: in this process, or in the workers of a Ray cluster.",
        "local",
    )
    ray_address: str | None = _setting(
        "Ray", "Address of the cluster (auto, host:port).  [default: one on this machine]"
    )
    workers: int | None = _setting(
        "Ray", "Workers.  [default: one a node, or as many as the GPUs serve]", gt=0
    )
    gpus_per_worker: float | None = _setting(
        "Ray", "GPUs of each.  [default: 1 for a model on cuda, else none]", ge=0
    )
    dry_run: bool = _setting(
        "Execution",
        "Show what would be sent; send and write nothing.",
        False,
        environment="DRY_RUN",
    )
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_in_capitals)
    ] = _setting("Execution", "How much to say.", "INFO", environment="LOG_LEVEL")


_PATHS = ("input_path", "output_path", "cache_dir", "prices")
MAYBE_FILES = ("instruction", "model", "base_model", "chat_template")
"""Settings that are a text or a name, unless a file of that name is there."""
_ALIASES = ("strip_fences", "auto_extract_code")


def setting(name: str, key: str) -> Any:
    """What is declared of a setting: panel, flag, changes or environment."""
    extra = RunConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return extra[key]


def flag(name: str) -> str:
    return f"--{setting(name, 'flag') or name.replace('_', '-')}"


_SPELLED = {
    str(flag_name).replace("-", "_"): name
    for name in RunConfig.model_fields
    if (flag_name := setting(name, "flag"))
}
"""Settings by the names of their flags, where these are others."""
_LISTS = [
    name
    for name, declared in RunConfig.model_fields.items()
    if get_origin(declared.annotation) is list
]


def read_config(flags: Mapping[str, Any], file: Path | None = None) -> RunConfig:
    """The configuration: flag over environment over YAML file over default.

    Raises: UsageError, naming the flag, variable or key that is wrong.
    """
    layers: list[tuple[dict[str, Any], Callable[[str], str]]] = [
        (_read_yaml(file) if file else {}, lambda name: f"{file}: {name}"),
        (_read_environment(), lambda name: str(setting(name, "environment"))),
        (dict(flags), flag),
    ]
    values: dict[str, Any] = {}
    named: dict[str, str] = {}
    for layer, name_of in layers:
        given = {name: value for name, value in layer.items() if value is not None}
        for name, other in (_ALIASES, _ALIASES[::-1]):
            if name in given:
                if given.get(other, given[name]) != given[name]:
                    raise UsageError(f"{name_of(name)} and {name_of(other)} are one setting")
                values[other] = given[name]
                named[other] = name_of(name)
        values |= given
        named |= {name: name_of(name) for name in given}
    return validated(RunConfig, values, named)


def by_name(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of keywords, which may be called as the flags are too (`input`, `validate`)."""
    values: dict[str, Any] = {}
    for given, value in options.items():
        name = _SPELLED.get(given, given)
        if name in values:
            raise UsageError(f"{given}: given twice, under two names")
        values[name] = value
    for name in _LISTS:
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    return values


def signature_of(model: type[BaseModel], *first: inspect.Parameter) -> inspect.Signature:
    """The settings of a configuration as keywords, behind other parameters: for `help`, and for
    the hints of notebooks and editors."""
    keywords = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=declared.get_default(call_default_factory=True),
            annotation=declared.rebuild_annotation(),
        )
        for name, declared in model.model_fields.items()
        if name not in {parameter.name for parameter in first}
    ]
    return inspect.Signature([*first, *keywords])


def validated(model: type[C], values: Mapping[str, Any], named: Mapping[str, str]) -> C:
    """The configuration of these values; `named` is how each was given, for the error."""
    try:
        return model(**{n: v if n in _PATHS else _as_text(v) for n, v in values.items()})
    except UnicodeDecodeError:
        wrong = next(n for n, v in values.items() if n not in _PATHS and not _is_text(v))
        raise UsageError(f"{named.get(wrong, wrong)}: not UTF-8") from None
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise UsageError(unknown(name, [*model.model_fields, *_SPELLED])) from None
        if name == "device":
            raise UsageError(
                f"--device {first['input']}: write cpu, cuda, cuda:0, cuda:0,1, mps or auto"
            ) from None
        message = str(first["msg"]).removeprefix("Value error, ").replace("Input should", "should")
        given = "" if name == "api_key" else f" {_short(first['input'])}"
        raise UsageError(f"{named.get(name, name)}{given}: {message}") from None


def _as_text(value: Any) -> Any:
    """A value of the command line, whose bytes are UTF-8 whatever the locale says.

    Raises: UnicodeDecodeError.
    """
    if isinstance(value, str) and not is_text(value):
        return os.fsencode(value).decode()
    return [_as_text(item) for item in value] if isinstance(value, list) else value


def _is_text(value: Any) -> bool:
    try:
        _as_text(value)
    except UnicodeDecodeError:
        return False
    return True


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= VALUE_SHOWN else f"{shown[:VALUE_SHOWN]}..."


def unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, VERY_NEAR)
    return f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _read_yaml(file: Path) -> dict[str, Any]:
    """The settings in a YAML file; paths in it are relative to it."""
    try:
        loaded = read_yaml(file)
    except OSError as error:
        raise UsageError(f"--config {file}: {reason(error)}") from None
    except ValueError as error:
        raise UsageError(f"--config {file}{error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"--config {file}: not a mapping of settings")
    values: dict[str, Any] = {}
    names = list(RunConfig.model_fields)
    for given, value in loaded.items():
        # As the flag is called, too: input, also-field, --glob.
        name = str(given).removeprefix("--").replace("-", "_")
        name = _SPELLED.get(name, name)
        if name not in RunConfig.model_fields:
            raise UsageError(f"--config {file}: {unknown(str(given), [*names, *_SPELLED])}")
        if name in values:
            raise UsageError(f"--config {file}: {given} is there twice, under two names")
        values[name] = value
    base = file.parent
    for name in _PATHS:
        if isinstance(values.get(name), str):
            values[name] = base / values[name]
    for name in MAYBE_FILES:
        value = values.get(name)
        if isinstance(value, str) and "\n" not in value and len(value) < 1024:
            beside = base / value
            if value.startswith(("./", "../")) or os.path.lexists(beside):
                values[name] = str(beside)
    check = values.get("validate_with")
    if isinstance(check, str) and check.startswith(SCHEMA_FILE):
        beside = base / check.removeprefix(SCHEMA_FILE)
        values["validate_with"] = f"{SCHEMA_FILE}{beside}"
    for name in _LISTS:
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    if "template_vars" in values:
        values["template_vars"] = _variables(values["template_vars"], f"--config {file}")
    return values


def _variables(given: Any, where: str) -> Any:
    """Template variables as a mapping of texts, or as the flag takes them: name=value."""
    if isinstance(given, str | list):
        given = [given] if isinstance(given, str) else given
        pairs = [str(pair).partition("=") for pair in given]
        if wrong := next((name for name, equals, _ in pairs if not equals), None):
            raise UsageError(f"{where}: template_vars: {wrong}: write name: value, or name=value")
        return {name: value for name, _, value in pairs}
    if isinstance(given, dict):
        return {str(name): str(value) for name, value in given.items()}
    return given


def _read_environment() -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in RunConfig.model_fields:
        variable = setting(name, "environment")
        if variable and (text := os.environ.get(variable, "")):
            values[name] = text
    return values
