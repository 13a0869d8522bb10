"""Find and read the folders of control images that belong to a folder of generated images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from data_sharding.common.errors import RequestError, show
from data_sharding.common.files import read_json
from data_sharding.common.untrusted import check_group, check_text
from finetune.evaluation.generated import (
    GeneratedSet,
    check_control,
    check_settings,
    read_generated,
    read_not_applicable,
)
from finetune.generation.config import Control
from pretrain.evidence.rules import CONTROLS, NotApplicable

ENDINGS = ("shuffled", "class", *CONTROLS)
"""Endings of the folder names that `find_controls` looks for."""


def find_controls(directory: str | Path) -> list[Path]:
    """Find the folders of control images next to a folder of generated images.

    Parameters
    ----------
    directory : str or Path
        Folder of generated images.

    Returns
    -------
    list of Path
        The folders beside `directory` that hold a generated.json and have the right name, sorted by name. The right
        name is the name of `directory`, a hyphen and one of `ENDINGS`, such as ``images-shuffle`` for ``images``.
    """
    own = Path(directory).resolve()
    beside = (own.with_name(f"{own.name}-{ending}") for ending in sorted(ENDINGS))
    return [path for path in beside if (path / "generated.json").is_file()]


def read_controls(own: GeneratedSet, folders: Sequence[str | Path]) -> dict[str, GeneratedSet | NotApplicable]:
    """Read folders of control images, and check that each folder holds a control for the generated images.

    Parameters
    ----------
    own : GeneratedSet
        The generated images.
    folders : sequence of str or Path
        Folders that ``dreamscale generate --control NAME`` wrote.

    Returns
    -------
    dict
        Maps the name of each control to its images, or to the reason why the control cannot be made from the data.

    Raises
    ------
    RequestError
        If a folder does not hold a control for `own`, or if two folders hold the same control.
    """
    found: dict[str, GeneratedSet | NotApplicable] = {}
    for folder in folders:
        if reason := read_not_applicable(folder):
            name, read = _read_name(own, Path(folder)), NotApplicable(reason=reason)
        else:
            read = read_generated(folder)
            check_control(own, read)
            name = str(read.about["control"])
        if name in found:
            raise RequestError(
                f"{folder}: this is a second folder with the control '{name}'; give only one folder for each control"
            )
        found[name] = read
    return found


def _read_name(own: GeneratedSet, folder: Path) -> str:
    """Check that a control that cannot be made belongs to the generated images, and return the control's name."""
    record = folder / "generated.json"
    about = check_group(read_json(record), str(record))
    name = check_text(about.get("control"), str(record), "control")
    if name == "none" or name not in get_args(Control):
        raise RequestError(f"{record}: '{show(name)}' is not the name of a control; generate the control again")
    check_settings(own, about, folder)
    return name
