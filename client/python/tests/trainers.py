"""Trainers on a GPU in processes of their own: what they check batches with, and how they are killed.

Batches are compared with rows that pyarrow read, orders with the one that an undisturbed loader of the host
gives.
"""

from __future__ import annotations

import multiprocessing
import random
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

import robocache as rc

BATCH, STEPS, FPS, FRAMES = 256, 16, 30, 35_965


class Truth:
    """The rows of `action`, and for every frame the last one of its episode, as pyarrow reads them."""

    def __init__(self, action: Any, last: Any) -> None:
        self.action, self.last = action, last

    @classmethod
    def read(cls, dataset: str) -> Truth:
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = sorted(Path(dataset).glob("data/*/*.parquet"))
        table = pa.concat_tables(
            [pq.read_table(f, columns=["index", "episode_index", "action"]) for f in files]
        )
        table = table.sort_by("index").combine_chunks()
        assert table["index"].to_numpy().tolist() == list(range(FRAMES))
        action = np.array(table["action"].chunk(0).flatten().to_numpy(), np.float32).reshape(FRAMES, -1)
        _, first, count = np.unique(table["episode_index"].to_numpy(), return_index=True, return_counts=True)
        return cls(action, np.repeat(first + count - 1, count))

    def save(self, folder: Path) -> None:
        np.save(folder / "action.npy", self.action)
        np.save(folder / "last.npy", self.last)

    @classmethod
    def on_gpu(cls, folder: str, device: str = "cuda:0") -> Truth:
        made = cls(
            *(torch.from_numpy(np.load(f"{folder}/{name}.npy")).to(device) for name in ("action", "last"))
        )
        torch.cuda.synchronize(device)
        return made

    def differs(self, action: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """How many values are not the rows that LeRobot's `delta_timestamps` mean. Nothing waits for it."""
        rows = index[:, None] + torch.arange(STEPS, device=index.device)
        return (self.action[torch.minimum(rows, self.last[index][:, None])] != action).sum()


def loader_of(path: str, **arguments: Any) -> rc.DataLoader:
    deltas = {"action": [k / FPS for k in range(STEPS)]}
    usual = {
        "batch_size": BATCH,
        "delta_timestamps": deltas,
        "device": "cuda",
        "framework": "torch",
        "seed": 7,
    }
    return rc.DataLoader(path, **(usual | arguments))


def uninterrupted(path: str, socket: str, epochs: int, **arguments: Any) -> list[list[int]]:
    """Ids by epoch, in the order that a loader of the host gives them."""
    loader = loader_of(path, socket=socket, device="cpu", framework="numpy", **arguments)
    found = [[int(i) for batch in loader for i in batch.sample_ids] for _ in range(epochs)]
    loader.close()
    return found


def trainer(
    said: Connection, path: str, truth: str, socket: str, state: Any, seed: int, arguments: dict[str, Any]
) -> None:
    """Checks batches and says so, for ever. At any moment kernels are reading a slot on another stream."""
    warnings.simplefilter("ignore", rc.RoboCacheWarning)
    torch.cuda.set_device(arguments["device"])
    right, rng, aside = Truth.on_gpu(truth, arguments["device"]), random.Random(seed), torch.cuda.Stream()
    loader = loader_of(path, socket=socket, **arguments)
    if state is not None:
        loader.load_state_dict(state)
    while True:
        for batch in loader:
            wrong = int(right.differs(batch["action"], batch["index"]))
            with torch.cuda.stream(aside):
                action = batch["action"]
                torch.cuda._sleep(rng.randrange(20_000_000))
                action.clone()
            said.send((batch.epoch, batch.sample_ids.tolist(), loader.state_dict(), wrong))
            del batch, action


class Trainer:
    """A `trainer`, killed and started again from the last state that it told of."""

    def __init__(self, *arguments: Any, **of_loader: Any) -> None:
        self._arguments, self._of_loader = arguments, {"device": "cuda:0"} | of_loader
        self._starts = 0
        self.state: Any = None
        self.ids: dict[int, list[int]] = {}
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "robocache", "trainers"])
        self.said, say = context.Pipe(duplex=False)
        self._starts += 1
        arguments = (say, *self._arguments, self.state, self._starts, self._of_loader)
        self.process = context.Process(target=trainer, args=arguments, daemon=True)
        self.process.start()
        say.close()
        self.since = 0

    def take(self) -> None:
        """One batch that it told of. What it was about to tell when it died was not used."""
        try:
            epoch, ids, self.state, wrong = self.said.recv()
        except (EOFError, OSError):
            self.process.join()
            raise AssertionError(f"the trainer ended by itself with {self.process.exitcode}") from None
        assert wrong == 0
        self.ids.setdefault(epoch, []).extend(ids)
        self.since += 1

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.said.close()


def take_turns(
    trainers: list[Trainer], until: Callable[[Trainer], bool], then: Callable[[Trainer], None]
) -> None:
    """Batches of all, as they come; `then` where `until`, once each time."""
    going = list(trainers)
    while going:
        for ready in wait([one.said for one in going]):
            one = next(one for one in going if one.said is ready)
            one.take()
            if until(one):
                then(one)
        going = [one for one in going if one.process.is_alive()]


def end(trainers: list[Trainer], epochs: int) -> None:
    """Each goes on until it has `epochs` whole epochs, and is killed."""
    take_turns(trainers, lambda one: max(one.ids) >= epochs, Trainer.kill)
