"""Which crate may depend on which: the arrows of ARCHITECTURE.md, checked against `cargo metadata`.

Exits with 1 and names every arrow that points the wrong way. Dev-dependencies are free, but for the daemon:
tests of a client may not need it either.
"""

from __future__ import annotations

import json
import subprocess
import sys

MAY_USE = {
    "robocache-types": set(),
    "robocache-wire": {"robocache-types"},
    "robocache-formats": {"robocache-types"},
    "robocache-kernels": {"robocache-types"},
    "robocache": {"robocache-types", "robocache-wire"},
    "robocache-py": {"robocache", "robocache-types", "robocache-wire", "robocache-kernels"},
    "robocached": {"robocache-types", "robocache-wire", "robocache-formats", "robocache-kernels"},
    "robocache-examples": {"robocache", "robocache-types"},
    "robocache-benches": {
        "robocache",
        "robocache-types",
        "robocache-wire",
        "robocache-formats",
        "robocache-kernels",
        "robocached",
    },
}


def main() -> int:
    command = ["cargo", "metadata", "--locked", "--no-deps", "--format-version", "1"]
    packages = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["packages"]
    wrong = []
    for package in packages:
        name = package["name"]
        if name not in MAY_USE:
            wrong.append(f"{name} is not in tools/layering.py: say there what it may depend on")
            continue
        for dependency in package["dependencies"]:
            used = dependency["name"]
            if used not in MAY_USE or used in MAY_USE[name]:
                continue
            if dependency["kind"] == "dev" and (used != "robocached" or name == "robocache-benches"):
                continue
            wrong.append(f"{name} -> {used}: not an arrow of ARCHITECTURE.md")
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"layering: {len(packages)} crates, {len(wrong)} wrong arrows")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
