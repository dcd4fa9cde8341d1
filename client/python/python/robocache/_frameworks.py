"""How a column becomes a numpy array, a torch tensor or a JAX array. No copies: all go through DLPack.

But that JAX, unless it was told to keep 64 bits, gets columns of 64 as numpy arrays, copied from a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from ._errors import RequestError

if TYPE_CHECKING:
    from . import _robocache
    from ._batch import View

FRAMEWORKS = ("torch", "jax", "numpy")


def choose(framework: str | None) -> str:
    """`framework` if it is one; if absent, torch where it can be imported, else numpy."""
    if framework is None:
        return "torch" if "torch" in sys.modules or importlib.util.find_spec("torch") else "numpy"
    if framework not in FRAMEWORKS:
        raise RequestError(f"framework must be one of {', '.join(FRAMEWORKS)}, found {framework!r}")
    if framework != "numpy" and framework not in sys.modules and not importlib.util.find_spec(framework):
        raise RequestError(
            f"framework={framework!r}, but {framework} cannot be imported: install it, or say numpy"
        )
    return framework


def view_for(framework: str, dtypes: set[str], on_cuda: bool) -> View:
    """The function that makes that framework's view of a column, given the dtypes it will meet and where."""
    if framework == "torch":
        from .torch import cuda_view, host_view

        return cuda_view if on_cuda else host_view
    if framework == "jax":
        return _jax()
    if "bfloat16" not in dtypes:
        return _numpy
    try:
        import ml_dtypes
    except ImportError as error:
        raise RequestError(
            "numpy has no bfloat16 of its own: install ml_dtypes, or use dtype='float16' or framework='torch'"
        ) from error
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def numpy_with_bfloat16(tensor: _robocache.Tensor) -> Any:
        if tensor.dtype == "bfloat16":
            return np.from_dlpack(tensor.bits()).view(bfloat16)
        return np.from_dlpack(tensor)

    return numpy_with_bfloat16


def _numpy(tensor: _robocache.Tensor) -> Any:
    return np.from_dlpack(tensor)


def _jax() -> View:
    import jax
    from jax.dlpack import from_dlpack

    def view(tensor: _robocache.Tensor) -> Any:
        # JAX would cut 64-bit values to their lower half (`t_ns` above all) unless it was told to keep them.
        if tensor.dtype in ("int64", "uint64", "float64") and not jax.config.jax_enable_x64:
            return _numpy(tensor.to_host())
        # JAX computes on streams that it tells nobody. That it keeps memory until they are done was seen of
        # JAX 0.11 and is promised nowhere.
        tensor.read_anywhere()
        return from_dlpack(tensor)

    return view
