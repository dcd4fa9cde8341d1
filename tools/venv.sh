#!/usr/bin/env bash
# Makes .venv, the Python environment of tests, linters and wheel builds, from tools/requirements.txt (about 8 GB:
# torch and LeRobot). Does nothing when it is there already; a stamp with the file's hash tells.
# Usage: tools/venv.sh   PYTHON=python3.11 chooses the interpreter, VENV=DIR the place.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "tools/venv.sh: python 3.10 or newer is needed, found $("$python" --version); set PYTHON=" >&2
    exit 1
}
stamp=$({ "$python" --version; cat tools/requirements.txt; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$venv/.stamp" 2>/dev/null || true)" = "$stamp" ]; then
    exit 0
fi
echo "tools/venv.sh: installing tools/requirements.txt into $venv (some minutes the first time)" >&2
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/pip" install --disable-pip-version-check --quiet --no-deps -r tools/requirements.txt
echo "$stamp" > "$venv/.stamp"
