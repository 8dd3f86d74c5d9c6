"""qvq-bench: tokens per second and memory headroom of a server, as a capacity."""
