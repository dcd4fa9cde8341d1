"""Batches delivered to a client that only waits on them, and how fast one is handed over.

From episodes in the GPU's memory, and from episodes in pinned host memory.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from bench import KEY, OFF_GRID, ON_GRID, ROW_BYTES, ROWS, Bench, Json, endless, figures, gpu_work
from step import BATCH, DIM, STEPS

from daemon import Daemon


def taking(
    bench: Bench, batches: Iterator[Any], use: Callable[[torch.Tensor], object]
) -> Callable[[], float]:
    """Episodes a second of a loop that takes a batch and enqueues `use` on it."""

    def measure() -> float:
        episodes, start = 0, time.perf_counter()
        while time.perf_counter() - start < bench.args.seconds:
            for _ in range(20):
                x = next(batches)[KEY]
                use(x)
                episodes += len(x)
                del x
        torch.cuda.synchronize()
        return episodes / (time.perf_counter() - start)

    return measure


def store(bench: Bench) -> Json:
    """Batches from episodes that are all in the GPU's memory."""
    out: Json = {}
    reps = ("--reps", str(bench.args.rounds), "--seconds", str(bench.args.seconds))
    with bench.daemon("--gpu-cache", "16GiB", "--pinned-cache", "0") as daemon:
        for name, start in (("resample-off-grid", OFF_GRID), ("resample", ON_GRID)):
            data = bench.dataset()
            warm = bench.rust("", "throughput", data, "--workload", name, "--reps", "1", socket=daemon.socket)
            before, cpu, began = daemon.gpu(), daemon.cpu_seconds(), time.perf_counter()
            rust = bench.rust(
                f"store {name}", "throughput", data, "--workload", name, *reps, socket=daemon.socket
            )
            seconds = time.perf_counter() - began
            rust |= {
                "daemon": gpu_work(daemon, before, seconds),
                "daemon_cpu_s": daemon.cpu_seconds() - cpu,
                "warm_up": warm["samples_per_s"]["median"],
            }
            loader = bench.loader(daemon, start)
            static = torch.empty(BATCH, STEPS, DIM, dtype=torch.bfloat16, device=bench.args.device)
            resident = torch.randn_like(static)
            batches = endless(loader)
            copies = taking(bench, batches, static.copy_)
            found = bench.rounds(
                {
                    "python, waits": taking(bench, batches, lambda x: None),
                    "python, copies each batch": copies,
                    "resident tensor, copied": taking(bench, itertools.repeat({KEY: resident}), static.copy_),
                }
            )
            loader.close()
            out[name] = {"rust, waits": rust} | {key: figures(rates) for key, rates in found.items()}
            rate = rust["samples_per_s"]["median"]
            bench.row(f"{name}, Rust client", f"{rate:,.0f} episodes/s", "", ">= 1,000,000")
            beside = f"resident tensor {median(found['resident tensor, copied']):,.0f}"
            bench.row(
                f"{name}, Python client",
                f"{median(found['python, waits']):,.0f} episodes/s; "
                f"copying {median(found['python, copies each batch']):,.0f}",
                beside,
                ">= 1,000,000",
            )
        out["daemon_warnings"] = daemon.warnings()
    return out


