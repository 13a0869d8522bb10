"""``python -m data_sharding CONFIG.yaml --output DIR``: the sharding job, for `ray job submit` and the like."""

import sys

from data_sharding.job.run import main

sys.exit(main())
