"""qvq-serve: a thin, high-throughput serving stack on vLLM for QVQ-72B-Preview."""

__version__ = "0.1.0"
