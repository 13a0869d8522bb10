"""Run ``dreamscale submit`` with ``python -m launch.submit``."""

import sys

from launch.submit.run import main

if __name__ == "__main__":
    sys.exit(main())
