"""Command lines and YAML files as typed dataclasses, through jsonargparse."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_sharding.common.errors import RequestError, one_line, run_main
from data_sharding.common.shipped import find_config

T = TypeVar("T")


class Main(Protocol):
    """A command: takes its arguments (`sys.argv[1:]` by default) and returns its exit code."""

    def __call__(self, argv: list[str] | None = None) -> int:
        """Run the command."""
        ...


def _leaf_keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of every field of a dataclass, nested ones included."""
    import typing

    hints = typing.get_type_hints(cls)
    keys = []
    for field in dataclasses.fields(cls):
        keys.append(prefix + field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            keys += _leaf_keys(hints[field.name], f"{prefix}{field.name}.")
    return keys


def _renamed_keys(cls: type, prefix: str = "") -> dict[str, str]:
    """Keys that a config had in older versions, nested ones included, with what to use instead.

    A config class lists its own in ``RENAMED: ClassVar[dict[str, str]]``: the old key to the new one, both relative to
    the class, or to a sentence where a new name does not say enough.
    """
    import typing

    found = {}
    for old, new in getattr(cls, "RENAMED", {}).items():
        found[prefix + old] = new if " " in new else f"use '{prefix}{new}'"
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= _renamed_keys(hints[field.name], f"{prefix}{field.name}.")
    return found


def _explain(error: Exception, cls: type) -> str:
    """One line that names the key and what to do, out of jsonargparse's message."""
    message = one_line(error)
    unknown = re.search(r"Key ['\"]?([\w.]+)['\"]? is not expected|[Uu]nrecognized arguments?: *--([\w.]+)", message)
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if unknown or group:
        key = f"{group.group(1)}.{group.group(2)}" if group else next(k for k in unknown.groups() if k)  # type: ignore[union-attr]
        if key in (renamed := _renamed_keys(cls)):
            return f"the key '{key}' has another name now; {renamed[key]}"
        keys = _leaf_keys(cls)
        near = difflib.get_close_matches(key, keys, n=1) or [k for k in keys if k.split(".")[-1] == key.split(".")[-1]]
        hint = f"did you mean '{near[0]}'?" if near else "see --help for the keys there are"
        return f"unknown key '{key}'; {hint}"
    return message


def parse_config(
    cls: type[T],
    argv: Sequence[str] | None,
    *,
    prog: str,
    positionals: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> T:
    """Read a stage's request into its dataclass.

    Parameters
    ----------
    cls : type
        A dataclass with keyword-only, typed fields, each with a docstring under it.
    argv : sequence of str or None
        Arguments; `sys.argv[1:]` where None.
    prog : str
        The command as the user typed it, for help and messages.
    positionals : sequence of str
        What the leading arguments mean, in order: the name of a field, or ``"config"`` for a YAML file.
    aliases : mapping, optional
        Short flags to field names, e.g. ``{"-o": "output"}``.

    Returns
    -------
    object
        An instance of `cls`; values given on the command line win over the YAML file's.

    Raises
    ------
    RequestError
        For an unknown key, a value of the wrong type, a missing key or file, with the key named.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    words = list(sys.argv[1:] if argv is None else argv)
    for short, name in (aliases or {}).items():
        words = [f"--{name}" if word == short else word for word in words]
    lead: list[str] = []
    while words and not words[0].startswith("-") and len(lead) < 2 * len(positionals):
        lead += [f"--{positionals[len(lead) // 2]}", words.pop(0)]
    if words and not words[0].startswith("-"):
        raise RequestError(
            f"{prog}: unexpected argument '{words[0]}'; usage: {prog} {' '.join(p.upper() for p in positionals)}"
        )
    words = lead + words
    usage = " ".join(
        [
            prog,
            *(f"[{p.upper()}.yaml]" if p == "config" else p.upper() for p in positionals),
            "[--key value ...]",
        ]
    )
    parser = ArgumentParser(
        prog=prog,
        usage=usage,
        exit_on_error=False,
        allow_abbrev=False,
        description=one_line((cls.__doc__ or "").split("\n\n")[0]),
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the keys below.")
    parser.add_class_arguments(cls, nested_key=None, sub_configs=False)
    for position, word in enumerate(words):
        if word != "--config" or position + 1 == len(words):
            continue
        words[position + 1] = str(find_config(words[position + 1]))
        if not Path(words[position + 1]).is_file():
            raise RequestError(f"{words[position + 1]}: no such config file")
    try:
        namespace = parser.parse_args(words)
        built = parser.instantiate_classes(namespace)
        request = cls(**{field.name: getattr(built, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]
    except RequestError:
        raise
    except Exception as error:
        # jsonargparse raises its own error, yaml's, TypeError or our ValueError from __post_init__: all are the user's.
        raise RequestError(_explain(error, cls)) from None
    # The same rule in every stage: NumPy takes no others.
    if (seed := getattr(request, "seed", 0)) < 0:
        raise RequestError(f"seed is {seed}; it must not be negative")
    return request


def command(
    config_class: type[T],
    body: Callable[[T], int],
    *,
    prog: str,
    positionals: Sequence[str] = ("config",),
    aliases: Mapping[str, str] | None = None,
) -> Main:
    """Make the ``main(argv) -> exit code`` of a command.

    Parameters
    ----------
    config_class : type
        The request, as for `parse_config`.
    body : callable
        Does the work on an instance of it and returns the exit code; may raise `RequestError` and `StopRequested`.
    prog, positionals, aliases
        As for `parse_config`.

    Returns
    -------
    Main
        The command.
    """

    def run(words: list[str]) -> int:
        # DeepSpeed's launcher adds this flag; the environment says the same.
        words = [word for word in words if not word.startswith("--local_rank=")]
        return body(parse_config(config_class, words, prog=prog, positionals=positionals, aliases=aliases))

    def main(argv: list[str] | None = None) -> int:
        return run_main(run, argv)

    main.__doc__ = f"Run ``{prog}``; returns its exit code."
    return main


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionary of a config dataclass.

    Parameters
    ----------
    config : dataclass instance
        The config.

    Returns
    -------
    dict
        Dictionaries, lists and scalars only; paths become strings.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """YAML text of a config dataclass, in the order of its fields.

    Parameters
    ----------
    config : dataclass instance
        The config.

    Returns
    -------
    str
        What `parse_config` reads back to an equal config.
    """
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)
