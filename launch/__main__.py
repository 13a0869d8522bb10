"""Run the ``dreamscale`` command as ``python -m launch``."""

import sys

from launch.cli import main
from launch.parent import end_with_named_parent

end_with_named_parent()
sys.exit(main())
