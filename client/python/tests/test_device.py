"""`device=`: what it means where there is no GPU, and the whole path on a daemon's simulated one."""

from __future__ import annotations

import collections
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import robocache as rc
from robocache import _device

WINDOWS = {"action": rc.Window(hz=30, steps=8), "observation.state": rc.Window(at=[-0.1, 0.0])}
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a GPU here")


@pytest.fixture(scope="module")
def simulating(daemon_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A daemon with two simulated GPUs."""
    from conftest import Daemon

    folder = tmp_path_factory.mktemp("simulating")
    folder.chmod(0o700)
    running = Daemon(daemon_program, folder, "--simulate-gpus", "2")
    yield running
    running.stop()
    assert running.process.returncode == 0, "".join(running.log)


def loader_of(path: str, daemon: Any, **arguments: Any) -> rc.DataLoader:
    given = {"batch_size": 32, "windows": WINDOWS, "framework": "torch", "socket": daemon.socket}
    return rc.DataLoader(path, **(given | arguments))


@pytest.mark.parametrize(
    ("device", "framework", "wrong"),
    [
        ("gpu", "torch", 'device must be "cpu", "cuda" or "cuda:N", found \'gpu\''),
        ("cuda:", "torch", "found 'cuda:'"),
        ("cuda:-1", "torch", "found 'cuda:-1'"),
        (0, "torch", "found 0"),
        ("cuda", "numpy", "numpy has no arrays on a GPU"),
        ("cuda:1", "numpy", "numpy has no arrays on a GPU"),
    ],
)
def test_what_is_no_device_is_refused_before_anything_is_asked(
    device: Any, framework: str, wrong: str
) -> None:
    with pytest.raises(rc.RequestError, match=wrong):
        rc.DataLoader("/data", device=device, framework=framework)


@NO_GPU
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_gpu_that_the_framework_lacks_is_an_error_that_says_what_is_missing(framework: str) -> None:
    with pytest.raises(rc.DeviceError, match=r"cuda.*: .*(without CUDA|no CUDA device|backend is).*'cpu'"):
        rc.DataLoader("/data", device="cuda", framework=framework)
    with pytest.raises(ValueError, match="cuda:1"):
        rc.DataLoader("/data", device=torch.device("cuda:1"), framework=framework)


@NO_GPU
@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_an_absent_device_is_the_host_where_there_is_no_gpu_and_nothing_is_said(
    g1: str, sock: str, framework: str
) -> None:
    loader = rc.DataLoader(g1, batch_size=4, framework=framework)
    assert loader.device == "cpu"
    batch = next(iter(loader))
    assert batch.device == "cpu"
    batch.record_stream(7)  # of no consequence
    assert batch.copy().device is None
    with pytest.raises(rc.RequestError, match=r"wanted a CUDA stream .* found 'x'"):
        batch.record_stream("x")


def test_a_device_that_the_daemon_lacks_is_an_error_if_named_and_a_warning_if_assumed(
    g1: str, simulating: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(rc.DeviceError, match=r"unsupported_device.*sim:7"):
        loader_of(g1, simulating, device="sim:7")
    monkeypatch.setattr(_device, "assumed", lambda _framework: ("sim:7", True))
    with pytest.warns(
        rc.RoboCacheWarning, match=r"host memory, though torch has a GPU: .*sim:7.*device=\"cpu\""
    ):
        loader = loader_of(g1, simulating)
    assert loader.device == "cpu"
    assert len(next(iter(loader))["action"]) == 32
    # Said once: what is made of the same, in a worker say, is on the host as well and says nothing.
    assert pickle.loads(pickle.dumps(loader)).device == "cpu"


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_an_epoch_on_a_simulated_gpu_equals_one_on_the_host(g1: str, simulating: Any, framework: str) -> None:
    here = loader_of(g1, simulating, device="cpu", framework=framework, episodes=range(10))
    there = loader_of(g1, simulating, device="sim:1", framework=framework, episodes=range(10))
    assert there.device == "sim:1"
    assert "memory" not in there.info["gpu"]
    assert there.columns == here.columns
    count = 0
    for wanted, found in zip(here, there, strict=True):
        assert list(found) == list(wanted)
        for key in wanted:
            if isinstance(wanted[key], list):
                assert found[key] == wanted[key]
            else:
                assert type(found[key]) is type(wanted[key])
                assert np.asarray(found[key]).tobytes() == np.asarray(wanted[key]).tobytes()
        assert repr(found) == repr(wanted)
        count += 1
    assert count == len(here)


def test_slots_of_a_simulated_gpu_go_round_and_held_ones_are_told(g1: str, simulating: Any) -> None:
    loader = loader_of(g1, simulating, device="sim:0", slots=2)
    slots = loader.info["slots"]
    for epoch, batch in enumerate(loader):
        assert batch["action"].shape == (32, 8, 26)
        if epoch == 10 * slots:
            break
    del batch
    gc.collect()
    epoch = iter(loader)
    held = [next(epoch) for _ in range(slots)]
    with pytest.raises(rc.AllSlotsHeld, match=f"all {slots} slots"):
        next(epoch)
    held.clear()
    assert len(next(epoch)["action"]) == 32


def test_a_loader_on_a_simulated_gpu_goes_on_from_its_state(g1: str, simulating: Any) -> None:
    loader = loader_of(g1, simulating, device="sim:0")
    epoch = iter(loader)
    for _ in range(5):
        next(epoch)
    state = loader.state_dict()
    wanted = [next(epoch)["index"].tolist() for _ in range(5)]
    other = loader_of(g1, simulating, device="cpu")
    other.load_state_dict(state)
    assert [batch["index"].tolist() for batch, _ in zip(other, range(5), strict=False)] == wanted


def test_a_daemon_that_dies_is_told_and_what_came_stays(g1: str, daemon_program: str, tmp_path: Path) -> None:
    from conftest import Daemon

    tmp_path.chmod(0o700)
    own = Daemon(daemon_program, tmp_path, "--simulate-gpus", "1")
    loader = loader_of(g1, own, device="sim:0")
    epoch = iter(loader)
    held = next(epoch)
    wanted = held["action"].clone()
    own.kill()
    with pytest.raises(rc.DaemonGone):
        collections.deque(epoch, maxlen=0)
    assert torch.equal(held["action"], wanted)
    assert held["observation.state"].shape == (32, 2, 26)
