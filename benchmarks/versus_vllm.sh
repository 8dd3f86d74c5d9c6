#!/usr/bin/env bash
# This server against plain `vllm serve`, the same weights and precision, in steps that one can do one at a time:
#
#   versus_vllm.sh start plain OUT --model DIR [vLLM's flags]      a server at $PORT (8099), which lives on; plain or ours
#   versus_vllm.sh start ours OUT --model DIR [our flags]
#   versus_vllm.sh load plain|ours OUT NAME...                     measures loads of the table below, into OUT/SIDE_NAME.json
#   versus_vllm.sh stop OUT
#   versus_vllm.sh table OUT                                       ratios ours / plain of all that both sides measured
set -euo pipefail
PORT=${PORT:-8099}
URL=http://127.0.0.1:$PORT

load() {  # NAME -> qvq-bench's arguments; seeds of their own, or an image would be known from another load
    case $1 in
        alone) echo run --workload image-512 --seed 1001 --load 1 --seconds 30 --warmup 10 ;;
        long-answers) echo run --workload image-2k --seed 1128 --load 128 --seconds 90 --warmup 150 ;;
        long-answers-64) echo run --workload image-2k --seed 1064 --load 64 --seconds 60 --warmup 120 ;;
        chat-64) echo run --workload chat-short --seed 64 --load 64 --seconds 30 --warmup 25 ;;
        chat-192) echo run --workload chat-short --seed 192 --load 192 --seconds 40 --warmup 45 ;;
        chat-256) echo run --workload chat-short --seed 256 --load 256 --seconds 40 --warmup 45 ;;
        first-image) echo run --workload first-image --seed 1032 --load 32 --seconds 30 --warmup 15 ;;
        same-image) echo run --workload same-image --seed 1033 --load 32 --seconds 30 --warmup 15 ;;
        capacity) echo sweep --workload qvq-long --seed 1500 --seconds 90 --warmup 150 --start "${START:-16}" --max-load "${MOST:-512}" \
            --repeats 1 --tolerance 0.16 ;;
        *) echo "versus_vllm.sh: no load is called '$1'" >&2; exit 2 ;;
    esac
}

what=$1; shift
case $what in
    start)
        side=$1 out=$2; shift 2
        ! curl -s "$URL/health" > /dev/null || { echo "versus_vllm.sh: something serves $URL already" >&2; exit 1; }
        mkdir -p "$out"
        case $side in
            plain) command=(env VLLM_PLUGINS= python3 -m vllm.entrypoints.launchers.api_server.entry) ;;
            ours) command=(python3 -m qvq_serve) ;;
        esac
        began=$(date +%s)
        rm -f "$out/pid" "$out/exit"
        # shellcheck disable=SC2016  # the inner shell expands it
        setsid bash -c 'out=$1; shift; "$@" & echo $! > "$out/pid"; wait $!; echo $? > "$out/exit"' server "$out" \
            "${command[@]}" --port "$PORT" "$@" > "$out/$side.log" 2>&1 < /dev/null &
        until [ -e "$out/pid" ]; do sleep 0.1; done
        until curl -sf "$URL/health" > /dev/null; do
            kill -0 "$(cat "$out/pid")" || { tail -n 20 "$out/$side.log"; exit 1; }
            sleep 1
        done
        echo "$side is up after $(($(date +%s) - began)) s"
        printf '%s\n' "${command[*]} --port $PORT $*" > "$out/$side.argv"
        ;;
    load)
        side=$1 out=$2; shift 2
        for name in "$@"; do
            # shellcheck disable=SC2046  # the arguments are words
            python3 -m qvq_bench.cli $(load "$name") --url "$URL" --no-drain --quiet --out "$out/${side}_$name.json" > /dev/null || true
        done
        ;;
    stop) kill "$(cat "$1/pid")" && while kill -0 "$(cat "$1/pid")" 2> /dev/null; do sleep 0.5; done ;;
    table)
        for ours in "$1"/ours_*.json; do
            plain=${ours/ours_/plain_}
            [ ! -e "$plain" ] || { echo "## $(basename "$ours" .json | cut -d_ -f2)"; python3 -m qvq_bench.cli compare "$plain" "$ours" --anyway; }
        done
        ;;
esac
