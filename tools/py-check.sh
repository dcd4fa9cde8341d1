#!/usr/bin/env bash
# Lints and types of the Python package, its stub against the built module, and its tests.
# Usage: tools/py-check.sh [pytest arguments]   after tools/py-install.sh
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath "${VENV:-.venv}")/bin
"$bin/ruff" check benches examples kernels tools
"$bin/ruff" format --check benches examples kernels tools
cd client/python
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/python" -m mypy.stubtest robocache._robocache
"$bin/python" -m pytest "$@"
