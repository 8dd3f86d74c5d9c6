"""A small model hub on this machine: ModelScope's and Hugging Face's routes, with the faults that networks have."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

TENSOR = bytes(range(256)) * 4 * 1024
HEADER = json.dumps({"x": {"dtype": "U8", "shape": [len(TENSOR)], "data_offsets": [0, len(TENSOR)]}}).encode()
MODEL = {
    "config.json": b"{}",
    "preprocessor_config.json": b"{}",
    "tokenizer_config.json": b"{}",
    "model.safetensors": len(HEADER).to_bytes(8, "little") + HEADER + TENSOR,
}
WEIGHTS = "model.safetensors"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Serves MODEL as every repository. Use as a context manager; `url` is the endpoint."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.files = dict(MODEL)
        self.listed_sizes: dict[str, int] = {}
        """Sizes to list instead of the true ones."""
        self.cuts = 0
        """How many more answers with weights break off in the middle."""
        self.before_weights: Any = None
        """Called before weights are sent."""
        self.ranges: list[str | None] = []
        """The Range header of each request for weights."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def listing(self) -> list[dict[str, Any]]:
        """Each file's path, size, SHA-256, and git's own hash of it."""
        found = []
        for path in self.files:
            content = MODEL.get(path, self.files[path])
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            found.append({"path": path, "size": self.listed_sizes.get(path, len(content)),
                          "sha256": hashlib.sha256(content).hexdigest(), "blob": blob})  # fmt: skip
        return found


class Routes(BaseHTTPRequestHandler):
    """The routes that the two libraries ask."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        url = urlparse(self.path)
        query, hub = parse_qs(url.query), self.server
        if url.path.endswith("/repo/files"):
            files = [
                {"Path": f["path"], "Size": f["size"], "Sha256": f["sha256"], "Type": "blob"} for f in hub.listing()
            ]
            self.send_json({"Code": 200, "Success": True, "Data": {"Files": files}})
        elif url.path.endswith("/repo"):
            self.send_file(query["FilePath"][0], head)
        elif "/tree/" in url.path:
            self.send_json([self.tree_entry(f) for f in hub.listing()])
        elif "/api/models/" in url.path:
            self.send_json({"id": "x/y", "sha": COMMIT, "siblings": [{"rfilename": path} for path in hub.files]})
        elif "/resolve/" in url.path:
            self.send_file(unquote(url.path.split(f"/resolve/{COMMIT}/")[-1]), head)
        else:
            self.send_json({"Code": 404, "Success": False, "Message": "none"}, status=404)

    def tree_entry(self, file: dict[str, Any]) -> dict[str, Any]:
        """A file as Hugging Face lists it: weights in LFS with a SHA-256, the rest with git's hash."""
        entry = {"type": "file", "path": file["path"], "size": file["size"], "oid": file["blob"]}
        if file["path"] == WEIGHTS:
            entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": 130}
        return entry

    def send_json(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, path: str, head: bool) -> None:
        hub, content = self.server, self.server.files[path]
        listed = next(f for f in hub.listing() if f["path"] == path)
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if path == WEIGHTS and not head:
            hub.ranges.append(asked)
            if hub.before_weights:
                hub.before_weights()
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{listed["sha256" if path == WEIGHTS else "blob"]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if head:
            return
        if path == WEIGHTS and hub.cuts:
            hub.cuts -= 1
            self.wfile.write(content[start : start + 300_000])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def log_message(self, *_: Any) -> None:
        """Quiet."""
