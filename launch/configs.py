"""The command ``dreamscale configs``: list, print and copy the configs that come with Dreamscale."""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError
from data_sharding.common.shipped import shipped_configs

LONGEST = 90
"""Largest number of characters of a description in the list of configs. A longer description is cut at its first colon
or semicolon."""


@dataclass(kw_only=True)
class ConfigsConfig:
    """List the configs that come with Dreamscale, print one config, or copy the configs to a folder."""

    name: str = ""
    """Name of a config, such as pretrain/released.yaml, or of a folder of configs, such as pretrain. By default: all
    configs."""
    output: str = ""
    """Folder to which the configs are copied, with their subfolders. -o is short for --output."""


def describe(path: Path) -> str:
    """Return the first sentence of the comment at the top of a config; a long sentence is shortened.

    Parameters
    ----------
    path : Path
        A YAML file or a shell script.

    Returns
    -------
    str
        The sentence in one line; empty if the file does not begin with a comment.
    """
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    # Skip the indented lines of the comment, because they contain shell commands and not sentences.
    words = [line.removeprefix("# ") for line in lines if not line.startswith(("#!", "#  "))]
    sentence = re.split(r"(?<=\.)\s", " ".join(words), maxsplit=1)[0]
    return sentence if len(sentence) <= LONGEST else re.split(r"[:;]\s", sentence, maxsplit=1)[0]


def select_configs(name: str) -> list[Path]:
    """Find the configs with a given name.

    Parameters
    ----------
    name : str
        Name of a file or a folder. The prefix ``configs/`` and the extension ``.yaml`` are optional. An empty name
        means all configs.

    Returns
    -------
    list of Path
        The files of the matching configs, sorted.

    Raises
    ------
    RequestError
        If no config has the name.
    """
    root = shipped_configs()
    files = sorted(path for path in root.rglob("*") if path.is_file())
    wanted = Path(name.removeprefix("configs/"))
    by_name = {str(path.relative_to(root)): path for path in files}
    for candidate in (str(wanted), f"{wanted}.yaml"):
        if candidate in by_name:
            return [by_name[candidate]]
    found = [path for path in files if wanted in path.relative_to(root).parents]
    if not found:
        folders = {path.parent.relative_to(root).as_posix() for path in files}
        known = [*folders, *by_name, *(Path(name).with_suffix("").as_posix() for name in by_name)]
        near = difflib.get_close_matches(str(wanted), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "'dreamscale configs' lists the configs"
        raise RequestError(f"no config '{name}' comes with Dreamscale; {hint}")
    return found


def copy_configs(files: list[Path], folder: Path) -> None:
    """Copy configs to a folder. An existing file with other content is never overwritten.

    Parameters
    ----------
    files : list of Path
        Config files that come with Dreamscale, as returned by `select_configs`.
    folder : Path
        Destination; the folder is created if it does not exist.

    Raises
    ------
    RequestError
        If the folder has a file with the same name and other content (then no file is copied), or if the folder cannot
        be written.
    """
    targets = {folder / path.relative_to(shipped_configs()): path.read_bytes() for path in files}
    for target, content in targets.items():
        if target.exists() and (not target.is_file() or target.read_bytes() != content):
            raise RequestError(
                f"{target}: a file with this name and other content exists; move that file away, or choose another "
                "folder for -o"
            )
    try:
        for target, content in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    except OSError as error:
        raise RequestError(f"{folder}: cannot be written ({error.strerror}); choose another folder for -o") from None


def _configs(config: ConfigsConfig) -> int:
    files = select_configs(config.name)
    names = {path: f"configs/{path.relative_to(shipped_configs()).as_posix()}" for path in files}
    if config.output:
        copy_configs(files, Path(config.output))
        for path in files:
            print(Path(config.output) / path.relative_to(shipped_configs()))
    elif len(files) == 1:
        print(files[0].read_text(), end="")
    else:
        width = max(len(name) for name in names.values())
        for path, name in names.items():
            print(f"{name:<{width}}  {describe(path)}")
        print("\nEvery command accepts these paths in any folder. Print a config: 'dreamscale configs NAME'.")
        print("Copy all configs, to change them: 'dreamscale configs -o configs'.")
    return EXIT_DONE


main = command(ConfigsConfig, _configs, prog="dreamscale configs", positionals=("name",), aliases={"-o": "output"})

if __name__ == "__main__":
    sys.exit(main())
