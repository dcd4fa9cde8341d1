"""state_dict and load_state_dict: the exact batch, whatever happened before."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

import robocache as rc

ONE = {"action": rc.Window(at=[0.0])}


def loader_of(path: str, **arguments: Any) -> rc.DataLoader:
    return rc.DataLoader(path, **({"batch_size": 500, "windows": ONE, "framework": "numpy"} | arguments))


def ids(loader: Any) -> list[int]:
    return [int(i) for batch in loader for i in batch["index"]]


def take(loader: rc.DataLoader, batches: int) -> list[int]:
    found: list[int] = []
    for _, batch in zip(range(batches), loader, strict=False):
        found += batch["index"].tolist()
    return found


def test_a_state_is_small_plain_and_complete(g1: str, sock: str) -> None:
    loader = loader_of(g1, seed=5)
    state = loader.state_dict()
    assert state == {
        "version": 1,
        "seed": 5,
        "shuffle": True,
        "epoch": 0,
        "consumed": 0,
        "fingerprint": loader.info["fingerprint"],
        "batch_size": 500,
        "world_size": 1,
    }
    assert len(json.dumps(state)) < 1024
    assert len(pickle.dumps(state)) < 1024


@pytest.mark.parametrize("done", [0, 1, 7, 71, 72])
def test_a_resumed_loader_goes_on_at_the_exact_batch(g1: str, sock: str, done: int) -> None:
    whole = loader_of(g1)
    first, second = ids(whole), ids(whole)
    loader = loader_of(g1)
    epoch = iter(loader)
    seen: list[int] = []
    for _ in range(done):
        seen += next(epoch)["index"].tolist()
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = loader_of(g1, slots=7)
    resumed.load_state_dict(state)
    if done == 72:
        assert (state["epoch"], state["consumed"]) == (1, 0)
        assert ids(resumed) == second
    else:
        assert state["consumed"] == done * 500
        assert seen + ids(resumed) == first
        assert ids(resumed) == second


def test_a_state_may_be_loaded_while_iterating(g1: str, sock: str) -> None:
    loader = loader_of(g1)
    first = ids(loader_of(g1))
    epoch = iter(loader)
    next(epoch)
    state = loader.state_dict()
    for _ in range(6):
        next(epoch)
    loader.load_state_dict(state)
    with pytest.raises(rc.RoboCacheError, match="newest iterator"):
        next(epoch)
    assert ids(loader) == first[500:]


def test_another_world_size_and_batch_size_go_on_where_the_others_stopped(g1: str, sock: str) -> None:
    seen: list[int] = []
    states = []
    for rank in range(2):
        loader = loader_of(g1, rank=rank, world_size=2)
        seen += take(loader, 9)
        states.append(loader.state_dict())
    assert states[0] == states[1]
    assert states[0]["consumed"] == 9 * 500 * 2
    for rank in range(3):
        loader = loader_of(g1, rank=rank, world_size=3, batch_size=333)
        loader.load_state_dict(states[0])
        seen += ids(loader)
    assert sorted(seen) == list(range(35_965))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, "its seed is 0, this loader's 1"),
        ({"shuffle": False}, "its shuffle is True"),
        ({"episodes": [0, 1]}, "its fingerprint is .*dataset, anchors or episodes"),
        ({"anchors": "episodes"}, "its fingerprint is"),
    ],
)
def test_a_state_of_another_loader_is_refused(
    g1: str, sock: str, arguments: dict[str, Any], message: str
) -> None:
    state = loader_of(g1).state_dict()
    loader = loader_of(g1, **arguments)
    with pytest.raises(rc.StateError, match=message):
        loader.load_state_dict(state)
    assert loader.state_dict()["consumed"] == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 2}, "version 2, this robocache reads version 1"),
        ({"epoch": -1}, "epoch must be a whole number"),
        ({"consumed": 1.5}, "consumed must be a whole number"),
    ],
)
def test_a_state_that_cannot_be_is_refused(g1: str, sock: str, changed: dict[str, Any], message: str) -> None:
    loader = loader_of(g1)
    with pytest.raises(rc.RoboCacheError, match=message):
        loader.load_state_dict(loader.state_dict() | changed)
    with pytest.raises(rc.StateError, match="lacks version, seed"):
        loader.load_state_dict({})
    with pytest.raises(rc.StateError, match="found list"):
        loader.load_state_dict([])  # type: ignore[arg-type]


def test_set_epoch_chooses_the_epoch_of_the_next_for(g1: str, sock: str) -> None:
    loader = loader_of(g1)
    epochs = [ids(loader) for _ in range(3)]
    for epoch in (2, 0, 1):
        loader.set_epoch(epoch)
        assert loader.epoch == epoch
        assert ids(loader) == epochs[epoch]
    with pytest.raises(rc.RequestError, match="epoch must be a whole number from 0, found -1"):
        loader.set_epoch(-1)
