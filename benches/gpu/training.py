"""The original's training step, fed from files by way of the daemon.

Beside it the same step on a resident batch, and fed by torch's DataLoader.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import rivals
import torch
from bench import KEY, OFF_GRID, Bench, Json, endless, figures
from step import BATCH, DIM, STEPS, Graph, Step

from daemon import Daemon, cpu_seconds


class Fed:
    """The training step with one way of getting batches, timed in turns."""

    def __init__(
        self, take: Callable[[], Any], step: Callable[[Any], None], pids: Callable[[], list[int]]
    ) -> None:
        self.take, self.step, self.pids = take, step, pids
        self.turns: list[Json] = []

    def turn(self, steps: int, lead: int, device: str) -> None:
        """`steps` steps after `lead` uncounted ones, which use up what lay ready."""
        for _ in range(lead):
            self.step(self.take())
        wait(device)
        others = [cpu_seconds(pid) for pid in self.pids()]
        main, process = time.thread_time(), time.process_time()
        taking, start = 0.0, time.perf_counter()
        for _ in range(steps):
            before = time.thread_time()
            x = self.take()
            taking += time.thread_time() - before
            self.step(x)
            del x
        wait(device)
        wall = time.perf_counter() - start
        process, main = time.process_time() - process, time.thread_time() - main
        others = [cpu_seconds(pid) - was for pid, was in zip(self.pids(), others, strict=True)]
        self.turns.append(
            {
                "steps_per_s": steps / wall,
                "taking_s_a_step": taking / steps,
                "other_threads_s_a_step": (process - main) / steps,
                "other_processes_s_a_step": sum(others) / steps,
            }
        )

    def median(self, key: str) -> float:
        return median(turn[key] for turn in self.turns[1:])

    def found(self, resident: Fed) -> Json:
        pairs = zip(self.turns[1:], resident.turns[1:], strict=True)
        rate = self.median("steps_per_s")
        more_threads = self.median("other_threads_s_a_step") - resident.median("other_threads_s_a_step")
        return {
            "steps_per_s": figures([turn["steps_per_s"] for turn in self.turns[1:]]),
            "episodes_per_s": rate * BATCH,
            "of_resident": median(mine["steps_per_s"] / its["steps_per_s"] for mine, its in pairs),
            "cores_of_other_processes": self.median("other_processes_s_a_step") * rate,
            "cores_taking_batches": (self.median("taking_s_a_step") + max(more_threads, 0.0)) * rate,
        }


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def train(bench: Bench) -> Json:
    """The original's training step, from Parquet files, beside a resident batch and torch's DataLoader."""
    args, out = bench.args, {}
    on_gpu = args.device != "cpu"
    bench.dataset()
    eager = Step(args.device)
    resident = torch.randn(BATCH, STEPS, DIM, dtype=torch.bfloat16, device=args.device)
    graph = Graph(Step(args.device)) if on_gpu else None
    tiers = {
        "gpu store": ("--gpu-cache", "16GiB"),
        "pinned store": ("--gpu-cache", "0", "--pinned-cache", "8GiB"),
    }
    if not on_gpu:
        tiers = {"cpu": ()}
    daemons: dict[str, Daemon] = {}
    ours, theirs = {}, {}
    try:
        for name, flags in tiers.items():
            daemons[name] = bench.daemon(*flags)
            ours[name], out[f"first epoch, {name}"] = first_epoch(bench, daemons[name])
        data = rivals.store(args.episodes)
        for workers in args.workers:
            theirs[workers] = rivals.batches(data, workers, OFF_GRID, args.device)
        for mode, run, steps in (
            ("eager", eager.run, args.eager_steps),
            ("graph", graph and graph.run, args.graph_steps),
        ):
            if run is None:
                continue
            constant = resident if mode == "eager" else None
            feds = {"resident": Fed(lambda x=constant: x, run, list)}
            for name, batches in ours.items():
                pid = daemons[name].pid
                feds[name] = Fed(lambda of=batches: next(of)[KEY], run, lambda pid=pid: [pid])
            for workers, (iterator, batches) in theirs.items():
                pids = [worker.pid for worker in iterator._workers]
                feds[f"torch, {workers} workers"] = Fed(
                    lambda of=batches: next(of), run, lambda pids=pids: pids
                )
            for _ in range(args.rounds + 1):
                for name, fed in feds.items():
                    slow = name.startswith("torch")
                    # All that was made meanwhile is used up before the clock starts.
                    lead = 5 * max(args.workers) if slow else 40
                    fed.turn(
                        max(steps // 4, min(steps, 20)) if slow else steps, lead if on_gpu else 2, args.device
                    )
            out[mode] = {name: fed.found(feds["resident"]) for name, fed in feds.items()}
            training_rows(bench, mode, out[mode])
        out["loss"] = float(eager.loss)
        out["daemon_warnings"] = {name: daemon.warnings() for name, daemon in daemons.items()}
        if on_gpu:
            out["daemons"] = {name: daemon.gpu() for name, daemon in daemons.items()}
    finally:
        for daemon in daemons.values():
            daemon.__exit__()
    return out


def first_epoch(bench: Bench, daemon: Daemon) -> tuple[Iterator[Any], Json]:
    """Opens the loader; its first epoch comes from the files."""
    start = time.perf_counter()
    loader = bench.loader(daemon, OFF_GRID)
    batches, epoch = endless(loader), len(loader)
    next(batches)[KEY]
    first = time.perf_counter() - start
    for _ in range(epoch - 1):
        next(batches)[KEY]
    wait(bench.args.device)
    whole = time.perf_counter() - start
    return batches, {"to_first_batch_s": first, "epoch_s": whole, "episodes_per_s": epoch * BATCH / whole}


def training_rows(bench: Bench, mode: str, found: Json) -> None:
    resident = found["resident"]
    best = max((of["episodes_per_s"], name) for name, of in found.items() if name.startswith("torch"))
    bench.row(f"training step, {mode}: resident", f"{resident['episodes_per_s']:,.0f} episodes/s")
    for name, of in found.items():
        if name == "resident":
            continue
        cores = of["cores_of_other_processes"] + of["cores_taking_batches"]
        text = f"{of['episodes_per_s']:,.0f} episodes/s, {cores:.2f} cores"
        ratio = f"{of['of_resident']:.1%} of resident"
        if name.startswith("torch"):
            bench.row(f"training step, {mode}: {name}", text, ratio)
        else:
            ratio += f", {of['episodes_per_s'] / best[0]:.1f} x {best[1]}"
            goal = ">= 99 %, <= 1 core" if mode == "eager" else ">= 98 %, <= 1 core"
            bench.row(f"training step, {mode}: {name}", text, ratio, goal)
