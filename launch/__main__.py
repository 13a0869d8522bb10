"""Run the ``dreamscale`` command as ``python -m launch``."""

import os
import sys

from launch.cli import main
from launch.worker import PARENT, end_with_parent

# The demo sets this environment variable for its steps. If the demo is killed, its current step must end too, because a
# restarted demo writes to the same folder.
if os.environ.pop(PARENT, None) == str(os.getppid()):
    end_with_parent()
sys.exit(main())
