"""What this machine can run a model on."""

from __future__ import annotations

from fabe_ds.providers.base import Requirement


def device_of(wanted: str) -> str:
    """The device that torch is told: what `--device` asks for, or the best one for "auto".

    Raises: Requirement where it is not there.
    """
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    if wanted.startswith("cuda") and not cuda:
        raise Requirement(f"--device {wanted}: no CUDA device here; use --device cpu or auto")
    if wanted == "mps" and not mps:
        raise Requirement("--device mps: no Apple GPU here; use --device cpu or auto")
    return wanted


def cpu_has_bf16() -> bool:
    import torch

    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())
