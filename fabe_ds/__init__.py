"""Rewrite one field of every record with a language model; give the records back as they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabe_ds.errors import FabeError, InputError, RunStopped, TemplateError, UsageError
from fabe_ds.version import __version__

if TYPE_CHECKING:
    from fabe_ds.config.settings import RunConfig
    from fabe_ds.formats.json.load import load_records
    from fabe_ds.formats.json.write import export_records
    from fabe_ds.hub import push_to_hub
    from fabe_ds.pipeline import run
    from fabe_ds.report.result import RunResult
    from fabe_ds.tools.preview import preview
    from fabe_ds.transform import transform_fn

__all__ = [
    "FabeError",
    "InputError",
    "RunConfig",
    "RunResult",
    "RunStopped",
    "TemplateError",
    "UsageError",
    "__version__",
    "export_records",
    "load_records",
    "preview",
    "push_to_hub",
    "run",
    "transform_fn",
]

_HOMES = {
    "RunConfig": "fabe_ds.config.settings",
    "RunResult": "fabe_ds.report.result",
    "export_records": "fabe_ds.formats.json.write",
    "load_records": "fabe_ds.formats.json.load",
    "push_to_hub": "fabe_ds.hub",
    "preview": "fabe_ds.tools.preview",
    "run": "fabe_ds.pipeline",
    "transform_fn": "fabe_ds.transform",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Imported when first used: `fabe-ds --help` needs neither datasets nor aiohttp.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
