#!/usr/bin/env bash
# All checks: ruff, then pytest. From any folder, with nothing but Python installed; further arguments go to pytest.
#
#   bash tests/run.sh                    in the active environment, else in .venv
#   bash tests/run.sh -k hungarian       some of the tests
#   bash tests/run.sh --oldest           pytest with the oldest supported torch and torchvision, in .venv-oldest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source configs/setup_env.sh

# The largest test holds 600 MB of checkpoints; a full disk shows as a hundred unrelated failures, or as a hang.
need_space "${TMPDIR:-/tmp}" 2

requirements=(-r requirements.txt -r tests/requirements.txt)
if [ "${1:-}" = --oldest ]; then
    shift
    # torch 2.6 has no wheels for later Pythons.
    FRESH=1 NEWEST_PYTHON="(3, 12)" setup_env "$PWD/.venv-oldest" "${requirements[@]}" -r tests/requirements-oldest.txt
    exec python -m pytest "$@"
fi

setup_env "$PWD/.venv" "${requirements[@]}"
failed=()
python -m ruff check . || failed+=("ruff check")
python -m ruff format --check . || failed+=("ruff format")
python -m pytest "$@" || failed+=("pytest")
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
