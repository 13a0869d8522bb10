"""Run ``python -m finetune.stable_diffusion CONFIG.yaml``, e.g. from ``accelerate launch -m``."""

import sys

from finetune.stable_diffusion.train import main

sys.exit(main())
