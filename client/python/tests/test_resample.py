"""`rc.resample` and `rc.fuse` on arrays of the host, against numpy: values, libraries, copies, refusals."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tensors
import torch

import robocache as rc
from robocache import _robocache


def case(
    seed: int, values: str, times: str, dim: int, batch: int = 3, rows: int = 40, steps: int = 57
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    stamps = tensors.times(rng, batch, rows, times)
    return tensors.values(rng, (batch, rows, dim), values), stamps, tensors.targets(rng, stamps, steps)


def as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def of_torch(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.mark.parametrize("dim", [1, 3, 16, 256])
@pytest.mark.parametrize("times", tensors.TIMES)
@pytest.mark.parametrize("values", tensors.VALUES)
def test_values_are_the_references_for_every_dtype(values: str, times: str, dim: int) -> None:
    src, stamps, at = case(dim, values, times, dim)
    out = rc.resample(src, stamps, at)
    assert isinstance(out, np.ndarray)
    tensors.check(out, src, stamps, at)


@pytest.mark.parametrize("times", tensors.TIMES)
@pytest.mark.parametrize("values", tensors.VALUES)
def test_torch_gives_torch_with_the_same_bits(values: str, times: str) -> None:
    src, stamps, at = case(1, values, times, 7)
    out = rc.resample(as_torch(src), as_torch(stamps), as_torch(at))
    assert isinstance(out, torch.Tensor)
    assert (out.device.type, out.is_contiguous()) == ("cpu", True)
    assert of_torch(out).tobytes() == rc.resample(src, stamps, at).tobytes()


@pytest.mark.parametrize("values", ["float16", "bfloat16", "float32"])
def test_jax_gives_jax_with_the_same_bits(values: str) -> None:
    src, stamps, at = case(2, values, "float32", 7)
    out = rc.resample(*(jax.numpy.asarray(array) for array in (src, stamps, at)))
    assert isinstance(out, jax.Array)
    assert out.dtype == src.dtype
    assert np.asarray(out).tobytes() == rc.resample(src, stamps, at).tobytes()


def test_jax_keeps_64_bits_where_it_may_and_says_so_where_not() -> None:
    src, stamps, at = case(3, "float64", "int64", 2)
    with jax.enable_x64(True):
        arrays = [jax.numpy.asarray(array) for array in (src, stamps, at)]
        out = rc.resample(*arrays)
        assert (out.dtype, np.asarray(out).tobytes()) == (np.float64, rc.resample(src, stamps, at).tobytes())
    with pytest.raises(ValueError, match="jax_enable_x64"):
        rc.resample(*arrays)
    with pytest.raises(ValueError, match="tracer"):
        jax.jit(rc.resample)(*(jax.numpy.zeros(shape) for shape in ((1, 2, 1), (1, 2), (1, 2))))


def test_other_arrays_that_speak_dlpack_are_answered_as_numpy() -> None:
    src, stamps, at = case(4, "float32", "float64", 2)
    columns = [_robocache.Tensor.from_bytes(a.tobytes(), a.dtype.name, a.shape) for a in (src, stamps, at)]
    out = rc.resample(*columns)
    assert isinstance(out, np.ndarray)
    np.testing.assert_array_equal(out, rc.resample(src, stamps, at))


def test_a_fusion_is_the_resampled_streams_side_by_side() -> None:
    rng = np.random.default_rng(5)
    streams = []
    for rows, dim in [(30, 16), (100, 1), (200, 3), (1, 5)]:
        streams.append(
            (tensors.values(rng, (4, rows, dim), "float32"), tensors.times(rng, 4, rows, "float64"))
        )
    at = tensors.targets(rng, streams[1][1], 50)
    wanted = np.concatenate([rc.resample(src, stamps, at) for src, stamps in streams], axis=2)
    for (src, stamps), column in zip(streams, (0, 16, 17, 20), strict=True):
        tensors.check(wanted[:, :, column : column + src.shape[2]].copy(), src, stamps, at)
    fused = rc.fuse(streams, at)
    assert fused.shape == (4, 50, 25)
    assert fused.tobytes() == wanted.tobytes()
    assert rc.fuse(iter(streams), at).tobytes() == wanted.tobytes(), "any iterable"
    fused_torch = rc.fuse([(as_torch(s), as_torch(t)) for s, t in streams], as_torch(at))
    assert of_torch(fused_torch).tobytes() == wanted.tobytes()
    # 81 streams are more than a launch takes, not more than the host does.
    assert rc.fuse(streams[3:] * 81, at).shape == (4, 50, 405)


def test_equal_times_take_the_later_row_and_edges_hold() -> None:
    src = np.array([[[1.0], [2.0], [3.0], [10.0]]], np.float32)
    stamps = np.array([[0, 5, 5, 7]], np.int64)
    at = np.array([[-(2**62), -1, 0, 4, 5, 6, 7, 8, 2**62]], np.int64)
    out = rc.resample(src, stamps, at)[0, :, 0]
    np.testing.assert_array_equal(out, np.array([1, 1, 1, 1.8, 3, 6.5, 10, 10, 10], np.float32))


def test_a_nan_target_gives_a_nan_row() -> None:
    out = rc.resample(np.ones((1, 2, 3), np.float16), np.array([[0.0, 1.0]]), np.array([[np.nan, 0.5]]))
    assert np.isnan(out[0, 0]).all()
    np.testing.assert_array_equal(out[0, 1], np.ones(3, np.float16))


def test_epoch_seconds_are_compared_in_their_own_type() -> None:
    """In float32 they step by 128 s: ten minutes at 1 Hz have six times. Nanoseconds lose nothing."""
    seconds = 1_763_800_000 + np.arange(600)
    src = np.arange(600, dtype=np.float32).reshape(1, 600, 1)
    coarse, fine = seconds[None].astype(np.float32), seconds[None] * 1_000_000_000
    assert len(np.unique(coarse)) < 7
    at = coarse[:, ::37]
    out = rc.resample(src, coarse, at)
    tensors.check(out, src, coarse, at)
    assert len(np.unique(out)) < 7
    out = rc.resample(src, fine, fine[:, :-1] + 500_000_000)
    np.testing.assert_array_equal(out[0, :, 0], np.arange(599) + np.float32(0.5))


def test_what_is_not_row_major_is_copied_and_left_as_it_was() -> None:
    src, stamps, at = case(6, "float32", "float64", 6)
    wanted = rc.resample(src, stamps, at)
    turned = np.asfortranarray(src)
    wide = np.repeat(stamps, 2, axis=1)[:, ::2]
    assert not turned.flags.c_contiguous
    assert not wide.flags.c_contiguous
    assert rc.resample(turned, wide, at[:, ::-1][:, ::-1]).tobytes() == wanted.tobytes()
    np.testing.assert_array_equal(turned, src)
    out = rc.resample(as_torch(turned), as_torch(wide), as_torch(at))
    assert of_torch(out).tobytes() == wanted.tobytes()
    one = torch.zeros(1, 1, 1).expand(3, 40, 6)
    assert not rc.resample(one, as_torch(stamps), as_torch(at)).any()


def test_read_only_arrays_are_read() -> None:
    arrays = case(7, "float32", "int64", 2)
    wanted = rc.resample(*arrays)
    for array in arrays:
        array.flags.writeable = False
    np.testing.assert_array_equal(rc.resample(*arrays), wanted)
    assert rc.resample(*arrays).flags.writeable


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("src", "times", "at", "message"),
    [
        (zeros(2, 3), zeros(2, 3), zeros(2, 4), r"src of stream 0: wanted shape \[B, S, D\], found \[2, 3\]"),
        (zeros(2, 3, 1), zeros(2, 3, 1), zeros(2, 4), r"times of stream 0: wanted shape \[B, S\]"),
        (zeros(2, 3, 1), zeros(2, 3), zeros(4), r"times_tgt: wanted shape \[B, T\], found \[4\]"),
        (zeros(2, 3, 1), zeros(2, 4), zeros(2, 5), r"do not fit.*\[2, 3, 1\].*\[2, 4\].*\[2, 5\]"),
        (zeros(2, 3, 1), zeros(2, 3), zeros(3, 5), r"do not fit.*\[3, 5\]"),
        (zeros(2, 0, 1), zeros(2, 0), zeros(2, 5), r"at least 1.*\[2, 0, 1\]"),
        (zeros(2, 3, 1), zeros(2, 3), zeros(2, 0), r"at least 1.*\[2, 0\]"),
        (zeros(1, 1, 1, dtype="int32"), zeros(1, 1), zeros(1, 1), "values must be float16.*int32"),
        (zeros(1, 1, 1, dtype="uint16"), zeros(1, 1), zeros(1, 1), "values must be float16.*uint16"),
        (zeros(1, 1, 1), zeros(1, 1, dtype="int32"), zeros(1, 1, dtype="int32"), "times must be.*int32"),
        (zeros(1, 1, 1), zeros(1, 1), zeros(1, 1, dtype="float64"), "dtype of the targets, float64.*float32"),
        (zeros(1, 1, 1, dtype="complex64"), zeros(1, 1), zeros(1, 1), "type code 5, 64 bits"),
        (
            zeros(1, 1, 1, dtype=">f4"),
            zeros(1, 1),
            zeros(1, 1),
            "src of stream 0: numpy.ndarray cannot be read",
        ),
        (zeros(1, 1, 1), np.zeros((1, 1), "M8[ns]"), np.zeros((1, 1), "M8[ns]"), "times of stream 0"),
        ([[[1.0]]], zeros(1, 1), zeros(1, 1), r"src of stream 0: wanted an array.*builtins\.list"),
        (
            torch.zeros(1, 1, 1),
            zeros(1, 1),
            zeros(1, 1),
            "array of torch as the first src, found one of numpy",
        ),
        (zeros(1, 1, 1), zeros(1, 1), jax.numpy.zeros((1, 1)), "times_tgt.*of numpy.*one of jax"),
        (np.ma.zeros((1, 1, 1)), zeros(1, 1), zeros(1, 1), "MaskedArray"),
    ],
)
def test_what_does_not_fit_is_a_value_error(src: Any, times: Any, at: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        rc.resample(src, times, at)
    assert isinstance(raised.value, rc.RequestError)


def test_torch_tensors_that_cannot_be_read_say_why() -> None:
    times = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"src of stream 0: torch.Tensor cannot be read.*detach"):
        rc.resample(torch.zeros(1, 1, 1, requires_grad=True), times, times)
    with pytest.raises(ValueError, match="src of stream 0"):
        rc.resample(torch.zeros(1, 1, 1, device="meta"), times, times)


def test_streams_that_do_not_go_together_are_named() -> None:
    at = zeros(1, 1)
    with pytest.raises(ValueError, match="at least one"):
        rc.fuse([], at)
    first = (zeros(1, 1, 1), at)
    with pytest.raises(ValueError, match="dtype of the first, float32; stream 1 has float64"):
        rc.fuse([first, (zeros(1, 1, 1, dtype="float64"), at)], at)
    with pytest.raises(ValueError, match="dtype of the first, float32; stream 1 has bfloat16"):
        rc.fuse([first, (zeros(1, 1, 1).astype(ml_dtypes.bfloat16), at)], at)
    with pytest.raises(ValueError, match="those of stream 1 have int64"):
        rc.fuse([first, (zeros(1, 1, 1), zeros(1, 1, dtype="int64"))], at)
    with pytest.raises(ValueError, match="times of stream 2: wanted shape"):
        rc.fuse([first, first, (zeros(1, 1, 1), zeros(1))], at)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (np.array([[0, 1, 2], [5, 7, 6]]), "batch element 1, row 1 has 7, the next 6"),
        (np.array([[0.0, 1.0, 2.0], [0.0, np.nan, 1.0]]), "batch element 1, row 0 has 0, the next NaN"),
    ],
)
def test_times_that_run_backwards_are_an_error_that_names_the_row(times: np.ndarray, message: str) -> None:
    src = zeros(2, 3, 4)
    with pytest.raises(ValueError, match=f"must ascend.*stream 1.*{message}"):
        rc.fuse([(src, np.sort(times)[:1].repeat(2, axis=0)), (src, times)], times)


def test_other_threads_run_while_it_computes() -> None:
    """With no switch forced, the counter moves during the call only if the call lets go of Python's lock."""
    src, stamps, at = case(8, "float32", "int64", 256, batch=8, rows=500, steps=2000)
    counter = 0
    moved, over = [], threading.Event()

    def work() -> None:
        for _ in range(100):
            before = counter
            rc.resample(src, stamps, at)
            if counter != before:
                moved.append(counter - before)
                break
        over.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        while not over.is_set():
            counter += 1
            os.sched_yield()
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert moved


