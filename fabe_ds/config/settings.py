"""The configuration: declared once, read from flags, environment and YAML, validated once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from fabe_ds.config.section import IO, Section, in_capitals, setting_field
from fabe_ds.config.sections import (
    AnswerSettings,
    BudgetSettings,
    ModelSettings,
    PolicySettings,
    PromptSettings,
    SamplingSettings,
    ServerSettings,
    StoreSettings,
    TargetSettings,
)
from fabe_ds.fields import Targets, parse_path
from fabe_ds.json_schema import has_property

STANDARD = Path("-")
"""Standard input, and standard output."""
VERY_NEAR = 0.8
"""Likeness of two names, from 0 to 1, of which one may be meant by the other."""
SCHEMA_FILE = "json-schema:"
"""How a check begins that is a file."""
JUDGE_FILE = "judge:"
"""How a way to pick begins that is a file."""


class InputSettings(Section):
    """What is read."""

    input_path: Path | None = setting_field(
        IO,
        "File, folder, saved Dataset, or dataset of the Hub (org/name) to read; a URL (hf://, "
        "s3://, ...); - for standard input.",
        flag="input",
    )
    input_glob: list[str] = setting_field(
        IO, "Pattern of files in a folder (*.jsonl, **/*.json); repeatable.", [], flag="glob"
    )
    records_key: str | None = setting_field(
        IO, "Key of the list of records, in files that wrap it in an object."
    )
    split: str = setting_field(
        IO, "Split of a Hub or saved Dataset, as datasets writes it (train, train[:100]).", "train"
    )
    config_name: str | None = setting_field(IO, "Configuration of a Hub dataset.")
    limit: int | None = setting_field(
        IO, "Ask about the first so many records that are to be done; the others stay.", gt=0
    )
    on_bad_input: Literal["fail", "skip"] = setting_field(
        IO,
        "What cannot be read: stop, or leave it out, a line of JSON lines (which is copied, and "
        "fails) or a file.",
        "fail",
    )


class OutputSettings(Section):
    """Where records are written to, and as what."""

    output_path: Path | None = setting_field(
        IO,
        "Folder to write to, which mirrors the input; for one file, also a file, or - for standard "
        "output; a URL.  [default: outputs]",
        flag="output",
    )
    output_format: Literal["jsonl", "parquet", "csv", "tsv", "dataset"] | None = setting_field(
        IO, "What a table is written as.  [default: parquet, or what a CSV or a Dataset is]"
    )
    inplace: bool = setting_field(IO, "Replace the input files.", False)


class HubSettings(Section):
    """Where the records are pushed to."""

    push_to_hub: str | None = setting_field(
        "Hub", "Dataset of the Hub (org/name) to push the records to; private unless --public."
    )
    hub: Literal["huggingface", "modelscope"] = setting_field(
        "Hub", "Whose hub; modelscope needs fabe-ds[modelscope].", "huggingface"
    )
    public: bool = setting_field("Hub", "Let everybody see it.", False)
    revision: str | None = setting_field("Hub", "Branch to push to.")
    push_config_name: str | None = setting_field(
        "Hub", "Configuration to push as.  [default: that of --config-name, else default]"
    )
    force: bool = setting_field("Hub", "Push a run with failed records too.", False)
    push_failures: bool = setting_field(
        "Hub", "Push the failed records too, as a configuration of their own (failures).", False
    )


class RaySettings(Section):
    """Where the transform runs."""

    runner: Literal["local", "ray"] = setting_field(
        "Ray",
        "Where the transform runs: in this process, or in the workers of a Ray cluster.",
        "local",
    )
    ray_address: str | None = setting_field(
        "Ray", "Address of the cluster (auto, host:port).  [default: one on this machine]"
    )
    workers: int | None = setting_field(
        "Ray", "Workers.  [default: one a node, or as many as the GPUs serve]", gt=0
    )
    gpus_per_worker: float | None = setting_field(
        "Ray", "GPUs of each.  [default: 1 for a model on cuda, else none]", ge=0
    )


class TransformConfig(
    StoreSettings,
    BudgetSettings,
    PolicySettings,
    SamplingSettings,
    ModelSettings,
    ServerSettings,
    AnswerSettings,
    PromptSettings,
    TargetSettings,
):
    """What is asked of which model, and how. The options of `transform_fn`."""

    @property
    def targets(self) -> Targets:
        outputs = tuple(self.output_fields)
        one_field = not self.also_fields
        keyed = tuple(name for name in outputs if one_field and self._is_key(name))
        return Targets(
            (self.field, *self.also_fields),
            self.backup_field or None,
            self.samples,
            self.samples_field if self.samples > 1 else None,
            self.status_field or None,
            outputs=outputs,
            keyed=keyed,
            is_json=self.response_format is not None,
            reasoning_field=self.reasoning_field or None,
            confidence_field=self.confidence_field or None,
            pick=self.pick.partition(":")[0],  # type: ignore[arg-type]
            failed_is_null=self.on_failure == "null",
            skips_existing=self.on_existing == "skip",
            model=self.model,
            several_models=bool(self.fallback_models),
            schema=self.response_format,
        )

    def _is_key(self, name: str) -> bool:
        """Whether the schema of answers has a key of that name."""
        schema = self.response_format
        return schema is not None and has_property(schema, parse_path(name))


class RunConfig(RaySettings, HubSettings, OutputSettings, InputSettings, TransformConfig):
    """A whole run: the transform, and the files it reads and writes."""

    dry_run: bool = setting_field(
        "Execution",
        "Show what would be sent; send and write nothing.",
        False,
        environment="DRY_RUN",
    )
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(in_capitals)
    ] = setting_field("Execution", "How much to say.", "INFO", environment="LOG_LEVEL")


def setting(name: str, key: str) -> Any:
    """What is declared of a setting: panel, flag, changes or environment."""
    extra = RunConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return extra[key]


def flag(name: str) -> str:
    return f"--{setting(name, 'flag') or name.replace('_', '-')}"
