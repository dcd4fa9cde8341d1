"""Columns as arrays of other libraries: dtypes, read-only flags, copies, lifetimes. No daemon needed."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.dlpack import from_dlpack as jax_from_dlpack

from robocache._robocache import Tensor

DTYPES = {
    "bool": np.bool_,
    "uint8": np.uint8,
    "int8": np.int8,
    "uint16": np.uint16,
    "int16": np.int16,
    "uint32": np.uint32,
    "int32": np.int32,
    "uint64": np.uint64,
    "int64": np.int64,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
}


def values(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(7)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    if dtype.startswith("float"):
        return rng.normal(size=shape).astype(DTYPES[dtype])
    return rng.integers(0, 100, size=shape).astype(DTYPES[dtype])


def tensor_of(array: np.ndarray, dtype: str | None = None) -> Tensor:
    return Tensor.from_bytes(array.tobytes(), dtype or array.dtype.name, array.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (1, 1, 1, 7), (0, 3)])
def test_numpy_and_torch_read_the_values_of_every_dtype_and_shape(dtype: str, shape: tuple[int, ...]) -> None:
    wanted = values(dtype, shape)
    column = tensor_of(wanted)
    assert (column.dtype, column.shape, column.nbytes) == (dtype, shape, wanted.nbytes)
    array = np.from_dlpack(column)
    assert array.dtype == wanted.dtype
    np.testing.assert_array_equal(array, wanted)
    tensor = torch.from_dlpack(column)
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(tensor.numpy(), wanted)


def test_numpy_cannot_write_to_a_column() -> None:
    array = np.from_dlpack(tensor_of(values("float32", (3, 2))))
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_all_libraries_see_one_memory() -> None:
    column = tensor_of(values("float32", (4, 8)))
    address = np.from_dlpack(column).ctypes.data
    assert address % 64 == 0
    assert torch.from_dlpack(column).data_ptr() == address
    assert torch.utils.dlpack.from_dlpack(column.__dlpack__(max_version=(1, 0))).data_ptr() == address
    assert torch.utils.dlpack.from_dlpack(column.__dlpack__()).data_ptr() == address
    assert jax_from_dlpack(column).unsafe_buffer_pointer() == address


def test_a_copy_is_other_memory_that_may_be_written() -> None:
    wanted = values("int64", (5, 3))
    column = tensor_of(wanted)
    array = np.from_dlpack(column, copy=True)
    assert array.flags.writeable
    assert array.ctypes.data != np.from_dlpack(column).ctypes.data
    array += 1
    np.testing.assert_array_equal(np.from_dlpack(column), wanted)


def test_bfloat16_reaches_torch_and_jax_as_itself_and_numpy_through_its_bits() -> None:
    wanted = values("float32", (3, 5)).astype(ml_dtypes.bfloat16)
    column = Tensor.from_bytes(wanted.tobytes(), "bfloat16", wanted.shape)
    assert torch.from_dlpack(column).dtype == torch.bfloat16
    assert torch.equal(torch.from_dlpack(column).float(), torch.from_numpy(wanted.astype(np.float32)))
    assert jax_from_dlpack(column).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(jax_from_dlpack(column)), wanted)
    np.testing.assert_array_equal(np.from_dlpack(column.bits()).view(ml_dtypes.bfloat16), wanted)


@pytest.mark.parametrize("dtype", ["bool", "float32", "float16", "int32", "uint8"])
def test_jax_reads_the_values(dtype: str) -> None:
    wanted = values(dtype, (6, 4))
    array = jax_from_dlpack(tensor_of(wanted))
    assert isinstance(array, jax.Array)
    assert array.dtype == wanted.dtype
    np.testing.assert_array_equal(np.asarray(array), wanted)


def test_a_capsule_is_versioned_where_the_reader_knows_versions() -> None:
    column = tensor_of(values("float32", (2,)))
    assert '"dltensor"' in repr(column.__dlpack__())
    assert '"dltensor"' in repr(column.__dlpack__(max_version=(0, 8)))
    assert '"dltensor_versioned"' in repr(column.__dlpack__(max_version=(1, 0)))
    assert '"dltensor_versioned"' in repr(column.__dlpack__(max_version=(2, 3)))


def test_what_host_memory_cannot_give_is_refused() -> None:
    column = tensor_of(values("float32", (2,)))
    assert column.__dlpack_device__() == (1, 0)
    with pytest.raises(BufferError, match="no streams"):
        column.__dlpack__(stream=1)
    with pytest.raises(BufferError, match="host memory"):
        column.__dlpack__(dl_device=(2, 0))
    with pytest.raises(ValueError, match=r"24 bytes.*float32.*found 23"):
        Tensor.from_bytes(b"x" * 23, "float32", (2, 3))
    with pytest.raises(ValueError, match="float8"):
        Tensor.from_bytes(b"", "float8", (0,))


def test_memory_lives_as_long_as_any_view_and_no_longer() -> None:
    """Counted in bytes of the process, over far more than it could hold."""
    import psutil

    block = np.zeros(16 << 20, np.uint8)
    array = np.from_dlpack(Tensor.from_bytes(block.tobytes(), "uint8", block.shape))
    gc.collect()
    assert int(array[-1]) == 0
    before = psutil.Process().memory_info().rss
    for _ in range(64):
        column = Tensor.from_bytes(block.tobytes(), "uint8", block.shape)
        views = [
            np.from_dlpack(column),
            torch.from_dlpack(column),
            column.__dlpack__(),
            jax_from_dlpack(column),
        ]
        del column, views
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 256 << 20


def test_importing_into_torch_warns_of_nothing() -> None:
    script = """
        import numpy as np
        from robocache._robocache import Tensor
        import torch
        for _ in range(3):
            torch.from_dlpack(Tensor.from_bytes(b"12345678", "float32", (2,))) + 1
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
