"""The command line of qvq-bench."""

import sys


def main() -> int:
    """Says that the load-testing harness is not in this version; exit code 2."""
    print("qvq-bench: the load-testing harness is not in this version of qvq-serve", file=sys.stderr)
    return 2
