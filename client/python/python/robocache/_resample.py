"""Resampling of arrays that the caller has: numpy, torch and JAX on the host, torch and CuPy on CUDA."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import numpy as np

from . import _robocache
from ._errors import RequestError

Array = TypeVar("Array")
Shape = tuple[int, int, int]

# Before it numpy could not export an array that is read-only, as those of JAX are.
_EXPORTS_READ_ONLY = np.lib.NumpyVersion(np.__version__) >= "2.1.0"


def resample(src: Array, times_src: Any, times_tgt: Any) -> Array:
    """`src` `[B, S, D]`, whose rows were taken at `times_src` `[B, S]`, at `times_tgt` `[B, T]`: `[B, T, D]`.

    Linear between the rows around a target; before the first row and after the last that row is held, and
    nothing is extrapolated. A target that is a time is that row, bit for bit; of equal times the later row
    counts; a NaN target gives a NaN row.

    `src` is float16, bfloat16, float32 or float64, and so is the result. Times are int64, float64 or float32
    (epoch seconds in float32 step by 128 s), all of one dtype, in any unit, and ascend.

    All arrays are of one library (numpy, torch, JAX, CuPy; others that speak DLPack are read, and answered,
    as numpy) and on one device; the result is a new array of that library there. What is not row-major is
    copied first, by the library, and so are read-only arrays of a numpy before 2.1. Nobody may write the
    arrays meanwhile.

    On the host other Python threads run while this computes. On a CUDA device (torch, CuPy) it is one kernel
    on the library's current stream: it does not wait, and can be captured into a CUDA graph. There nobody
    looks at the order of times: where they do not ascend the result is made of any rows. It is not
    differentiable: pass `src.detach()`.

    Raises `RequestError`, a `ValueError`, for shapes, dtypes, devices or times that do not fit, and
    `RoboCacheError` where the device cannot do it.
    """
    return fuse([(src, times_src)], times_tgt)


def fuse(streams: Iterable[tuple[Array, Any]], times_tgt: Any) -> Array:
    """Several streams, `(src, times_src)` each, side by side at `times_tgt` `[B, T]`: `[B, T, sum of D]`.

    Equal to `resample` of each, concatenated along the last axis in the order given, at the price of one pass
    (on a CUDA device one kernel, for up to 80 streams). Streams have their own S and D, and one dtype; else
    as `resample`.
    """
    pairs = [(src, times) for src, times in streams]
    if not pairs:
        raise RequestError("nothing to resample: wanted at least one (src, times) pair, found none")
    first = pairs[0][0]
    library = _library_of("src of stream 0", first)
    for number, (src, times) in enumerate(pairs):
        _same(library, f"src of stream {number}", src)
        _same(library, f"times of stream {number}", times)
    _same(library, "times_tgt", times_tgt)

    with library.on_device_of(first):
        ready = [(library.ready(src), library.ready(times)) for src, times in pairs]
        like = ready[0][0]
        made = _robocache.fuse(
            [(_bits(src), times, "bfloat16" if _is_bfloat16(src) else None) for src, times in ready],
            library.ready(times_tgt),
            empty=lambda shape: _bits(library.empty(like, shape)),
            stream=library.stream,
        )
    result: Array = library.finished(made.view(like.dtype) if _is_bfloat16(like) else made, first)
    return result


class _Library(NamedTuple):
    """What has to be known of a library of arrays."""

    name: str
    # Makes the array's device current, where the library has such a thing.
    on_device_of: Callable[[Any], AbstractContextManager[Any]]
    # A row-major array that exports itself through DLPack: the one given, or a copy.
    ready: Callable[[Any], Any]
    # An array of the shape, else like the one given (which is ready).
    empty: Callable[[Any, Shape], Any]
    # The caller's kind of array from one that `empty` made.
    finished: Callable[[Any, Any], Any]
    # The number of the current CUDA stream of a device, which is current.
    stream: Callable[[int], int] | None


def _numpy_ready(array: Any) -> Any:
    if not isinstance(array, np.ndarray):
        try:
            array = np.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError) as error:
            raise RequestError(
                f"{type(array).__module__}.{type(array).__qualname__} cannot be read as numpy: {error}"
            ) from error
    if isinstance(array, np.ma.MaskedArray):
        raise RequestError(
            "wanted arrays without a mask, found numpy.ma.MaskedArray: fill it, or drop its rows"
        )
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    if not (array.flags.writeable or _EXPORTS_READ_ONLY):
        array = array.copy()
    return array


def _numpy_empty(like: Any, shape: Shape) -> Any:
    return np.empty(shape, like.dtype)


def _jax_ready(array: Any) -> Any:
    if isinstance(array, sys.modules["jax"].core.Tracer):
        raise RequestError(
            "wanted a JAX array with values, found a tracer: call this outside of jax.jit and jax.grad"
        )
    kind, _ = array.__dlpack_device__()
    if kind != 1:
        raise RequestError(
            "JAX arrays are resampled on the host only, found one elsewhere: jax.device_put it to "
            'jax.devices("cpu")[0], or use torch or CuPy on CUDA (DLPack hands arrays over without a copy)'
        )
    return _numpy_ready(np.asarray(array))


def _jax_finished(made: Any, like: Any) -> Any:
    # JAX would cut 64-bit values to their lower half unless it was told to keep them.
    if made.dtype.itemsize == 8 and not sys.modules["jax"].config.jax_enable_x64:
        raise RequestError(
            f"JAX cannot hold a {made.dtype} result: set jax_enable_x64, or pass float32 values"
        )
    return sys.modules["jax"].device_put(made, like.sharding)


def _torch_on(tensor: Any) -> AbstractContextManager[Any]:
    # It exports tensors of the current device only.
    if not tensor.is_cuda:
        return nullcontext()
    device: AbstractContextManager[Any] = sys.modules["torch"].cuda.device(tensor.device)
    return device


def _torch_ready(tensor: Any) -> Any:
    return tensor.resolve_neg().contiguous()


def _torch_empty(like: Any, shape: Shape) -> Any:
    return sys.modules["torch"].empty(shape, dtype=like.dtype, device=like.device)


def _torch_stream(device: int) -> int:
    stream: int = sys.modules["torch"].cuda.current_stream(device).cuda_stream
    return stream


def _cupy_on(array: Any) -> AbstractContextManager[Any]:
    device: AbstractContextManager[Any] = array.device
    return device


def _cupy_ready(array: Any) -> Any:
    return sys.modules["cupy"].ascontiguousarray(array)


def _cupy_empty(like: Any, shape: Shape) -> Any:
    return sys.modules["cupy"].empty(shape, like.dtype)


def _cupy_stream(_device: int) -> int:
    stream: int = sys.modules["cupy"].cuda.get_current_stream().ptr
    return stream


def _anywhere(_array: Any) -> AbstractContextManager[Any]:
    return nullcontext()


def _itself(made: Any, _like: Any) -> Any:
    return made


_NUMPY = _Library("numpy", _anywhere, _numpy_ready, _numpy_empty, _itself, None)
_JAX = _Library("jax", _anywhere, _jax_ready, _numpy_empty, _jax_finished, None)
_TORCH = _Library("torch", _torch_on, _torch_ready, _torch_empty, _itself, _torch_stream)
_CUPY = _Library("cupy", _cupy_on, _cupy_ready, _cupy_empty, _itself, _cupy_stream)
# By the package that defines the type, or one that it derives from.
_LIBRARIES = {"numpy": _NUMPY, "jax": _JAX, "jaxlib": _JAX, "torch": _TORCH, "cupy": _CUPY}


def _library_of(what: str, array: Any) -> _Library:
    for kind in type(array).__mro__:
        library = _LIBRARIES.get(kind.__module__.partition(".")[0])
        if library:
            return library
    if hasattr(array, "__dlpack__"):
        return _NUMPY
    raise RequestError(
        f"{what}: wanted an array of numpy, torch, JAX or CuPy, or one that speaks DLPack, found "
        f"{type(array).__module__}.{type(array).__qualname__}"
    )


def _same(library: _Library, what: str, array: Any) -> None:
    found = _library_of(what, array)
    if found is not library:
        raise RequestError(
            f"{what}: wanted an array of {library.name} as the first src, found one of {found.name}: "
            "convert it first"
        )


def _bits(array: Any) -> Any:
    # DLPack cannot name the bfloat16 that ml_dtypes gives to numpy.
    return array.view(np.uint16) if _is_bfloat16(array) else array


def _is_bfloat16(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.name == "bfloat16"