def test_calls_keep_no_array_alive() -> None:
    src, stamps, at = case(9, "float32", "int64", 2)
    before = [sys.getrefcount(array) for array in (src, stamps, at)]
    for _ in range(10):
        rc.resample(src, stamps, at)
    with pytest.raises(ValueError, match="ascend"):
        rc.resample(src, stamps[:, ::-1].copy(), at)
    gc.collect()
    assert [sys.getrefcount(array) for array in (src, stamps, at)] == before


def test_the_module_takes_an_allocation_only_if_it_is_the_one_asked_for() -> None:
    src, times = zeros(1, 2, 3), zeros(1, 2)

    def fuse(made: Any) -> Any:
        return _robocache.fuse([(src, times, None)], times, empty=lambda _shape: made)

    assert fuse(zeros(1, 2, 3)).shape == (1, 2, 3)
    for made in (zeros(1, 2, 4), zeros(2, 3), zeros(1, 2, 3, dtype="float64")):
        with pytest.raises(
            ValueError, match=r"the array for the result: wanted float32 \[1, 2, 3\] on cpu, found"
        ):
            fuse(made)
    with pytest.raises(ValueError, match="row-major"):
        fuse(np.zeros((1, 3, 2), np.float32).transpose(0, 2, 1))
    read_only = zeros(1, 2, 3)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        fuse(read_only)
    with pytest.raises(ValueError, match="wanted the bits of bfloat16, found float32"):
        _robocache.fuse([(src, times, "bfloat16")], times, empty=lambda _shape: src)


