"""torch's DataLoader doing the same work: episodes in RAM, resampled by numpy in worker processes, pinned,
copied to the device.

It has the easier half: its store is decoded already and laid out for it, and brackets and weights are worked
out once.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

BATCH, ROWS, STEPS, DIM = 32, 500, 250, 256
#: Batches a worker makes ahead.
AHEAD = 4


class Resampled(IterableDataset):
    """Endless batches `[32, 250, 256]` of bfloat16: random episodes at 50 Hz, from `start` s on."""

    def __init__(self, store: torch.Tensor, start: float) -> None:
        self.store = store
        position = (start + np.arange(STEPS) / 50) * 100
        self.low = np.floor(position + 1e-4).astype(int)
        self.weight = (position - self.low).astype(np.float32)[:, None]

    def __iter__(self) -> Iterator[torch.Tensor]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        rng = np.random.default_rng(worker.id if worker else 0)
        store = self.store.numpy()
        out, above = np.empty((BATCH, STEPS, DIM), np.float32), np.empty((STEPS, DIM), np.float32)
        while True:
            for target, episode in zip(out, rng.integers(len(store), size=BATCH), strict=True):
                np.take(store[episode], self.low, axis=0, out=target, mode="clip")
                np.take(store[episode], self.low + 1, axis=0, out=above, mode="clip")
                np.subtract(above, target, out=above)
                np.multiply(above, self.weight, out=above)
                np.add(target, above, out=target)
            # Half the bytes to hand over and to copy, as the daemon delivers them.
            yield torch.from_numpy(out).to(torch.bfloat16)


def store(episodes: int) -> torch.Tensor:
    """In memory that the workers share."""
    made = torch.empty(episodes, ROWS, DIM).share_memory_()
    rng = np.random.default_rng(0)
    one = rng.standard_normal((ROWS, DIM), np.float32)
    for i, episode in enumerate(made.numpy()):
        np.multiply(one, 1 + i / episodes, out=episode)
    return made


def batches(
    data: torch.Tensor, workers: int, start: float, device: str
) -> tuple[Any, Iterator[torch.Tensor]]:
    """The loader's iterator, which knows its workers, and its batches on the device."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy"])
    loader = DataLoader(
        Resampled(data, start),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        pin_memory=device != "cpu",
        prefetch_factor=AHEAD,
    )
    iterator = iter(loader)
    return iterator, (batch.to(device, non_blocking=True) for batch in iterator)
