"""/metrics on a port of its own, always in Prometheus' text format.

prometheus_client's own server answers a Prometheus before version 3 in OpenMetrics, where it writes vllm: as vllm_.
"""

import socket
import threading
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server


class Server(ThreadingMixIn, WSGIServer):
    """One thread a scrape."""

    daemon_threads = True


class Quiet(WSGIRequestHandler):
    """A scrape every few seconds is no line in the log."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


def app() -> Callable[[dict[str, Any], Any], Any]:
    """The WSGI application of prometheus_client, asked for text whatever the scraper asks for."""
    from prometheus_client import make_wsgi_app

    inner: Callable[[dict[str, Any], Any], Any] = make_wsgi_app()
    return lambda environ, start: inner(environ | {"HTTP_ACCEPT": "text/plain"}, start)


def serve(port: int, host: str) -> Server:
    """Answer scrapes from a thread, until this process ends."""
    family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    Server.address_family = family
    server = make_server(host, port, app(), Server, handler_class=Quiet)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
