"""Parse the units of channels, to find the factor that converts the values of each channel to volts.

Recording software writes the unit microvolt in many ways (``uV``, ``µV`` in several text encodings, ``muV``,
``microvolts``). All readers of this package use this module, so that every spelling of a unit is understood in every
file format.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_sharding.formats.channels import INTRACRANIAL, canonical_name, is_electrode, kind_of

PREFIXES = {"": 1.0, "d": 1e-1, "c": 1e-2, "m": 1e-3, "u": 1e-6, "n": 1e-9, "p": 1e-12, "f": 1e-15, "k": 1e3}
"""Factor of each prefix; upper and lower case mean the same. EEG never has megavolts or petavolts, so MV means
millivolt, and PV means picovolt."""
PREFIXES |= {"deci": 1e-1, "centi": 1e-2, "milli": 1e-3, "micro": 1e-6, "nano": 1e-9, "pico": 1e-12, "femto": 1e-15}
PREFIXES |= {"kilo": 1e3, "mu": 1e-6, "mc": 1e-6, "mic": 1e-6, "mk": 1e-6, "micr": 1e-6}
VOLT = re.compile(
    r"(?P<number>[-+x*^.0-9e ]*?)[ *]?(?P<prefix>[a-z]{0,6}?)[ _-]?(?:volts?|vol|v)"
    r"(?P<more>[ _/-]?\(?(rms|bit|lsb|p-?p|[ad]c)\)?)?(?P<after> ?[*x] ?[-+^.0-9e]+)?",
    re.IGNORECASE,
)
"""Pattern of a unit of voltage. The unit field of EDF has only 8 characters, so the pattern also matches
``microvol``."""
MICRO = re.compile(r"(?:[^\x00-\x7f]|\?)[^\x00-\x7f?]{0,3}(?=[ _-]?v)", re.IGNORECASE)
"""Pattern of non-ASCII characters before the letter V (volt). The micro sign is the only prefix outside ASCII, so
non-ASCII characters that come from a wrong text encoding must be a micro sign."""
CYRILLIC = str.maketrans("мкнвМКНВ", "mknVmknV")
"""Table that replaces the Cyrillic letters of Russian and Bulgarian units by Latin letters."""
OLD_PAGES = {
    text.encode(page).decode("latin-1"): text.translate(CYRILLIC)
    for text in ("мкВ", "мВ", "нВ", "мкв", "мв")
    for page in ("cp1251", "cp866", "koi8-r")
} | {"μV".encode("big5").decode("latin-1"): "uV"}
"""Russian and Chinese units that are stored in an older code page but decoded as Latin-1. The value is the right
unit."""
MARKUP = str.maketrans("", "", "\0\"'\\$&;")
"""Table that removes the characters that some programs write around or inside a unit: ``"uV"``, ``$\\mu$V``,
``&micro;V``."""
NOTHING = ("", "n/a", "na", "none", "-", "unknown", "unspecified", "?", "not available", "code 0", "code 512")
"""Texts (in lower case) that mean that no unit is given. The GDF codes 0 and 512 mean a missing unit."""
OTHER = re.compile(
    r"%|deg.*|.?[°º].*|[cfk]|celsius|fahrenheit|kelvin|[kmg]?(ohms?|Ω)|bpm|(beats|breaths)?[ /]*(per )?(1/)?min|[km]?hz"
    r"|mm ?hg|cm ?h2o|[kmh]?pa|m?bar|psi|ml|[ml]*l(iters?)?/(s|sec|min)|[mun]?m|[mc]?m/s(\^?2|²|ec)?|m?g|rad(/s)?"
    r"|[mun]?s|[mun]?siemens|[kmun]?n|[mupnf]?t|tesla|lux|db.*|[mun]?a|[mun]?w|aru|bool(ean)?|events?|on/off|level|pixels?",
    re.IGNORECASE,
)
"""Pattern of units of other quantities than voltage."""


def decode_unit(data: bytes) -> str:
    """Decode a unit in a header that does not name its text encoding: as UTF-8 if possible, otherwise as Latin-1."""
    try:
        return data.decode("utf-8").strip(" \0")
    except UnicodeDecodeError:
        return data.decode("latin-1").strip(" \0")


def gdf_unit(code: int) -> str:
    """Return the unit for a unit code of GDF 2.

    The lowest five bits of the code are the prefix; the other bits are the code of the unit in ISO 11073.
    """
    if code & 0xFFE0 != 4256:
        return f"code {code}"
    prefixes = {0: "", 3: "k", 16: "d", 17: "c", 18: "m", 19: "u", 20: "n", 21: "p", 22: "f"}
    prefix = prefixes.get(code & 0x1F)
    return f"code {code}" if prefix is None else f"{prefix}V"


def names_no_unit(unit: str) -> bool:
    """Return whether the text of a unit field means that no unit is given."""
    return unit.strip(" \0[]()").lower() in NOTHING


@functools.lru_cache(maxsize=1024)
def to_volts(unit: str) -> float | None:
    """Return the factor that converts values with this unit to volts.

    Parameters
    ----------
    unit : str
        Unit as the file writes it, in any spelling and text encoding.

    Returns
    -------
    float or None
        The factor; None if the text is not a unit of voltage.
    """
    text = unit.removeprefix("\xff\xfe").translate(MARKUP).strip()
    text = OLD_PAGES.get(text, text)
    # Some Unicode characters stand for a whole unit. First replace such a character by the letters of the unit. If the
    # result is not a unit, use the original text, because the replacement can change a damaged micro sign.
    wide = unicodedata.normalize("NFKC", text).translate(CYRILLIC)
    return _to_volts(wide) if _to_volts(wide) is not None else _to_volts(text)


def _to_volts(text: str) -> float | None:
    text = text.strip().rstrip(".").replace("\u00d7", "x")
    text = text[text[:1] in ("(", "[") :].strip()
    if text[-1:] in (")", "]") and not {"(", "["} & set(text):
        text = text[:-1].strip()
    match = VOLT.fullmatch(MICRO.sub("u", text, count=1))
    prefix = PREFIXES.get(match["prefix"].lower()) if match else None
    number = _number(match["number"] or match["after"] or "") if match else None
    twice = match is not None and bool(match["number"].strip() and match["after"])
    return None if prefix is None or number is None or twice else prefix * number


def _number(text: str) -> float | None:
    """Return the number before or after a unit. An empty text means 1; ``10^-6``, ``1e-6`` and ``x10-6`` mean 1e-6."""
    text = text.strip(" x*")
    if not text:
        return 1.0
    if power := re.fullmatch(r"(?:1(?:\.0*)?[x* ]*)?10(?:\^|\*\*)?([-+]\d{1,2})", text):
        return float(f"1e{power[1]}")
    if re.fullmatch(r"10e[-+]?\d+", text, re.IGNORECASE):
        return None  # The text 10e-6 is ambiguous: its value is 1e-5, but some people write it for 1e-6.
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 1e-12 <= number <= 1e3 else None


@dataclass(kw_only=True)
class Units:
    """Factors that convert the values of a recording's channels to volts."""

    ch_types: list[str]
    """Types of the channels. A channel has the type misc if its unit is not a voltage and its name is not an
    electrode."""
    gains: np.ndarray
    """Factors [n] that convert the values of the reader to volts."""
    named: dict[str, float] = field(default_factory=dict)
    """For each channel with a known unit: name of the channel, and factor that converts the unit to volts."""
    assumed: dict[str, float] = field(default_factory=dict)
    """For each channel without a unit: name of the channel, and factor that converts its assumed unit to volts."""
    unknown: dict[str, str] = field(default_factory=dict)
    """For each channel that may be an electrode and has an unknown unit: name of the channel, and unit."""
    notes: list[str] = field(default_factory=list)
    """Notes for the ledger."""

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `SignalInfo` that depend on the units."""
        return {
            "ch_types": self.ch_types,
            "named_units": self.named,
            "assumed_units": self.assumed,
            "unknown_units": self.unknown,
            "notes": self.notes,
        }


def read_units(
    ch_names: Sequence[str], ch_types: Sequence[str], units: Sequence[str], applied: Sequence[float]
) -> Units:
    """Find the factor that converts the values of each channel to volts.

    Parameters
    ----------
    ch_names, ch_types : sequence of str
        Names and types of the channels. Only channels of the type eeg can get another type.
    units : sequence of str
        Unit of each channel as the file writes it.
    applied : sequence of float
        Factor by which the reader has already multiplied the values of each channel.

    Returns
    -------
    Units
        Types, factors and notes. For a channel without a unit, the values of the reader are not changed (factor 1).
    """
    types, gains = list(ch_types), np.ones(len(units))
    electrodes = is_electrode(ch_names)
    named, assumed, unknown, guessed = {}, {}, {}, {}
    for i, (name, unit, done) in enumerate(zip(ch_names, units, applied, strict=True)):
        if names_no_unit(unit):
            assumed[name] = done
            continue
        factor = to_volts(unit)
        if factor is not None:
            named[name] = factor
            gains[i] = 1.0 if np.isclose(factor, done, rtol=1e-9, atol=0) else factor / done
            if unit[:2] == "MV" or unit[:1] in ("?", "\ufffd"):
                guessed[unit] = "millivolts" if unit[:2] == "MV" else "microvolts"
            continue
        gains[i] = 1.0 / done
        if types[i] not in ("eeg", *INTRACRANIAL):
            continue
        other = OTHER.fullmatch(unit.strip(" \0[]()")) or kind_of(canonical_name(name)) is not None
        if electrodes[i] or not other:
            unknown[name] = unit
        else:
            types[i] = "misc"
    notes = [f"unit '{unit}' read as {what}" for unit, what in guessed.items()]
    return Units(ch_types=types, gains=gains, named=named, assumed=assumed, unknown=unknown, notes=notes)
