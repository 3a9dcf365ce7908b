"""Models of the Hugging Face Hub, or in a local folder, or in one .gguf file."""

from __future__ import annotations

from pathlib import Path

from fabe_ds.errors import first_line
from fabe_ds.providers.base import Requirement
from fabe_ds.providers.local import TransformersProvider


class HFProvider(TransformersProvider):
    name = "hf"

    def fetch(self) -> Path:
        model = self.endpoint.model
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return Path(snapshot_download(model, local_files_only=self.endpoint.local_files_only))
        except HFValidationError:
            raise Requirement(f"--model {model}: neither a folder nor a hub id") from None
        except FileNotFoundError as error:  # LocalEntryNotFoundError is one
            if not self.endpoint.local_files_only:
                raise Requirement(
                    f"--model {model}: neither here nor to be had from the Hub: {first_line(error)}"
                ) from None
            raise Requirement(
                f"--model {model}: not in the local Hugging Face cache; download it, or allow it "
                "with --no-local-files-only"
            ) from None
        except (HfHubHTTPError, OSError) as error:
            raise Requirement(
                f"--model {model}: cannot be fetched from the Hub: {first_line(error)}"
            ) from None
