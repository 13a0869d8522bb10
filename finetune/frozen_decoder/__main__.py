"""Run ``python -m finetune.frozen_decoder CONFIG.yaml``."""

import sys

from finetune.frozen_decoder.train import main

sys.exit(main())
