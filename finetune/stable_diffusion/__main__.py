"""``python -m finetune.stable_diffusion CONFIG.yaml``, for `accelerate launch -m` and other launchers."""

import sys

from finetune.stable_diffusion.train import main

sys.exit(main())
