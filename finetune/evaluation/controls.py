"""Find and read the folders of control images that belong to a folder of generated images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json
from finetune.evaluation.generated import GeneratedSet, check_control, read_generated, read_not_applicable
from pretrain.evidence.rules import CONTROLS, NotApplicable

ENDINGS = ("shuffled", "class", *CONTROLS)
"""Endings of the folder names that `find_controls` looks for."""


def find_controls(directory: str | Path) -> list[Path]:
    """Find the folders of control images beside a folder of generated images.

    Parameters
    ----------
    directory : str or Path
        Folder of generated images.

    Returns
    -------
    list of Path
        The folders with a generated.json whose name is the name of `directory`, a hyphen and one of `ENDINGS`, such as
        ``images-shuffle`` for ``images``; sorted by name.
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
        Maps the name of each control to its images, or to the reason why the data cannot give the control.

    Raises
    ------
    RequestError
        If a folder does not hold a control for `own`, or if two folders hold the same control.
    """
    found: dict[str, GeneratedSet | NotApplicable] = {}
    for folder in folders:
        if reason := read_not_applicable(folder):
            name, read = str(read_json(Path(folder) / "generated.json").get("control")), NotApplicable(reason=reason)
        else:
            read = read_generated(folder)
            check_control(own, read)
            name = str(read.about["control"])
        if name in found:
            raise RequestError(f"{folder}: is a second folder with the control '{name}'; give each control once")
        found[name] = read
    return found
