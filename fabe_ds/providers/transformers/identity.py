"""Who a local model is, told from its files before any of them is loaded."""

from __future__ import annotations

import hashlib
import importlib.util
from abc import abstractmethod
from functools import cached_property
from pathlib import Path

from fabe_ds.errors import RunStopped, UsageError
from fabe_ds.providers.base import Endpoint, LocalProvider, Requirement
from fabe_ds.providers.transformers import amendments
from fabe_ds.providers.transformers import checkpoint as checkpoints
from fabe_ds.providers.transformers.checkpoint import Checkpoint
from fabe_ds.providers.transformers.digests import Digests


class CheckpointProvider(LocalProvider):
    """A local model as files: where they are, and the digest that stands in the cache keys."""

    needs = (
        "torch and transformers: pip install 'fabe-ds[hf]'; a local folder, .gguf file or hub id"
    )

    def __init__(self, endpoint: Endpoint) -> None:
        """Raises: Requirement where the engine is not installed."""
        if endpoint.engine == "vllm" and not importlib.util.find_spec("vllm"):
            raise Requirement("--engine vllm: not installed; pip install 'fabe-ds[vllm]'")
        super().__init__(endpoint)

    @classmethod
    def missing(cls) -> str | None:
        lacking = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
        if lacking:
            return f"{' and '.join(lacking)} not installed; pip install 'fabe-ds[{cls.name}]'"
        return None

    @abstractmethod
    def fetch(self, model: str, one: str | None = None) -> Path:
        """The folder of a model that is given by its name in a hub. `one`: the file of it that is
        asked for.

        Raises: Requirement where it is not on this machine and may not be fetched.
        """

    @cached_property
    def path(self) -> Path:
        """The folder or .gguf file that holds the model. Raises: Requirement."""
        return self._path_of(self.endpoint.model, Path())

    def _path_of(self, model: str, beside: Path) -> Path:
        """Where a model is that is given by its path, from here or from `beside`, or its name."""
        for path in (_expanded(model), beside / _expanded(model)):
            if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
                return path
            if path.exists():
                raise Requirement(f"--model {model}: not a model folder or a .gguf file")
        if model.startswith((".", "/", "~")):
            raise Requirement(f"--model {model}: no such model folder or .gguf file")
        if model.endswith(".gguf"):
            owner, _, rest = model.partition("/")
            name, _, file = rest.partition("/")
            if not file:
                raise Requirement(f"--model {model}: no such model folder or .gguf file")
            return self.fetch(f"{owner}/{name}", file) / file
        return self.fetch(model)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What --model names: a model, or an adapter. Raises: Requirement, RunStopped."""
        found = checkpoints.at(self.path, self.endpoint.model)
        if self.endpoint.base_model and not found.is_adapter:
            raise UsageError(
                f"--base-model: {self.endpoint.model} is a model and no adapter of one"
            )
        return found

    @cached_property
    def base(self) -> Checkpoint:
        """The model itself: that which the adapter is for, where --model names one.

        Raises: Requirement, RunStopped.
        """
        adapter = self.checkpoint
        if not adapter.is_adapter:
            return adapter
        if self.endpoint.engine == "vllm":
            raise Requirement(
                f"--model {adapter.name}: an adapter, which --engine vllm does not load; merge it"
            )
        name = self.endpoint.base_model or adapter.base
        if not name:
            raise Requirement(
                f"--model {adapter.name}: an adapter that does not name its model; give it with "
                "--base-model"
            )
        try:
            return checkpoints.at(self._path_of(name, adapter.folder), name)
        except Requirement as error:
            raise Requirement(
                f"--model {adapter.name}: an adapter of {name}, which is not here "
                f"({str(error).partition(': ')[2]}); give its folder with --base-model"
            ) from None

    def identity(self) -> str:
        return self._identity

    @cached_property
    def _identity(self) -> str:
        """Names the model by its contents, and by what this version makes of them otherwise than
        earlier ones did."""
        try:
            digest = self._digest
            if self._amended:
                digest = hashlib.sha256(f"{digest} {self._amended}".encode()).hexdigest()
        except OSError as error:
            raise RunStopped(
                f"--model {self.endpoint.model}: {error.filename}: {error.strerror}"
            ) from None
        self._digests.save()
        return digest

    @cached_property
    def _digests(self) -> Digests:
        return Digests.below(self.endpoint.cache_dir)

    @cached_property
    def _digest(self) -> str:
        digest = self.checkpoint.digest(self._digests)
        if self.base is not self.checkpoint:
            digest = f"{self.base.digest(self._digests)} with {digest}"
        return digest

    @cached_property
    def _amended(self) -> list[str]:
        return amendments.amended(self.base, self._speaking, self._digests)

    @property
    def _speaking(self) -> Checkpoint:
        """Where tokenizer and chat template are taken from: the adapter, where it has them."""
        has_tokenizer = (self.checkpoint.folder / "tokenizer_config.json").is_file()
        return self.checkpoint if has_tokenizer else self.base

    @cached_property
    def _changed(self) -> float:
        return self.checkpoint.changed

    def former_identity(self) -> str | None:
        """How earlier versions named this very model."""
        return self._former_identity

    @cached_property
    def _former_identity(self) -> str | None:
        if self.checkpoint.is_adapter:
            return None
        former = self.checkpoint.former_digest()
        return None if former == self._identity else former


def _expanded(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError:  # the home of a user that is not there
        return Path(model)
