"""What the chart renders: eight scenarios, by the schemas of three Kubernetes versions, and as it promises."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from qvq_serve.profile import NAMES, option_type
from tests.helm.chart import CHART, RENDERED, SCENARIOS, helm, manifests, needs_helm, one, pods, rendered, template

pytestmark = needs_helm
VERSIONS = ("1.30", "1.34", "1.37")
"""The oldest that the chart admits, one between, and the newest whose schemas kubernetes-validate has."""
BY_NPM = ("keda.sh", "monitoring.coreos.com", "gateway.networking.k8s.io")
BY_US = Path(__file__).parent / "small_schemas.json"
"""Of what no package has a schema, the fields that the chart uses, written by hand from its documentation."""


def test_there_are_the_eight_scenarios() -> None:
    assert (
        sorted(
            ["minimal", "cpu-demo", "h100x4-bf16", "h200x1-fp8", "two-nodes", "autoscaled", "air-gapped", "hardened"]
        )
        == SCENARIOS
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_helm_lints_it(scenario: str) -> None:
    done = helm("lint", "--strict", str(CHART), "--values", str(CHART / "ci" / f"{scenario}-values.yaml"))
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_committed_rendering_is_what_helm_renders(scenario: str) -> None:
    assert (RENDERED / f"{scenario}.yaml").read_text() == rendered(scenario), "python -m tests.helm.chart writes it"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kubernetes_knows_every_field(scenario: str, version: str) -> None:
    import kubernetes_validate

    core = [m for m in manifests(scenario) if "." not in m["apiVersion"] or ".k8s.io/" in m["apiVersion"]]
    core = [m for m in core if group(m) not in (*BY_NPM, *json.loads(BY_US.read_text()))]
    assert {"Service", "NetworkPolicy"} <= {m["kind"] for m in core}
    for manifest in core:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    import kubernetes_validate

    pod = one("minimal", "Pod", "qvq-test")
    pod["spec"]["containers"][0]["readonlyRootFilesystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readonlyRootFilesystem"):
        kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)


def group(manifest: dict[str, Any]) -> str:
    return str(manifest["apiVersion"]).partition("/")[0]


def by_npm(checked: list[dict[str, Any]]) -> list[str]:
    """What the schemas of npm's packages find wrong."""
    done = subprocess.run(
        ["node", str(Path(__file__).parent / "schemas.mjs")],
        input=json.dumps(checked),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(
    not shutil.which("node") or not os.environ.get("QVQ_NODE_MODULES"), reason="no schemas; launch/tools.sh brings them"
)
def test_keda_prometheus_and_the_gateway_know_theirs() -> None:
    found = {m["kind"]: m for scenario in SCENARIOS for m in manifests(scenario) if group(m) in BY_NPM}
    assert set(found) == {"ScaledObject", "PodMonitor", "PrometheusRule", "HTTPRoute"}
    assert by_npm([m for s in SCENARIOS for m in manifests(s) if group(m) in BY_NPM]) == []
    found["ScaledObject"]["spec"]["minReplicaCount"] = "one"
    found["PodMonitor"]["spec"].pop("selector")
    found["PrometheusRule"]["spec"]["groups"][0]["rules"][0]["for"] = "some minutes"
    found["HTTPRoute"]["spec"]["rules"][0]["timeouts"]["request"] = "long"
    assert [line.partition(":")[0] for line in by_npm(list(found.values()))] == list(found)


def test_the_rest_has_the_fields_that_its_documentation_names() -> None:
    import jsonschema

    schemas = json.loads(BY_US.read_text())
    found = [m for scenario in SCENARIOS for m in manifests(scenario) if group(m) in schemas]
    assert {m["kind"] for m in found} == {"LeaderWorkerSet", "InferencePool"}
    for manifest in found:
        jsonschema.validate(manifest, schemas[group(manifest)])
        manifest["spec"]["replica"] = 1
        with pytest.raises(jsonschema.ValidationError, match="replica"):
            jsonschema.validate(manifest, schemas[group(manifest)])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_each_pod_is_one_that_the_restricted_standard_admits(scenario: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards, and further: a read-only root, no token."""
    assert len(pods(scenario)) >= 2
    for pod in pods(scenario):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        asks_kubernetes = pod["metadata"]["labels"].get("app.kubernetes.io/component") == "router"
        assert spec["automountServiceAccountToken"] is asks_kubernetes
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["memory"]
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts <= {volume["name"] for volume in spec["volumes"]}
    # The standard refuses hostPath; it is for machines that have the weights, and said so.
    host_paths = [v for pod in pods(scenario) for v in pod["spec"]["volumes"] if "hostPath" in v]
    assert bool(host_paths) == (scenario == "air-gapped")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_selectors_find_the_pods_that_they_mean(scenario: str) -> None:
    labels = {pod["metadata"]["labels"]["qvq-serve/role"]: pod["metadata"]["labels"] for pod in pods(scenario)
              if "qvq-serve/role" in pod["metadata"]["labels"]}  # fmt: skip
    meant = {"Service": {"api"}, "PodMonitor": {"api"}, "InferencePool": {"api"}}
    for manifest in manifests(scenario):
        spec = manifest.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector")
        if not selector or manifest["kind"] == "Job":
            continue
        wanted = selector.get("matchLabels", selector)
        if wanted.get("app.kubernetes.io/component") == "router":
            assert manifest["metadata"]["name"] == "qvq-router" or manifest["kind"] == "Service"
            continue
        matched = {role for role, of in labels.items() if wanted.items() <= of.items()}
        assert matched == meant.get(manifest["kind"], set(labels)), manifest["kind"]
        others = [pod for pod in pods(scenario) if "qvq-serve/role" not in pod["metadata"]["labels"]]
        assert not any(wanted.items() <= pod["metadata"]["labels"].items() for pod in others)


def test_a_rollout_never_asks_for_gpus_that_are_in_use() -> None:
    deployments = [one(scenario, "Deployment") for scenario in SCENARIOS if scenario != "two-nodes"]
    assert len(deployments) == 7
    assert all(d["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1} for d in deployments)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_end_of_a_pod_leaves_time_for_the_longest_answer(scenario: str) -> None:
    servers = [pod["spec"] for pod in pods(scenario) if pod["metadata"]["labels"].get("qvq-serve/role") == "api"]
    assert servers
    for spec in servers:
        server = spec["containers"][0]
        env = {e["name"]: e.get("value") for e in server["env"]}
        slept = server["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert spec["terminationGracePeriodSeconds"] == slept + int(env["QVQ_DRAIN_TIMEOUT"]) + 30
        live, start = server["livenessProbe"], server["startupProbe"]
        assert live["periodSeconds"] * live["failureThreshold"] >= 300
        assert start["periodSeconds"] * start["failureThreshold"] >= 345
        assert (start["httpGet"]["path"], live["httpGet"]["path"]) == ("/health", "/health")
        assert server["readinessProbe"]["httpGet"]["path"] == "/ready"


def test_proxies_wait_as_long_as_a_request_may_take() -> None:
    ingress = one("h100x4-bf16", "Ingress")["metadata"]["annotations"]
    assert ingress["nginx.ingress.kubernetes.io/proxy-read-timeout"] == "1800"
    (rule,) = one("autoscaled", "HTTPRoute")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "1800s", "backendRequest": "1800s"}
    assert rule["backendRefs"][0]["kind"] == "InferencePool"


def test_nothing_goes_out_of_a_hardened_server_but_to_dns() -> None:
    policy = one("hardened", "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    (rule,) = policy["egress"]
    assert {port["port"] for port in rule["ports"]} == {53}
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == ["http", "metrics"]
    server = one("hardened", "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert server["image"] == "qvq-serve:0.1.0@sha256:" + "0123456789abcdef" * 4


def test_images_are_fetched_from_the_named_networks_only() -> None:
    out = one("h100x4-bf16", "NetworkPolicy")["spec"]["egress"][-1]
    assert out == {"ports": [{"port": 80}, {"port": 443}], "to": [{"ipBlock": {"cidr": "203.0.113.0/24"}}]}


def test_a_replica_of_two_machines_has_half_of_its_gpus_on_each() -> None:
    made = one("two-nodes", "LeaderWorkerSet", "qvq-nodes")["spec"]["leaderWorkerTemplate"]
    assert made["size"] == 2
    leader, worker = (made[key]["spec"]["containers"][0] for key in ("leaderTemplate", "workerTemplate"))
    assert leader["resources"]["limits"]["nvidia.com/gpu"] == worker["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert worker["args"] == leader["args"] and leader["args"][0] == "node"
    assert worker["lifecycle"] == leader["lifecycle"] == {"preStop": {"sleep": {"seconds": 15}}}
    assert "ports" not in worker and "readinessProbe" not in worker


@pytest.mark.parametrize(("index", "part"), [("0", ""), ("1", " --headless")])
def test_qvq_serve_takes_the_arguments_of_each_machine(index: str, part: str) -> None:
    made = one("two-nodes", "LeaderWorkerSet", "qvq-nodes")["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    own = {"$(LWS_WORKER_INDEX)": index, "$(LWS_LEADER_ADDRESS)": "qvq-nodes-0.qvq-nodes"}
    own["/etc/qvq/profile.toml"] = str(CHART / "profiles" / "qvq72b_h100x8_bf16.toml")
    arguments = [own.get(argument, argument) for argument in made["spec"]["containers"][0]["args"]]
    command = [sys.executable, "-m", "qvq_serve", *arguments, "--dry-run"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert shown.rstrip().endswith(f"--nnodes 2 --node-rank {index} --master-addr qvq-nodes-0.qvq-nodes{part}")


def test_no_service_has_the_name_of_a_leader_worker_set() -> None:
    """Its controller makes a headless one of that name, for the leader's address, and took the API's for it."""
    made = manifests("two-nodes")
    sets = {m["metadata"]["name"] for m in made if m["kind"] == "LeaderWorkerSet"}
    assert sets and not sets & {m["metadata"]["name"] for m in made if m["kind"] == "Service"}
    scaled = yaml.safe_load_all(template("--values", str(CHART / "ci" / "two-nodes-values.yaml"), "--set",
                                         "autoscaling.kind=hpa,weights.accessMode=ReadWriteMany").stdout)  # fmt: skip
    [hpa] = [m for m in scaled if m and m["kind"] == "HorizontalPodAutoscaler"]
    assert {hpa["spec"]["scaleTargetRef"]["name"]} == sets


def made_with(*arguments: str) -> list[dict[str, Any]]:
    done = template(*arguments)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def test_a_variable_of_ones_own_takes_the_place_of_the_charts() -> None:
    """Two of a name are refused by the API server, where Helm 4 applies on its side."""
    names = {"QVQ_HOST": "::", "HOME": "/elsewhere", "QVQ_MAX_IMAGES": "2"}
    given = [{"name": name, "value": value} for name, value in names.items()]
    both = "settings.max_images=8,router.enabled=true"
    made = made_with("--set-json", f"extraEnv={json.dumps(given)}", "--set", both)
    for pod in (m["spec"]["template"]["spec"] for m in made if m["kind"] in ("Deployment", "Job")):
        for container in pod["containers"]:
            env = [entry["name"] for entry in container.get("env", [])]
            assert len(env) == len(set(env)), env
    server, router = (m["spec"]["template"]["spec"]["containers"][0] for m in made if m["kind"] == "Deployment")
    if router["name"] == "server":
        server, router = router, server
    assert {entry["name"]: entry.get("value") for entry in server["env"]}.items() >= names.items()
    assert "--host=::" in router["args"] and "--prometheus-host=::" in router["args"]


def test_a_port_below_1024_can_be_listened_on() -> None:
    made = made_with("--set", "service.port=80")
    [server] = [m for m in made if m["kind"] == "Deployment"]
    [download] = [m for m in made if m["kind"] == "Job"]
    assert download in manifests("minimal"), "a Job that is there cannot be changed"
    security = server["spec"]["template"]["spec"]["securityContext"]
    assert security["sysctls"] == [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}]
    assert all("sysctls" not in pod["spec"]["securityContext"] for pod in pods("minimal"))


def test_the_addresses_of_clients_reach_the_policy_and_annotations_the_balancer() -> None:
    outside = ["--set", "service.type=LoadBalancer,apiKeys.existingSecret=keys,service.annotations.internal=yes",
               "--set-json", 'networkPolicy.clients=[{"ipBlock":{"cidr":"203.0.113.0/24"}}]']  # fmt: skip
    [service] = [m for m in made_with(*outside) if m["kind"] == "Service"]
    assert service["spec"]["externalTrafficPolicy"] == "Local"
    assert service["metadata"]["annotations"] == {"internal": "yes"}
    anyone = "service.type=NodePort,apiKeys.existingSecret=keys,networkPolicy.enabled=false"
    [service] = [m for m in made_with("--set", anyone) if m["kind"] == "Service"]
    assert "externalTrafficPolicy" not in service["spec"]
    ingress = ["--set", "expose.kind=ingress,expose.host=a.example,apiKeys.existingSecret=keys",
               "--set-json", 'expose.annotations={"a/b":"c","nginx.ingress.kubernetes.io/proxy-buffering":"on"}',
               "--set-json", 'networkPolicy.clients=[{"ipBlock":{"cidr":"203.0.113.0/24"}}]']  # fmt: skip
    [made] = [m for m in made_with(*ingress) if m["kind"] == "Ingress"]
    annotations = made["metadata"]["annotations"]
    assert annotations["a/b"] == "c" and annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "on"
    assert len(annotations) == 5
    cleared = [*ingress[:2], *ingress[4:], "--set", "expose.annotations=null"]
    [made] = [m for m in made_with(*cleared) if m["kind"] == "Ingress"]
    assert len(made["metadata"]["annotations"]) == 4


@pytest.mark.parametrize("change", ["settings.kv_cache_dtype=fp8", "vllmArgs={--seed=1}", "profile=qvq72b_h100x8_bf16"])
def test_another_configuration_is_benchmarked_by_itself(change: str) -> None:
    """Nothing ran for it, or --resume refused the file of another."""
    jobs = [
        next(m for m in made_with("--set", "bench.enabled=true", *more) if "-bench-" in m["metadata"]["name"])
        for more in ((), ("--set", change))
    ]
    commands = [job["spec"]["template"]["spec"]["containers"][0]["command"] for job in jobs]
    outs = [argument for command in commands for argument in command if argument.startswith("--out=")]
    assert len({job["metadata"]["name"] for job in jobs}) == len(set(outs)) == 2


def test_an_uninstall_keeps_the_weights() -> None:
    claim = one("minimal", "PersistentVolumeClaim", "qvq-weights")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert claim["spec"]["resources"]["requests"]["storage"] == "151Gi"


def made(*values: str) -> list[dict[str, Any]]:
    """What is rendered with these values over the defaults."""
    done = template(*(part for value in values for part in ("--set", value)))
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


MINE = ("weights.kind=existingClaim", "weights.existingClaim=mine")
HOST = ("weights.kind=hostPath", "weights.hostPath=/srv/models")


@pytest.mark.parametrize(("values", "volume", "brought"), [
    ((), {"persistentVolumeClaim": {"claimName": "qvq-weights"}}, True),
    (("weights.download=false",), {"persistentVolumeClaim": {"claimName": "qvq-weights"}}, False),
    (MINE, {"persistentVolumeClaim": {"claimName": "mine"}}, True),
    ((*MINE, "weights.download=false"), {"persistentVolumeClaim": {"claimName": "mine"}}, False),
    (HOST, {"hostPath": {"path": "/srv/models", "type": "Directory"}}, False),
    (("profile=demo",), {}, False),
])  # fmt: skip
def test_the_server_has_its_weights_and_waits_for_them_where_a_job_brings_them(
    values: tuple[str, ...], volume: dict[str, Any], brought: bool
) -> None:
    manifests = made(*values)
    (pod,) = [m["spec"]["template"]["spec"] for m in manifests if m["kind"] == "Deployment"]
    assert [v for v in pod["volumes"] if v["name"] == "models"] == ([{"name": "models", **volume}] if volume else [])
    jobs = [m["spec"]["template"]["spec"] for m in manifests if m["kind"] == "Job"]
    waits = pod.get("initContainers", [])
    assert len(jobs) == len(waits) == brought
    claims = {m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"}
    assert ("qvq-weights" in claims) == (volume.get("persistentVolumeClaim") == {"claimName": "qvq-weights"})
    for job, wait in zip(jobs, waits, strict=True):
        assert {v["name"]: v for v in job["volumes"]}["models"] == {"name": "models", **volume}
        model = job["containers"][0]["command"][-1]
        assert wait["command"] == ["qvq-serve", "download", "--wait", "--model", model]
        assert wait["env"] == job["containers"][0]["env"][:1] == [{"name": "QVQ_CACHE", "value": "/models"}]


@pytest.mark.parametrize(("kind", "volume"), [
    ("emptyDir", {"emptyDir": {"sizeLimit": "20Gi"}}), ("claim", {"persistentVolumeClaim": {"claimName": "qvq-cache"}}),
])  # fmt: skip
def test_what_is_compiled_is_kept_on_a_volume(kind: str, volume: dict[str, Any]) -> None:
    manifests = made(f"compileCache.kind={kind}", "compileCache.size=20Gi")
    (pod,) = [m["spec"]["template"]["spec"] for m in manifests if m["kind"] == "Deployment"]
    assert {"name": "cache", **volume} in pod["volumes"]
    server = pod["containers"][0]
    (path,) = [m["mountPath"] for m in server["volumeMounts"] if m["name"] == "cache"]
    caches = {e["name"]: e["value"] for e in server["env"] if "CACHE" in e["name"] and e["name"] != "QVQ_CACHE"}
    assert len(caches) >= 3 and all(value.startswith(path) for value in caches.values())
    claimed = [m["spec"]["resources"]["requests"]["storage"] for m in manifests
               if m["kind"] == "PersistentVolumeClaim" and m["metadata"]["name"] == "qvq-cache"]  # fmt: skip
    assert claimed == (["20Gi"] if kind == "claim" else [])


def test_the_bench_and_the_helm_test_ask_the_service_with_a_key() -> None:
    manifests = made("bench.enabled=true", "service.port=9000", "apiKeys.existingSecret=keys")
    (service,) = [m for m in manifests if m["kind"] == "Service" and m["metadata"]["name"] == "qvq"]
    assert service["spec"]["ports"][0]["port"] == 9000
    bench = next(m["spec"]["template"]["spec"] for m in manifests if m["metadata"]["name"].startswith("qvq-bench-"))
    (test,) = [m for m in manifests if m["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"]
    for pod, program in ((bench, "qvq-bench sweep"), (test["spec"], "qvq-serve ask")):
        (container,) = pod["containers"]
        assert f'exec {program} "$@"' in container["command"][2] and "/etc/qvq-keys/keys" in container["command"][2]
        assert "--url=http://qvq:9000" in container["command"]
        assert {"name": "keys", "secret": {"secretName": "keys"}} in pod["volumes"]
    written = next(each for each in bench["containers"][0]["command"] if each.startswith("--out="))
    kept = {m["name"]: m["mountPath"] for m in bench["containers"][0]["volumeMounts"]}["results"]
    assert written.startswith(f"--out={kept}/") and "--resume" in bench["containers"][0]["command"]
    assert {"name": "results", "persistentVolumeClaim": {"claimName": "qvq-bench"}} in bench["volumes"]


@pytest.mark.parametrize("program", ["qvq-bench", "qvq-serve"])
def test_their_commands_are_ones_that_the_programs_take(program: str, tmp_path: Path) -> None:
    """Run as they are rendered, but for the address, at which a server becomes ready, and answers nothing else."""
    manifests = made("bench.enabled=true")
    pods = [
        m["spec"]["template"]["spec"] if m["kind"] == "Job" else m["spec"]
        for m in manifests
        if m["kind"] in ("Job", "Pod")
    ]
    (container,) = [p["containers"][0] for p in pods if f"exec {program} " in str(p["containers"][0]["command"])]
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(200 if asked == ["/ready"] * 2 else 503)

    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "sleep").chmod(0o755)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        command = [part.replace("http://qvq:8000", url) for part in container["command"]]
        path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False,
                              env={"PATH": path, "HOME": "/tmp"})  # fmt: skip
        server.shutdown()
    assert done.returncode in (2, 3), done.stderr
    assert url in done.stderr and "usage:" not in done.stderr and "Traceback" not in done.stderr
    waited = ["not ready: urllib.error.HTTPError: HTTP Error 503: Service Unavailable"]
    assert done.stdout.splitlines() == (waited if program == "qvq-bench" else [])
    assert asked[:2] == ["/ready"] * 2 or program == "qvq-serve"


def test_the_profile_that_is_mounted_is_the_file_of_launch_profiles() -> None:
    import tomllib

    for scenario in SCENARIOS:
        name = yaml.safe_load((CHART / "ci" / f"{scenario}-values.yaml").read_text()) or {}
        path = CHART.parents[1] / "launch" / "profiles" / f"{name.get('profile', 'qvq72b_h100x4_bf16')}.toml"
        mounted = one(scenario, "ConfigMap", "qvq-profile")["data"]["profile.toml"]
        assert tomllib.loads(mounted) == tomllib.loads(path.read_text())


def test_a_profile_of_ones_own_is_mounted_with_its_own_plan() -> None:
    plan = "gpus=2,cpus=8,memoryGiB=24,shmGiB=1,weightsGiB=151,startupSeconds=900,drainSeconds=60,graceSeconds=105"
    settings = ",".join(f"plan.{item}" for item in f"{plan},requestSeconds=300".split(","))
    done = template("--set-literal", 'customProfile=tp = 2\nmodel = "qvq-72b"', "--set", settings)
    assert done.returncode == 0, done.stderr
    assert 'tp = 2\n    model = "qvq-72b"' in done.stdout
    assert 'nvidia.com/gpu: "2"' in done.stdout


def test_the_notes_end_with_the_first_question() -> None:
    done = helm("install", "qvq", str(CHART), "--dry-run=client", "--namespace", "serving",
                "--set", "apiKeys.existingSecret=qvq-keys")  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.endswith('qvq-serve ask photo.png "How much is the total?"')
    assert "QVQ_API_KEY=$(kubectl -n serving get secret qvq-keys" in last


def test_large_numbers_of_a_values_file_stay_whole(tmp_path: Path) -> None:
    """Helm reads them as floats, and QVQ_MAX_BODY_BYTES was "2e+08", which the server refuses again and again."""
    values = tmp_path / "values.yaml"
    values.write_text("settings: {max_body_bytes: 200000000, gpu_memory_utilization: 0.9}\nrouter: {enabled: true}\n")
    done = template("--values", str(values))
    assert done.returncode == 0, done.stderr
    assert '{"name":"QVQ_MAX_BODY_BYTES","value":"200000000"}' in done.stdout
    assert '{"name":"QVQ_GPU_MEMORY_UTILIZATION","value":"0.9"}' in done.stdout
    assert "--max-payload-size=200000001" in done.stdout


def test_bodies_are_as_large_as_a_profile_of_ones_own_says(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    plan = yaml.safe_load((CHART / "plan.yaml").read_text())["qvq72b_h100x2_fp8"]
    values.write_text(yaml.safe_dump({"customProfile": "tp = 2\nmax_body_bytes = 300000000\n", "plan": plan}))
    more = ["router.enabled=true", "apiKeys.existingSecret=k", "networkPolicy.imageNetworks={::/0}"]
    more += ["expose.kind=ingress", "expose.host=*.example.com", "networkPolicy.clients[0].ipBlock.cidr=10.0.0.0/8"]
    done = template("--values", str(values), "--set", ",".join(more))
    assert done.returncode == 0, done.stderr
    assert "--max-payload-size=300000001" in done.stdout
    found = {m["kind"]: m for m in yaml.safe_load_all(done.stdout) if m and m["metadata"]["name"] == "qvq"}
    assert found["Ingress"]["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"] == "287m"
    assert found["Ingress"]["spec"]["rules"][0]["host"] == "*.example.com"
    assert found["NetworkPolicy"]["spec"]["egress"][-1]["to"] == [{"ipBlock": {"cidr": "::/0"}}]


def test_a_release_whose_jobs_names_would_be_too_long_is_refused() -> None:
    done = helm("template", "x" * 46, str(CHART))
    assert "the release's name has 46 characters" in done.stderr
    names = [m["metadata"]["name"] for m in yaml.safe_load_all(helm("template", "x" * 45, str(CHART)).stdout) if m]
    assert max(map(len, names)) == 63


@pytest.mark.parametrize("policy", ["qvq", "qvq-router"])
def test_helms_test_and_the_bench_job_may_ask_whoever_else_may(policy: str) -> None:
    """The policies admitted one namespace of clients, and `helm test` waited for nothing."""
    pods = [m for m in manifests("hardened") if m["kind"] == "Pod" or m["kind"] == "Job"]
    asks = {m["metadata"]["labels"]["app.kubernetes.io/component"] for m in pods if m["kind"] == "Pod"}
    ingress = one("hardened" if policy == "qvq-router" else "h100x4-bf16", "NetworkPolicy", policy)["spec"]["ingress"]
    [own] = [rule for rule in ingress for peer in rule["from"] if "matchExpressions" in peer.get("podSelector", {})]
    assert asks | {"bench"} == {*own["from"][0]["podSelector"]["matchExpressions"][0]["values"]}
    assert {"port": "http"} in own["ports"]


def test_a_service_for_outside_has_no_metrics() -> None:
    values = "service.type=LoadBalancer,apiKeys.existingSecret=k,networkPolicy.enabled=false,bench.enabled=true"
    made = [m for m in yaml.safe_load_all(template("--set", values).stdout) if m]
    [service] = [m for m in made if m["kind"] == "Service"]
    assert [port["name"] for port in service["spec"]["ports"]] == ["http"]
    [bench] = [m for m in made if "-bench-" in m["metadata"]["name"]]
    assert "--metrics-url" not in " ".join(bench["spec"]["template"]["spec"]["containers"][0]["command"])


def test_the_settings_that_the_schema_knows_are_the_profiles() -> None:
    known = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"]["properties"]
    by_the_chart = {"host", "port", "metrics_port", "drain_timeout", "api_key", "api_key_file", "guard_api_key"}
    kinds = {int: "integer", float: "number", str: "string"}
    assert known == {name: {"type": kinds[option_type(name)]} for name in NAMES if name not in by_the_chart}


BAD = [
    ("replica=2", "replica"),
    ("replicas=two", "replicas"),
    ("profile=qvq72b_h100x3", "profile is 'qvq72b_h100x3'.*known: demo, qvq72b_h100x1_int4"),
    ("settings.tp=2", "plan.gpus is 4, and tp x pp of the profile and settings is 2 x 1 = 2"),
    ("plan.gpus=8", "plan.gpus is 8, and tp x pp of the profile and settings is 4 x 1 = 4"),
    ("plan.gpus=0", "plan.gpus is 0, and the model qvq-72b"),
    ("nodes=3", "nodes is 3, and tp x pp = 4"),
    ("settings.top_k=many", "/settings/top_k"),
    ("settings.max_tokens=10", "/settings'.*max_tokens"),
    ("settings.drain_timeout=10", "/settings'.*drain_timeout"),
    ("settings.max_output_tokens=16384", "settings.max_output_tokens changes.*give plan.drainSeconds too"),
    ("settings.request_timeout=7200,plan.drainSeconds=3200,plan.graceSeconds=3300", "give plan.requestSeconds too"),
    ("settings.max_model_len=65536,plan.cpus=9", "settings.max_model_len changes.*give plan.memoryGiB too"),
    ("vllmArgs={--mm_processor_cache_gb=32}", "vllmArgs has --mm_processor_cache_gb=32.*give plan.memoryGiB too"),
    ("settings.guard_url=http://guard", "settings.guard_url is given, and the NetworkPolicy.*extraEgress"),
    ("plan.drainSeconds=900", "plan.graceSeconds is 875, less than plan.drainSeconds 900"),
    ("plan.shm=1Gi", "/plan'.*shm"),
    ("customProfile=tp = 4", "plan.gpus is missing, and customProfile"),
    ("image.digest=sha256:abc", "/image/digest"),
    ("weights.kind=nfs", "/weights/kind"),
    ("weights.kind=existingClaim", "weights.kind is existingClaim, and weights.existingClaim names none"),
    ("weights.kind=hostPath", "weights.kind is hostPath, and weights.hostPath names none"),
    ("replicas=2", "weights.accessMode is ReadWriteOnce, and replicas"),
    ("expose.kind=ingress", "expose.kind is ingress, and expose.host is empty"),
    ("expose.kind=ingress,expose.host=a.example", "expose.kind is ingress, and apiKeys.existingSecret is empty"),
    ("service.type=LoadBalancer", "service.type is LoadBalancer, and apiKeys.existingSecret is empty"),
    (
        "service.type=NodePort,apiKeys.existingSecret=k",
        "service.type is NodePort, and networkPolicy.clients lets in the",
    ),
    (
        "expose.kind=ingress,expose.host=a.example,apiKeys.existingSecret=k",
        "expose.kind is ingress, and networkPolicy.clients lets in the pods of this namespace alone",
    ),
    ("expose.kind=httproute,expose.host=a.example", "expose.gateway.name is empty"),
    ("autoscaling.kind=keda,autoscaling.min=5", "autoscaling.min is 5, above autoscaling.max 4"),
    ("autoscaling.kind=keda,weights.accessMode=ReadWriteMany", "monitoring.podMonitor is false"),
    ("autoscaling.kvCacheUse=85", "/autoscaling/kvCacheUse"),
    ("inferencePool.enabled=true", "inferencePool.endpointPicker.name is empty"),
    ("inferencePool.enabled=true,router.enabled=true", "inferencePool.enabled and router.enabled are both true"),
    (
        "bench.enabled=true,router.enabled=true",
        "bench.enabled is true, and replicas, autoscaling.max or",
    ),
    ("bench.enabled=true,replicas=2,weights.accessMode=ReadWriteMany", "measure one replica without a router"),
    ("router.policy=fastest", "/router/policy"),
    ("service.metricsPort=8000", "service.port and service.metricsPort are both 8000"),
    ("networkPolicy.imageNetworks={example.com}", "/networkPolicy/imageNetworks/0"),
    ("compileCache.kind=claim,weights.kind=hostPath,weights.hostPath=/m,replicas=2", "compileCache.kind is claim"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[values for values, _ in BAD])
def test_a_bad_value_fails_with_its_key(values: str, message: str) -> None:
    import re

    done = template("--set", values)
    assert done.returncode != 0
    assert re.search(message, done.stderr, re.DOTALL), done.stderr
    assert "nil pointer" not in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        "tolerations[0].operator=Exists",
        "image.tag=next",
        "image.pullPolicy=Always",
        "weights.accessMode=ReadWriteMany",
        "bench.args={--quiet}",
        "service.port=9000",
        "apiKeys.existingSecret=keys",
    ],
)
def test_a_job_that_becomes_another_has_another_name(change: str) -> None:
    """A Job cannot be changed, so an upgrade that changes one under its name fails."""
    found = [yaml.safe_load_all(template("--set", f"bench.enabled=true{more}").stdout) for more in ("", f",{change}")]
    jobs = [{m["metadata"]["name"]: m["spec"] for m in made if m and m["kind"] == "Job"} for made in found]
    assert len(jobs[0]) == len(jobs[1]) == 2
    assert jobs[0] != jobs[1]
    for name in jobs[0].keys() & jobs[1].keys():
        assert jobs[0][name] == jobs[1][name], name


def test_a_packaged_chart_has_the_profiles_in_it(tmp_path: Path) -> None:
    """In a checkout they are a link to launch/profiles."""
    done = helm("package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.iterdir()
    values = str(CHART / "ci" / "h100x4-bf16-values.yaml")
    done = helm("template", "qvq", str(package), "--namespace", "serving", "--values", values)
    assert done.stdout == rendered("h100x4-bf16")
