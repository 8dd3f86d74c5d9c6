"""Everything that vLLM loads from us, on one page. vLLM calls `register` in each of its processes, maybe repeatedly."""


def register() -> None:
    """Entry point `vllm.general_plugins`: makes our classes known by name; a launch then chooses them by its flags."""
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY

    from qvq_serve.engine import CONNECTOR
    from qvq_serve.hooks.images import ImageConnector

    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(ImageConnector)
