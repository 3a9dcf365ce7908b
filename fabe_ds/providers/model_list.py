"""Servers that list their models at GET /models: whether they are there, and what they have."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fabe_ds import network
from fabe_ds.errors import RunStopped
from fabe_ds.providers.dialects import dialect_of_owner
from fabe_ds.providers.http import PREFLIGHT_SECONDS, HttpProvider

if TYPE_CHECKING:
    import requests

_NOT_THERE = (200, 404, 405)
"""Statuses of a list of models that is asked for where it is not; LM Studio answers 200."""


class ListingProvider(HttpProvider):
    """Base of providers whose servers list models as OpenAI's do: {"data": [{"id": ...}]}."""

    def preflight(self) -> None:
        import requests

        try:
            answer = network.get(self.address.url("/models"), self.headers(), PREFLIGHT_SECONDS)
        except requests.exceptions.RequestException as error:
            hint = "no server answers there; start it, or give its --base-url"
            raise self.unreachable(error, hint) from None
        # A key that may not list models (403, or a scope that is named) may complete chats.
        if answer.status_code == 401 and not _lacks_scope(answer.text):
            raise RunStopped(
                f"{self.address}: the key is not accepted ({answer.status_code}); give it with "
                f"--api-key or {self.key_variable}"
            )
        listed = _listed(answer)
        if listed is None and answer.status_code in _NOT_THERE:
            self._look_elsewhere()
        self.models = [str(model["id"]) for model in listed or ()]
        owners = (dialect_of_owner(str(model.get("owned_by"))) for model in listed or ())
        self.detected = next(filter(None, owners), None)

    def _look_elsewhere(self) -> None:
        """Raises: RunStopped where the server answers with /v1 behind its address, or without."""
        import requests

        other = self.address.elsewhere()
        with contextlib.suppress(requests.exceptions.RequestException):
            found = network.get(other.url("/models"), self.headers(), PREFLIGHT_SECONDS)
            if _listed(found) is not None:
                raise RunStopped(f"{self.address}: the server is at {other}; --base-url {other}")


def _listed(answer: requests.Response) -> list[Mapping[str, Any]] | None:
    """The models that an answer lists; None where it is no list of models."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        models = answer.json()["data"]
        if isinstance(models, list) and all(isinstance(model["id"], str) for model in models):
            return models
    return None


def _lacks_scope(text: str) -> bool:
    return bool(re.search(r"scope|insufficient permission|not allowed to list", text, re.I))
