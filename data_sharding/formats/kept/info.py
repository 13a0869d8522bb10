"""Writes a `SignalInfo` as JSON, and reads and checks it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from data_sharding.common.untrusted import MAX_TEXT, check_count, check_group, check_list, check_number, check_text
from data_sharding.formats.signal import About, Segment, SignalInfo

MOST = 2**50
"""A number of samples above this limit is refused when the metadata are read."""


def info_to_json(info: SignalInfo) -> dict[str, Any]:
    """Return all fields of the metadata as JSON types.

    The function `info_from_json` restores every number exactly, also NaN and infinity.
    """
    return _plain(dataclasses.asdict(info))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    return value


def info_from_json(values: Any, where: str) -> SignalInfo:
    """Check the metadata that `info_to_json` has written, and return them.

    Parameters
    ----------
    values : Any
        Parsed JSON.
    where : str
        Path of the file, for error messages.

    Returns
    -------
    SignalInfo
        The metadata.

    Raises
    ------
    RequestError
        If a field is missing, or has a value of the wrong type.
    ValueError
        If the fields contradict each other.
    """
    values = check_group(values, where)
    names = {field.name for field in dataclasses.fields(SignalInfo)}
    if set(values) != names:
        raise ValueError(f"the fields are not exactly {', '.join(sorted(names))}")

    def number(value: Any, what: str) -> float:
        if isinstance(value, dict):
            if value not in ({"float": "nan"}, {"float": "inf"}, {"float": "-inf"}):
                raise ValueError(f"{what} is not a number")
            return float(value["float"])
        return check_number(value, where, what)

    def texts(name: str) -> list[str]:
        return [check_text(v, where, name, most=MAX_TEXT) for v in check_list(values[name], where, name)]

    def numbers(name: str) -> dict[str, float]:
        return {key: number(v, name) for key, v in check_group(values[name], where, name).items()}

    def named(name: str) -> dict[str, str]:
        return {
            key: check_text(v, where, name, most=MAX_TEXT) for key, v in check_group(values[name], where, name).items()
        }

    def flag(name: str) -> bool:
        if not isinstance(values[name], bool):
            raise ValueError(f"{name} is neither true nor false")
        return values[name]

    def place(value: Any) -> list[float] | None:
        return None if value is None else [number(v, "positions") for v in check_list(value, where, "positions")]

    def spans(name: str) -> list[tuple[float, float, str]]:
        out = []
        for value in check_list(values[name], where, name):
            start, stop, text = check_list(value, where, name)
            out.append((number(start, name), number(stop, name), check_text(text, where, name, most=MAX_TEXT)))
        return out

    names_, total = texts("ch_names"), check_count(values["n_samples"], where, "n_samples", most=MOST)
    types, positions = texts("ch_types"), [place(v) for v in check_list(values["positions"], where, "positions")]
    if not len(names_) == len(types) == len(positions):
        raise ValueError("the lists of channel names, types and positions have different lengths")
    segments, end = [], 0
    for entry in check_list(values["segments"], where, "segments"):
        segment = check_group(entry, where, "segments")
        start = check_count(segment.get("start"), where, "segments", least=end, most=total)
        end = check_count(segment.get("stop"), where, "segments", least=start, most=total)
        segments.append(Segment(start=start, stop=end, onset=number(segment.get("onset"), "segments")))
    about = check_group(values["about"], where, "about")
    age, year = about.get("age"), about.get("year")
    return SignalInfo(
        ch_names=names_,
        ch_types=types,
        positions=positions,
        sfreq=number(values["sfreq"], "sfreq"),
        n_samples=total,
        segments=segments,
        line_freq=None if values["line_freq"] is None else number(values["line_freq"], "line_freq"),
        unit_known=flag("unit_known"),
        scale=number(values["scale"], "scale"),
        reference=check_text(values["reference"], where, "reference"),
        bads=texts("bads"),
        named_units=numbers("named_units"),
        assumed_units=numbers("assumed_units"),
        unknown_units=named("unknown_units"),
        bad_spans=spans("bad_spans"),
        bad_channel_spans=spans("bad_channel_spans"),
        epoched=flag("epoched"),
        intracranial=flag("intracranial"),
        tmin=number(values["tmin"], "tmin"),
        left_out=named("left_out"),
        about=About(
            age=None if age is None else number(age, "age"),
            sex=check_text(about.get("sex"), where, "sex"),
            year=None if year is None else check_count(year, where, "year", most=9999),
            device=check_text(about.get("device"), where, "device", most=MAX_TEXT),
            filters=check_text(about.get("filters"), where, "filters", most=MAX_TEXT),
        ),
        notes=texts("notes"),
    )