class _DlTensor(ctypes.Structure):
    """`DLManagedTensor` of dlpack.h before 1.0, whose first field is the `DLTensor`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class Forged:
    """An array that says of itself whatever a test wants; float32, at no memory that is ever read."""

    def __init__(self, shape: tuple[int, ...], device: tuple[int, int] = (2, 0), **said: Any) -> None:
        self.device = device
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        self.tensor = _DlTensor(data=4096, device=device, ndim=len(shape), code=2, bits=32, lanes=1)
        self.tensor.shape = self.shape
        for name, value in said.items():
            setattr(self.tensor, name, value)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        assert stream == (-1 if self.device[0] == 2 else None)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


def forged(src: Any, times: Any, at: Any, stream: Any = None) -> Any:
    return _robocache.fuse([(src, times, None)], at, empty=Forged, stream=stream)


def test_devices_that_differ_are_an_error() -> None:
    src, times = Forged((1, 2, 3)), Forged((1, 2))
    with pytest.raises(ValueError, match=r"times_tgt: wanted it on cuda:0 as the first src, found cpu"):
        forged(src, times, zeros(1, 2))
    with pytest.raises(
        ValueError, match=r"times of stream 0: wanted it on cuda:0 as the first src, found cuda:1"
    ):
        forged(src, Forged((1, 2), (2, 1)), times)
    with pytest.raises(ValueError, match=r"wanted memory of the host or of a CUDA device, found.*\(10, 0\)"):
        forged(Forged((1, 2, 3), (10, 0)), times, times)
    with pytest.raises(ValueError, match="CuPy"):
        forged(src, times, times)


def test_descriptions_that_cannot_be_are_refused() -> None:
    times = zeros(1, 2)
    for said, message in [
        ({"shape": (1, -2, 3)}, "a size of -2"),
        ({"shape": (2**31, 2**31, 2**31)}, "no memory holds"),
        ({"shape": (1, 2, 3), "data": None}, "at no address"),
        ({"shape": (1, 2, 3), "lanes": 4}, "4 lanes"),
        ({"shape": (1, 2, 3), "bits": 8}, "type code 2, 8 bits"),
    ]:
        with pytest.raises(ValueError, match=message):
            forged(Forged(said.pop("shape"), (1, 0), **said), times, times)
    with pytest.raises(ValueError, match="multiple of its element's 4 bytes, found 0x1002"):
        forged(Forged((1, 2, 3), byte_offset=2), Forged((1, 2)), Forged((1, 2)))


def test_a_used_capsule_is_refused() -> None:
    class Once:
        def __init__(self, array: np.ndarray) -> None:
            self.capsule = array.__dlpack__()

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self, **_: Any) -> Any:
            return self.capsule

    once = Once(zeros(1, 2, 3))
    torch.from_dlpack(once)
    with pytest.raises(ValueError, match="nobody used yet"):
        forged(once, zeros(1, 2), zeros(1, 2))


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="this machine has a CUDA driver")
def test_without_a_driver_the_error_says_what_is_missing() -> None:
    times = Forged((1, 2))
    with pytest.raises(rc.RoboCacheError, match=r"no CUDA driver was found \(libcuda.so.1\)") as raised:
        forged(Forged((1, 2, 3)), times, times, stream=lambda _device: 0)
    assert not isinstance(raised.value, ValueError)


def test_it_needs_no_torch_and_no_jax() -> None:
    script = """
import sys
import numpy as np
import robocache as rc
out = rc.resample(np.ones((1, 2, 3)), np.array([[0, 10]]), np.array([[5]]))
assert out.tolist() == [[[1.0, 1.0, 1.0]]]
assert not {"torch", "jax"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
