"""From the start to the end: ready after a real request, a drain at SIGTERM, a code of its own for a dead engine."""

import asyncio
import base64
import io
import logging
import math
import signal
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import psutil
from fastapi import Response

from qvq_serve import interrupt, metrics
from qvq_serve.errors import EngineDied
from qvq_serve.interrupt import lives
from qvq_serve.profile import Profile

log = logging.getLogger("vllm.qvq_serve")
RATE_WINDOW_S = 60.0
MOST_RETRY_S = 60
POLL_S = 0.1
GRACE_S = 0.5
"""For the errors to reach the clients of a dead engine."""
FLUSH_S = 5.0
"""For the last answers, which are written, to reach their clients."""


@dataclass
class State:
    """What door, routes and signals of this process share."""

    serving: bool = False
    """Whether our signal handlers are in: from then on only a drain, or a dead engine, ends the server."""
    ready: bool = False
    draining: bool = False
    in_flight: int = 0
    running: int = 0
    """Of those in flight, chats whose body has come: clients that send slowly take nobody's place."""
    finished: deque[float] = field(default_factory=lambda: deque(maxlen=1024))
    """When the last requests ended well (time.monotonic)."""

    def retry_after(self) -> int:
        """Seconds until a slot should be free, 1 to 60: those in flight over the rate of the last minute."""
        now = time.monotonic()
        recent = [moment for moment in self.finished if now - moment < RATE_WINDOW_S]
        if not recent:
            return 5
        rate = len(recent) / max(1.0, now - recent[0])
        return max(1, min(MOST_RETRY_S, math.ceil(self.in_flight / rate / 2)))


STATE = State()


def prove_drained() -> None:
    """Called when vLLM's server has ended. Raises EngineDied where nobody asked it to: then its engine was lost."""
    if STATE.serving and not STATE.draining:
        raise EngineDied("vLLM's engine died; its log above says why. The server is to be started again.")


async def run(state: Any, profile: Profile) -> None:
    """Take over the signals once the HTTP server is there; become ready; end by a drain, or when the engine dies."""
    while not (getattr(state, "server", None) and state.server.started):
        await asyncio.sleep(POLL_S)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    interrupt.hand_over()
    STATE.serving = True
    probe = asyncio.create_task(become_ready(state))
    engine = engine_processes()
    loop.add_signal_handler(signal.SIGUSR1, end_at_once, engine)  # another machine is lost (qvq_serve/node.py)
    while not stop.is_set() and not state.engine_client.errored:
        await asyncio.sleep(POLL_S)
        if not all(map(lives, engine)):
            end_at_once(engine)
    probe.cancel()
    if stop.is_set():
        await drain(state, profile)
    else:  # vLLM's own watchdog looks every 5 s
        STATE.ready = False
        metrics.READY.set(0)
        log.error("the engine died; the server ends")
        await asyncio.sleep(GRACE_S)
        state.server.should_exit = True


def engine_processes() -> list[psutil.Process]:
    """vLLM's engine and workers, which name themselves VLLM::..."""
    return [child for child in psutil.Process().children(recursive=True) if "VLLM::" in interrupt.title(child)]


def end_at_once(engine: list[psutil.Process]) -> None:
    """An engine that lost a worker is lost; by itself vLLM gives the other workers 8 s before it says so."""
    for process in engine:
        if lives(process):
            process.kill()
    engine.clear()


async def ready() -> Response:
    """GET /ready: 200 once a request with an image was answered; 503 before, in a drain, and without an engine."""
    return Response(status_code=200 if STATE.ready else 503)


async def become_ready(state: Any) -> None:
    """Ask about an image until an answer comes; each failure is logged."""
    while not STATE.ready:
        try:
            await first_answer(state)
        except Exception as error:
            log.warning("not ready yet: the first request failed: %s", error)
            await asyncio.sleep(5)
        else:
            STATE.ready = True
            metrics.READY.set(1)
            log.info("ready: a request with an image was answered")


async def first_answer(state: Any) -> None:
    """One token about a small image, through vLLM's own handler. Raises what went wrong."""
    from PIL import Image
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), (200, 30, 30)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Which colour is this?"}]
    request = ChatCompletionRequest(messages=[{"role": "user", "content": content}], max_tokens=1)
    answer = await state.openai_serving_chat.create_chat_completion(request)
    if isinstance(answer, ErrorResponse):
        raise RuntimeError(answer.error.message)


async def drain(state: Any, profile: Profile) -> None:
    """Refuse what is new, let what runs finish until --drain-timeout, then end the HTTP server; vLLM's end follows."""
    STATE.draining, STATE.ready = True, False
    metrics.READY.set(0)
    metrics.DRAINING.set(1)
    log.info("draining: %d requests in flight, for at most %g s", STATE.in_flight, profile.drain_timeout)
    deadline = time.monotonic() + profile.drain_timeout
    while STATE.in_flight and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
    if STATE.in_flight:
        log.warning("the drain timed out: %d requests are cut", STATE.in_flight)
        state.server.force_exit = True
    log.info("drained")
    state.server.should_exit = True
    await asyncio.sleep(FLUSH_S)
    for connection in list(state.server.server_state.connections):  # whose clients do not read: they would hold the end
        connection.transport.abort()
