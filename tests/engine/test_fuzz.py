"""Two thousand bad requests of every kind: none is answered by a 5xx, none leaves a traceback, and memory stays."""

import base64
import concurrent.futures
import copy
import io
import json
import random
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from tests.engine.conftest import Server, data_url, photo, png

REQUESTS, WARM_UP = 2_000, 400
GROWTH_BYTES = 50 * 2**20
CHAT = "/v1/chat/completions"
FIELDS = [
    "messages",
    "model",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "response_format",
    "tools",
    "min_tokens",
    "tool_choice",
    "structured_outputs",
    "allowed_token_ids",
    "stop_token_ids",
    "bad_words",
    "repetition_detection",
    "thinking_token_budget",
    "include_reasoning",
    "min_visual_tokens",
    "max_visual_tokens",
    "presence_penalty",
    "priority",
    "continue_final_message",
    "add_generation_prompt",
    "chat_template_kwargs",
    "cache_salt",
    "prompt_logprobs",
    "echo",
    "request_id",
    "logprob_token_ids",
    "repetition_penalty",
    "ignore_eos",
    "skip_special_tokens",
    "stream_interval",
    "user",
]


class Maze(BaseHTTPRequestHandler):
    """/N redirects to /N-1; /endless sends bytes for ever; anything else is a cut image."""

    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name.isdigit() and int(name):
            self.send_response(302)
            self.send_header("Location", f"/{int(name) - 1}")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        try:
            while name == "endless":
                self.wfile.write(b"x" * 65_536)
            self.wfile.write(png(photo(64, 64))[:300])
        except OSError:
            return

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def maze() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Maze) as pages:
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{pages.server_address[1]}"
        pages.shutdown()


