"""Read the config stored in a run directory, also if an older version wrote it, and compare it with a new config."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from data_sharding.common.config import parse_config, to_dict
from data_sharding.common.errors import RequestError, one_line
from data_sharding.common.plain_yaml import MAX_YAML, parse_yaml
from data_sharding.common.untrusted import read_limited

T = TypeVar("T")


def read_stored_config(
    path: Path, config_class: type, upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Read the config.yaml of a run; an older version of Dreamscale may have written this file.

    Parameters
    ----------
    path : Path
        Path of the file config.yaml.
    config_class : type
        The config's dataclass. The attribute ``RENAMED`` of the dataclass and of its nested dataclasses maps old keys
        to new keys.
    upgrade : callable, optional
        Function that changes an old config in other ways than renaming keys; it is called before keys are renamed.

    Returns
    -------
    dict
        The values of the config; renamed keys have their current names.

    Raises
    ------
    RequestError
        If the file is missing, or if it does not contain a config.
    """
    import yaml

    try:
        values = parse_yaml(read_limited(path, MAX_YAML))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RequestError(f"{path}: cannot be read ({one_line(error)}); choose another output") from None
    if not isinstance(values, dict):
        raise RequestError(f"{path}: does not hold a config; choose another output")
    values = upgrade(values) if upgrade else values
    return plain(_rename(values, config_class))


def load_stored_config(path: Path, config_class: type[T]) -> T:
    """Read the config.yaml of a run as a dataclass instance; an older version of Dreamscale may have written the file.

    Parameters
    ----------
    path : Path
        Path of the file config.yaml.
    config_class : type
        The config's dataclass.

    Returns
    -------
    object
        The config.

    Raises
    ------
    RequestError
        If the file is missing, or if its content is not a config of the class.
    """
    import yaml

    values = read_stored_config(path, config_class)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        try:
            return parse_config(config_class, [str(file)], prog="dreamscale", positionals=("config",))
        except RequestError as error:
            raise RequestError(f"{path}: cannot be read as the config of this kind of run ({error})") from None


def _rename(values: dict[str, Any], config_class: type) -> dict[str, Any]:
    """Return a copy of a stored config in which old keys have their new names."""
    import typing

    values = dict(values)
    for old, new in getattr(config_class, "RENAMED", {}).items():
        # RENAMED maps an old key to its new key, or to a sentence if there is no new key; in this case, the old key
        # stays as it is. If a new key contains dots, the parts before the last dot name nested configs.
        if old in values and " " not in new:
            *parts, name = new.split(".")
            place = values
            for part in parts:
                place[part] = dict(place.get(part) or {})
                place = place[part]
            place.setdefault(name, values.pop(old))
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]) and isinstance(values.get(field.name), dict):
            values[field.name] = _rename(values[field.name], hints[field.name])
    return values


def changed_keys(stored: dict[str, Any], config: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Compare a stored config with a new config.

    Parameters
    ----------
    stored : dict
        The stored values. A key that is missing here did not exist yet when the run began, so the key's default value
        counts as its old value.
    config : dataclass instance
        The new config.
    prefix : str
        If `config` is a nested config, its dotted name with a dot at the end; it is put in front of the returned keys.

    Returns
    -------
    list of tuple
        Dotted key, old value and new value for each key that differs, in the order of the config's fields.
    """
    changed = []
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value) and isinstance(stored.get(field.name), dict):
            changed += changed_keys(stored[field.name], value, f"{key}.")
            continue
        if field.name in stored:
            before = stored[field.name]
        elif field.default is not dataclasses.MISSING:
            before = plain(_value(field.default))
        elif field.default_factory is not dataclasses.MISSING:
            before = plain(_value(field.default_factory()))
        else:
            continue
        now = plain(_value(value))
        if before != now:
            changed.append((key, before, now))
    return changed


def _value(value: Any) -> Any:
    """Return a config value as plain data; a dataclass becomes a dictionary."""
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def plain(value: Any) -> Any:
    """Convert a value to the types that JSON can store; NaN and infinities become strings."""
    return json.loads(json.dumps(value, default=str), parse_constant=str)


def show(value: Any) -> str:
    """Return a short text of a config value, for use in a message."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
