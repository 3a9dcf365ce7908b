"""Writes the first configuration and prompt of a project."""

from __future__ import annotations

from pathlib import Path

from fabe_ds.errors import UsageError
from fabe_ds.files import Replacing, check_file_writable
from fabe_ds.providers import provider_class

CONFIG = """\
# Run it with:   fabe-ds run --config {config}
# Every flag of `fabe-ds run` may stand here, with _ for -. A flag goes over the environment, that
# over this file. Paths are relative to this file.

input_path: data.jsonl        # a file, or a folder of .json, .jsonl, .parquet or .csv
output_path: outputs
field: code                   # which field of each record is rewritten
backup_field: original_code   # where the original is kept; '' for nowhere
instruction: {prompt}

provider: {provider}
{model}
max_new_tokens: 512
temperature: 0.0

cache_dir: .cache             # what was answered is kept here: run again to go on
"""
PROMPT = """\
Rewrite the code below so that it is easier to read. Keep what it does.
{# Record fields can be used too: {{ record.path }}; and variables: {{ goal | default('...') }} #}

{{ text }}
"""
_MODELS = {
    "echo": "# echo asks no model: it puts a comment before each text, to try the data out.",
    "openai": """\
model: my-model
base_url: http://localhost:8000/v1   # any server that speaks OpenAI's protocol
concurrency: auto                    # requests at once; auto finds out what the server takes
# The key comes from OPENAI_API_KEY.""",
    "ollama": """\
model: qwen3                         # ollama pull it first
base_url: http://localhost:11434
concurrency: 4                       # as many as OLLAMA_NUM_PARALLEL""",
    "hf": """\
model: path/or/hub-id                # a folder, a .gguf file, or an id of the Hub
local_files_only: true               # false fetches it
device: auto
batch_size: 8                        # times concurrency: the records at once, at most
concurrency: 4                       # `fabe-ds tune` finds out what is quickest""",
}


def write_project(folder: Path, provider: str, force: bool = False) -> list[Path]:
    """Writes fabe-ds.yaml and prompt.j2 for a provider. Gives their paths.

    Raises: UsageError where the provider is unknown or one of them is there already.
    """
    provider_class(provider)
    model = _MODELS.get("hf" if provider == "modelscope" else provider, "model: my-model")
    config, prompt = folder / "fabe-ds.yaml", folder / "prompt.j2"
    texts = {
        config: CONFIG.format(
            config=config.name, prompt=prompt.name, provider=provider, model=model
        ),
        prompt: PROMPT,
    }
    for path in texts:
        check_file_writable(path)
        if path.exists() and not force:
            raise UsageError(f"{path}: is there already; --force replaces it")
    with Replacing() as files:
        for path, text in texts.items():
            with files.open(path) as file:
                file.write(text.encode())
    return list(texts)
