"""Batches on a CUDA device: equal to those on the host, fenced by the streams that use them, through deaths.

`torch.cuda._sleep` makes streams late; what a late stream reads must be what was there when it was told to.
"""

from __future__ import annotations

import collections
import copy
import gc
import pickle
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Daemon
from test_layouts import OCTO
from test_multirate import COMMA, husky_manifest, px4_manifest

import robocache as rc

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

WINDOWS = {"action": rc.Window(hz=30, steps=8), "observation.state": rc.Window(at=[-0.1, 0.0])}
#: Cycles; some 50 ms.
LATE = 100_000_000


def loader_of(path: str, daemon: Daemon, **arguments: Any) -> rc.DataLoader:
    given = {"batch_size": 32, "windows": WINDOWS, "framework": "torch", "socket": daemon.socket}
    return rc.DataLoader(path, **(given | arguments))


def indices(path: str, daemon: Daemon, count: int, **arguments: Any) -> list[torch.Tensor]:
    """What the first batches' `index` is, as the host has it."""
    loader = loader_of(path, daemon, device="cpu", **arguments)
    found: list[torch.Tensor] = []
    while len(found) < count:
        found += [batch["index"].clone() for batch, _ in zip(loader, range(count - len(found)), strict=False)]
    return found


def endless(loader: rc.DataLoader) -> Iterator[rc.Batch]:
    while True:
        yield from loader


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8)


# Values


def comma() -> dict[str, Any]:
    offsets = [-0.04, -0.02, 0.0, 0.02, 0.1]
    streams = {
        key: {
            "file": f"{file}.parquet",
            "time": {"column": "t", "unit": "s"},
            "columns": columns,
            "interp": interp,
        }
        for key, (file, columns, interp) in COMMA.items()
    }
    return {
        "manifest": {"layout": "streams", "streams": streams},
        "windows": {key: rc.Window(at=offsets, max_gap=0.05005) for key in COMMA},
        "anchors": rc.Every(hz=50),
    }


def husky(suffix: str) -> dict[str, Any]:
    keys = ["gyro", "imu_attitude", "odometry", "gps", "gps_status"]
    return {
        "manifest": husky_manifest(suffix),
        "windows": {key: rc.Window(at=[-0.5, -0.05, 0.0, 0.05]) for key in keys},
        "anchors": rc.Every(hz=20),
        "dtype": {"gps": "float64"},
    }


def px4() -> dict[str, Any]:
    manifest = px4_manifest()
    return {
        "manifest": manifest,
        "windows": {key: rc.Window(hz=100, steps=6, start=-0.03) for key in manifest["streams"]},
        "anchors": rc.Every(hz=25),
    }


def octo() -> dict[str, Any]:
    return {
        "manifest": OCTO,
        "windows": {
            "observation.state": rc.Window(at=[-0.4, -0.05, 0.0, 1.0]),
            "action": rc.Window(at=[0.0, 0.1, 0.2], interp="nearest"),
        },
        "features": ["instruction", "is_last"],
    }


WHOLE = {
    "g1_v30_conv": ("g1_v30_conv", {"windows": WINDOWS}),
    "g1_v30_conv, deltas": (
        "g1_v30_conv",
        {"delta_timestamps": {"action": [k / 30 for k in range(16)], "observation.state": [-0.5, 0.0]}},
    ),
    "g1_v21": ("g1_v21", {"windows": WINDOWS, "shuffle": True}),
    "comma2k19_seg": ("comma2k19_seg/parquet", comma()),
    "husky_outdoor, Parquet": ("husky_outdoor/data", husky("parquet")),
    "husky_outdoor, Arrow": ("husky_outdoor/data", husky("arrow")),
    "px4_auavx21": ("px4_auavx21/parquet", px4()),
    "octo_bridge": ("octo_bridge", octo()),
}


