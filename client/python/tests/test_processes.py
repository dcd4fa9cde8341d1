"""fork, spawn, pickling, torch's workers, and the embedded daemon."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import traceback
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader as TorchDataLoader

import robocache as rc

FRAMES = 35_965
ONE = {"action": rc.Window(at=[0.0])}


def loader_of(path: str, **arguments: Any) -> rc.DataLoader:
    return rc.DataLoader(path, **({"batch_size": 500, "windows": ONE, "framework": "numpy"} | arguments))


def ids(loader: Any) -> list[int]:
    return [int(i) for batch in loader for i in batch["index"]]


def in_forked_child(work: Any) -> str:
    """What `work` returns in a child made by a bare fork."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)
            with os.fdopen(write, "w") as pipe:
                try:
                    pipe.write(str(work()))
                    status = 0
                except BaseException:
                    pipe.write(traceback.format_exc())
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, said
    return said


# A child of a process with threads may only fork to do little; Python 3.12 and later warn of it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning"
)


def test_a_forked_child_attaches_by_itself_and_disturbs_nobody(g1: str, sock: str) -> None:
    first = ids(loader_of(g1))
    loader = loader_of(g1)
    epoch = iter(loader)
    held = next(epoch)
    seen = held["index"].tolist()

    def child() -> str:
        # The inherited iterator goes on from the parent's position, on a ring of its own.
        rest = [int(i) for batch in epoch for i in batch["index"]]
        nonlocal held
        del held
        loader.close()
        return str(rest == first[500:])

    assert in_forked_child(child) == "True"
    # The parent's batch is still its own, and its iterator goes on.
    assert held["index"].tolist() == seen
    assert seen + [int(i) for batch in epoch for i in batch["index"]] == first


def test_a_forked_child_that_exits_the_ordinary_way_leaves_the_parent_attached(g1: str, daemon: Any) -> None:
    script = f"""
        import os, sys, warnings
        import robocache as rc
        warnings.simplefilter("ignore", rc.RoboCacheWarning)
        loader = rc.DataLoader({g1!r}, batch_size=500, framework="numpy", socket={daemon.socket!r})
        epoch = iter(loader)
        batch = next(epoch)
        wanted = batch["action"].tobytes()
        pid = os.fork()
        if pid == 0:
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        for later in epoch:
            assert batch["action"].tobytes() == wanted
        print(loader.epoch)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_a_pickled_loader_is_its_parameters_and_its_position(g1: str, sock: str) -> None:
    first = ids(loader_of(g1))
    loader = loader_of(g1)
    epoch = iter(loader)
    seen = next(epoch)["index"].tolist() + next(epoch)["index"].tolist()
    state = loader.state_dict()
    pickled = pickle.dumps(loader)
    assert len(pickled) < 4096
    other = pickle.loads(pickled)
    assert other.state_dict() == state
    other.load_state_dict(state)
    assert seen + ids(other) == first
    # Both have been in this epoch, so each goes on with the next.
    assert next(iter(pickle.loads(pickled))).epoch == 1


def spawned(loader: rc.DataLoader, answers: Any) -> None:
    answers.put(ids(loader))


def test_a_spawned_child_attaches_by_itself(g1: str, sock: str) -> None:
    loader = loader_of(g1)
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=spawned, args=(loader, answers))
    process.start()
    found = answers.get()
    process.join()
    assert process.exitcode == 0
    assert found == ids(loader)


def rows(loader: Any) -> list[bytes]:
    return [batch["action"].tobytes() for batch in loader]


def tell_rows(arguments: dict[str, Any], answers: Any) -> None:
    answers.put(rows(loader_of(**arguments)))


def test_processes_that_say_the_same_share_and_seed_see_the_same_batches_decoded_once(
    g1: str, own_daemon: Any
) -> None:
    same = {"path": g1, "shuffle": True, "seed": 3, "rank": 1, "world_size": 2, "socket": own_daemon.socket}
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=tell_rows, args=(same, answers))
    process.start()
    loader = loader_of(**same)
    wanted = rows(loader)
    assert answers.get() == wanted
    process.join()
    assert process.exitcode == 0
    assert len(wanted) == 36
    assert loader.stats()["store"]["episodes_read"] == 100


@pytest.mark.parametrize(
    ("workers", "context"), [(0, None), (1, "fork"), (2, "fork"), (2, "spawn"), (2, "forkserver")]
)
@pytest.mark.filterwarnings("ignore:Length of IterableDataset:UserWarning")
def test_torchs_dataloader_with_any_workers_sees_every_sample_once(
    g1: str, sock: str, workers: int, context: str | None
) -> None:
    loader = loader_of(g1, framework="torch")
    torchs = TorchDataLoader(loader, batch_size=None, num_workers=workers, multiprocessing_context=context)
    first = []
    for batch in torchs:
        assert isinstance(batch, rc.Batch)
        assert isinstance(batch["action"], torch.Tensor)
        assert isinstance(batch["task"], list)
        first += batch["index"].tolist()
    assert sorted(first) == list(range(FRAMES))
    loader.set_epoch(1)
    second = [int(i) for batch in torchs for i in batch["index"]]
    assert sorted(second) == list(range(FRAMES))
    assert first != second


@pytest.mark.filterwarnings("ignore:Length of IterableDataset:UserWarning")
def test_persistent_workers_go_through_the_epochs_by_themselves(g1: str, sock: str) -> None:
    torchs = TorchDataLoader(
        loader_of(g1, framework="torch"),
        batch_size=None,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    first, second = ids(torchs), ids(torchs)
    assert sorted(first) == sorted(second) == list(range(FRAMES))
    assert first != second


def test_torch_distributed_gives_the_rank(g1: str, daemon: Any, tmp_path: Any) -> None:
    script = f"""
        import sys, torch.distributed as dist, robocache as rc
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method="file://{tmp_path}/init", rank=rank, world_size=2)
        loader = rc.DataLoader({g1!r}, batch_size=64, shuffle=False, socket={daemon.socket!r})
        print(loader.info["rank"], loader.info["world_size"], int(next(iter(loader))["index"][1]))
        dist.destroy_process_group()
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    # Gloo prints lines of its own before.
    said = [process.communicate()[0].splitlines()[-1] for process in processes]
    assert said == ["0 2 2", "1 2 3"]


