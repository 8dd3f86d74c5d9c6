#!/usr/bin/env bash
# One machine of a replica that runs on several: node.sh RANK NODES LEADER [FLAGS…], with the same FLAGS on each.
# Makes the environment if it is missing, then is `qvq-serve node "$@"`.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
make_environment
exec qvq-serve node "$@"
