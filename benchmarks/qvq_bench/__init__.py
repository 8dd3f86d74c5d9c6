"""qvq-bench: tokens per second and memory headroom of a server, as a capacity."""

EXIT_NOT_OK = 1
"""Too few requests were ok, not even the lowest load held, or the client could not keep up."""
EXIT_INTERRUPTED = 130