@pytest.mark.filterwarnings("ignore:video feature")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", WHOLE)
def test_every_batch_of_real_data_equals_the_hosts(data: Path, daemon: Daemon, name: str, dtype: str) -> None:
    folder, given = WHOLE[name]
    dtypes = {"default": dtype} | given.get("dtype", {})
    arguments = {"batch_size": 500, "shuffle": False} | given | {"dtype": dtypes}
    here = rc.DataLoader(data / folder, framework="torch", socket=daemon.socket, device="cpu", **arguments)
    there = rc.DataLoader(data / folder, framework="torch", socket=daemon.socket, device="cuda", **arguments)
    slerped = {
        key
        for key, stream in arguments.get("manifest", {}).get("streams", {}).items()
        if stream.get("interp") == "slerp"
    }
    samples = 0
    for wanted, found in zip(here, there, strict=True):
        assert list(found) == list(wanted)
        samples += len(found["index"])
        for key in wanted:
            if isinstance(wanted[key], list):
                assert found[key] == wanted[key]
                continue
            assert (found[key].shape, found[key].dtype) == (wanted[key].shape, wanted[key].dtype)
            assert found[key].device == torch.device(there.device)
            if key in slerped:
                # One ulp of the output's dtype, at the scale of a unit quaternion.
                ulp = 2.0 ** -{"float32": 24, "bfloat16": 8, "float16": 11}[dtype]
                apart = (found[key].cpu().double() - wanted[key].double()).abs().max().item()
                assert apart <= ulp, f"{key}: {apart}"
            else:
                assert torch.equal(bits(found[key]), bits(wanted[key])), key
    assert samples == here.info["anchors"]


def test_an_absent_device_is_torchs_current_gpu(g1: str, daemon: Daemon) -> None:
    loader = loader_of(g1, daemon)
    assert loader.device == f"cuda:{torch.cuda.current_device()}"
    batch = next(iter(loader))
    assert batch.device == loader.device
    assert batch["action"].is_cuda
    assert isinstance(batch["task"], list)
    assert "handle" not in repr(loader.info)
    for named in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)):
        assert loader_of(g1, daemon, device=named).device == "cuda:0"


def test_a_device_that_this_process_does_not_see_is_refused(g1: str, daemon: Daemon) -> None:
    with pytest.raises(rc.DeviceError, match=r"cuda:77.*not among those that this process sees: GPU-"):
        loader_of(g1, daemon, device="cuda:77")


def test_tensors_are_views_of_the_ring(g1: str, daemon: Daemon) -> None:
    """Memory reserved by torch does not grow, and a slot's address comes again."""
    loader = loader_of(g1, daemon)
    torch.cuda.synchronize()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    addresses = collections.Counter()
    for batch, _ in zip(endless(loader), range(500), strict=False):
        assert batch["action"] is batch["action"]
        addresses[batch["action"].data_ptr()] += 1
    assert (torch.cuda.memory_reserved(), torch.cuda.memory_allocated()) == (reserved, allocated)
    assert len(addresses) <= loader.info["slots"]


# Streams


def test_the_current_stream_device_and_context_stay_as_they_are(g1: str, daemon: Daemon) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loader = loader_of(g1, daemon)
        batch = next(iter(loader))
        batch["action"].sum()
        del batch
        loader.close()
        assert torch.cuda.current_stream() == stream
        assert torch.cuda.current_device() == 0
        assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.parametrize("kind", ["default", "side", "several", "cached"])