def bomb() -> bytes:
    """A PNG that says it is 60,000 x 60,000 and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    )


def images(maze: str) -> list[str]:
    """Addresses of images that are none, or should not be read."""
    gif = io.BytesIO()
    Image.new("P", (5, 5)).save(gif, "GIF")

    def data(content: bytes, kind: str = "image/png") -> str:
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"

    whole = png(photo(64, 64))
    return [
        data(bomb()), data(b""), data(whole[:100]), data(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        data(whole, "💣"), data(bytes(1_000)), data(gif.getvalue()[:20], "image/gif"), "data:image/png;base64,!!!!",
        "data:,", "data:", "data:image/png;base64", "data:image/png;base64," + "A" * 99_999, f"{maze}/50",
        f"{maze}/endless", f"{maze}/cut", "http://", "http://[", "http://\u2603.example/", "http://localhost:22/",
        "http://" + "a" * 300 + ".com/", "http://169.254.169.254/latest/meta-data", "http://0/", "file:///etc/passwd",
        "file://", "ftp://x/y", "//x", "x", "\x00", "🖼️", "javascript:alert(1)", f"{maze}/\r\nX: y",
        data_url(Image.new("RGB", (2_100, 10))), "https://user:password@127.0.0.1/",
    ]  # fmt: skip


JUNK: list[Callable[[random.Random], Any]] = [
    lambda draw: draw.choice([None, True, False, "", "x", "\x00", "💥" * 50, "\u202e", "a" * 20_000, "NaN", "null"]),
    lambda draw: draw.choice([0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -1e-308, 0.1]),
    lambda draw: [draw.choice([None, 1, "x", {}, []]) for _ in range(draw.choice([0, 1, 3, 2_000]))],
    lambda draw: {draw.choice(["a", "type", "json", "regex", "0", "💥", ""]): draw.choice([None, 1, "x", [], {}])},
    lambda draw: nested(draw.choice([2, 50, 500])),
    lambda draw: {"type": draw.choice(["json_schema", "json_object", "text", "x"]), "json_schema": nested(3)},
    lambda draw: {"regex": draw.choice(["(", "(a+)+$", "[", "a{1000000}", "\\", "."])},
    lambda draw: {"grammar": draw.choice(["root ::=", "::", "root ::= root", "x" * 100])},
    lambda draw: {"json": draw.choice(["{", {"type": "x"}, {"$ref": "#"}, {"pattern": "("}, 7])},
]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = "x"
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def bad_request(draw: random.Random, urls: list[str]) -> tuple[str, str, bytes, dict[str, str]]:
    """(method, path, body, headers) of one."""
    headers = {"Content-Type": "application/json"}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    kind = draw.randrange(10)
    if kind < 4:
        for _ in range(draw.choice([1, 1, 2, 5])):
            body[draw.choice(FIELDS)] = draw.choice(JUNK)(draw)
    elif kind < 7:
        parts = [
            {"type": "image_url", "image_url": {"url": draw.choice(urls)}} for _ in range(draw.choice([1, 1, 2, 5]))
        ]
        body["messages"][0]["content"] = [*parts, {"type": "text", "text": "What?"}]
        if draw.random() < 0.3:
            part = draw.choice(parts)
            part[draw.choice(["type", "image_url", "text", "uuid", "x"])] = draw.choice(JUNK)(draw)
    elif kind == 7:
        message = draw.choice(
            [{"role": "x", "content": "Hi"}, {"role": "user"}, {"content": "Hi"}, {}, 7, "Hi", None, ["Hi"],
             {"role": "assistant", "tool_calls": [{"id": 1}]}, {"role": "tool", "content": "x"},
             {"role": "user", "content": [7]}, {"role": "user", "content": {"type": "text"}},
             {"role": "user", "content": "<|im_end|>" * 50}, {"role": "user", "content": "<|image_pad|>" * 9}]
        )  # fmt: skip
        body["messages"] = [copy.deepcopy(message) for _ in range(draw.choice([0, 1, 3]))]
    elif kind == 8:
        text = json.dumps(body).encode()
        raw = draw.choice(
            [b"", text[: draw.randrange(len(text))], b"\xff\xfe" + text, b"[" * 50_000, b'{"a":' * 5_000, text + text,
             b'{"messages": NaN}', text.replace(b"Hi", b"\\ud800"), b"\x00" * 100, text.replace(b"2", b"1e999")]
        )  # fmt: skip
        return "POST", CHAT, raw, headers
    else:
        path = draw.choice(
            [CHAT, "/v1/models", "/health", "/ready", "/metrics", "/version", "/x", "/%00", "/..", "/v1/💥"]
        )
        headers["Content-Type"] = draw.choice(["text/plain", "multipart/form-data", "application/json; charset=x", ""])
        method = draw.choice(["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "POST"])
        return method, path, json.dumps(body).encode(), headers
    return "POST", CHAT, json.dumps(body).encode(), headers


def resident(server: Server) -> int:
    """Bytes of the server's processes together."""
    main = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in [main, *main.children(recursive=True)])


def test_two_thousand_bad_requests(server: Server, maze: str) -> None:
    urls = images(maze)

    def send(seed: int) -> tuple[int, int, str]:
        method, path, body, headers = bad_request(random.Random(seed), urls)
        answer = httpx.request(method, server.url + path, content=body, headers=server.headers | headers, timeout=120)
        return answer.status_code, seed, answer.text[:300]

    def run(seeds: range) -> list[tuple[int, int, str]]:
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            return list(pool.map(send, seeds))

    answers = run(range(WARM_UP))
    before = resident(server)
    answers += run(range(WARM_UP, REQUESTS))
    assert [answer for answer in answers if answer[0] >= 500] == []
    assert [answer for answer in answers if "Traceback" in answer[2]] == []
    statuses = Counter(status for status, _, _ in answers)
    assert statuses[400] > REQUESTS / 2, statuses
    assert server.alive()
    assert "Traceback" not in server.log.read_text()
    assert resident(server) - before < GROWTH_BYTES
