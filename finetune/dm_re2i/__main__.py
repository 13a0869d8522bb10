"""``python -m finetune.dm_re2i CONFIG.yaml``, for `accelerate launch -m` and other launchers."""

import sys

from finetune.dm_re2i.train import main

sys.exit(main())
