"""Find the YAML files that come with Dreamscale, in the repository's folder ``configs`` or in the installed wheel."""

from __future__ import annotations

from pathlib import Path

from data_sharding.common.errors import RequestError

_ABOVE = Path(__file__).resolve().parents[2]


def shipped_configs() -> Path:
    """Return the folder of the configs that come with Dreamscale.

    Returns
    -------
    Path
        The folder ``dreamscale_configs`` next to the installed packages, or the folder ``configs`` of the repository.

    Raises
    ------
    RequestError
        If neither folder exists.
    """
    # In the wheel, the folder has the name 'dreamscale_configs' (see setup.py), because no other package uses this
    # name.
    for folder in (_ABOVE / "dreamscale_configs", _ABOVE / "configs"):
        if folder.is_dir():
            return folder
    raise RequestError(f"{_ABOVE}: the folder of configs is missing; install Dreamscale again with pip")


def find_config(path: str | Path) -> Path:
    """Return the config file for a path that the user typed.

    Parameters
    ----------
    path : str or Path
        Path of a config, as the user typed it.

    Returns
    -------
    Path
        `path` itself, if it exists. If `path` does not exist and begins with ``configs/``, the result is the file or
        folder of this name that comes with Dreamscale. So the commands of the documentation work in any folder. For all
        other paths, the result is `path` itself.
    """
    path = Path(path)
    if not path.exists() and path.parts[:1] == ("configs",):
        shipped = shipped_configs().joinpath(*path.parts[1:])
        if shipped.exists():
            return shipped
    return path
