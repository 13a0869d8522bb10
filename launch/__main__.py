"""Run the ``dreamscale`` command as ``python -m launch``."""

import os
import sys

from launch.cli import main
from launch.worker import PARENT, end_with_parent

# `launch.chain` sets the environment variable `PARENT` for its steps. If the demo or an ablation is killed, its current
# step must end too, because a restarted run writes to the same folder.
if os.environ.pop(PARENT, None) == str(os.getppid()):
    end_with_parent()
sys.exit(main())
