"""Torch's side: views as tensors, the loader as an `IterableDataset`. The only file that imports torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.dlpack import from_dlpack

from ._batch import Batch
from ._loader import DataLoader

if TYPE_CHECKING:
    from . import _robocache
    from ._batch import Note


def host_view(tensor: _robocache.Tensor) -> torch.Tensor:
    """A column in host memory as a tensor over the slot's own memory: `clone()` before a write."""
    # Given a capsule, torch does not first ask for devices and streams, which takes as long as all the rest.
    made: torch.Tensor = from_dlpack(tensor.__dlpack__())
    return made


def cuda_view(tensor: _robocache.Tensor) -> torch.Tensor:
    """A column on a CUDA device as a tensor over the slot's own memory: `clone()` before a write.

    The current stream of that device is made to wait for the batch, and noted.
    """
    # As torch would, given the tensor; but it looks the device up by name, which takes most of its 10 us.
    _, device = tensor.__dlpack_device__()
    made: torch.Tensor = from_dlpack(tensor.__dlpack__(stream=_current_stream(device)))
    return made


def _public_current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


#: The number of the stream that is current on a device. Between two steps of a training loop, when no cache
#: holds its code, torch's public function takes 26 us. The other is what torch's compiled code calls.
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_current_stream)


def lacks_cuda() -> str | None:
    """What is missing for torch to use a GPU in this process; None where nothing is."""
    if torch.cuda.is_available():
        # It says so as well in a child of a process that uses CUDA, where nothing works.
        if torch.cuda._is_in_bad_fork():
            return (
                "CUDA cannot be used in a process forked from one that uses it: start workers with "
                'multiprocessing_context="spawn", or none (num_workers=0: the daemon prefetches)'
            )
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install a build with it"
    return (
        "torch finds no CUDA device: look at nvidia-smi (driver), CUDA_VISIBLE_DEVICES, and the GPUs that "
        "the container was given"
    )


def current_device() -> int:
    """The number of torch's current GPU."""
    return torch.cuda.current_device()


def note_on(device: int) -> Note:
    """Tells a native batch which stream of that GPU is current."""
    torch.cuda.init()  # type: ignore[no-untyped-call]  # which asking for a stream by number leaves out

    def note(raw: _robocache.Batch) -> None:
        raw.use_on(_current_stream(device))

    return note


class TorchDataLoader(DataLoader, IterableDataset[Batch]):
    """What `robocache.DataLoader(framework="torch")` is: the same loader, which torch's DataLoader also
    takes.

    In worker `w` of `n` it is the loader of rank `rank * n + w` of `world_size * n`.
    """

    def _next(self, run: int, epoch: int) -> Batch | None:
        batch = super()._next(run, epoch)
        # A worker hands it to another process. From a GPU torch would share it, which it can do with its own
        # memory only, and by then it has made a plain mapping of the batch.
        if batch is not None and self._note is not None and get_worker_info() is not None:
            return batch.copy()
        return batch

    def _shard(self) -> tuple[int, int]:
        rank, world_size = super()._shard()
        worker = get_worker_info()
        if worker is None:
            return rank, world_size
        return rank * worker.num_workers + worker.id, world_size * worker.num_workers
