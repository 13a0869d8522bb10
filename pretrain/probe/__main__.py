"""Run the probe with ``python -m pretrain.probe ENCODER DATASET``."""

import sys

from pretrain.probe.run import main

sys.exit(main())