def test_late_streams_read_what_was_there_when_they_were_told_to(g1: str, daemon: Daemon, kind: str) -> None:
    """Batches are dropped at once, long before the streams that read them get to it."""
    count = 300
    wanted = indices(g1, daemon, count)
    loader = loader_of(g1, daemon, slots=3)
    streams = [torch.cuda.Stream() for _ in range(4)]
    rng = random.Random(7)
    found: list[list[torch.Tensor]] = []
    for n, batch in zip(range(count), endless(loader), strict=False):
        readers = {
            "default": [torch.cuda.current_stream()],
            "side": [streams[n % 4]],
            "several": rng.sample(streams, rng.randint(1, 4)),
            # The tensor was made under one stream and is taken again under others.
            "cached": [torch.cuda.current_stream(), *rng.sample(streams, 2)],
        }[kind]
        copies = []
        for stream in readers:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(rng.randrange(LATE // 20))
                copies.append(torch.empty(len(wanted[n]), dtype=torch.int64, device="cuda"))
                copies[-1].copy_(batch["index"])
        found.append(copies)
        del batch
    torch.cuda.synchronize()
    for n, copies in enumerate(found):
        for read in copies:
            assert torch.equal(read.cpu(), wanted[n]), n


def test_batches_held_for_random_times_on_slow_streams_do_not_change(g1: str, daemon: Daemon) -> None:
    """Sums before and after a hold, both on the device, over ten thousand batches."""
    loader = loader_of(g1, daemon, slots=6, batch_size=16)
    streams = [torch.cuda.Stream() for _ in range(3)]
    rng = random.Random(11)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    held: list[tuple[torch.cuda.Stream, rc.Batch, torch.Tensor]] = []

    def settle(entry: tuple[torch.cuda.Stream, rc.Batch, torch.Tensor]) -> None:
        stream, batch, before = entry
        with torch.cuda.stream(stream):
            torch.cuda._sleep(rng.randrange(200_000))
            differ.add_((batch["action"].view(torch.int32).sum() != before).to(torch.int64))

    for batch, n in zip(endless(loader), range(10_000), strict=False):
        stream = streams[n % 3]
        with torch.cuda.stream(stream):
            held.append((stream, batch, batch["action"].view(torch.int32).sum()))
        while len(held) > rng.randrange(1, 4):
            settle(held.pop(rng.randrange(len(held))))
        del batch
        if n % 500 == 0:
            torch.cuda.synchronize()
    held.clear()
    torch.cuda.synchronize()
    assert differ.item() == 0


def test_a_stream_that_was_not_told_is_not_waited_for_and_record_stream_tells_it(
    g1: str, daemon: Daemon
) -> None:
    """Else the tests above would prove nothing."""
    wanted = indices(g1, daemon, 1)[0]
    for told in (False, True):
        loader = loader_of(g1, daemon, slots=2)
        stream = torch.cuda.Stream()
        read = torch.empty_like(wanted, device="cuda")
        torch.cuda.synchronize()
        batches = endless(loader)
        batch = next(batches)
        index = batch["index"]
        torch.cuda.current_stream().synchronize()
        if told:
            batch.record_stream(stream)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20 * LATE)
            read.copy_(index)
        del batch, index
        for _ in range(20 * loader.info["slots"]):
            next(batches)
            if told and stream.query():
                break
        stream.synchronize()
        assert torch.equal(read.cpu(), wanted) is told


def test_a_capture_is_refused_and_a_static_copy_replays(g1: str, daemon: Daemon) -> None:
    loader = loader_of(g1, daemon, device="cuda", drop_last=True)
    static = torch.empty(32, 8, 26, device="cuda")
    out = torch.empty(32, device="cuda")
    batches = iter(loader)
    first = next(batches)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out.copy_(static.sum(dim=(1, 2)))
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for key in ("action", "observation.state"):
            with pytest.raises(rc.DeviceError, match=r"captured into a CUDA graph.*copy the batch"):
                first[key]
        out.copy_(static.sum(dim=(1, 2)))
        # Dropped in a capture, and used outside before.
        dropped = next(batches)
        del dropped
    for batch, _ in zip(batches, range(50), strict=False):
        static.copy_(batch["action"])
        graph.replay()
        assert torch.allclose(out, batch["action"].sum(dim=(1, 2)))


def test_a_batch_used_before_and_dropped_in_a_capture_goes_back_after_it(g1: str, daemon: Daemon) -> None:
    loader = loader_of(g1, daemon, slots=2)
    batches = endless(loader)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    work = torch.zeros(8, device="cuda")
    torch.cuda.synchronize()
    for _ in range(3 * loader.info["slots"]):
        batch = next(batches)
        with torch.cuda.stream(stream):
            batch["action"].sum()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            work.add_(1)
            del batch
            gc.collect()
            graph.capture_end()
        graph.replay()
    torch.cuda.synchronize()
    assert work[0].item() == 3 * loader.info["slots"]


# Keeping, copying, sharing


def test_holding_every_slot_is_an_error_and_copies_are_the_cure(g1: str, daemon: Daemon) -> None:
    loader = loader_of(g1, daemon, slots=2)
    slots = loader.info["slots"]
    batches = iter(loader)
    held = [next(batches) for _ in range(slots)]
    with pytest.raises(rc.AllSlotsHeld, match=f"all {slots} slots"):
        next(batches)
    kept = [batch.copy() for batch in held]
    wanted = [batch["action"].cpu() for batch in held]
    held.clear()
    gc.collect()
    for _ in range(5 * slots):
        next(batches)
    torch.cuda.synchronize()
    for copied, host in zip(kept, wanted, strict=True):
        assert copied["action"].is_cuda
        assert torch.equal(copied["action"].cpu(), host)


def test_a_batch_pickles_and_copies_by_value(g1: str, daemon: Daemon) -> None:
    batch = next(iter(loader_of(g1, daemon)))
    for made in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch), batch.copy()):
        assert isinstance(made, rc.Batch)
        assert made["action"].is_cuda
        assert made["action"].data_ptr() != batch["action"].data_ptr()
        assert torch.equal(made["action"], batch["action"])
        assert made["task"] == batch["task"]


