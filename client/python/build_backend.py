"""PEP 517 backend: maturin's, after building `robocached` and putting it into the package for the embedded
mode.

Environment:
    ROBOCACHE_DAEMON_BINARY: a built `robocached` to carry instead of building one.
    ROBOCACHE_BUILD_PROFILE: cargo profile of the daemon and the module; absent: release.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import maturin

HERE = Path(__file__).resolve().parent
WORKSPACE = HERE.parent.parent
CARRIED = HERE / "python" / "robocache" / "bin" / "robocached"

get_requires_for_build_wheel = maturin.get_requires_for_build_wheel
get_requires_for_build_editable = maturin.get_requires_for_build_editable
get_requires_for_build_sdist = maturin.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = maturin.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = maturin.prepare_metadata_for_build_editable

Settings = Mapping[str, Any] | None


def _profile() -> str:
    return os.environ.get("ROBOCACHE_BUILD_PROFILE", "release")


def _built_daemon() -> Path:
    given = os.environ.get("ROBOCACHE_DAEMON_BINARY")
    if given:
        return Path(given)
    if not (WORKSPACE / "daemon" / "Cargo.toml").is_file():
        raise RuntimeError(
            f"the daemon's source is not at {WORKSPACE / 'daemon'}: build from a checkout of the whole "
            "repository, or set ROBOCACHE_DAEMON_BINARY to a built robocached"
        )
    cargo = [
        "cargo",
        "build",
        "--locked",
        "--package",
        "robocached",
        "--bin",
        "robocached",
        "--profile",
        _profile(),
    ]
    subprocess.run(cargo, cwd=WORKSPACE, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", WORKSPACE / "target"))
    return WORKSPACE / target / ("debug" if _profile() == "dev" else _profile()) / "robocached"


def _carry_daemon() -> None:
    built = _built_daemon()
    CARRIED.parent.mkdir(exist_ok=True)
    # Written beside and renamed: another build, or a daemon that runs from here, keeps the old file.
    with tempfile.TemporaryDirectory(dir=CARRIED.parent) as scratch:
        new = Path(scratch) / "robocached"
        shutil.copy(built, new)
        strip = shutil.which("strip")
        if strip:
            subprocess.run([strip, str(new)], check=True)
        new.chmod(0o755)
        new.replace(CARRIED)


def _settings(config_settings: Settings) -> dict[str, Any]:
    settings = dict(config_settings or {})
    settings.setdefault("build-args", f"--locked --profile {_profile()}")
    return settings


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """A wheel with the module and the daemon."""
    _carry_daemon()
    name: str = maturin.build_wheel(wheel_directory, _settings(config_settings), metadata_directory)
    return name


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """An editable install; the daemon lies in the source tree, where git ignores it."""
    _carry_daemon()
    name: str = maturin.build_editable(wheel_directory, _settings(config_settings), metadata_directory)
    return name


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Refused: a source archive of this folder would lack the daemon."""
    raise RuntimeError(
        "robocache is built from a checkout of the whole repository (the daemon is part of the wheel): "
        "`pip install client/python` or `pip wheel client/python`"
    )
