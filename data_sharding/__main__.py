"""Starts the sharding job. `ray job submit` uses ``python -m data_sharding CONFIG.yaml --output DIR``."""

import sys

from data_sharding.job.run import main

if __name__ == "__main__":
    sys.exit(main())
