#!/usr/bin/env bash
# Makes the environment if it is missing, then is `qvq-bench "$@"`: the load-testing harness (benchmarks/README.md).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
make_environment quality
exec qvq-bench "$@"
