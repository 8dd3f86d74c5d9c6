"""`qvq-serve ask` against a server whose answer breaks off."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from qvq_serve.ask import ask
from qvq_serve.errors import StartError


class Breaking(BaseHTTPRequestHandler):
    """Names a model, and hangs up in the middle of an answer."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply(b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(b'data: {"choices": [{"index": 0, "delta": {"content": "begun"}}]}\n\n', more=1)
        self.close_connection = True

    def reply(self, body: bytes, more: int = 0) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if more else "application/json")
        self.send_header("Content-Length", str(len(body) + more))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def test_an_answer_that_breaks_off_is_not_taken_for_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(StartError, match="the answer broke off"):
            ask(f"http://127.0.0.1:{server.server_address[1]}", [], "Hi", api_key=None, max_tokens=9)
        server.shutdown()
    assert capsys.readouterr().out == "begun"
