"""Run ``python -m finetune.dm_re2i CONFIG.yaml``, e.g. from ``accelerate launch -m``."""

import sys

from finetune.dm_re2i.train import main

sys.exit(main())