EMBEDDED = """
    import os, sys, robocache as rc
    loader = rc.DataLoader(sys.argv[1], batch_size=500, framework="numpy")
    print(loader.info["daemon_pid"], loader._near, flush=True)
    batches = sum(1 for _ in loader)
    other = rc.DataLoader(sys.argv[1], batch_size=7, framework="numpy")
    print(batches, next(iter(other)).rows, flush=True)
"""


def embedded(script: str, path: str, tmp_path: Any, daemon_program: str) -> list[str]:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("ROBOCACHE_SOCKET", "XDG_RUNTIME_DIR")
    } | {"ROBOCACHE_DAEMON": daemon_program, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_without_a_daemon_the_loader_starts_one_and_stops_it_after(
    g1: str, tmp_path: Any, daemon_program: str
) -> None:
    pid, socket, batches, rows = embedded(EMBEDDED, g1, tmp_path, daemon_program)
    assert (batches, rows) == ("72", "7")
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(pid)).name() != "robocached"
    assert not os.path.exists(socket)


def test_a_forked_child_uses_its_parents_embedded_daemon(g1: str, tmp_path: Any, daemon_program: str) -> None:
    script = """
        import os, sys, robocache as rc
        loader = rc.DataLoader(sys.argv[1], batch_size=500, framework="numpy")
        print(loader.info["daemon_pid"], flush=True)
        pid = os.fork()
        if pid == 0:
            print(sum(1 for _ in loader), flush=True)
            print(loader.info["daemon_pid"], flush=True)
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        print(sum(1 for _ in loader), flush=True)
    """
    pid, in_child, childs_pid, in_parent = embedded(script, g1, tmp_path, daemon_program)
    assert (in_child, in_parent) == ("72", "72")
    assert childs_pid == pid


def test_the_module_is_the_daemons_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "robocache", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout
