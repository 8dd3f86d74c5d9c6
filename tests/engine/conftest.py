"""Real servers for the tests: the real vLLM on the CPU, started as a user starts it."""

import base64
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from qvq_serve.demo.cases import case
from tests.network import free_port

KEY = "a-key-that-nobody-sees"
START_TIMEOUT_S = 300
MOST_TOKENS = 320
"""What the shared server writes where a request does not say, and the most that it writes: an answer of the demo."""


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A seeded image with structure at every scale, so that no two places look alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def user(*parts: str | dict[str, Any]) -> dict[str, Any]:
    """A user's message: images by URL as {"url": ...}, texts as they are."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


@dataclass
class Server:
    """A running qvq-serve."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    metrics: str = ""
    """Where its metrics are, if they have a port of their own."""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def chat(self, *messages: dict[str, Any], **body: Any) -> httpx.Response:
        request = {"messages": list(messages), "temperature": 0, "max_tokens": 8} | body
        return httpx.post(f"{self.url}/v1/chat/completions", json=request, headers=self.headers, timeout=120)

    def alive(self) -> bool:
        return httpx.get(f"{self.url}/health", timeout=30).status_code == 200


@contextmanager
def serving(cache: Path, *arguments: str, key: str | None = KEY, stop: bool = True, **environ: str) -> Iterator[Server]:
    """A qvq-serve with these arguments; stopped by SIGTERM, which must end it with exit code 0."""
    port = free_port()
    log = cache / f"server-{port}.log"
    command = [Path(sys.executable).parent / "qvq-serve", "--port", str(port)]
    command += [*(["--api-key", key] if key else []), *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"QVQ_CACHE": str(cache)} | environ
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not up(server):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start (exit code {process.poll()}):\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield server
        if stop:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def up(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/ready", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def greedy_tokens(server: Server, seed: int) -> list[int]:
    """48 tokens about a seeded image of an invoice, token by token the likeliest."""
    one = case(seed, "invoice", size=(476, 532))
    message = user({"url": data_url(one.image)}, one.question)
    answer = server.chat(message, max_tokens=48, ignore_eos=True, return_token_ids=True)
    return answer.json()["choices"][0]["token_ids"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache directory, as on a new machine."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def image_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    photo(476, 476).save(directory / "photo.png")
    return directory


@pytest.fixture(scope="session")
def server(cache: Path, image_dir: Path) -> Iterator[Server]:
    """The demo model on the CPU, shared by all tests that need no server of their own."""
    limits = [
        "--allowed-image-dir",
        str(image_dir),
        "--image-timeout",
        "2",
        "--max-output-tokens",
        str(MOST_TOKENS),
        "--allowed-image-hosts",
        "127.0.0.1",
        "--open-routes",
        "/tokenize,/detokenize",
    ]
    with serving(cache, "--demo", *limits) as running:
        yield running


class Files(BaseHTTPRequestHandler):
    """A web server with an image, a page, a redirect, an address that never answers, and 404."""

    def do_GET(self) -> None:
        if self.path == "/hang":
            time.sleep(15)
            return
        answers = {"/photo.png": (200, png(photo(476, 476))), "/page.html": (200, b"<html>no image</html>")}
        status, body = answers.get(self.path, (404, b"none"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="session")
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{files.server_address[1]}"
        files.shutdown()
