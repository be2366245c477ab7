# shellcheck shell=bash
# Python with everything installed, for quickstart.sh and tests/run.sh. Sourced, not run:
#
#   source configs/setup_env.sh
#   setup_env .venv -r requirements.txt "matplotlib>=3.7"    # a folder for the environment, then what pip is to install
#
# Afterwards `python` is the right one. An active virtual or conda environment is used as it is and gets only what it
# lacks; otherwise the folder is made, or used again. FRESH=1 ignores an active environment.

say() { printf '== %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Stop unless folder $1 has $2 GB free.
need_space() {
    local free
    free=$(df -Pk "$1" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$2" ] ||
        die "$1 has $free GB free, $2 GB are needed: make room, or point TMPDIR to a folder on another disk."
}

# Print the first interpreter between Python $1 and $2 that can make environments.
# Each candidate is run: a name in PATH can be the empty shim of a version manager.
find_python() {
    local candidate without_venv=""
    for candidate in python3.11 python3.12 python3.10 python3.13 python3 python /usr/bin/python3; do
        "$candidate" -c "import sys; sys.exit(not $1 <= sys.version_info[:2] <= $2)" 2>/dev/null || continue
        if "$candidate" -c "import ensurepip, venv" 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        without_venv=$candidate
    done
    if [ -n "$without_venv" ]; then
        die "$without_venv cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install" \
            "python3-venv), or activate an environment of your own first."
    fi
    die "no Python between $1 and $2 found (python3: $(python3 --version 2>&1 || true)). Install one, or activate an" \
        "environment that has one, and run this again."
}

# Print the folder of the active environment, if any. Conda's base is left alone: it is active in every shell.
active_environment() {
    if [ -n "${FRESH:-}" ]; then
        return
    elif [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        printf '%s\n' "$VIRTUAL_ENV"
    elif [ "${CONDA_DEFAULT_ENV:-base}" != base ] && [ -x "${CONDA_PREFIX:-}/bin/python" ]; then
        printf '%s\n' "$CONDA_PREFIX"
    fi
}

# Tell whether every requirement in "$@" (pip's form: NAME or -r FILE) is installed in a version it allows.
# pip would say the same, but slowly, and it asks the network first.
satisfied() {
    python - "$@" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from pip._vendor.packaging.requirements import Requirement
except ImportError:
    sys.exit(1)

lines, words = [], iter(sys.argv[1:])
for word in words:
    lines += Path(next(words)).read_text().splitlines() if word == "-r" else [word]
try:
    for line in filter(None, (line.split("#")[0].strip() for line in lines)):
        requirement = Requirement(line)
        if not requirement.specifier.contains(version(requirement.name), prereleases=True):
            sys.exit(1)
except PackageNotFoundError:
    sys.exit(1)
PY
}

setup_env() {
    local folder=$1 active base log newest="${NEWEST_PYTHON:-(3, 99)}"
    shift
    active=$(active_environment)
    if [ -n "$active" ]; then
        folder=$active
    elif ! "$folder/bin/python" -c "" 2>/dev/null; then
        base=$(find_python "(3, 10)" "$newest") || exit 1
        say "making the environment $folder with $("$base" --version 2>&1)"
        "$base" -m venv --clear "$folder" || die "$base -m venv $folder failed, see above."
    fi
    export PATH="$folder/bin:$PATH" VIRTUAL_ENV="$folder"
    hash -r
    python -c "import sys; sys.exit(sys.version_info < (3, 10))" ||
        die "$folder has $(python --version 2>&1); 3.10 or newer is needed: activate another environment, or none."
    satisfied "$@" && return

    python -m pip --version >/dev/null 2>&1 || python -m ensurepip >/dev/null 2>&1 ||
        die "$folder has no pip: add it (for environments of uv: uv pip install pip), or deactivate the environment."
    log=$(mktemp "${TMPDIR:-/tmp}/pip.XXXXXX")
    say "installing into $folder: takes some minutes the first time (log: $log)"
    if ! python -m pip install --progress-bar off "$@" >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        die "pip could not install $*; its last lines are above, all of them in $log." \
            "Without a way to the package index, activate an environment that has the requirements already."
    fi
    # Two builds that do not belong together install without complaint and fail at import.
    python -c "import torch, torchvision" 2>"$log" || {
        tail -n 5 "$log" >&2
        die "torch and torchvision in $folder do not work together: reinstall both in one command," \
            "python -m pip install --force-reinstall torch torchvision"
    }
    rm -f "$log"
}
