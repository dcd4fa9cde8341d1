"""What a client costs a trainer: private memory of a process that does nothing but take batches."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

MIB = 1 << 20


def test_a_client_adds_less_than_30_mb_to_python_and_numpy_and_stays_flat(g1: str, daemon: Any) -> None:
    # Unique set size: pages that no other process has. The ring is the daemon's as well: it does not count.
    script = f"""
        import gc, json, sys, warnings
        import numpy, psutil

        def private():
            gc.collect()
            return psutil.Process().memory_full_info().uss

        bare = private()
        import robocache as rc
        warnings.simplefilter("ignore")
        windows = {{
            "observation.state": rc.Window(hz=30, steps=2, start=-1 / 30),
            "action": rc.Window(hz=50, steps=50),
        }}
        loader = rc.DataLoader(
            {g1!r}, batch_size=64, windows=windows, framework="numpy", slots=4, socket={daemon.socket!r}
        )
        taken, after = 0, []
        while taken < 5000:
            for batch in loader:
                for key in batch:
                    batch[key]
                taken += 1
                if taken % 500 == 0:
                    after.append(private())
                if taken == 5000:
                    break
        unwanted = sorted(set(sys.modules) & {{"torch", "jax", "pyarrow", "pandas"}})
        print(json.dumps({{"bare": bare, "after": after, "unwanted": unwanted}}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["unwanted"] == []
    assert len(found["after"]) == 10
    added = [(after - found["bare"]) / MIB for after in found["after"]]
    assert max(added) < 30, added
    # The heap has settled by the first look; from then on not a page a hundred batches.
    assert added[-1] - added[0] < 1, added


def test_a_second_trainer_on_a_daemon_costs_it_no_second_copy_of_the_data(g1: str, own_daemon: Any) -> None:
    """Two ranks read the same episodes: decoded once, held once."""
    import psutil

    import robocache as rc

    def loader() -> rc.DataLoader:
        windows = {"action": rc.Window(hz=30, steps=2)}
        return rc.DataLoader(
            g1, batch_size=64, windows=windows, framework="numpy", socket=own_daemon.socket, seed=1
        )

    def status() -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "robocache", "status", "--json", "--socket", own_daemon.socket],
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    def store() -> tuple[int, int]:
        found = status()["store"]
        return found["bytes_decoded"], found["episodes_read"]

    first = loader()
    for _ in first:
        pass
    before, held = store(), psutil.Process(own_daemon.pid).memory_full_info().uss
    assert before[1] == 100
    second = loader()
    for _ in second:
        pass
    assert store() == before
    added = (psutil.Process(own_daemon.pid).memory_full_info().uss - held) / MIB
    assert added < 50, added
