"""What a model's folder holds, found out without loading it: its weights, whether they are whole,
an adapter, the settings beside them, and the digest that names them all.

Formats: https://github.com/huggingface/safetensors (a length, a header that lists byte ranges, the
bytes), https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md (pointers), transformers' and
peft's names of files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from fabe_ds.errors import RunStopped
from fabe_ds.providers.base import Requirement
from fabe_ds.providers.transformers.digests import Digests

_POINTER = b"version https://git-lfs"
_SETTING = re.compile(
    r"(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map"
    r"|added_tokens|vocab|vocabulary|tekken|chat_template|.+\.index)\.json"
    r"|.+\.(jinja|model|tiktoken|bpe|spm)|vocab\.\w+|merges\.txt|bpe\.codes"
)
"""The files that a model is made of beside its weights."""
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.\w+$")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_ONE_FILE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FEW = 3
_SMALL = 2 << 20
_SAMPLED = 1 << 20
_BIG = 64 << 20
_FORMER_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".onnx")


def few(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more


@dataclass(frozen=True)
class Checkpoint:
    """One model, or one adapter, on this machine.

    `folder` holds it; `gguf` is its one file where it is a .gguf; `name` is how the user calls it.
    """

    name: str
    folder: Path
    gguf: Path | None = None

    def json(self, name: str) -> dict[str, Any]:
        """What a JSON file of the folder says; nothing where it is not there, or not JSON."""
        if self.gguf is not None:
            return {}
        try:
            loaded = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter and not the model that it goes on."""
        there = (self.folder / "adapter_config.json").is_file()
        return self.gguf is None and there and not self._model_weights()

    @property
    def adapter(self) -> Checkpoint | None:
        """The adapter in the folder, its own model's or alone."""
        if self.gguf is None and (self.folder / "adapter_config.json").is_file():
            if any((self.folder / name).is_file() for name in _ADAPTER):
                return self
            if self.is_adapter:
                raise RunStopped(
                    f"--model {self.name}: adapter_config.json, but no {_ADAPTER[0]} beside it"
                )
        return None

    @property
    def base(self) -> str | None:
        """The model that the adapter was made for, as its configuration names it."""
        return self.json("adapter_config.json").get("base_model_name_or_path") or None

    @cached_property
    def weights(self) -> list[Path]:
        """The files of the weights: those that transformers, or peft, would load."""
        if self.gguf is not None:
            return [self.gguf]
        if self.is_adapter:
            return [path for name in _ADAPTER if (path := self.folder / name).is_file()][:1]
        return self._model_weights()

    def _model_weights(self) -> list[Path]:
        for one, index in zip(_ONE_FILE, _INDEX, strict=True):
            if (self.folder / one).is_file():
                return [self.folder / one]
            if (self.folder / index).is_file():
                return [self.folder / name for name in self._shards(index)]
        return []

    def _shards(self, index: str) -> list[str]:
        places = self.json(index).get("weight_map")
        if not isinstance(places, dict):
            why = _why(self.folder / index) or "no index of weights (weight_map)"
            raise RunStopped(f"--model {self.name}: {index}: {why}")
        return sorted({str(name) for name in places.values()})

    @property
    def files(self) -> list[Path]:
        """All that can change an answer, in order."""
        if self.gguf is not None:
            return [self.gguf]
        beside = [path for path in self.folder.iterdir() if path.is_file()]
        templates = self.folder / "additional_chat_templates"
        if templates.is_dir():
            beside += [path for path in templates.iterdir() if path.is_file()]
        settings = {path for path in beside if _is_setting(path.name)}
        if "auto_map" in self.json("config.json"):  # it comes with code of its own
            settings |= {path for path in beside if path.suffix == ".py"}
        adapter = self.adapter
        if adapter is not None:
            settings |= {path for name in _ADAPTER if (path := self.folder / name).is_file()}
        return sorted(settings | set(self.weights))

    def has_config(self) -> bool:
        """Whether there is a config.json that can be read."""
        file = self.folder / "config.json"
        return self.gguf is None and file.is_file() and not _why(file)

    def check(self) -> None:
        """Raises: RunStopped where a file is missing, cut off, or a pointer to what it should be;
        the message says what to do."""
        self._check_weights()
        for path in self.files:
            if why := _why(path):
                raise RunStopped(f"--model {self.name}: {path.name}: {why}")
        if (
            self.gguf is None
            and not self.is_adapter
            and not (self.folder / "config.json").is_file()
        ):
            raise RunStopped(f"--model {self.name}: no config.json beside the weights")

    def _check_weights(self) -> None:
        if not self.weights:
            raise RunStopped(f"--model {self.name}: {self._without_weights()}")
        missing = [path.name for path in self.weights if not path.is_file()]
        if missing:
            raise RunStopped(
                f"--model {self.name}: not complete: {len(missing)} of {len(self.weights)} files "
                f"of weights are not there ({few(missing)}); download it again"
            )

    def _without_weights(self) -> str:
        names = sorted(path.name for path in self.folder.iterdir())
        if any(name.startswith("consolidated") for name in names):
            return (
                "weights in Mistral's or Meta's own layout (consolidated.*); the layout of "
                "transformers is needed (model.safetensors), or a .gguf file"
            )
        if shards := [name for name in names if _SHARD.match(name)]:
            return f"{few(shards)}, but no index of them ({_INDEX[0]}); download it again"
        if folders := [name for name in names if name.startswith("checkpoint-")]:
            return f"no model, but checkpoints of a training: give one of them ({few(folders)})"
        if "config.json" in names:
            return "config.json, but no weights (model.safetensors or a .gguf file)"
        return "no model folder (config.json and model.safetensors, or a .gguf file)"

    def digest(self, known: Digests) -> str:
        """A digest of all that can change an answer: a moved folder is the same model, a changed
        one is not. Hidden files and what else lies about do not count.

        Raises: RunStopped where a file is missing; OSError where one cannot be read.
        """
        self._check_weights()
        total = hashlib.sha256()
        for path in self.files:
            if path.stat().st_size > (_SMALL if path.suffix in _FORMER_WEIGHTS else _BIG):
                total.update(self._called(path))
                total.update(known.digest(path).encode())
            else:  # beginning and end are all of it, so that its name stays what it was
                self._sample(path, total)
        return total.hexdigest()

    def _called(self, path: Path) -> bytes:
        return f"{path.relative_to(self.folder).as_posix()} {path.stat().st_size}\n".encode()

    def _sample(self, path: Path, total: Any) -> None:
        """Takes a file into a digest: weights, and what is very large, by beginning and end."""
        total.update(self._called(path))
        size = path.stat().st_size
        with path.open("rb") as data:
            if path.suffix in _FORMER_WEIGHTS or size > _BIG:
                total.update(data.read(_SAMPLED))
                data.seek(max(0, size - _SAMPLED))
            total.update(data.read())

    def former_digest(self) -> str:
        """How versions up to 0.1 named it: hidden folders counted, and of large files beginning
        and end only."""
        total = hashlib.sha256()
        files = [self.gguf] if self.gguf is not None else sorted(self.folder.rglob("*"))
        for path in files:
            if path.is_file() and not path.name.startswith(".") and path.suffix != ".md":
                self._sample(path, total)
        return total.hexdigest()

    @property
    def changed(self) -> float:
        """When the last of its files was changed, or put there: seconds since 1970."""
        return max(max(s.st_mtime, s.st_ctime) for s in (path.stat() for path in self.files))

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[Path]:
        """The folder as it is without the adapter in it, while the block runs: links."""
        import tempfile

        with tempfile.TemporaryDirectory(prefix="fabe-ds-") as scratch:
            for path in self.folder.iterdir():
                if not path.name.startswith("adapter_"):
                    (Path(scratch) / path.name).symlink_to(path.resolve())
            yield Path(scratch)


def _is_setting(name: str) -> bool:
    return not name.startswith(".") and bool(_SETTING.fullmatch(name))


def at(path: Path, name: str) -> Checkpoint:
    """The checkpoint at a path: a folder, or a .gguf file, or a folder of one .gguf file.

    Raises: RunStopped where it is several.
    """
    if path.is_file():
        _refuse_parts(path.name, name)
        return Checkpoint(name, path.parent, path)
    found = Checkpoint(name, path)
    if (path / "adapter_config.json").is_file() or any(
        (path / file).exists() for file in (*_ONE_FILE, *_INDEX)
    ):
        return found
    files = models_of([file.name for file in path.iterdir() if file.suffix == ".gguf"])
    if len(files) > 1:
        raise RunStopped(
            f"--model {name}: {len(files)} .gguf files; give one of them: "
            + few(f"{name.rstrip('/')}/{file}" for file in files)
        )
    return at(path / files[0], name) if files else found


def models_of(files: Iterable[str]) -> list[str]:
    """Those .gguf files that are language models: no projectors, a split one once."""
    names = (name for name in files if name.endswith(".gguf") and "mmproj" not in name.lower())
    return sorted(name for name in names if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", name))


def _refuse_parts(file: str, name: str) -> None:
    if _SHARD.match(file):
        raise RunStopped(
            f"--model {name}: one .gguf file in several parts; join them first "
            "(llama-gguf-split --merge)"
        )


def wanted_files(files: Collection[str], model: str, one: str | None = None) -> list[str]:
    """Which files of a hub's repository make up a model: its settings, and its weights in one
    format. `one`: the .gguf file that is asked for.

    Raises: Requirement where it holds several models, or none.
    """
    top = sorted(name for name in files if len(PurePosixPath(name).parts) == 1)
    ggufs = models_of(files)
    if one is not None:
        if one not in files:
            raise Requirement(
                f"--model {model}: it has no {one}; it has {few(ggufs) or 'no .gguf'}"
            )
        return [one]
    settings = [name for name in top if _is_setting(name) or name.endswith(".py")]
    settings += [name for name in files if name.startswith("additional_chat_templates/")]
    adapter = [name for name in _ADAPTER if name in top][:1]
    for suffix, beginning in ((".safetensors", "model"), (".bin", "pytorch_model")):
        weights = [name for name in top if name.startswith(beginning) and name.endswith(suffix)]
        if weights:
            unneeded = _INDEX[suffix == ".safetensors"]
            return [*(name for name in settings if name != unneeded), *weights, *adapter]
    if adapter:
        return [*settings, *adapter]
    if len(ggufs) > 1:
        named = few(f"{model}/{file}" for file in ggufs)
        raise Requirement(f"--model {model}: {len(ggufs)} .gguf files; give one of them: {named}")
    if ggufs:
        _refuse_parts(ggufs[0], model)
        return ggufs
    raise Requirement(
        f"--model {model}: no weights that transformers loads (model.safetensors, "
        "pytorch_model.bin, one .gguf file)"
    )


def _why(path: Path) -> str:
    """What is wrong with a file; empty where nothing shows."""
    size = path.stat().st_size
    if not size and path.suffix not in (".txt", ".py"):
        return "an empty file; download it again"
    with path.open("rb") as data:
        start = data.read(len(_POINTER))
    if start == _POINTER:
        return "a git-lfs pointer and not the file itself; run `git lfs pull` in the folder"
    if path.suffix == ".safetensors":
        return _safetensors(path, size)
    if path.suffix == ".gguf" and start[:4] != b"GGUF":
        return "not a .gguf file; download it again"
    if path.suffix == ".bin" and start[:2] == b"PK" and not zipfile.is_zipfile(path):
        return "cut off; download it again"
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            return f"not JSON ({error}); download it again"
    return ""


def _safetensors(path: Path, size: int) -> str:
    with path.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        if length > size - 8:
            return "cut off, or no .safetensors file; download it again"
        try:
            header = json.loads(data.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return "no .safetensors file; download it again"
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        return f"cut off: {size:,} of {whole:,} bytes; download it again"
    return ""


# What of a folder's settings this version takes otherwise than earlier ones did.


def context(config: Any) -> int | None:
    """The most tokens that a model's configuration (of its text part) allows, or None."""
    longest = getattr(config, "max_position_embeddings", None)
    if type(longest) is not int or longest <= 0:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(rope, dict) and "dynamic" in str(rope.get("rope_type")):
        return int(longest * max(1.0, rope.get("factor") or 1.0))
    return longest
