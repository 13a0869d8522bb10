"""Run ``python -m finetune.linear CONFIG.yaml``."""

import sys

from finetune.linear.train import main

sys.exit(main())
