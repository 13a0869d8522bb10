"""Explain the fault of a config in one line that names the key and the fix.

jsonargparse checks every config, but its messages use internal terms ("Union subtypes"). When jsonargparse refuses a
config, the functions of this module search the user's values for the fault and explain the fault.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from data_sharding.common.errors import RequestError, one_line
from data_sharding.common.plain_yaml import MAX_YAML, parse_yaml
from data_sharding.common.untrusted import read_limited


def field_types(cls: type) -> dict[str, Any]:
    """Return the type of each dataclass field that a config may set."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def list_keys(cls: type, prefix: str = "") -> list[str]:
    """Return the dotted names of all keys of a config class, including those of nested groups."""
    keys = []
    for name, hint in field_types(cls).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += list_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
    return keys


def renamed_keys(cls: type, prefix: str = "") -> dict[str, str]:
    """Return the keys that were renamed or removed in a config class, each with its replacement.

    A config class lists its old keys in ``RENAMED: ClassVar[dict[str, str]]``. The value for an old key in ``RENAMED``
    is the new key, or a sentence that tells the user what to write. The keys in ``RENAMED`` are written without the
    names of the groups above them.
    """
    found = {}
    for old, new in getattr(cls, "RENAMED", {}).items():
        found[prefix + old] = new if " " in new else f"use '{prefix}{new}'"
    for name, hint in field_types(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= renamed_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


def unknown_key(key: str, cls: type, prefix: str = "") -> str:
    """Explain that a config class does not have a key; `prefix` is the path of the class, such as ``preprocess.``."""
    if prefix + key in (renamed := renamed_keys(cls, prefix)):
        return f"the key '{prefix}{key}' was renamed; {renamed[prefix + key]}"
    keys = list_keys(cls)
    near = difflib.get_close_matches(key, keys, n=1) or [k for k in keys if k.split(".")[-1] == key.split(".")[-1]]
    hint = f"did you mean '{prefix}{near[0]}'?" if near else "see --help for the valid keys"
    return f"unknown key '{prefix}{key}'; {hint}"


def read_config_file(path: Path) -> tuple[dict[str, Any], str | None]:
    """Read a YAML file of a config.

    Returns
    -------
    values : dict
        Keys and values of the file; empty if the file has a fault.
    fault : str or None
        Why the file cannot be used, in one line; None if the file can be used.
    """
    try:
        values = parse_yaml(read_limited(path, MAX_YAML))
    except OSError as error:
        return {}, f"{path}: cannot be read ({error.strerror})"
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        return {}, f"{path}{line}: not valid YAML ({one_line(error.problem)}); check brackets, colons and indentation"
    except RequestError as error:
        return {}, str(error)
    except (yaml.YAMLError, UnicodeError):
        return {}, f"{path}: not a YAML file; give the text file with the keys of this command"
    except ValueError as error:
        return {}, f"{path}: cannot be used ({error}); write the values without YAML aliases (*name)"
    if values is None:
        return {}, f"{path}: the file is empty; write the keys of this command into it (see --help)"
    if not isinstance(values, dict):
        return {}, f"{path}: must consist of lines such as 'key: value', not {_show(values)}"
    return values, None


def find_fault(cls: type, values: Any, where: str = "", *, is_entry: bool = False) -> str | None:
    """Find the first fault in the user's values for a config class.

    Parameters
    ----------
    cls : type
        Class of the whole config, of a group of keys, or of a list entry.
    values : Any
        Values that the user wrote for the keys of this class.
    where : str
        Position of the values in the config: empty at the top level, otherwise for example ``preprocess`` or
        ``corpora[0] (kind folder)``.
    is_entry : bool
        Whether the values are an entry of a list.

    Returns
    -------
    str or None
        The fault, in one line; None if there is no fault.
    """
    known = field_types(cls)
    if not isinstance(values, Mapping):
        if is_entry:
            return f"{where} must be keys with values, such as '{_example(cls)}: ...', not {_show(values)}"
        return f"{where} must be a group of keys ({', '.join(known)}), not {_show(values)}"
    # A message begins with "preprocess.sfreq" for a key of a group, and with "corpora[0] (kind folder): root" for a key
    # of a list entry.
    start, path = (f"{where}: ", "") if is_entry else ("", f"{where}." if where else "")
    for key, value in values.items():
        if key not in known:
            return start + unknown_key(str(key), cls, path)
        # A key without a value in the YAML file ("key:") is not a fault: the key gets its default value.
        if value is not None and (fault := _value_fault(known[key], value, path + key)):
            return start + fault
    if not where:
        return None  # At the top level, a key that is missing in the file may be given on the command line.
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and values.get(field.name) is None:
            return f"{start}missing key '{path}{field.name}'; add it"
    if is_entry:
        # The dataclass of a list entry checks the values in its `__post_init__`, whose message does not say which entry
        # is wrong. So put the position of the entry in the list before the message.
        try:
            cls(**values)
        except ValueError as error:
            return start + one_line(error)
        except TypeError:
            pass
    return None


def _value_fault(hint: Any, value: Any, key: str) -> str | None:
    if dataclasses.is_dataclass(hint):
        return find_fault(hint, value, key)  # type: ignore[arg-type]
    entry = get_args(hint)[0] if get_origin(hint) is list else None
    if entry is not None and dataclasses.is_dataclass(entry):
        if not isinstance(value, list):
            return f"{key} must be a list, not {_show(value)}; write each entry with a dash: '- {_example(entry)}: ...'"
        for number, one in enumerate(value):
            place = _name_of_entry(entry, one, f"{key}[{number}]")
            if fault := find_fault(entry, one, place, is_entry=True):  # type: ignore[arg-type]
                return fault
        return None
    if isinstance(value, list) and get_origin(hint) is list:
        parts = [(f"{key}[{number}]", get_args(hint)[0], one) for number, one in enumerate(value)]
        return next((fault for name, type_, one in parts if (fault := _value_fault(type_, one, name))), None)
    if isinstance(value, Mapping) and get_origin(hint) in (dict, Mapping):
        parts = [(f"{key}['{name}']", get_args(hint)[1], one) for name, one in value.items()]
        return next((fault for name, type_, one in parts if (fault := _value_fault(type_, one, name))), None)
    if not _fits(hint, value):
        is_scalar = not isinstance(value, list | dict)
        more = f"; write [{json.dumps(value)}]" if get_origin(hint) is list and is_scalar else ""
        more = "; put it into quotes" if hint is str and isinstance(value, int | float) else more
        return f"{key} must be {describe_type(hint)}, not {_show(value)}{more}"
    return None


def _example(cls: Any) -> str:
    """Return a key for an example in a message: the first required key, or the first key if no key is required."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    return next((field.name for field in fields if field.default is field.default_factory), fields[0].name)


def _name_of_entry(cls: Any, values: Any, place: str) -> str:
    """Name an entry of a list by its index and its kind, so that the user finds the entry in the file."""
    if not isinstance(values, Mapping) or "kind" not in field_types(cls):
        return place
    return f"{place} (kind {values.get('kind') or getattr(cls, 'kind', '')})"


def _fits(hint: Any, value: Any) -> bool:
    """Return whether a YAML value fits a type; True for a type that this function does not know."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(one, value) for one in arguments)
    if hint is types.NoneType:
        return value is None
    if origin is Literal:
        return value in arguments
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False
        return origin is tuple or all(_fits(arguments[0], one) for one in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(arguments[1], one) for one in value.values())
    if hint is bool:
        return isinstance(value, bool) or str(value).lower() in ("true", "false", "yes", "no")
    if hint in (int, float):
        try:
            number = float(value)
            return not isinstance(value, bool) and (hint is float or number.is_integer())
        except (TypeError, ValueError):
            return False
    return isinstance(value, str) if hint is str else True


def describe_type(hint: Any) -> str:
    """Describe the values that a type accepts, for error messages."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        words = [describe_type(one) for one in arguments if one is not types.NoneType]
        return " or ".join([*words, *(["empty"] if types.NoneType in arguments else [])])
    if origin is Literal:
        return f"one of {', '.join(repr(one) if one == '' else str(one) for one in arguments)}"
    if origin in (list, tuple):
        return f"a list of {_plural(arguments[0])}" if arguments else "a list"
    if origin in (dict, Mapping):
        return f"keys with {_plural(arguments[1])} as values"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "another value")


def _plural(hint: Any) -> str:
    return {str: "texts", int: "whole numbers", float: "numbers"}.get(hint, "values")


def _show(value: Any) -> str:
    if value is None:
        return "empty"
    text = "a list" if isinstance(value, list) else "keys with values" if isinstance(value, dict) else repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def find_fault_in_words(cls: type, words: Sequence[str]) -> str | None:
    """Find the first fault in the command-line arguments that set keys: ``--key value`` and ``--key=value``."""
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--"):
            continue
        key, equals, text = word[2:].partition("=")
        if not equals:
            if position == len(words) or words[position].startswith("--"):
                return f"the key '{key}' has no value; write --{key} VALUE" if key in list_keys(cls) else None
            text = words[position]
            position += 1
        if key in ("config", "help") or key.endswith("+"):
            continue
        hint: Any = cls
        for part in key.split("."):
            hints = field_types(hint) if dataclasses.is_dataclass(hint) else {}  # type: ignore[arg-type]
            if part not in hints:
                return unknown_key(key, cls)
            hint = hints[part]
        try:
            value = parse_yaml(text)
        except (yaml.YAMLError, ValueError):
            continue
        # Arguments are text, so an argument is valid if the text fits the type, or if the value that YAML reads from
        # the text fits the type.
        fits = value is None or hint is str or _fits(hint, text)
        if not fits and (fault := _value_fault(hint, value, key)):
            return fault
    return None


def missing_keys(cls: type, message: str, aliases: Mapping[str, str]) -> str | None:
    """Explain a message of jsonargparse that lists missing keys; return None for any other message."""
    match = re.search(r"following arguments are required: (.+)", message)
    if not match:
        return None
    names = [name.strip().removeprefix("--") for name in match.group(1).split(",")]
    known = field_types(cls)
    flags = {name: short for short, name in aliases.items()}
    lines = []
    for name in names:
        hint = known.get(name)
        on_line = f", or give --{name}" + (f" (short: {flags[name]})" if name in flags else "")
        lines.append(f"'{name}'; write it into the config file{'' if get_origin(hint) is list else on_line}")
    return f"missing {'keys' if len(names) > 1 else 'key'} {'; '.join(lines)}"


def explain(
    error: Exception, cls: type, files: Sequence[Path], words: Sequence[str], aliases: Mapping[str, str]
) -> str:
    """Explain in one line why a config was refused.

    Parameters
    ----------
    error : Exception
        Error that jsonargparse or the config class raised.
    cls : type
        The config class.
    files : sequence of Path
        The config files.
    words : sequence of str
        The arguments of the command line.
    aliases : mapping of str to str
        Key for each short flag.
    """
    for path in files:
        values, fault = read_config_file(path)
        if fault := fault or find_fault(cls, values):
            return fault
    if fault := find_fault_in_words(cls, words):
        return fault
    message = one_line(error)
    return missing_keys(cls, message, aliases) or message
