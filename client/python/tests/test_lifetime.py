"""A slot goes back when the last view of its batch is collected, not before and not later."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch

import robocache as rc

WINDOWS = {"action": rc.Window(hz=30, steps=8)}


def loader_of(path: str, **arguments: Any) -> rc.DataLoader:
    return rc.DataLoader(path, **({"batch_size": 32, "windows": WINDOWS, "framework": "numpy"} | arguments))


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_a_view_keeps_its_values_while_the_daemon_refills(g1: str, sock: str, framework: str) -> None:
    loader = loader_of(g1, framework=framework, slots=3)
    epoch = iter(loader)
    batch = next(epoch)
    # Slices, which are views of views.
    kept = batch["action"][:, 2:5]
    wanted = np.asarray(kept).copy()
    del batch
    gc.collect()
    for _ in range(30):
        later = next(epoch)
        np.testing.assert_array_equal(np.asarray(kept), wanted)
    assert later.batch_index == 30
    # Once it is let go, all slots go round again.
    del kept, later
    gc.collect()
    held = [next(epoch), next(epoch), next(epoch)]
    with pytest.raises(rc.AllSlotsHeld):
        next(epoch)
    del held


def test_a_ring_of_two_goes_round_with_plain_loops(g1: str, sock: str) -> None:
    loader = loader_of(g1, slots=2)
    total = 0
    for batch in loader:
        total += len(batch["index"])
        if total >= 32 * 200:
            break
    assert total == 32 * 200


def test_holding_all_slots_says_what_to_do_and_copies_are_the_cure(g1: str, sock: str) -> None:
    loader = loader_of(g1, slots=3)
    epoch = iter(loader)
    held = [next(epoch) for _ in range(3)]
    with pytest.raises(rc.AllSlotsHeld, match=r"3.*(copy|clone).*slots") as caught:
        next(epoch)
    assert isinstance(caught.value, rc.RoboCacheError)
    copies = [batch.copy() for batch in held]
    wanted = [batch["action"].tobytes() for batch in held]
    del held
    gc.collect()
    copies += [next(epoch).copy() for _ in range(6)]
    assert [batch["action"].tobytes() for batch in copies[:3]] == wanted
    assert len({batch["index"].tobytes() for batch in copies}) == 9
    assert copies[0]["action"].flags.writeable


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_a_batch_pickles_and_copies_by_value(g1: str, sock: str, framework: str) -> None:
    loader = loader_of(g1, framework=framework)
    batch = next(iter(loader))
    for made in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch), batch.copy()):
        assert isinstance(made, rc.Batch)
        assert list(made) == list(batch)
        assert made["task"] == batch["task"]
        assert type(made["action"]) is type(batch["action"])
        np.testing.assert_array_equal(np.asarray(made["action"]), np.asarray(batch["action"]))
        assert made.sample_ids is None
        assert "action: float32[32, 8, 26]" in repr(made)
    address = torch.from_dlpack(batch["action"]).data_ptr()
    assert torch.from_dlpack(pickle.loads(pickle.dumps(batch))["action"]).data_ptr() != address


def test_a_batch_is_made_of_any_mapping_as_collate_functions_do(g1: str, sock: str) -> None:
    loader = loader_of(g1, framework="torch")
    batch = next(iter(loader))
    doubled = type(batch)({key: batch[key] for key in batch})
    assert doubled["action"] is batch["action"]
    from torch.utils.data import default_convert

    converted = default_convert(batch)
    assert isinstance(converted, rc.Batch)
    assert torch.equal(converted["action"], batch["action"])
    assert converted["task"] == batch["task"]
    from accelerate.utils import send_to_device

    moved = send_to_device(batch, "cpu")
    assert isinstance(moved, rc.Batch)
    assert torch.equal(moved["action"], batch["action"])


def test_memory_stays_flat_over_many_batches(g1: str, sock: str) -> None:
    import psutil

    loader = loader_of(g1, framework="torch")

    def run(batches: int) -> None:
        for n, batch in enumerate(loader):
            batch["action"].sum()
            if n == batches:
                return

    run(200)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(4):
        run(1000)
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 16 << 20


def test_a_write_through_a_torch_view_ends_the_process_and_not_the_data(g1: str, daemon: Any) -> None:
    """Torch has no read-only tensors; the mapping is. What the documentation says must be so."""
    import signal

    script = f"""
        import resource, robocache as rc
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        loader = rc.DataLoader({g1!r}, batch_size=4, framework="torch", socket={daemon.socket!r})
        batch = next(iter(loader))
        batch["action"].clone().add_(1)
        print("cloned", flush=True)
        batch["action"].add_(1)
        print("written", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "cloned\n"
    assert done.returncode == -signal.SIGSEGV
