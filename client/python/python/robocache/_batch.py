"""One batch, as a mapping whose tensors are made when they are first asked for.

A batch of a loader holds a lease on its slot of the ring, and so does every tensor made from it: the slot
goes back to the daemon when the last of them is collected. A batch made from a plain mapping (what torch's
collate and pin_memory, accelerate and pickle do) holds no lease, just those values.

On a CUDA device a slot goes back behind the streams that read it. They are told by taking a tensor from the
batch, `batch["x"]`, which notes the stream that is current then, each time anew; `record_stream` tells
others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ._device import number_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from . import _robocache

    #: Makes the framework's view of a column.
    View = Callable[[_robocache.Tensor], Any]
    #: Says that the current stream reads the batch.
    Note = Callable[[_robocache.Batch], None]


class Batch(Mapping[str, Any]):
    """`B` samples: `batch["action"]` is a view of the slot, `[B, T, D]`; `batch["task"]` is a `list[str]`.

    Views are read-only. numpy and JAX enforce it; torch has no read-only tensors, and a write through one
    (`x.add_(1)`) ends the process with a segmentation fault, since the memory is mapped read-only: `clone()`
    first. On a CUDA device nothing stops such a write; it changes what this batch's views show, no other's.

    On a CUDA device, take tensors from the batch on the stream that uses them, as in
    `with torch.cuda.stream(s): batch["action"]`: taking one makes the current stream wait for the batch, and
    the slot, once the batch and its tensors are gone, for that stream. A tensor that goes to another stream
    without being taken there needs `batch.record_stream(s)`. A CUDA graph cannot capture reads of a batch,
    since its replays would find another one in the slot: copy it to a tensor of your own before each replay.
    """

    __slots__ = ("__weakref__", "_cache", "_note", "_raw", "_view")

    _raw: _robocache.Batch | None

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        self._raw = None
        self._view: View | None = None
        self._note: Note | None = None
        self._cache: dict[str, Any] = dict(values)

    @classmethod
    def _leased(cls, raw: _robocache.Batch, view: View, note: Note | None) -> Batch:
        batch = cls.__new__(cls)
        batch._raw = raw
        batch._view = view
        batch._note = note
        batch._cache = {}
        return batch

    def __getitem__(self, key: str) -> Any:
        raw = self._raw
        if raw is None or self._view is None:
            return self._cache[key]
        value = self._cache.get(key)
        if value is not None:
            if self._note is not None and not isinstance(value, list):
                self._note(raw)
            return value
        made = raw.column(key)
        value = made if isinstance(made, list) else self._view(made)
        # Two threads may both get here; both then have the first one's view.
        return self._cache.setdefault(key, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._cache if self._raw is None else self._raw.keys())

    def __len__(self) -> int:
        return len(self._cache if self._raw is None else self._raw.keys())

    def __contains__(self, key: object) -> bool:
        return key in (self._cache if self._raw is None else self._raw.keys())

    def __repr__(self) -> str:
        if self._raw is None:
            parts = [f"{key}: {_describe(value)}" for key, value in self._cache.items()]
            return f"Batch({{{', '.join(parts)}}})"
        raw = self._raw
        parts = [f"{key}: {raw.describe(key)}" for key in self]
        return f"Batch(rows={raw.rows}, epoch={raw.epoch}, index={raw.index}, {{{', '.join(parts)}}})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Whatever carries the values on (pickle, deepcopy, torch's own pickler) copies them. On a CUDA device
        # torch would rather share them with the other process, which it can do with memory of its own only.
        values = self if self._raw is None or self._raw.cuda is None else self.copy()
        return Batch, (dict(values),)

    def copy(self) -> Batch:
        """The same values in memory of their own, on the same device: what to keep when a batch must outlive
        its turn. On a CUDA device the copies are made on the current stream."""
        return Batch({key: _own(value) for key, value in self.items()})

    def record_stream(self, stream: Any) -> None:
        """Says that work on `stream` reads tensors of this batch that were taken while another was current.

        To be called before that work is enqueued. `stream` is a `torch.cuda.Stream`, a `cupy.cuda.Stream`, or
        the number of a `cudaStream_t`; it must be of the batch's device and not be destroyed before the batch
        and its tensors are gone. Nothing happens for a batch in host memory, or one made from a mapping.
        """
        number = number_of(stream)
        if self._raw is not None and self._raw.cuda is not None:
            self._raw.use_on(number)

    @property
    def device(self) -> str | None:
        """`"cuda:N"`, as this process counts, or `"cpu"`; None if it was made from a mapping."""
        if self._raw is None:
            return None
        return "cpu" if self._raw.cuda is None else f"cuda:{self._raw.cuda}"

    @property
    def rows(self) -> int | None:
        """Samples in it; None if it was made from a mapping."""
        return None if self._raw is None else self._raw.rows

    @property
    def epoch(self) -> int | None:
        """The epoch it belongs to; None if it was made from a mapping."""
        return None if self._raw is None else self._raw.epoch

    @property
    def batch_index(self) -> int | None:
        """Its number within this rank's part of the epoch (or of what was left of it when the loader was
        told where to begin); None if it was made from a mapping."""
        return None if self._raw is None else self._raw.index

    @property
    def sample_ids(self) -> npt.NDArray[np.uint64] | None:
        """`[B]` uint64, a copy: which anchor each row is, as numbered over the whole dataset. Over an epoch
        every anchor is seen exactly once by one of the ranks. None if it was made from a mapping."""
        if self._raw is None:
            return None
        import numpy as np

        return np.frombuffer(self._raw.ids(), dtype="<u8").astype(np.uint64)


def _describe(value: Any) -> str:
    if isinstance(value, list):
        return f"{type(value[0]).__name__ if value else 'Any'} list[{len(value)}]"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return type(value).__name__
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _own(value: Any) -> Any:
    if isinstance(value, list):
        return list(value)
    clone = getattr(value, "clone", None)
    return clone() if clone is not None else value.copy()
