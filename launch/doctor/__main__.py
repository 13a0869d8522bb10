"""Run ``dreamscale doctor`` with ``python -m launch.doctor``."""

import sys

from launch.doctor.run import main

if __name__ == "__main__":
    sys.exit(main())
