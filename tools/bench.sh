#!/usr/bin/env bash
# The benchmarks, each beside its rivals in the same run; about five minutes once everything is built. Writes
# benches/results/DATE-MACHINE-COMMIT.json and prints a table.
# Usage: tools/bench.sh [SECTION...]   ready, lerobot, resample, decode; absent: all. VENV=DIR is the Python environment.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv}
target=${CARGO_TARGET_DIR:-target}
echo "building (release)" >&2
cargo build --release --locked --quiet -p robocached -p robocache-benches
ROBOCACHE_DAEMON_BINARY=$(realpath "$target")/release/robocached tools/py-install.sh release >&2
exec "$VENV/bin/python" benches/run.py --bin "$(realpath "$target")/release" "$@"
