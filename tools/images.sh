#!/usr/bin/env bash
# Rebuilds the GPU images (kernels/images) with the compiler that build.py pins. Arguments go to it: --check compares.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${XDG_CACHE_HOME:-$HOME/.cache}/robocache/nvrtc-12.9.86
if ! "$venv/bin/python" -c 'import nvidia.cuda_nvrtc' 2>/dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps nvidia-cuda-nvrtc-cu12==12.9.86
fi
exec "$venv/bin/python" -B kernels/images/build.py "$@"
