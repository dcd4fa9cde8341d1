#!/usr/bin/env bash
# Puts the Python package, its module and its daemon into .venv, built from this tree.
# Usage: tools/py-install.sh [release|dev]   dev compiles faster and runs slower. ROBOCACHE_DAEMON_BINARY names a
# built robocached to carry instead of building one.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
VENV=$venv tools/venv.sh
venv=$(realpath "$venv")
export PATH=$venv/bin:$PATH # maturin
export ROBOCACHE_BUILD_PROFILE=${1:-release}
"$venv/bin/pip" install --disable-pip-version-check --quiet --no-build-isolation --no-deps --force-reinstall ./client/python
"$venv/bin/python" -c 'import robocache; print("robocache", robocache.__version__, "in", robocache.__path__[0])'
