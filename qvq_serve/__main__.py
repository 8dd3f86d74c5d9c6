"""`python -m qvq_serve` is `qvq-serve`."""

import sys

from qvq_serve.cli import main

sys.exit(main())
