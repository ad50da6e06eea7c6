"""`python -m kvcapsule.eval.bench.engine`."""

import sys

from .main import main

sys.exit(main())
