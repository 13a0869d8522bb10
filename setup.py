"""Builds the wheel. All other settings of the project are in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Adds the folder ``configs`` to the wheel, as ``dreamscale_configs``."""

    def run(self) -> None:
        """Build the packages, then copy the configs; an editable install reads them from the checkout."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "dreamscale_configs")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(Path(__file__).parent / "configs", target)


setup(cmdclass={"build_py": BuildWithConfigs})
