"""Which times a sample looks at: the `windows=` and `anchors=` arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ._errors import RequestError

INTERPS = ("linear", "nearest", "previous", "slerp")


def _finite(name: str, value: Any, why: str) -> float:
    if isinstance(value, bool) or (not isinstance(value, (int, float)) and not hasattr(value, "__float__")):
        raise RequestError(f"{name} must be a number of {why}, found {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise RequestError(f"{name} must be a finite number of {why}, found {value!r}")
    return number


@dataclass(frozen=True, init=False)
class Window:
    """Time offsets from the anchor for one stream.

    Either a grid, `start + k / hz` for `k < steps`, or explicit offsets `at=`; all in seconds. A batch has
    `[B, T, D]` for a window of `T` offsets over a stream of `D` elements a row (`[B, T]` for a scalar
    stream), and `<key>_is_pad`, `[B, T]` bool, that is true where the offset fell outside the episode or into
    a gap.

    Args:
        hz: steps a second; positive.
        steps: how many; at least 1.
        start: seconds from the anchor to the first step; negative looks back.
        at: explicit offsets in seconds instead of `hz`, `steps` and `start`.
        interp: `"linear"`, `"nearest"`, `"previous"` or `"slerp"`; absent: the stream's own default, which is
            linear for floating streams and previous for all others.
        max_gap: seconds; a target inside a longer hole of the stream is padded.

    Raises:
        RequestError: (a `ValueError`) for anything else.
    """

    hz: float | None
    steps: int | None
    start: float
    at: tuple[float, ...] | None
    interp: str | None
    max_gap: float | None

    def __init__(
        self,
        hz: float | None = None,
        steps: int | None = None,
        start: float = 0.0,
        *,
        at: Sequence[float] | None = None,
        interp: str | None = None,
        max_gap: float | None = None,
    ) -> None:
        if at is not None:
            if hz is not None or steps is not None or start != 0.0:
                raise RequestError("a Window has either at= or hz=, steps= and start=, found both")
            if isinstance(at, (str, bytes)) or not hasattr(at, "__iter__"):
                raise RequestError(f"at must be a sequence of seconds, found {at!r}")
            at = tuple(_finite("at", offset, "seconds") for offset in at)
            if not at:
                raise RequestError("at must name at least one offset, found none; leave the key out instead")
        else:
            if hz is None or steps is None:
                raise RequestError(
                    f"a Window needs hz= and steps=, or at=; found hz={hz!r}, steps={steps!r}, at=None"
                )
            hz = _finite("hz", hz, "steps a second")
            if hz <= 0:
                raise RequestError(f"hz must be positive, found {hz!r}")
            if isinstance(steps, bool) or not hasattr(steps, "__index__"):
                raise RequestError(f"steps must be a whole number, found {steps!r}")
            steps = steps.__index__()
            if not 1 <= steps < 2**63:
                raise RequestError(f"steps must be at least 1, found {steps}; leave the key out instead")
            start = _finite("start", start, "seconds")
        if interp is not None and interp not in INTERPS:
            raise RequestError(f"interp must be one of {', '.join(INTERPS)}, found {interp!r}")
        if max_gap is not None:
            max_gap = _finite("max_gap", max_gap, "seconds")
            if max_gap <= 0:
                raise RequestError(
                    f"max_gap must be positive seconds, found {max_gap!r}; None allows any gap"
                )
        for name, value in {
            "hz": hz,
            "steps": steps,
            "start": float(start),
            "at": at,
            "interp": interp,
            "max_gap": max_gap,
        }.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        if self.at is not None:
            parts = [f"at={list(self.at)}"]
        else:
            parts = [f"hz={self.hz:g}", f"steps={self.steps}"] + (
                [f"start={self.start:g}"] if self.start else []
            )
        if self.interp is not None:
            parts.append(f"interp={self.interp!r}")
        if self.max_gap is not None:
            parts.append(f"max_gap={self.max_gap:g}")
        return f"Window({', '.join(parts)})"

    def _spec(self) -> dict[str, Any]:
        """The wire's `WindowSpec`."""
        if self.at is not None:
            offsets: dict[str, Any] = {"at": list(self.at)}
        else:
            offsets = {"grid": {"hz": self.hz, "steps": self.steps, "start": self.start}}
        return {"offsets": offsets, "interp": self.interp, "max_gap": self.max_gap}


@dataclass(frozen=True)
class Every:
    """Anchors on a grid of `hz` a second, from the start of every episode to its end."""

    hz: float

    def __post_init__(self) -> None:
        hz = _finite("hz", self.hz, "anchors a second")
        if hz <= 0:
            raise RequestError(f"Every(hz=) must be positive, found {hz!r}")
        object.__setattr__(self, "hz", hz)
