"""Torch's side: views as tensors, the loader as an `IterableDataset`. The only file that imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.dlpack import from_dlpack

from ._batch import Batch
from ._loader import DataLoader

if TYPE_CHECKING:
    from . import _robocache


def view(tensor: _robocache.Tensor) -> torch.Tensor:
    """The column as a tensor over the slot's own memory, mapped read-only: `clone()` before a write."""
    made: torch.Tensor = from_dlpack(tensor)
    return made


class TorchDataLoader(DataLoader, IterableDataset[Batch]):
    """What `robocache.DataLoader(framework="torch")` is: the same loader, which torch's DataLoader also
    takes.

    In worker `w` of `n` it is the loader of rank `rank * n + w` of `world_size * n`.
    """

    def _shard(self) -> tuple[int, int]:
        rank, world_size = super()._shard()
        worker = get_worker_info()
        if worker is None:
            return rank, world_size
        return rank * worker.num_workers + worker.id, world_size * worker.num_workers
