"""`rc.resample` and `rc.fuse` on CUDA, against numpy: values, the caller's stream and context, graphs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensors
import torch

import robocache as rc

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def on_gpu(array: np.ndarray, device: str = "cuda") -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def of_gpu(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def case(
    seed: int, values: str, times: str, dim: int, batch: int = 3, rows: int = 200, steps: int = 130
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    stamps = tensors.times(rng, batch, rows, times)
    return tensors.values(rng, (batch, rows, dim), values), stamps, tensors.targets(rng, stamps, steps)


@pytest.mark.parametrize("dim", [1, 3, 7, 16, 26, 256, 1078])
@pytest.mark.parametrize("times", tensors.TIMES)
@pytest.mark.parametrize("values", tensors.VALUES)
def test_values_are_the_references_and_the_bits_those_of_the_host(values: str, times: str, dim: int) -> None:
    arrays = case(dim, values, times, dim)
    out = rc.resample(*map(on_gpu, arrays))
    assert (out.device.type, out.is_contiguous()) == ("cuda", True)
    tensors.check(of_gpu(out), *arrays)
    assert of_gpu(out).tobytes() == rc.resample(*arrays).tobytes()


def test_a_fusion_is_the_resampled_streams_side_by_side() -> None:
    rng = np.random.default_rng(5)
    streams = [
        (tensors.values(rng, (4, rows, dim), "bfloat16"), tensors.times(rng, 4, rows, "int64"))
        for rows, dim in [(30, 512), (100, 64), (200, 12), (1, 5)]
    ]
    at = tensors.targets(rng, streams[1][1], 50)
    for used in (streams, streams * 20):
        fused = rc.fuse([(on_gpu(src), on_gpu(stamps)) for src, stamps in used], on_gpu(at))
        assert of_gpu(fused).tobytes() == rc.fuse(used, at).tobytes()
    with pytest.raises(ValueError, match="at most 80 streams, found 81"):
        rc.fuse([(on_gpu(src), on_gpu(stamps)) for src, stamps in streams[3:] * 81], on_gpu(at))


def test_what_is_not_row_major_is_copied_on_the_device() -> None:
    src, stamps, at = case(6, "float32", "float64", 6)
    turned = on_gpu(np.ascontiguousarray(src.transpose(2, 1, 0))).permute(2, 1, 0)
    assert not turned.is_contiguous()
    out = rc.resample(turned, on_gpu(stamps), on_gpu(at))
    assert of_gpu(out).tobytes() == rc.resample(src, stamps, at).tobytes()


def test_devices_that_differ_are_an_error() -> None:
    src, stamps, at = map(on_gpu, case(7, "float32", "int64", 2))
    with pytest.raises(ValueError, match="times_tgt: wanted it on cuda:0 as the first src, found cpu"):
        rc.resample(src, stamps, at.cpu())
    with pytest.raises(
        ValueError, match="times of stream 0: wanted it on cpu as the first src, found cuda:0"
    ):
        rc.resample(src.cpu(), stamps, at.cpu())


def test_it_is_enqueued_on_the_current_stream_and_does_not_wait() -> None:
    """Behind work that lasts: the call is back before it is over, and reads what it wrote."""
    src, stamps, at = case(8, "float32", "int64", 16)
    wanted = rc.resample(src, stamps, at)
    src_gpu, stamps_gpu, at_gpu = map(on_gpu, (src, stamps, at))
    rc.resample(src_gpu, stamps_gpu, at_gpu)  # kernels are loaded
    stream = torch.cuda.Stream()
    late = torch.full_like(src_gpu, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000_000)
        late.copy_(src_gpu)
        out = rc.resample(late, stamps_gpu, at_gpu)
        assert not stream.query(), "the call waited for the stream"
        assert torch.cuda.current_stream() == stream
        written = out.clone()
    stream.synchronize()
    assert of_gpu(written).tobytes() == wanted.tobytes()


def test_memory_goes_back_to_the_librarys_allocator() -> None:
    src, stamps, at = map(on_gpu, case(9, "float32", "int64", 256))
    rc.resample(src, stamps, at)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        rc.resample(src, stamps, at)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_a_graph_replays_it_on_new_data() -> None:
    first, second = case(10, "bfloat16", "int64", 64), case(11, "bfloat16", "int64", 64)
    inputs = [on_gpu(array) for array in first]
    rc.resample(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one = rc.resample(*inputs)
        both = rc.fuse([(inputs[0], inputs[1])] * 2, inputs[2])
    for arrays in (first, second, first):
        for tensor, array in zip(inputs, arrays, strict=True):
            tensor.copy_(on_gpu(array))
        one.zero_()
        both.zero_()
        graph.replay()
        torch.cuda.synchronize()
        wanted = rc.resample(*arrays)
        assert of_gpu(one).tobytes() == wanted.tobytes()
        assert of_gpu(both).tobytes() == np.concatenate([wanted, wanted], axis=2).tobytes()


def test_the_first_call_of_a_process_may_be_inside_a_capture() -> None:
    script = """
        import torch
        import robocache as rc

        src = torch.arange(12.0, device="cuda").reshape(1, 4, 3)
        times = torch.arange(4, device="cuda")[None]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = rc.resample(src, times, times)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, src)
    """
    run = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_work_before_and_after_stays_on_the_device_that_was_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("torch sees one CUDA device; this needs two")
    arrays = case(12, "float32", "int64", 8)
    out = rc.resample(*(on_gpu(array, "cuda:1") for array in arrays))
    assert torch.cuda.current_device() == 0
    assert torch.empty(1, device="cuda").device.index == 0
    assert out.device.index == 1
    assert of_gpu(out).tobytes() == rc.resample(*arrays).tobytes()


def test_cupy_gives_cupy_on_its_current_stream() -> None:
    cupy: Any = pytest.importorskip("cupy", reason="CuPy is not installed")
    arrays = case(13, "float32", "int64", 8)
    wanted = rc.resample(*arrays)
    with cupy.cuda.Stream(non_blocking=True):
        out = rc.resample(*(cupy.asarray(array) for array in arrays))
        assert isinstance(out, cupy.ndarray)
        assert cupy.asnumpy(out).tobytes() == wanted.tobytes()
