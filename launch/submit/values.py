"""Check the values that are written into a job file, so that no value can add a line or an option to the job file."""

from __future__ import annotations

import re

from data_sharding.common.errors import show

_PLAIN = r"\w./:@%+=,~\[\]"


def check_printable(key: str, value: str) -> None:
    """Refuse a value with a line break or another control character, because it could add a line to the job file.

    Raises
    ------
    ValueError
        If the value has a line break or another control character.
    """
    if not value.isprintable():
        raise ValueError(f"{key} '{show(value)}': use no line breaks and no other control characters in this value")


def check_plain(key: str, value: str, more: str = "") -> None:
    """Refuse a value that needs quotes.

    Slurm reads its options from comments of the job file. Values cannot be quoted there, and a blank or '#' would end
    the value.

    Parameters
    ----------
    key, value : str
        Key of the config, and its value.
    more : str
        Further characters that the value may contain.

    Raises
    ------
    ValueError
        If the value has a character that is not allowed.
    """
    allowed = _PLAIN + re.escape(more)
    if not re.fullmatch(rf"([{allowed}][{allowed}-]*)?", value):
        listed = " ".join((". / : @ % + = , ~ [ ] _ -", *more))
        raise ValueError(
            f"{key} '{show(value)}': use only letters, digits and {listed} in this value, and no - at its beginning"
        )
