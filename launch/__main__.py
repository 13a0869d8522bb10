"""``python -m launch`` is the ``dreamscale`` command."""

import sys

from launch.cli import main

sys.exit(main())
