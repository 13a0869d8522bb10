"""Check that values from a file have the types of a dataclass's fields, before the dataclass is made."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin

from data_sharding.common.errors import RequestError, show
from data_sharding.common.untrusted import MAX_TEXT, check_count, check_group, check_list, check_number, check_text

MAX_INTEGER = 2**63
"""Largest whole number that a field may have; a Parquet column of 64 bits has the same limit."""


def check_fields(kind: type, values: Any, where: str, *, least: float = -MAX_INTEGER) -> dict[str, Any]:
    """Check that values from a file have the types of a dataclass's fields.

    Parameters
    ----------
    kind : type
        The dataclass. A field may be a number, a text, a bool, a ``Literal``, a union, another dataclass, or a list,
        tuple or dictionary of these types.
    values : Any
        Dictionary from the name of each field to its value. Fields with a default value may be missing.
    where : str
        Where the values come from, for the error message: the path of the file, and the place in the file (such as the
        row).
    least : int
        Smallest value that a number may have.

    Returns
    -------
    dict
        The values; a list becomes a tuple if the field is a tuple.

    Raises
    ------
    RequestError
        If `values` has an unknown key or lacks a field, or if a value has another type than its field.
    """
    hints = _hints(kind)
    check_group(values, where)
    if unknown := values.keys() - hints.keys():
        raise RequestError(f"{where}: the key '{show(min(unknown, key=str))}' is unknown to this version of Dreamscale")
    needed = [f.name for f in dataclasses.fields(kind) if _is_needed(f) and f.name not in values]
    if needed:
        raise RequestError(f"{where}: the key '{needed[0]}' is missing; get the file again from its source")
    return {name: check_typed(hints[name], value, where, name, least=least) for name, value in values.items()}


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@lru_cache
def _hints(kind: type) -> Mapping[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def check_typed(hint: Any, value: Any, where: str, what: str, *, least: float = -MAX_INTEGER) -> Any:
    """Check that a value has the type `hint`. `where` (the file) and `what` (the value's name) are for messages.

    Returns
    -------
    Any
        The value; a list becomes a tuple if the type is a tuple.

    Raises
    ------
    RequestError
        If the value has another type. The message names the file and the value.
    """
    # Check the most frequent types first and fast, because a ledger may have millions of values.
    if type(value) is hint and (
        len(value) <= MAX_TEXT if hint is str else hint in (int, float) and least <= value < MAX_INTEGER
    ):
        return value
    origin, parts = _origin(hint)
    if origin is list and type(value) is list and parts[0] is str and {*map(type, value)} <= {str}:
        for text in value:
            check_text(text, where, what, most=MAX_TEXT)
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in parts:
            return None
        return _check_union([part for part in parts if part is not types.NoneType], value, where, what, least)
    if origin is Literal:
        if value not in parts or type(value) not in {type(part) for part in parts}:
            raise RequestError(f"{where}: {what} is '{show(value)}', not one of {', '.join(map(str, parts))}")
        return value
    if origin is dict:
        for name, one in check_group(value, where, what).items():
            check_typed(parts[1], one, where, f"{what}.{show(name)}", least=least)
        return value
    if origin in (list, tuple):
        checked = [
            check_typed(parts[0], one, where, f"an entry of {what}", least=least) for one in _list(value, where, what)
        ]
        if origin is tuple and Ellipsis not in parts and len(checked) != len(parts):
            raise RequestError(f"{where}: {what} must have {len(parts)} entries, not {len(checked)}")
        return tuple(checked) if origin is tuple else checked
    if dataclasses.is_dataclass(hint):
        return value if type(value) is hint else check_fields(typing.cast(type, hint), value, f"{where}, {what}")
    if hint is bool:
        if not isinstance(value, bool):
            raise RequestError(f"{where}: {what} is '{show(value)}', not true or false")
        return value
    if hint is int:
        return check_count(value, where, what, least=int(least), most=MAX_INTEGER)
    if hint is float:
        if check_number(value, where, what) < least:
            raise RequestError(f"{where}: {what} is {show(value)}, which is below {least}")
        return value
    if hint is str:
        return check_text(value, where, what, most=MAX_TEXT)
    raise TypeError(f"{what}: this function cannot check values of the type {hint}")


def _check_union(parts: list[Any], value: Any, where: str, what: str, least: float) -> Any:
    """Check that a value has one of several types. If all checks fail, the error of the last type is raised."""
    for part in parts[:-1]:
        with contextlib.suppress(RequestError):
            return check_typed(part, value, where, what, least=least)
    return check_typed(parts[-1], value, where, what, least=least)


@lru_cache(maxsize=256)
def _origin(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(hint), get_args(hint)


def _list(value: Any, where: str, what: str) -> list[Any]:
    return list(value) if isinstance(value, tuple) else check_list(value, where, what)
