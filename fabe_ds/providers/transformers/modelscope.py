"""Models of ModelScope's hub, or in a local folder; run as hf runs its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fabe_ds.errors import first_line
from fabe_ds.providers.base import Requirement
from fabe_ds.providers.transformers.checkpoint import wanted_files
from fabe_ds.providers.transformers.provider import TransformersProvider


class ModelScopeProvider(TransformersProvider):
    name = "modelscope"
    needs = (
        "torch, transformers, modelscope: pip install 'fabe-ds[modelscope]'; a folder or model id"
    )

    def fetch(self, model: str, one: str | None = None) -> Path:
        if not importlib.util.find_spec("modelscope"):
            raise Requirement(
                "modelscope not installed, which fetches models by name; "
                "pip install 'fabe-ds[modelscope]'"
            )
        from modelscope.hub.snapshot_download import snapshot_download

        local = self.endpoint.local_files_only
        try:
            if local:
                return Path(snapshot_download(model, local_files_only=True))
            from modelscope.hub.api import HubApi

            found = HubApi().get_model_files(model, recursive=True)
            files = [str(file["Path"]) for file in found if file.get("Type") != "tree"]
            wanted = wanted_files(files, model, one)
            return Path(snapshot_download(model, allow_patterns=wanted))
        except Requirement:
            raise
        except Exception as error:  # the client's exceptions share no base
            advice = "; download it, or allow it with --no-local-files-only" if local else ""
            raise Requirement(
                f"--model {model}: not found by ModelScope: {first_line(error)}{advice}"
            ) from None