def test_views_outlive_batch_and_loader_and_the_memory_goes_when_they_do(g1: str, daemon: Daemon) -> None:
    wanted = indices(g1, daemon, 1)[0]
    torch.cuda.synchronize()
    loader = loader_of(g1, daemon, batch_size=20_000)
    batch = next(iter(loader))
    view = batch["index"][5:32]
    ring, _ = torch.cuda.mem_get_info()
    del batch
    loader.close()
    del loader
    gc.collect()
    assert torch.equal(view[:27].cpu(), indices(g1, daemon, 1, batch_size=20_000)[0][5:32])
    del view
    gc.collect()
    # The daemon frees it when it is told, which is not at once.
    while torch.cuda.mem_get_info()[0] <= ring:
        pass
    assert len(wanted) == 32


def test_two_loaders_on_one_gpu_do_not_mix(g1: str, daemon: Daemon) -> None:
    here = [loader_of(g1, daemon, seed=seed, slots=2) for seed in (1, 2)]
    wanted = [indices(g1, daemon, 50, seed=seed) for seed in (1, 2)]
    for n, batches in enumerate(zip(*map(iter, here), strict=False)):
        for batch, index in zip(batches, wanted, strict=True):
            assert torch.equal(batch["index"].cpu(), index[n])
        if n == 49:
            break


def test_cupy_reads_columns_in_place(g1: str, daemon: Daemon) -> None:
    cupy: Any = pytest.importorskip("cupy", reason="CuPy is not installed")
    wanted = indices(g1, daemon, 40)
    loader = loader_of(g1, daemon, slots=3)
    read = []
    with cupy.cuda.Stream(non_blocking=True):
        for batch, _ in zip(endless(loader), range(40), strict=False):
            column = batch._raw.column("index")
            array = cupy.from_dlpack(column)
            assert array.data.ptr == batch["index"].data_ptr()
            read.append(array.copy())
            del batch, column, array
    cupy.cuda.Device().synchronize()
    for found, index in zip(read, wanted, strict=True):
        np.testing.assert_array_equal(cupy.asnumpy(found), index.numpy())


def test_jax_reads_batches_that_are_dropped_before_it_computes(g1: str, daemon: Daemon) -> None:
    """In a process of its own, since these tests' own JAX is on the host."""
    script = f"""
        import os
        os.environ["JAX_PLATFORMS"] = "cuda"
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        import sys
        try:
            import jax, jax.numpy as jnp
            jax.devices("gpu")
        except Exception as error:
            print("no JAX on a GPU:", error)
            sys.exit(77)
        import numpy as np, robocache as rc
        windows = {{"action": rc.Window(hz=30, steps=32)}}
        arguments = dict(batch_size=256, windows=windows, socket={daemon.socket!r}, slots=3)
        host = rc.DataLoader({g1!r}, framework="numpy", device="cpu", **arguments)
        wanted = [batch["action"].sum(dtype="float64") for _ in range(2) for batch in host][:200]
        loader = rc.DataLoader({g1!r}, framework="jax", **arguments)
        assert loader.device == "cuda:0", loader.device
        slow = jax.jit(lambda m: jax.lax.fori_loop(0, 60, lambda _, x: jnp.tanh(x @ x), m))
        busy = jnp.ones((2048, 2048)) / 2048
        @jax.jit
        def late(m, several):
            return jnp.array([x.sum() for x in several]) + 0 * m[0, 0]
        # JAX runs at most 32 computations ahead: several batches in each are more than the ring has.
        batches = iter(loader)
        read = []
        for _ in range(25):
            several = []
            for _ in range(8):
                batch = next(batches, None) or next(batches := iter(loader))
                assert isinstance(batch["t_ns"], np.ndarray)
                several.append(batch["action"])
            read.append(late(slow(busy), several))
            del batch, several
        np.testing.assert_allclose(np.concatenate(read), wanted, rtol=1e-4, atol=1e-2)
        print("ok")
    """
    done = run(script)
    if done.returncode == 77:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")


# Processes