def h2d(mib: int = 256) -> Callable[[], float]:
    """Bytes a second of copies from pinned memory."""
    host = torch.empty(mib << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")

    def measure(copies: int = 8) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(copies):
            device.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        return copies * host.nbytes / (start.elapsed_time(end) / 1e3)

    return measure


def own_copies(seconds: float, between: Callable[[], object] = lambda: None) -> Json:
    """What a small upload of this process's own takes, until it is there: one after another."""
    host = torch.zeros(64 << 10, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    took, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        between()
        torch.cuda.synchronize()
        start = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        took.append((time.perf_counter() - start) * 1e6)
    middle, high = np.quantile(took, (0.5, 0.99)).tolist()
    return {"bytes": host.nbytes, "us": {"median": middle, "mean": fmean(took), "p99": high, "n": len(took)}}


def beside_own_copies(bench: Bench, daemon: Daemon, batches: Iterator[Any], workload: list[str]) -> Json:
    """A trainer's own uploads, while what it is fed with crosses the same bus."""
    out: Json = {"alone": own_copies(1.0)}

    def take() -> None:
        # As a trainer whose step takes 2.5 ms.
        next(batches)[KEY]
        time.sleep(0.0025)

    out["fed every 2.5 ms"] = own_copies(2.0, take)
    before = daemon.gpu()["batches"]
    with ThreadPoolExecutor() as pool:
        long = [*workload, "--seconds", "3", "--reps", "1"]
        client = pool.submit(bench.rust, "own uploads", "throughput", *long, socket=daemon.socket)
        while daemon.gpu()["batches"] < before + 1000 and not client.done():
            time.sleep(0.05)
        out["beside a client at full speed"] = own_copies(1.0)
        if client.done():
            client.result()
            raise RuntimeError("the client was done before the uploads beside it were")
    return out


def pinned(bench: Bench) -> Json:
    """Batches from pinned memory alone, beside pinned copies to the device."""
    data, copying = bench.dataset(), h2d()
    with bench.daemon("--gpu-cache", "0", "--pinned-cache", "8GiB") as daemon:
        workload = [data, "--workload", "resample-off-grid"]
        once = ["--seconds", str(bench.args.seconds), "--reps", "1"]

        def rust() -> float:
            made = bench.rust("pinned", "throughput", *workload, *once, socket=daemon.socket)
            return made["samples_per_s"]["median"]

        rust()  # brings all episodes to pinned memory
        before, cpu, began = daemon.gpu(), daemon.cpu_seconds(), time.perf_counter()
        loader = bench.loader(daemon, OFF_GRID)
        waits = taking(bench, endless(loader), lambda x: None)
        found = bench.rounds({"h2d": copying, "rust": rust, "h2d again": copying, "python": waits})
        work = gpu_work(daemon, before, time.perf_counter() - began)
        cpu = daemon.cpu_seconds() - cpu
        uploads = beside_own_copies(bench, daemon, endless(loader), workload)
        loader.close()
        warnings = daemon.warnings()
    bus = median(found["h2d"] + found["h2d again"])
    out: Json = {
        "h2d_bytes_per_s": figures(found["h2d"] + found["h2d again"]),
        "bytes_of_source_an_episode": ROWS * ROW_BYTES,
        "counted": "each target lies between rows 2k and 2k+1, so a batch reads each of its episodes' 500 "
        "rows of 256 float32 once; stamps, descriptors and what the bus adds are not counted",
        "daemon": work,
        "daemon_cpu_s": cpu,
        "daemon_warnings": warnings,
        "own uploads": uploads,
    }
    for name in ("rust", "python"):
        rate = median(found[name])
        share = rate * ROWS * ROW_BYTES / bus
        out[name] = {"samples_per_s": figures(found[name]), "of_h2d": share}
        ours = f"{rate:,.0f} episodes/s, {rate * ROWS * ROW_BYTES / 1e9:.1f} GB/s"
        bench.row(
            f"pinned store, {name} client", ours, f"{share:.0%} of H2D ({bus / 1e9:.1f} GB/s)", ">= 90 %"
        )
    for name, found in uploads.items():
        us = found["us"]
        told = f"p50 {us['median']:.0f} us, mean {us['mean']:.0f}, p99 {us['p99']:.0f}"
        bench.row(f"  64 KiB that a trainer uploads itself, {name}", told, "", "")
    return out


def hand_off(bench: Bench) -> Json:
    """From a slot's publication to the batch being usable on the stream of another process."""
    batches = bench.args.batches
    out = bench.rust("hand-off", "hand-off", "--batches", str(batches))
    out["bare"] = bench.rust("hand-off, bare", "hand-off", "--work-kib", "0", "--batches", str(batches // 4))

    def told(of: Json) -> str:
        us = {key: value / 1e3 for key, value in of["usable_ns"].items()}
        tail = f"p99 {us['p99']:.1f}, p99.9 {us['p999']:.1f} of {of['usable_ns']['n']:,}"
        return f"p50 {us['median']:.1f} us, {tail}"

    bench.row("hand-off: published to usable", told(out), "", "p50 <= 20, p99 <= 100")
    bench.row("  of batches that take the GPU no time", told(out["bare"]), "", "")
    return out
