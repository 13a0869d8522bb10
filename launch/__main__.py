"""``python -m launch`` is the ``dreamscale`` command."""

import os
import sys

from launch.cli import main
from launch.worker import PARENT, end_with_parent

# Set by the demo for its steps; they must not go on writing beside the next demo if this one is killed.
if os.environ.pop(PARENT, None) == str(os.getppid()):
    end_with_parent()
sys.exit(main())
