"""Batches on a GPU under stress: slow readers, leaks, and processes that die while their kernels run.

A short run is the default; the full one is

    export ROBOCACHE_SOAK_BATCHES=100000 ROBOCACHE_SOAK_CLIENT_KILLS=200 ROBOCACHE_SOAK_DAEMON_KILLS=20
    pytest -s tests/test_cuda_soak.py
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Daemon
from trainers import FRAMES, Trainer, Truth, end, loader_of, uninterrupted

import robocache as rc

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.timeout(1200),
]

BATCHES = int(os.environ.get("ROBOCACHE_SOAK_BATCHES", "3000"))
CLIENT_KILLS = int(os.environ.get("ROBOCACHE_SOAK_CLIENT_KILLS", "8"))
DAEMON_KILLS = int(os.environ.get("ROBOCACHE_SOAK_DAEMON_KILLS", "2"))
RANKS = 4
#: What the driver keeps of its own accord may differ by this; one ring is 14 MiB and more.
SLACK = 8 << 20


@pytest.fixture(scope="session")
def truth(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder to read it from, in this process and others."""
    folder, made = tmp_path_factory.mktemp("truth"), Truth.read(str(data / "g1_v30_conv"))
    made.save(folder)
    return str(folder)


def eventually(holds: Callable[[], bool], what: Callable[[], str]) -> None:
    """For what the kernel and the driver do in their own time."""
    end = time.monotonic() + 60
    while not holds():
        if time.monotonic() > end:
            pytest.fail(what())
        time.sleep(0.02)


