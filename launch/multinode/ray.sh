#!/usr/bin/env bash
# One machine of a replica that runs on several, with Ray: ray.sh [--dry-run] RANK NODES LEADER [FLAGS…], with the same
# FLAGS on each. On rank 0 it starts Ray's head, waits for the others, and is `qvq-serve`; elsewhere it is `ray start`.
# Never run: vLLM's CPU platform has no Ray, and no GPUs were at hand on two machines. --dry-run is tested.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

run() { if [ -z "$dry" ]; then "$@"; else printf '%q ' "$@"; echo; fi; }
last() { [ -n "$dry" ] || exec "$@"; run exec "$@"; exit; }

dry=
[ "${1:-}" != --dry-run ] || { dry=yes; shift; }
if [ $# -lt 3 ] || ! [[ "$1" =~ ^[0-9]+$ && "$2" =~ ^[0-9]+$ ]] || [ "$1" -ge "$2" ]; then
    echo "ray.sh: expected [--dry-run] RANK NODES LEADER [FLAGS…], with RANK from 0 to NODES - 1; got: $*" >&2
    exit 2
fi
rank=$1 nodes=$2 leader=$3 port=${RAY_PORT:-6379}
shift 3
if [ -z "$dry" ]; then
    make_environment
    command -v ray > /dev/null || fail "Ray is not in .venv; \`$VENV/bin/python -m pip install ray\` brings it."
fi

# The address by which LEADER is reached: Ray and vLLM must name each machine by the same one.
address() {
    python3 -c 'import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], 9))
print(s.getsockname()[0])' "$leader"
}
export VLLM_HOST_IP=${VLLM_HOST_IP:-$(address)}
[ "$rank" = 0 ] || last ray start --address="$leader:$port" --node-ip-address="$VLLM_HOST_IP" --block
# After a restart Ray's head may still be there. Its workers get vLLM's variables, and those with the prefix below.
if [ -n "$dry" ] || ! ray status --address="$VLLM_HOST_IP:$port" > /dev/null 2>&1; then
    run ray start --head --node-ip-address="$VLLM_HOST_IP" --port="$port"
fi
run export VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY=QVQ_LAUNCHED_
run python -c "import ray, time
ray.init(address='$VLLM_HOST_IP:$port')
while sum(node['Alive'] for node in ray.nodes()) < $nodes: time.sleep(1)"
separator=--
for flag in "$@"; do [ "$flag" != -- ] || separator=; done
# --force, since the checks know of this machine's GPUs only; it prints what they say.
last qvq-serve --force "$@" $separator --distributed-executor-backend ray
