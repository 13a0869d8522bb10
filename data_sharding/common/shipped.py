"""The YAML files that come with Dreamscale: the repository's folder ``configs``, which the wheel carries as well."""

from __future__ import annotations

from pathlib import Path

from data_sharding.common.errors import RequestError

_ABOVE = Path(__file__).resolve().parents[2]


def shipped_configs() -> Path:
    """Return the folder of the configs that come with Dreamscale.

    Returns
    -------
    Path
        ``dreamscale_configs`` beside the installed packages, or ``configs`` of the checkout.

    Raises
    ------
    RequestError
        If neither is there.
    """
    # setup.py copies the checkout's 'configs' into the wheel under the longer name, which no other package uses.
    for folder in (_ABOVE / "dreamscale_configs", _ABOVE / "configs"):
        if folder.is_dir():
            return folder
    raise RequestError(f"{_ABOVE}: no configs beside the packages; install Dreamscale again, with pip")


def find_config(path: str | Path) -> Path:
    """Return the file that a path to a config means.

    Parameters
    ----------
    path : str or Path
        As the user typed it.

    Returns
    -------
    Path
        `path` itself, if it exists. If it does not and begins with ``configs/``, the file of that name that comes with
        Dreamscale, so that the commands of the documentation work in any folder. Otherwise `path` again.
    """
    path = Path(path)
    if not path.exists() and path.parts[:1] == ("configs",):
        shipped = shipped_configs().joinpath(*path.parts[1:])
        if shipped.is_file():
            return shipped
    return path