def run(script: str) -> subprocess.CompletedProcess[str]:
    # What there is to warn of the dataset is not of interest here.
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_forked_workers_are_refused_and_spawned_ones_deliver_every_sample(g1: str, daemon: Daemon) -> None:
    loader = loader_of(g1, daemon, device="cuda", batch_size=2000)
    next(iter(loader))
    loader.set_epoch(0)
    forked = torch.utils.data.DataLoader(loader, batch_size=None, num_workers=1)
    with pytest.raises(Exception, match=r"forked from one that uses it: start.*spawn"):
        next(iter(forked))
    # In a process of its own: spawning imports the main module again, which is pytest's here.
    script = f"""
        import torch, robocache as rc
        if __name__ == "__main__":
            loader = rc.DataLoader({g1!r}, batch_size=2000, socket={daemon.socket!r}, device="cuda")
            workers = torch.utils.data.DataLoader(
                loader, batch_size=None, num_workers=2, multiprocessing_context="spawn")
            seen = torch.cat([batch["index"].cpu().clone() for batch in workers])
            assert sorted(seen.tolist()) == list(range(loader.info["anchors"]))
            print("ok")
    """
    folder = Path(daemon.socket).parent / "spawn.py"
    folder.write_text(textwrap.dedent(script))
    done = subprocess.run([sys.executable, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


def test_a_killed_daemon_is_told_what_it_published_stays_and_the_next_one_goes_on(
    g1: str, daemon: Daemon, own_daemon: Daemon
) -> None:
    loader = loader_of(g1, own_daemon)
    count = 40 + loader.stats()["loaders"][0]["slots"]["total"]
    wanted = indices(g1, daemon, count)
    batches = iter(loader)
    read = [next(batches)["index"].cpu() for _ in range(20)]
    held = next(batches)
    read.append(held["index"].clone())
    torch.cuda._sleep(LATE)
    late = held["index"] + 0
    own_daemon.kill()
    with pytest.raises(rc.DaemonGone):
        read.extend(batch["index"].clone() for batch in batches)
    state = loader.state_dict()
    assert torch.equal(late.cpu(), wanted[20])
    assert torch.equal(held["index"].cpu(), wanted[20])
    following = loader_of(g1, daemon)
    following.load_state_dict(state)
    read.extend(batch["index"].clone() for batch, _ in zip(following, range(count - len(read)), strict=False))
    for n, (found, index) in enumerate(zip(read, wanted, strict=True)):
        assert torch.equal(found.cpu(), index), n
    del held
    loader.close()


def test_killed_clients_leave_no_memory_and_the_others_do_not_notice(g1: str, daemon: Daemon) -> None:
    script = f"""
        import sys, torch, robocache as rc
        loader = rc.DataLoader({g1!r}, batch_size=2000, socket={daemon.socket!r}, device="cuda")
        held = []
        while True:
            for batch in loader:
                torch.cuda._sleep(1_000_000)
                batch["action"].sum()
                held = [batch]
                print("read", flush=True)
    """
    wanted = indices(g1, daemon, 2000)
    loader = loader_of(g1, daemon)
    batches = endless(loader)
    rng = random.Random(3)
    n = 0
    free = None
    for death in range(6):
        client = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
        )
        assert client.stdout is not None
        for _ in range(rng.randrange(3, 30)):
            assert client.stdout.readline() == "read\n"
            for _ in range(5):
                assert torch.equal(next(batches)["index"].cpu(), wanted[n])
                n += 1
        client.send_signal(signal.SIGKILL)
        client.wait()
        client.stdout.close()
        if death == 0:
            # The first one's ring was made and freed: from here on nothing may be lost.
            while len(loader.stats()["loaders"]) > 1:
                pass
            free = torch.cuda.mem_get_info()[0]
    while len(loader.stats()["loaders"]) > 1:
        pass
    assert free is not None
    while torch.cuda.mem_get_info()[0] < free - (8 << 20):
        pass


def test_a_process_that_just_ends_with_batches_in_hand_ends_well(g1: str, daemon: Daemon) -> None:
    script = f"""
        import torch, robocache as rc
        loader = rc.DataLoader({g1!r}, batch_size=32, socket={daemon.socket!r}, device="cuda")
        batches = iter(loader)
        held = [next(batches), next(batches)]
        views = [batch["action"] for batch in held]
        print("ok")
    """
    done = run(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
