"""Everything that vLLM loads from us, on one page. vLLM calls `register` in each of its processes, maybe repeatedly."""

import asyncio
import logging
from typing import Any


def register() -> None:
    """Entry point `vllm.general_plugins`: makes our classes known by name; a launch then chooses them by its flags."""
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY
    from vllm.reasoning import ReasoningParserManager

    from qvq_serve.engine import CONNECTOR, PARSER
    from qvq_serve.hooks.images import ImageConnector

    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(ImageConnector)
    ReasoningParserManager.register_lazy_module(PARSER, "qvq_serve.hooks.reasoning", "QvqReasoningParser")


class Api:
    """Entry point `vllm.endpoint_plugins`: what we start beside vLLM's routes, in the API process."""

    name = "qvq_serve"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Our chat route, in the place of vLLM's."""
        from qvq_serve.api import chat

        chat.attach(app)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Called once the engine is up and before requests are taken."""
        from qvq_serve.api import memory
        from qvq_serve.engine import launched_profile
        from qvq_serve.hooks import chain

        state.qvq_chain = chain.launched()
        # The state keeps the task: an event loop holds only weak references to its tasks.
        state.qvq_memory = asyncio.create_task(memory.watch(engine_client, launched_profile()))
        state.qvq_memory.add_done_callback(report_end)


def report_end(task: "asyncio.Task[None]") -> None:
    """Memory figures that end while the server lives are worth a line; the server goes on without them."""
    if not task.cancelled() and (error := task.exception()):
        logging.getLogger("vllm.qvq_serve").warning("memory figures ended: %s: %s", type(error).__name__, error)
