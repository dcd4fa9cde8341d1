"""The contract of `robocache.DataLoader`, on a real dataset through a real daemon."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

import robocache as rc

FRAMES = 35_965
WINDOWS = {
    "observation.state": rc.Window(hz=30, steps=2, start=-1 / 30),
    "action": rc.Window(hz=50, steps=50),
}


def loader_of(path: str, **arguments: Any) -> rc.DataLoader:
    return rc.DataLoader(path, **({"batch_size": 64, "windows": WINDOWS, "framework": "numpy"} | arguments))


def ids(loader: Any) -> list[int]:
    return [int(i) for batch in loader for i in batch["index"]]


def test_a_batch_is_a_mapping_of_the_promised_columns(g1: str, sock: str) -> None:
    loader = loader_of(g1)
    batch = next(iter(loader))
    assert isinstance(batch, Mapping)
    assert len(batch) == len(list(batch)) == len(dict(batch))
    assert set(batch) == set(loader.columns)
    assert "action" in batch
    assert "nothing" not in batch
    assert batch.get("nothing", 7) == 7
    with pytest.raises(KeyError, match="nothing"):
        batch["nothing"]
    wanted = {
        "observation.state": ("float32", (64, 2, 26)),
        "observation.state_is_pad": ("bool", (64, 2)),
        "action": ("float32", (64, 50, 26)),
        "action_is_pad": ("bool", (64, 50)),
        "index": ("int64", (64,)),
        "episode_index": ("int64", (64,)),
        "frame_index": ("int64", (64,)),
        "task_index": ("int64", (64,)),
        "timestamp": ("float32", (64,)),
        "t_ns": ("int64", (64,)),
    }
    for key, (dtype, shape) in wanted.items():
        assert (batch[key].dtype.name, batch[key].shape) == (dtype, shape), key
        assert loader.columns[key]["dtype"] == dtype
        assert loader.columns[key]["shape"] == shape[1:]
    assert batch["task"] == ["Pick up the yellow bottle on the table."] * 64
    assert batch["action"] is batch["action"]
    assert (batch.rows, batch.epoch, batch.batch_index) == (64, 0, 0)
    assert batch.sample_ids is not None
    assert len(set(batch.sample_ids.tolist())) == 64
    assert "action: float32[64, 50, 26]" in repr(batch)
    assert repr(batch).startswith("Batch(rows=64, epoch=0, index=0, {")
    # 30 fps from frame 0 on, exactly.
    np.testing.assert_array_equal(batch["t_ns"], np.round(batch["frame_index"] * 1e9 / 30).astype(np.int64))
    np.testing.assert_array_equal(batch["timestamp"], (batch["frame_index"] / 30).astype(np.float32))


def test_what_is_odd_about_a_dataset_is_a_warning_when_it_is_opened(g1: str, sock: str) -> None:
    with pytest.warns(rc.RoboCacheWarning, match=r"wrong data file for 4 of 100 episodes"):
        loader_of(g1)


def test_without_windows_every_numeric_feature_comes_at_the_anchor(g1: str, sock: str) -> None:
    batch = next(iter(loader_of(g1, windows=None)))
    assert batch["action"].shape == batch["observation.state"].shape == (64, 26)
    assert "action_is_pad" not in batch


def test_features_adds_streams_at_the_anchor(g1: str, sock: str) -> None:
    windows = {"action": rc.Window(at=[0.0, 1 / 30])}
    assert "observation.state" not in next(iter(loader_of(g1, windows=windows)))
    batch = next(iter(loader_of(g1, windows=windows, features=["observation.state"])))
    assert batch["observation.state"].shape == (64, 26)
    assert batch["action"].shape == (64, 2, 26)


def test_dtypes_are_as_asked_in_every_framework(g1: str, sock: str) -> None:
    dtype = {"default": "float16", "action": "bfloat16"}
    exact = next(iter(loader_of(g1, shuffle=False)))
    batch = next(iter(loader_of(g1, shuffle=False, dtype=dtype)))
    assert batch["action"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(batch["action"], exact["action"].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(batch["observation.state"], exact["observation.state"].astype(np.float16))
    batch = next(iter(loader_of(g1, shuffle=False, dtype=dtype, framework="torch")))
    assert batch["action"].dtype == torch.bfloat16
    assert batch["observation.state"].dtype == torch.float16
    assert batch["action_is_pad"].dtype == torch.bool
    assert torch.equal(batch["action"].float(), torch.tensor(exact["action"]).bfloat16().float())
    batch = next(iter(loader_of(g1, shuffle=False, dtype=dtype, framework="jax")))
    assert isinstance(batch["action"], jax.Array)
    assert batch["action"].dtype == ml_dtypes.bfloat16
    assert batch["action_is_pad"].dtype == np.bool_
    # Never cut to 32 bits, whether JAX keeps 64 or not.
    for wide in (False, True):
        with jax.enable_x64(wide):
            batch = next(iter(loader_of(g1, shuffle=False, framework="jax")))
            assert isinstance(batch["t_ns"], jax.Array) is wide
            assert batch["t_ns"].dtype == np.int64
            np.testing.assert_array_equal(np.asarray(batch["t_ns"]), exact["t_ns"])
    assert batch["task"] == exact["task"]


def test_torch_is_the_framework_where_it_can_be_imported(g1: str, sock: str) -> None:
    loader = rc.DataLoader(g1, batch_size=2)
    assert isinstance(loader, rc.DataLoader)
    assert isinstance(loader, torch.utils.data.IterableDataset)
    assert isinstance(next(iter(loader))["action"], torch.Tensor)


def test_numpy_and_torch_read_the_slot_itself_and_numpy_refuses_writes(g1: str, sock: str) -> None:
    loader = loader_of(g1)
    batch = next(iter(loader))
    assert batch._raw is not None
    address = torch.from_dlpack(batch._raw.column("action")).data_ptr()
    assert batch["action"].ctypes.data == address
    assert not batch["action"].flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        batch["action"][0] = 0
    with open("/proc/self/maps") as maps:
        spans = (line.split() for line in maps)
        rights = [
            span[1]
            for span in spans
            if int(span[0].split("-")[0], 16) <= address < int(span[0].split("-")[1], 16)
        ]
    assert rights == ["r--s"]


def test_each_for_is_one_epoch_and_the_next_for_the_next(g1: str, sock: str) -> None:
    loader = loader_of(g1, batch_size=1000)
    assert len(loader) == 36
    first, second = ids(loader), ids(loader)
    assert loader.epoch == 2
    assert sorted(first) == sorted(second) == list(range(FRAMES))
    assert first != second
    again = loader_of(g1, batch_size=1000, slots=2)
    assert ids(again) == first
    again.set_epoch(0)
    assert ids(again) == first
    other = loader_of(g1, batch_size=1000, seed=1)
    assert ids(other) != first


def test_a_for_left_by_break_counts_as_its_epoch(g1: str, sock: str) -> None:
    whole = loader_of(g1, batch_size=1000)
    epochs = [ids(whole) for _ in range(2)]
    loader = loader_of(g1, batch_size=1000)
    for n, batch in enumerate(loader):
        assert batch["index"].tolist() == epochs[0][n * 1000 : (n + 1) * 1000]
        if n == 3:
            break
    assert ids(loader) == epochs[1]


def test_an_iterator_whose_loader_moved_says_so(g1: str, sock: str) -> None:
    loader = loader_of(g1)
    old = iter(loader)
    next(old)
    new = iter(loader)
    assert next(new).epoch == 1
    with pytest.raises(rc.RoboCacheError, match="newest iterator"):
        next(old)


def test_an_iterator_at_its_end_stays_there(g1: str, sock: str) -> None:
    loader = loader_of(g1, batch_size=20_000)
    epoch = iter(loader)
    assert len(list(epoch)) == 2
    assert next(epoch, None) is None
    assert loader.epoch == 1
    assert next(epoch, None) is None
    assert next(iter(loader)).epoch == 1


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_ranks_see_every_sample_exactly_once(g1: str, sock: str, world_size: int, drop_last: bool) -> None:
    seen: list[int] = []
    lengths = []
    for rank in range(world_size):
        loader = loader_of(
            g1,
            batch_size=300,
            windows={"action": rc.Window(at=[0.0])},
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        batches = [batch.sample_ids.tolist() for batch in loader if batch.sample_ids is not None]
        assert len(batches) == len(loader)
        lengths.append(len(batches))
        if drop_last:
            assert {len(batch) for batch in batches} == {300}
        seen += [i for batch in batches for i in batch]
    assert len(set(seen)) == len(seen)
    if drop_last:
        assert set(lengths) == {FRAMES // (300 * world_size)}
    else:
        assert sorted(seen) == list(range(FRAMES))


def test_the_environments_rank_is_taken(g1: str, sock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    loader = loader_of(g1, shuffle=False)
    assert (loader.info["rank"], loader.info["world_size"]) == (1, 2)
    assert next(iter(loader))["index"].tolist() == list(range(1, 129, 2))


def test_episodes_restricts_the_samples(g1: str, sock: str) -> None:
    loader = loader_of(g1, episodes=[3, 17], shuffle=False, windows={"action": rc.Window(at=[0.0])})
    episodes = [int(e) for batch in loader for e in batch["episode_index"]]
    assert set(episodes) == {3, 17}
    assert len(episodes) == loader.info["anchors"]


def test_anchors_may_be_episodes_or_a_grid(g1: str, sock: str) -> None:
    loader = loader_of(g1, anchors="episodes", shuffle=False)
    batch = next(iter(loader))
    assert loader.info["anchors"] == 100
    assert batch["frame_index"].tolist() == [0] * 64
    grid = loader_of(g1, anchors=rc.Every(hz=10), shuffle=False)
    assert np.diff(next(iter(grid))["t_ns"][:10]).tolist() == [100_000_000] * 9


def test_threads_share_an_iterator_without_loss(g1: str, sock: str) -> None:
    loader = loader_of(g1, batch_size=100, windows={"action": rc.Window(at=[0.0])}, slots=16)
    epoch = iter(loader)
    found: list[list[int]] = [[] for _ in range(4)]

    def take(mine: list[int]) -> None:
        for batch in epoch:
            mine.extend(batch["index"].tolist())

    threads = [threading.Thread(target=take, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(i for mine in found for i in mine) == list(range(FRAMES))
    assert loader.epoch == 1


def test_waiting_lets_other_threads_run(g1: str, sock: str) -> None:
    """All slots but none to come: the waiting thread must not keep the interpreter."""
    loader = loader_of(g1, slots=2)
    epoch = iter(loader)
    held = [next(epoch), next(epoch)]
    ran = threading.Event()
    other = threading.Thread(target=ran.set)
    other.start()
    with pytest.raises(rc.AllSlotsHeld, match="slots"):
        next(epoch)
    assert ran.is_set()
    other.join()
    # Nothing is lost by the error.
    del held
    assert next(epoch).batch_index == 2


def test_a_batch_outlives_its_loader_and_its_close(g1: str, sock: str) -> None:
    with loader_of(g1) as loader:
        batch = next(iter(loader))
        wanted = batch["action"].copy()
    np.testing.assert_array_equal(batch["action"], wanted)
    assert batch["observation.state"].shape == (64, 2, 26)
    for call in (loader.state_dict, lambda: iter(loader), loader.stats, lambda: len(loader)):
        with pytest.raises(rc.LoaderClosed):
            call()
    loader.close()


def test_columns_info_and_stats_tell_what_there_is(g1: str, sock: str, daemon: Any) -> None:
    loader = loader_of(g1)
    assert loader.columns["task"]["role"] == "text"
    assert loader.columns["action_is_pad"]["role"] == "mask"
    info = loader.info
    assert info["anchors"] == FRAMES
    assert info["batch_size"] == 64
    assert info["daemon_pid"] == daemon.pid
    json.dumps(info)
    stats = loader.stats()
    assert stats["pid"] == daemon.pid
    assert repr(loader) == f"<robocache.DataLoader {g1!r}, batch_size=64>"


def test_a_dataset_that_is_not_there_is_named(sock: str, tmp_path: Any) -> None:
    with pytest.raises(rc.DatasetError, match="nowhere"):
        loader_of(str(tmp_path / "nowhere"))
    with pytest.raises(rc.DatasetError, match="no-such-name"):
        loader_of("no-such-name")
    (tmp_path / "empty").mkdir()
    with pytest.raises(rc.DatasetError, match="empty"):
        loader_of(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"windows": {"acton": rc.Window(at=[0.0])}}, "acton.*action"),
        ({"windows": {"action": rc.Window(hz=50, steps=10**9)}}, "action|steps|memory|bytes"),
        ({"windows": {"action": rc.Window(at=[0.0], interp="slerp")}}, "(?i)slerp.*4 elements"),
        ({"windows": None, "delta_timestamps": {"action": [0.01]}}, "0.01"),
        ({"features": ["nothing"]}, "nothing"),
        ({"episodes": [1000]}, "1000"),
        ({"anchor_stream": "nothing"}, "nothing"),
        ({"dtype": {"nothing": "float16"}}, "nothing"),
    ],
)
def test_what_the_dataset_cannot_give_is_refused(
    g1: str, sock: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(rc.RoboCacheError, match=message):
        loader_of(g1, **arguments)
    # The daemon lives on.
    assert next(iter(loader_of(g1))).rows == 64


def test_no_daemon_is_an_error_that_names_the_socket_and_the_cure(g1: str, tmp_path: Any) -> None:
    with pytest.raises(rc.DaemonNotFound, match=r"nobody\.sock.*robocached serve"):
        loader_of(g1, socket=tmp_path / "nobody.sock")


def test_next_on_a_ready_batch_makes_no_tensors(g1: str, sock: str) -> None:
    loader = loader_of(g1)
    batch = next(iter(loader))
    assert batch._cache == {}
    assert batch["index"] is not None
    assert list(batch._cache) == ["index"]


@pytest.mark.parametrize("waiting", ["next", "full"])
def test_ctrl_c_ends_the_wait(g1: str, own_daemon: Any, waiting: str) -> None:
    """SIGINT while the daemon, stopped, delivers nothing."""
    script = f"""
        import os, signal, sys
        import robocache as rc
        # What a shell starts in the background ignores it, and so do its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        loader = rc.DataLoader({g1!r}, batch_size=64, framework="numpy", socket={own_daemon.socket!r})
        epoch = iter(loader)
        next(epoch)
        os.kill({own_daemon.pid}, signal.SIGSTOP)
        try:
            print("waiting", flush=True)  # inside: the signal may come at once
            while True:
                next(epoch)
        except KeyboardInterrupt:
            print("interrupted", loader.epoch, flush=True)
    """
    import os
    import signal

    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waiting\n"
            if waiting == "full":
                # Until it sleeps: its ring is drained and the batches are collected.
                while "S" not in process_state(process.pid):
                    time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted 0\n"
            assert process.wait() == 0
        finally:
            process.kill()  # it would be waited for without end
            os.kill(own_daemon.pid, signal.SIGCONT)


def process_state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0]


def test_a_dead_daemon_is_an_error_and_the_state_goes_on_with_the_next(
    g1: str, daemon: Any, own_daemon: Any
) -> None:
    whole = ids(loader_of(g1, batch_size=500, socket=daemon.socket))
    loader = loader_of(g1, batch_size=500, socket=own_daemon.socket)
    epoch = iter(loader)
    seen = [int(i) for _ in range(5) for i in next(epoch)["index"]]
    own_daemon.kill()

    def take_what_was_published() -> None:
        for batch in epoch:
            seen.extend(batch["index"].tolist())

    with pytest.raises(rc.DaemonGone, match="state"):
        take_what_was_published()
    state = loader.state_dict()
    after = loader_of(g1, batch_size=500, socket=daemon.socket)
    after.load_state_dict(state)
    assert seen + ids(after) == whole
