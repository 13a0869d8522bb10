"""``python -m data_sharding CONFIG.yaml --output DIR``: the sharding job, as it is started by `ray job submit`."""

import sys

from data_sharding.job.run import main

if __name__ == "__main__":
    sys.exit(main())
