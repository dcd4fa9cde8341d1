"""What `device=` means in this process: which device, or why there is none."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ._errors import DeviceError, RequestError

if TYPE_CHECKING:
    from ._batch import Note

_NAMES = re.compile(r"cpu|cuda(:(\d+|(GPU|MIG)-[0-9A-Za-z-]+))?|sim:\d+")


def choose(device: Any, framework: str) -> tuple[str, bool]:
    """The device, and whether it was only assumed: absent, and `framework` has a GPU here.

    Of CUDA it is `cuda:N` as this process counts, or a UUID.
    """
    if device is None:
        return assumed(framework)
    # A torch.device says what it is as text.
    name = device if isinstance(device, str) else str(device)
    if not _NAMES.fullmatch(name):
        raise RequestError(f'device must be "cpu", "cuda" or "cuda:N", found {device!r}')
    if not name.startswith("cuda"):
        return name, False
    if framework == "numpy":
        raise RequestError(
            f'device={name!r} and framework="numpy": numpy has no arrays on a GPU; say framework="torch" or '
            '"jax", or device="cpu"'
        )
    missing = _lacks(framework)
    if missing:
        raise DeviceError(f"device={name!r}: {missing}; or say device='cpu'")
    if name == "cuda":
        return f"cuda:{_current(framework)}", False
    return name, False


def assumed(framework: str) -> tuple[str, bool]:
    """What an absent `device=` means: the GPU that `framework` uses, where it has one."""
    if framework == "numpy" or _lacks(framework):
        return "cpu", False
    return f"cuda:{_current(framework)}", True


def _lacks(framework: str) -> str | None:
    """What it lacks to use a GPU in this process."""
    if framework == "torch":
        from . import torch

        return torch.lacks_cuda()
    import jax

    if jax.default_backend() == "gpu":
        return None
    return (
        f"JAX's default backend is {jax.default_backend()!r}: install jax[cuda13] (or jax[cuda12]), and look "
        "at JAX_PLATFORMS"
    )


def _current(framework: str) -> int:
    """The number of the GPU that it uses unless told otherwise."""
    if framework == "torch":
        from . import torch

        return torch.current_device()
    import jax

    number = jax.local_devices()[0].local_hardware_id
    return 0 if number is None else int(number)


def number_of(stream: Any) -> int:
    """The number of a CUDA stream: torch's, CuPy's, one that speaks `__cuda_stream__`, or the number."""
    speaks = getattr(stream, "__cuda_stream__", None)
    if speaks is not None:
        return int(speaks()[1])
    for name in ("cuda_stream", "ptr"):
        number = getattr(stream, name, None)
        if isinstance(number, int):
            return number
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return stream
    raise RequestError(
        f"wanted a CUDA stream (torch.cuda.Stream, cupy.cuda.Stream, or its number), found {stream!r}"
    )


def note_for(framework: str, cuda: int | None) -> Note | None:
    """Tells a native batch on that GPU which stream reads it now. None where there is nothing to tell."""
    if cuda is None or framework != "torch":
        return None
    from . import torch

    return torch.note_on(cuda)
