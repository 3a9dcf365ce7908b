"""Models of the Hugging Face Hub, or in a local folder, or in one .gguf file."""

from __future__ import annotations

from pathlib import Path

from fabe_ds.errors import FabeError, first_line
from fabe_ds.providers.base import Requirement
from fabe_ds.providers.transformers.checkpoint import wanted_files
from fabe_ds.providers.transformers.provider import TransformersProvider


class HFProvider(TransformersProvider):
    name = "hf"

    def fetch(self, model: str, one: str | None = None) -> Path:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        local = self.endpoint.local_files_only
        try:
            if local:
                return Path(snapshot_download(model, local_files_only=True))
            # Of a repository that holds a model in several formats, one is fetched.
            files = HfApi().list_repo_files(model)
            return Path(snapshot_download(model, allow_patterns=wanted_files(files, model, one)))
        except HFValidationError:
            raise Requirement(f"--model {model}: neither a folder nor a hub id") from None
        except LocalEntryNotFoundError as error:
            # Of what was fetched by name or pattern, what is there may be all that is needed.
            if partly := getattr(error, "snapshot_path", None):
                return Path(partly)
            if not local:
                raise Requirement(
                    f"--model {model}: neither here nor to be had from the Hub: {first_line(error)}"
                ) from None
            raise Requirement(
                f"--model {model}: not in the local Hugging Face cache; download it, or allow it "
                "with --no-local-files-only"
            ) from None
        except FabeError:
            raise
        except Exception as error:  # of whatever the Hub is asked through
            raise Requirement(
                f"--model {model}: cannot be fetched from the Hub: {first_line(error)}"
            ) from None
