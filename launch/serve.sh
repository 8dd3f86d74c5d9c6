#!/usr/bin/env bash
# Makes the environment if it is missing, then is `qvq-serve "$@"`. With no arguments it serves the profile that fits
# this machine's GPUs, or the built-in demo model where there is none.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
make_environment
exec qvq-serve "$@"
