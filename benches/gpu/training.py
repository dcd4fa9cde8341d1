"""The original's training step, fed from files by way of the daemon.

Beside it the same step on a resident batch, and fed by torch's DataLoader. A host's speed drifts by more than
what is looked for, so the near variants take turns, each compared with the resident one of its round:

    near      resident, gpu store, pinned store, resident again     eager: --eager ROUNDS, of one step each
                                                                    graph: --graph ROUNDS STEPS
    rivals    resident, torch's DataLoaders                         --rounds, --rival-steps

An eager step is a thread of Python that launches kernels for 10 ms, which the GPU does in 2.5: what a batch
costs is that thread's time, so single steps are timed by its clock and nobody waits for the GPU in between.

The rivals' workers start when the near variants are done, and stand still while others have their turn.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from statistics import fmean, median
from typing import Any

import numpy as np
import rivals
import torch
from bench import KEY, OFF_GRID, Bench, Json, endless, figures
from step import BATCH, DIM, STEPS, Graph, Step

from daemon import Daemon, cpu_seconds

#: Steps before a turn that are not counted. A ring of 64 slots gets 30 batches whenever 30 were used: by then
#: the daemon makes one for each that is taken, and a multiple of 30 steps has its share of that work, no more
#: and no less. Eight more, and each turn starts elsewhere between two bursts.
FED_LEAD = 40
#: Where nothing was made ahead meanwhile. What the turn before left the GPU to do is done by then.
SHORT_LEAD = 8


class Fed:
    """The training step with one way of getting batches, timed in turns."""

    def __init__(
        self, take: Callable[[], Any], step: Callable[[Any], None], pids: list[int], lead: int
    ) -> None:
        self.take, self.step, self.pids, self.lead = take, step, pids, lead
        self.turns: list[Json] = []

    def turn(self, steps: int, device: str) -> None:
        """`steps` steps after `lead` uncounted ones."""
        for _ in range(self.lead):
            self.step(self.take())
        wait(device)
        others = [cpu_seconds(pid) for pid in self.pids]
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
        others = [cpu_seconds(pid) - was for pid, was in zip(self.pids, others, strict=True)]
        self.turns.append(
            {
                "steps_per_s": steps / wall,
                "taking_s_a_step": taking / steps,
                "other_threads_s_a_step": (process - main) / steps,
                "other_processes_s_a_step": sum(others) / steps,
            }
        )

    def one(self) -> None:
        """One step, by the clock of this thread alone."""
        main, start = time.thread_time(), time.perf_counter()
        x = self.take()
        taking = time.thread_time() - main
        self.step(x)
        del x
        self.turns.append(
            {
                "steps_per_s": 1 / (time.perf_counter() - start),
                "taking_s_a_step": taking,
                "other_threads_s_a_step": 0.0,
                "other_processes_s_a_step": 0.0,
            }
        )

    def counted(self, key: str) -> list[float]:
        return [turn[key] for turn in self.turns[1:]]

    def median(self, key: str) -> float:
        return median(self.counted(key))

    def found(self, resident: Fed) -> Json:
        rates = self.counted("steps_per_s")
        pairs = zip(rates, resident.counted("steps_per_s"), strict=True)
        ratios = sorted(mine / its for mine, its in pairs)
        q1, middle, q3 = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        # Where the median is with 95 %: how many ratios lie below it is a binomial count.
        low = max(math.floor(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios))), 0)
        sure = [ratios[low], ratios[-1 - low]]
        rate = median(rates)
        more_threads = self.median("other_threads_s_a_step") - resident.median("other_threads_s_a_step")
        return {
            "steps_per_s": figures(rates),
            "episodes_per_s": rate * BATCH,
            "of_resident": middle,
            "of_resident_quartiles": [q1, q3],
            "of_resident_95_percent": sure,
            # A mean: they are told in hundredths of a second, and a turn has one or two.
            "cores_of_other_processes": fmean(self.counted("other_processes_s_a_step")) * rate,
            "cores_taking_batches": (self.median("taking_s_a_step") + max(more_threads, 0.0)) * rate,
        }


class Rival(Fed):
    """Its workers stand still while others have their turn: they take no processor from them, make nothing
    ahead meanwhile, and go on where they were.
    """

    def turn(self, steps: int, device: str) -> None:
        self.tell(signal.SIGCONT)
        if not self.turns:
            # From nothing ready to what their speed leaves ready: workers slower than the step would else
            # live on what they made at first.
            ahead = rivals.AHEAD * len(self.pids)
            for _ in range(ahead):
                self.take()
            for _ in range(ahead):
                self.step(self.take())
        super().turn(steps, device)
        self.tell(signal.SIGSTOP)

    def tell(self, what: signal.Signals) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, what)


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def orders(feds: dict[str, Fed]) -> Iterator[list[Fed]]:
    """Of round after round: every other goes backwards, so that drift favours none, and every two begin one
    further on, so that the last of `feds` is as near to the first as the second is.
    """
    order = list(feds.values())
    while True:
        yield order[::-1]
        order = [*order[1:], order[0]]
        yield order


def take_turns(feds: dict[str, Fed], rounds: int, steps: int, device: str) -> Json:
    """Rounds after one that is not counted, each compared with the first of `feds`."""
    for order in itertools.islice(orders(feds), rounds + 1):
        for fed in order:
            fed.turn(steps, device)
    resident = next(iter(feds.values()))
    return {name: fed.found(resident) for name, fed in feds.items()}


def take_steps(feds: dict[str, Fed], rounds: int, device: str) -> Json:
    """Rounds of one step of each, after as many as the slowest to start needs and one that is not counted."""
    everyone = list(feds.values())
    turns = orders(feds)
    for order in itertools.islice(turns, max(fed.lead for fed in everyone)):
        for fed in order:
            fed.one()
    for fed in everyone:
        fed.turns.clear()
    wait(device)
    before = [sum(map(cpu_seconds, fed.pids)) for fed in everyone]
    start = time.perf_counter()
    for order in itertools.islice(turns, rounds + 1):
        for fed in order:
            fed.one()
    wait(device)
    wall = time.perf_counter() - start
    for fed, was in zip(everyone, before, strict=True):
        used = (sum(map(cpu_seconds, fed.pids)) - was) / len(fed.turns)
        for one in fed.turns:
            one["other_processes_s_a_step"] = used
    found = {name: fed.found(everyone[0]) for name, fed in feds.items()}
    # That the clocks of single steps left nothing out.
    timed = sum(1 / one["steps_per_s"] for fed in everyone for one in fed.turns)
    found[next(iter(feds))]["of_all_time"] = timed / wall
    return found


def train(bench: Bench) -> Json:
    """The original's training step, from Parquet files, beside a resident batch and torch's DataLoader."""
    args, out = bench.args, {}
    on_gpu = args.device != "cpu"
    bench.dataset()
    eager = Step(args.device)
    constant = torch.randn(BATCH, STEPS, DIM, dtype=torch.bfloat16, device=args.device)
    modes = {"eager": (eager.run, constant, args.eager, 1)}
    if on_gpu:
        # On what its input holds: a resident batch is not copied.
        modes["graph"] = (Graph(Step(args.device)).run, None, *args.graph)
    tiers = {
        "gpu store": ("--gpu-cache", "16GiB"),
        "pinned store": ("--gpu-cache", "0", "--pinned-cache", "8GiB"),
    }
    if not on_gpu:
        tiers = {"cpu": ()}
    out["turns"] = {mode: {"rounds": rounds, "steps": steps} for mode, (*_, rounds, steps) in modes.items()}
    out["turns"]["torch"] = {"rounds": args.rounds, "steps": args.rival_steps}
    fed_lead, short_lead = (FED_LEAD, SHORT_LEAD) if on_gpu else (1, 1)

    def resident(mode: str) -> Fed:
        run, x, *_ = modes[mode]
        return Fed(lambda: x, run, [], short_lead)

    daemons: dict[str, Daemon] = {}
    ours, beside = {}, []
    try:
        for name, flags in tiers.items():
            daemons[name] = bench.daemon(*flags)
            ours[name], out[f"first epoch, {name}"] = first_epoch(bench, daemons[name])
        for mode, (run, _, rounds, steps) in modes.items():
            feds = {"resident": resident(mode)}
            for name, batches in ours.items():
                feds[name] = Fed(lambda of=batches: next(of)[KEY], run, [daemons[name].pid], fed_lead)
            feds["resident, again"] = resident(mode)
            if steps == 1:
                out[mode] = take_steps(feds, rounds, args.device)
            else:
                out[mode] = take_turns(feds, rounds, steps, args.device)
        data = rivals.store(args.episodes)
        theirs = {workers: rivals.batches(data, workers, OFF_GRID, args.device) for workers in args.workers}
        for mode, (run, *_) in modes.items():
            feds = {"resident, beside torch": resident(mode)}
            for workers, (iterator, batches) in theirs.items():
                pids = [worker.pid for worker in iterator._workers]
                beside.append(Rival(lambda of=batches: next(of), run, pids, short_lead))
                feds[f"torch, {workers} workers"] = beside[-1]
            out[mode] |= take_turns(feds, args.rounds, args.rival_steps, args.device)
            training_rows(bench, mode, out[mode])
        out["loss"] = float(eager.loss)
        out["daemon_warnings"] = {name: daemon.warnings() for name, daemon in daemons.items()}
        if on_gpu:
            out["daemons"] = {name: daemon.gpu() for name, daemon in daemons.items()}
    finally:
        # Who stands still cannot end.
        for rival in beside:
            rival.tell(signal.SIGCONT)
        for daemon in daemons.values():
            daemon.__exit__()
    return out


def first_epoch(bench: Bench, daemon: Daemon) -> tuple[Iterator[Any], Json]:
    """Opens the loader; its first epoch comes from the files."""
    cpu, start = daemon.cpu_seconds(), time.perf_counter()
    loader = bench.loader(daemon, OFF_GRID)
    batches, epoch = endless(loader), len(loader)
    next(batches)[KEY]
    first = time.perf_counter() - start
    for _ in range(epoch - 1):
        next(batches)[KEY]
    wait(bench.args.device)
    whole = time.perf_counter() - start
    # Where the time went: reading, and what this loader waited for.
    stats = loader.stats()
    return batches, {
        "to_first_batch_s": first,
        "epoch_s": whole,
        "episodes_per_s": epoch * BATCH / whole,
        "store": stats["store"],
        "counts": stats["loaders"][-1]["counts"],
        "gpus": stats["gpus"],
        "daemon_cpu_s": daemon.cpu_seconds() - cpu,
    }


def training_rows(bench: Bench, mode: str, found: Json) -> None:
    torches = [(of["of_resident"], name) for name, of in found.items() if name.startswith("torch")]
    for name, of in found.items():
        text, ratio, goal = f"{of['episodes_per_s']:,.0f} episodes/s", "", ""
        if name not in ("resident", "resident, beside torch"):
            low, high = of["of_resident_95_percent"]
            ratio = f"{100 * of['of_resident']:.1f} % of resident ({100 * low:.1f}-{100 * high:.1f})"
        if not name.startswith("resident"):
            text += f", {of['cores_of_other_processes'] + of['cores_taking_batches']:.2f} cores"
        if not name.startswith(("resident", "torch")):
            goal = ">= 99 %, <= 1 core" if mode == "eager" else ">= 98 %, <= 1 core"
            if torches:
                share, best = max(torches)
                ratio += f", {of['of_resident'] / share:.1f} x {best}"
        bench.row(f"training step, {mode}: {name}", text, ratio, goal)
