"""Where the daemon's program is, for the embedded mode and the console script."""

from __future__ import annotations

import os
from pathlib import Path


def carried() -> str | None:
    """The `robocached` inside this package, if this is an installation that has one."""
    program = Path(__file__).parent / "bin" / "robocached"
    return str(program) if os.access(program, os.X_OK) else None


def for_embedded() -> str | None:
    """The program to start when no daemon answers: the one carried, unless $ROBOCACHE_DAEMON names another.
    None leaves the search ($ROBOCACHE_DAEMON, then PATH) to the client library."""
    return None if os.environ.get("ROBOCACHE_DAEMON") else carried()
