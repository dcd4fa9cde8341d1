#!/usr/bin/env bash
# The demo: builds RoboCache, starts the daemon, trains a small policy in Python and one in Rust on it at the same time,
# prints what each got, and stops the daemon.
# Usage: tools/demo.sh [DATASET]   DATASET absent: a small one is made with `robocached synth`.
#        PYTHON=python3.12 chooses the interpreter, SECONDS_EACH=10 how long the trainers run.
# Leaves only .demo/ (data, build log), the cargo target directory and a Python environment in the user's cache behind.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${XDG_CACHE_HOME:-$HOME/.cache}/robocache/demo-venv
target=${CARGO_TARGET_DIR:-target}
dataset=${1:-}

fail() {
    printf 'demo: %s\n' "$@" >&2
    exit 1
}

# What a fresh machine may lack, said before anything is built.
command -v cargo > /dev/null || fail "cargo was not found; RoboCache is built with Rust: https://rustup.rs installs it"
command -v cc > /dev/null || fail "no C compiler (cc) was found; install one, e.g. apt install build-essential"
command -v "$python" > /dev/null || fail "$python was not found; install Python 3.10 or newer, or set PYTHON="
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed, $python is $("$python" --version 2>&1); set PYTHON="
"$python" -c 'import ensurepip, venv' 2> /dev/null ||
    fail "$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
if [ -n "$dataset" ]; then
    dataset=$(cd "$here" && realpath -e "$dataset" 2> /dev/null) || fail "there is no dataset at $1 (from $here)"
    if [ -d "$dataset" ] && [ ! -e "$dataset/meta/info.json" ] && [ ! -e "$dataset/robocache.toml" ]; then
        fail "$dataset is no dataset: it has neither meta/info.json (LeRobot) nor robocache.toml." \
            "A manifest for other tables is drafted by: robocached inspect --write-manifest $dataset"
    fi
fi
mkdir -p .demo
log=$PWD/.demo/build.log

# Runs a long command with its output in the log, saying now and then that it still runs.
quietly() {
    local what=$1 started=$SECONDS job
    shift
    "$@" > "$log" 2>&1 &
    job=$!
    trap 'kill "$job" 2> /dev/null; exit 130' INT TERM
    local said=0
    while kill -0 "$job" 2> /dev/null; do
        sleep 0.2
        if [ -t 1 ]; then
            printf '\r%s: %d s, %d crates compiled ' "$what" $((SECONDS - started)) "$(grep -c '^ *Compiling' "$log" || true)"
        elif [ $((SECONDS - started)) -ge $((said + 30)) ]; then
            said=$((SECONDS - started))
            printf '%s: %d s, %d crates compiled\n' "$what" "$said" "$(grep -c '^ *Compiling' "$log" || true)"
        fi
    done
    trap - INT TERM
    if ! wait "$job"; then
        printf '\n' >&2
        tail -n 25 "$log" >&2
        fail "$what failed after $((SECONDS - started)) s; all its output is in $log"
    fi
    if [ -t 1 ]; then printf '\r%s: done in %d s%20s\n' "$what" $((SECONDS - started)) ''; else
        printf '%s: done in %d s\n' "$what" $((SECONDS - started))
    fi
}

quietly "building daemon and Rust example (some minutes the first time)" \
    cargo build --release --locked -p robocached -p robocache-examples
bin=$(realpath "$target")/release

# numpy and maturin only; torch is used where $python has it already.
torch=$("$python" -c 'import torch; print(torch.__version__)' 2> /dev/null || true)
made_of="$(realpath "$(command -v "$python")") $("$python" --version) torch=${torch:-none}"
if [ "$(cat "$venv/.stamp" 2> /dev/null || true)" != "$made_of" ]; then
    rm -rf "$venv"
    mkdir -p "$(dirname "$venv")"
    "$python" -m venv ${torch:+--system-site-packages} "$venv"
    quietly "installing numpy and maturin into $venv" \
        "$venv/bin/pip" install --disable-pip-version-check 'numpy>=1.25' 'maturin>=1.9.4,<2'
    printf '%s\n' "$made_of" > "$venv/.stamp"
fi
# The package is installed again only when what it is built from has changed.
sources=$(find client formats/types Cargo.toml Cargo.lock -type f \( -name '*.rs' -o -name '*.py' -o -name '*.pyi' -o -name '*.toml' \
    -o -name Cargo.lock \) -not -path '*/tests/*' -print0 | sort -z | xargs -0 sha256sum | cat - <(sha256sum < "$bin/robocached") | sha256sum)
if [ "$(cat "$venv/.installed" 2> /dev/null || true)" != "$sources" ]; then
    quietly "building and installing the Python package" env ROBOCACHE_DAEMON_BINARY="$bin/robocached" PATH="$(realpath "$venv")/bin:$PATH" \
        "$venv/bin/pip" install --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall ./client/python
    printf '%s\n' "$sources" > "$venv/.installed"
fi

if [ -z "$dataset" ]; then
    dataset=$PWD/.demo/pick
    if [ ! -e "$dataset/meta/info.json" ]; then
        rm -rf "$dataset"
        "$bin/robocached" synth "$dataset" --layout lerobot-v3.0 --episodes 100 --frames 300
    fi
fi
exec "$venv/bin/python" tools/demo.py --bin "$bin" --seconds "${SECONDS_EACH:-6}" "$dataset"
