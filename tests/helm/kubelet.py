"""One pod as the kubelet would run it, on this machine: its command, arguments, environment, user, mounts and probes.

The root is a file system of its own, read-only but for the pod's volumes; the image is this machine's own.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
SYSTEM = ("/bin", "/lib", "/lib64", "/usr", "/sbin")


def can() -> bool:
    """Whether this machine lets us mount, which takes root."""
    return (
        os.geteuid() == 0
        and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    )


def sandbox(pod: dict[str, Any], config_maps: dict[str, dict[str, str]], root: Path) -> str:
    """A shell script that makes the pod's root at `root` and becomes its first container's process."""
    spec = pod["spec"]
    container, security = spec["containers"][0], spec["securityContext"]
    lines = [
        "set -e",
        "mount --make-rprivate /",
        f"mount -t tmpfs -o mode=755 root {root}",
        f"cd {root}",
        "mkdir proc dev sys tmp",
    ]
    lines += ["mount --rbind /proc proc", "mount --rbind /dev dev", "mount --rbind /sys sys", "cp -a /etc etc"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = sorted(container["volumeMounts"], key=lambda mount: mount["mountPath"])
    finish = []
    for mount in mounts:
        volume, at = volumes[mount["name"]], "." + mount["mountPath"]
        size = volume.get("emptyDir", {}).get("sizeLimit", "1Gi").removesuffix("i").lower()
        lines += [f"mkdir -p {at}", f"mount -t tmpfs -o mode=2775,gid={security['fsGroup']},size={size} volume {at}"]
        if "configMap" in volume:
            for name, text in config_maps[volume["configMap"]["name"]].items():
                lines.append(f"printf %s {shlex.quote(text)} > {at}/{name}")
        if mount.get("readOnly"):
            finish.append(f"mount -o remount,bind,ro {at}")
    image = [
        *SYSTEM,
        str(ROOT),
        sys.prefix,
        sys.base_prefix,
        *filter(None, os.environ.get("PYTHONPATH", "").split(":")),
    ]
    for path in dict.fromkeys(image):
        if Path(path).is_symlink():
            lines.append(f"ln -s {os.readlink(path)} .{path}")
        elif Path(path).is_dir():
            lines += [f"mkdir -p .{path}", f"mount --bind {path} .{path}", f"mount -o remount,bind,ro .{path}"]
    environ = {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin"} | {e["name"]: e["value"] for e in container["env"]}
    if path := os.environ.get("PYTHONPATH"):
        environ["PYTHONPATH"] = path
    user, group = security["runAsUser"], security["runAsGroup"]
    become = f"setpriv --reuid {user} --regid {group} --groups {security['fsGroup']} --no-new-privs --bounding-set -all"
    command = [*container["command"], *container["args"]]
    assignments = [f"{name}={value}" for name, value in environ.items()]
    run = f"{become} env -i {shlex.join(assignments)} {shlex.join(command)}"
    chroot = "$(command -v chroot || echo /usr/sbin/chroot)"
    return "\n".join([*lines, *finish, "mount -o remount,ro .", f"exec {chroot} . {run}"])


@dataclass
class Kubelet:
    """A running pod. `port` names are the container's."""

    pod: dict[str, Any]
    log: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, pod: dict[str, Any], config_maps: dict[str, dict[str, str]], directory: Path) -> "Kubelet":
        (directory / "root").mkdir()
        log = directory / "log"
        script = sandbox(pod, config_maps, directory / "root")
        with log.open("wb") as out:
            process = subprocess.Popen(["unshare", "-m", "bash", "-c", script], stdout=out, stderr=subprocess.STDOUT)
        return cls(pod, log, process)

    @property
    def container(self) -> dict[str, Any]:
        found: dict[str, Any] = self.pod["spec"]["containers"][0]
        return found

    def url(self, port: str) -> str:
        (number,) = [p["containerPort"] for p in self.container["ports"] if p["name"] == port]
        return f"http://127.0.0.1:{number}"

    def probe(self, name: str) -> bool:
        """One probe: a status from 200 to 399 within its timeout."""
        probe = self.container[name]
        try:
            url = self.url(probe["httpGet"]["port"]) + probe["httpGet"]["path"]
            return 200 <= httpx.get(url, timeout=probe["timeoutSeconds"]).status_code < 400
        except httpx.TransportError:
            return False

    def wait(self, name: str) -> int:
        """Probe until it succeeds; returns how often it failed, and fails where Kubernetes would have given up."""
        probe = self.container[name]
        for failures in range(probe["failureThreshold"]):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            if self.probe(name):
                return failures
            time.sleep(probe["periodSeconds"])
        raise AssertionError(f"{name} failed {probe['failureThreshold']} times:\n{self.log.read_text()[-3000:]}")

    def end(self) -> float:
        """preStop, SIGTERM, and SIGKILL when the grace is over, which is a failure; returns seconds after SIGTERM."""
        began = time.monotonic()
        time.sleep(self.container["lifecycle"]["preStop"]["sleep"]["seconds"])
        asked = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        left = self.pod["spec"]["terminationGracePeriodSeconds"] - (asked - began)
        code = self.process.wait(left)
        assert code == 0, self.log.read_text()[-3000:]
        return time.monotonic() - asked
