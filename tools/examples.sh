#!/usr/bin/env bash
# CI: runs the examples, built by `cargo build` and installed in $VENV, on small datasets of both kinds, and fails
# unless they end well.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath "${CARGO_TARGET_DIR:-target}")/debug
python=${VENV:-.venv}/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for need in "$bin/robocached" "$bin/train" "$python"; do
    [ -x "$need" ] || {
        echo "tools/examples.sh: $need is missing: cargo build --workspace, tools/py-install.sh dev" >&2
        exit 1
    }
done
"$bin/robocached" synth "$scratch/lerobot" --layout lerobot-v3.0 --episodes 4 --frames 120 > /dev/null
"$bin/robocached" synth "$scratch/streams" --layout streams --episodes 3 --frames 120 > /dev/null
for dataset in lerobot streams; do
    "$python" tools/demo.py --bin "$bin" --seconds 2 "$scratch/$dataset"
done
# With no daemon running the Python client starts the one it carries; without torch it trains in numpy.
ROBOCACHE_SOCKET='' "$python" examples/train.py "$scratch/lerobot" --seconds 1 --numpy