def free() -> int:
    """Bytes free on the GPU, whoever uses the others."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def gives_back(before: int) -> None:
    eventually(
        lambda: free() >= before - SLACK,
        lambda: f"{(before - free()) / 2**20:.0f} MiB of GPU memory are missing; nvidia-smi:\n{smi()}",
    )
    print(f"GPU memory free: {before >> 20} MiB before, {free() >> 20} MiB after", file=sys.stderr)


def smi() -> str:
    return subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout


def loaders(daemon: Daemon, program: str) -> list[dict[str, Any]]:
    asked = [program, "status", "--json", "--socket", daemon.socket]
    answer = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    return list(answer["loaders"])


@pytest.fixture(autouse=True)
def no_xid() -> Iterator[None]:
    """The driver reports no error of the GPU during a test, as far as the kernel's log may be read."""

    def xids() -> list[str] | None:
        try:
            log = subprocess.run(["dmesg"], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return re.findall(r".*NVRM: Xid.*", log.stdout) if log.returncode == 0 else None

    before = xids()
    yield
    after = xids()
    if before is None or after is None:
        print("the kernel's log cannot be read here: Xid errors were not looked for", file=sys.stderr)
    else:
        assert after == before


@pytest.fixture
def tight(daemon_program: str, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon whose rings have 12 slots, so that each is written again soon."""
    tmp_path.chmod(0o700)
    config = tmp_path / "robocached.toml"
    config.write_text("[gpu]\nburst = 4\n")
    running = Daemon(daemon_program, tmp_path, "--config", str(config))
    yield running
    running.kill()


def test_no_batch_changes_under_a_trainer_that_holds_it_and_is_slow(
    g1: str, tight: Daemon, truth: str
) -> None:
    loader = loader_of(g1, socket=tight.socket)
    assert loader.info["slots"] == 12
    right = Truth.on_gpu(truth)
    rng = random.Random(0)
    streams = [torch.cuda.Stream() for _ in range(4)]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    #: Batches, or tensors of theirs with the one stream that may use them, and when they are looked at again.
    held: list[tuple[int, Callable[[], None]]] = []
    ids: dict[int, list[int]] = {}

    def look(batch: rc.Batch) -> None:
        nth = rng.randrange(len(streams))
        with torch.cuda.stream(streams[nth]):
            action, index = batch["action"], batch["index"]
            torch.cuda._sleep(rng.randrange(1_500_000))
            wrong[nth] += right.differs(action, index)

    def look_later_at_tensors(batch: rc.Batch) -> Callable[[], None]:
        nth = rng.randrange(len(streams))
        with torch.cuda.stream(streams[nth]):
            action, index = batch["action"], batch["index"]

        def later() -> None:
            with torch.cuda.stream(streams[nth]):
                torch.cuda._sleep(rng.randrange(1_500_000))
                wrong[nth] += right.differs(action, index)

        return later

    taken = 0
    while taken < BATCHES:
        for batch in loader:
            if taken == 0:
                shifted = right.differs(batch["action"], (batch["index"] + 1) % FRAMES)
                assert int(shifted) > 0, "a check that finds nothing proves nothing"
            ids.setdefault(batch.epoch, []).extend(batch.sample_ids.tolist())
            look(batch)
            if rng.random() < 0.3:
                until = taken + rng.randrange(1, 20)
                kept = look_later_at_tensors(batch) if rng.random() < 0.5 else (lambda b=batch: look(b))
                held.append((until, kept))
            del batch
            # At most 5 of the 12 slots are held here, so that the loop goes on.
            due = [later for until, later in held if until <= taken] + [later for _, later in held[:-5]]
            held = [(until, later) for until, later in held[-5:] if until > taken]
            for later in due:
                later()
            del due
            taken += 1
            if taken == BATCHES:
                break
    for _, later in held:
        later()
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0] * len(streams)
    whole = [found for epoch, found in sorted(ids.items())[:-1]]
    assert all(sorted(found) == list(range(FRAMES)) for found in whole)
    print(f"{taken} batches held and checked, {len(whole)} whole epochs", file=sys.stderr)


def test_four_ranks_killed_at_random_lose_and_repeat_nothing_and_leak_no_memory(
    g1: str, own_daemon: Daemon, daemon_program: str, truth: str
) -> None:
    rng = random.Random(1)
    common = (g1, truth, own_daemon.socket)

    def make() -> list[Trainer]:
        return [Trainer(*common, rank=rank, world_size=RANKS) for rank in range(RANKS)]

    # Once undisturbed, so that the daemon has all it will ever need.
    end(make(), epochs=1)
    eventually(lambda: loaders(own_daemon, daemon_program) == [], lambda: "loaders of the dead are left")
    before = free()
    trainers, kills = make(), 0
    due = {id(one): rng.randrange(12) for one in trainers}

    def strike(one: Trainer) -> None:
        nonlocal kills
        one.kill()
        kills += 1
        one.start()
        due[id(one)] = rng.randrange(12)

    while kills < CLIENT_KILLS:
        for ready in wait([one.said for one in trainers]):
            one = next(one for one in trainers if one.said is ready)
            one.take()
            if one.since > due[id(one)] and kills < CLIENT_KILLS:
                strike(one)
    epochs = max(max(one.ids, default=0) for one in trainers) + 1
    end(trainers, epochs)
    for rank, one in enumerate(trainers):
        wanted = uninterrupted(g1, own_daemon.socket, epochs, rank=rank, world_size=RANKS)
        assert [one.ids[epoch] for epoch in range(epochs)] == wanted
    for epoch in range(epochs):
        assert sorted(i for one in trainers for i in one.ids[epoch]) == list(range(FRAMES))
    eventually(lambda: loaders(own_daemon, daemon_program) == [], lambda: "loaders of the dead are left")
    gives_back(before)
    assert own_daemon.process.poll() is None
    print(f"{kills} kills of clients, {epochs} epochs of {RANKS} ranks", file=sys.stderr)


def test_each_gpu_serves_a_process_of_its_own(g1: str, own_daemon: Daemon, truth: str) -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("this host has one GPU")
    trainers = [
        Trainer(g1, truth, own_daemon.socket, rank=n, world_size=count, device=f"cuda:{n}")
        for n in range(count)
    ]
    end(trainers, epochs=1)
    assert sorted(i for one in trainers for i in one.ids[0]) == list(range(FRAMES))


def test_a_daemon_killed_at_random_leaves_its_batches_readable_and_the_next_one_goes_on(
    g1: str, sock: str, daemon_program: str, truth: str, tmp_path: Path
) -> None:
    right, rng = Truth.on_gpu(truth), random.Random(2)
    aside = torch.cuda.Stream()
    state: Any = None
    ids: dict[int, list[int]] = {}
    before = 0

    def life(nth: int) -> None:
        folder = tmp_path / f"daemon-{nth}"
        folder.mkdir(mode=0o700)
        daemon = Daemon(daemon_program, folder)
        loader = loader_of(g1, socket=daemon.socket, slots=4)
        if state is not None:
            loader.load_state_dict(state)
        held: deque[rc.Batch] = deque(maxlen=3)
        killer = threading.Timer(rng.uniform(0.0, 0.2), daemon.kill)

        def read() -> None:
            nonlocal state
            while True:
                for batch in loader:
                    assert int(right.differs(batch["action"], batch["index"])) == 0
                    with torch.cuda.stream(aside):
                        action = batch["action"]
                        torch.cuda._sleep(2_000_000)
                        action.clone()
                    ids.setdefault(batch.epoch, []).extend(batch.sample_ids.tolist())
                    state = loader.state_dict()
                    held.append(batch)
                    if killer.ident is None:
                        killer.start()
                    del batch, action

        with pytest.raises(rc.DaemonGone):
            read()
        killer.join()
        # The daemon is gone, the last batches are not.
        for batch in held:
            assert int(right.differs(batch["action"], batch["index"])) == 0
        del batch
        held.clear()
        loader.close()

    for nth in range(DAEMON_KILLS + 1):
        life(nth)
        gc.collect()
        if nth == 0:
            # What this process keeps by itself, it has now.
            before = free()
    gives_back(before)
    # The whole is one uninterrupted order, whatever epoch it came to.
    last = max(ids)
    wanted = uninterrupted(g1, sock, last + 1)
    assert [ids[epoch] for epoch in range(last)] == wanted[:last]
    assert ids[last] == wanted[last][: len(ids[last])]
    print(f"{DAEMON_KILLS + 1} kills of daemons, {sum(map(len, ids.values()))} samples", file=sys.stderr)


# Leaks, neighbours, names of devices

LEAKER = """
    import gc, os, sys, warnings, torch, robocache as rc
    path, socket, how = sys.argv[1:]
    warnings.simplefilter("ignore", rc.RoboCacheWarning)
    gc.disable()
    class Ring: pass
    for _ in range(3):
        loader = rc.DataLoader(path, batch_size=256, device="cuda", framework="torch", socket=socket)
        epoch, leaked = iter(loader), Ring()
        leaked.me, leaked.batches = leaked, []
        try:
            while True:
                batch = next(epoch)
                leaked.batches.append((batch, batch["action"]))
        except rc.AllSlotsHeld:
            print(len(leaked.batches) == loader.info["slots"], flush=True)
        torch.cuda._sleep(50_000_000)
        leaked.batches[-1][1].clone()
        # The last three names go, the cycle stays.
        del loader, epoch, batch, leaked
    if how == "at once":
        os._exit(0)
"""


@pytest.mark.parametrize("how", ["at once", "the ordinary way"])
def test_a_process_that_leaks_all_its_batches_leaves_nothing_behind(
    g1: str, own_daemon: Daemon, daemon_program: str, truth: str, how: str
) -> None:
    right = Truth.on_gpu(truth)
    # A neighbour, who has what it needs before and notices nothing after.
    neighbour = loader_of(g1, socket=own_daemon.socket)
    epoch = iter(neighbour)
    held = next(epoch)

    def leak() -> None:
        command = [sys.executable, "-c", textwrap.dedent(LEAKER), g1, own_daemon.socket, how]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "True\n" * 3), done.stderr
        eventually(
            lambda: len(loaders(own_daemon, daemon_program)) == 1, lambda: "loaders of the dead are left"
        )

    leak()
    before = free()
    leak()
    gives_back(before)
    for batch in itertools.chain([held], epoch):
        assert int(right.differs(batch["action"], batch["index"])) == 0


def test_two_loaders_of_a_process_and_one_of_another_have_rings_of_their_own(
    g1: str, own_daemon: Daemon, truth: str
) -> None:
    right = Truth.on_gpu(truth)
    other = Trainer(g1, truth, own_daemon.socket)
    first, second = loader_of(g1, socket=own_daemon.socket), loader_of(g1, socket=own_daemon.socket, seed=8)
    ids: list[list[int]] = [[], []]
    for batches in zip(first, second, strict=True):
        assert batches[0]["action"].data_ptr() != batches[1]["action"].data_ptr()
        for batch, found in zip(batches, ids, strict=True):
            assert int(right.differs(batch["action"], batch["index"])) == 0
            found.extend(batch.sample_ids.tolist())
    assert sorted(ids[0]) == sorted(ids[1]) == list(range(FRAMES))
    assert ids[0] != ids[1]
    end([other], epochs=1)
    assert other.ids[0] == ids[0]


RENUMBERED = """
    import sys, warnings, torch, robocache as rc
    warnings.simplefilter("ignore", rc.RoboCacheWarning)
    try:
        path, socket = sys.argv[1:]
        loader = rc.DataLoader(path, batch_size=64, device="cuda", framework="torch", socket=socket)
        batch = next(iter(loader))
        uuid = str(torch.cuda.get_device_properties(batch["action"].device).uuid)
        print(loader.device, batch.device, batch["action"].device, torch.cuda.device_count(), uuid)
        print(loader.info["gpu"]["uuid"].removeprefix("GPU-") == uuid, float(batch["action"].sum()) != 0)
    except rc.DeviceError as error:
        print("refused:", error)
"""


def renumbered(path: str, socket: str, visible: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RENUMBERED), path, socket],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": visible},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_cuda_visible_devices_numbers_the_clients_gpus_and_not_the_daemons(
    g1: str, own_daemon: Daemon
) -> None:
    uuids = [str(torch.cuda.get_device_properties(n).uuid) for n in range(torch.cuda.device_count())]
    for uuid in uuids:
        # The one it sees is its number 0, whichever that is of the daemon's.
        assert renumbered(g1, own_daemon.socket, f"GPU-{uuid}") == [
            f"cuda:0 cuda:0 cuda:0 1 {uuid}",
            "True True",
        ]


def test_a_client_that_sees_no_gpu_is_told_so(g1: str, own_daemon: Daemon) -> None:
    (said,) = renumbered(g1, own_daemon.socket, "")
    assert said.startswith("refused: ")
    assert "CUDA_VISIBLE_DEVICES" in said


def test_a_daemon_that_does_not_have_the_clients_gpu_says_which_it_has(
    g1: str, daemon_program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this host has one GPU")
    uuids = [f"GPU-{torch.cuda.get_device_properties(n).uuid}" for n in range(2)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", uuids[0])
    tmp_path.chmod(0o700)
    daemon = Daemon(daemon_program, tmp_path)
    (said,) = renumbered(g1, daemon.socket, uuids[1])
    daemon.kill()
    assert said.startswith("refused: ")
    assert all(uuid in said for uuid in uuids)
