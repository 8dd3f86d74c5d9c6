"""Everything that vLLM loads from us, on one page. vLLM calls `register` in each of its processes, maybe repeatedly."""

import asyncio
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def register() -> None:
    """Entry point `vllm.general_plugins`: makes our classes known by name; a launch then chooses them by its flags."""
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY
    from vllm.reasoning import ReasoningParserManager

    from qvq_serve.engine import CONNECTOR, PARSER
    from qvq_serve.hooks.images import ImageConnector

    end_with_parent()
    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(ImageConnector)
    ReasoningParserManager.register_lazy_module(PARSER, "qvq_serve.hooks.reasoning", "QvqReasoningParser")


def end_with_parent() -> None:
    """In vLLM's child processes: have the kernel end this one when its parent is gone, even by SIGKILL.

    Its parent may end it by SIGTERM, as vLLM does.
    """
    parent = multiprocessing.parent_process()
    if parent is None or sys.platform != "linux":
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked in the parent (qvq_serve/interrupt.py)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it went before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)


class Api:
    """Entry point `vllm.endpoint_plugins`: what we start beside vLLM's routes, in the API process."""

    name = "qvq_serve"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Our chat route, in the place of vLLM's, and /ready."""
        from qvq_serve.api import chat, lifecycle

        chat.attach(app)
        app.get("/ready")(lifecycle.ready)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Called once the engine is up and before requests are taken."""
        import torch

        from qvq_serve.api import about, lifecycle, memory, scrape
        from qvq_serve.engine import launched_profile
        from qvq_serve.gpu import visible_gpus
        from qvq_serve.hooks import chain, governing
        from qvq_serve.profile import local_workers

        torch.set_num_threads(1)  # of this process, which serves: a loop is looked for between streams
        state.qvq_chain = chain.launched()
        profile = launched_profile()
        if profile.governor != "off":
            await memory.prove_governor(engine_client)
        if profile.governor == "on":  # what its acts are read back with: seconds, not between streams
            await asyncio.to_thread(governing.writing, engine_client.renderer.tokenizer)
        about.export(profile, visible_gpus()[: local_workers(profile)])
        if profile.metrics_port:
            scrape.serve(profile.metrics_port, profile.host)
        # The state keeps the tasks: an event loop holds only weak references to them.
        state.qvq_tasks = [
            asyncio.create_task(memory.watch(engine_client, profile), name="memory figures"),
            asyncio.create_task(lifecycle.run(state, profile), name="the lifecycle"),
        ]
        for task in state.qvq_tasks:
            task.add_done_callback(report_end)


def report_end(task: "asyncio.Task[None]") -> None:
    """A task of ours that ends by a fault is worth a line; the server goes on without it."""
    if not task.cancelled() and (error := task.exception()):
        logging.getLogger("vllm.qvq_serve").warning("%s ended: %s: %s", task.get_name(), type(error).__name__, error)
