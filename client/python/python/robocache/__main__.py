"""`python -m robocache ARGS` and the console script `robocached`: the daemon that this package carries."""

from __future__ import annotations

import os
import sys

from ._daemon import carried


def main() -> None:
    """Becomes the daemon: same process, same arguments."""
    program = carried()
    if program is None:
        sys.exit(
            "robocached: this installation of robocache carries no daemon. Install the wheel (`pip install "
            "client/python` in the repository), or build it: `cargo build --release -p robocached`."
        )
    os.execv(program, ["robocached", *sys.argv[1:]])


if __name__ == "__main__":
    main()
