"""``python -m launch`` is the ``dreamscale`` command."""

import os
import sys

from launch.cli import main
from launch.worker import PARENT, end_with_parent

# The demo sets this variable for its steps. A step must end when its demo is killed: the next demo writes to the same
# folder.
if os.environ.pop(PARENT, None) == str(os.getppid()):
    end_with_parent()
sys.exit(main())
