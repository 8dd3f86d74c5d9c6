#!/usr/bin/env bash
# Makes the environment if it is missing, then checks format, types and behaviour. What follows goes to pytest;
# --all adds the slow tests.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
. "$(dirname "${BASH_SOURCE[0]}")/tools.sh"
make_environment test
make_tools
cd "$ROOT"
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "" "$@"
fi
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
