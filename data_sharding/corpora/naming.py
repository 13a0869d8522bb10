"""Finds the subject in the path of a recording by common file naming schemes.

The subject's name depends only on the path of the recording itself, not on other recordings. So the name and the split
of the subject do not change when other recordings are added to the corpus or removed from the corpus.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEFT, RIGHT = "(?<![A-Za-z0-9])", "(?![A-Za-z0-9])"
"""Patterns for the left and right border of a name: no letter and no digit may be next to the name. These patterns are
look-arounds, so they match no characters themselves."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A naming scheme for subjects in paths."""

    name: str
    """Name of the scheme for messages, with an example."""
    body: str
    """Regular expression that matches only the name of the subject. Look-arounds in the expression
    check the text around the name."""
    note: str = ""
    """Hint for users whose paths follow this scheme."""

    @property
    def pattern(self) -> str:
        """The regular expression of this scheme, in the form that the key 'subject_pattern' needs."""
        return f"(?P<subject>{self.body})"


BIDS = Scheme(name="BIDS, as in sub-01", body=r"(?:(?<=^)|(?<=[/_]))sub-[A-Za-z0-9]+")
_WORDS = "subject|subj|sub|participant|patient|pat|proband|versuchsperson|volunteer|vpn|vp|ppt|ptp|ppn|pp|person"
_ANY_CASE = "(?i:{})".format
_NUMBER = r"(?:\d{1,3}|0\d{3,4})"
"""Pattern of a number with at most three digits or with a leading zero, so that years and dates do not match."""
_END = f"(?=(?:[a-d]|EO|EC|eo|ec)?{RIGHT})"
"""Pattern for the text after a number: optionally a letter (for a part), or a short word for open or closed eyes."""
TIERS: tuple[tuple[Scheme, ...], ...] = (
    (
        Scheme(name="PhysioNet, as in S001R04", body=rf"{LEFT}S\d{{2,3}}(?=R\d{{1,2}}{RIGHT})"),
        Scheme(name="Sleep-EDF, as in SC4001E0", body=rf"{LEFT}(?:SC4|ST7)\d{{2}}(?=\d[A-Z][A-Z0-9]{RIGHT})"),
        Scheme(
            name="CHB-MIT, as in chb01_03",
            body=rf"{LEFT}chb\d{{2}}(?=[a-z]?_\d{{2}})",
            note="chb21 is a later recording of the person chb01; give both the same name in a table (key 'subjects')",
        ),
        Scheme(name="TUH, as in aaaaaaac_s001_t000", body=rf"{LEFT}[a-z]{{8}}(?=_s\d{{3}}_t\d{{3}})"),
        Scheme(name="BCI Competition IV, as in A01T", body=rf"{LEFT}(?:A0\d(?=[TE]{RIGHT})|B0\d(?=0\d[TE]{RIGHT}))"),
        Scheme(name="NDAR, as in NDARAB123CDE", body=rf"{LEFT}NDAR[A-Z]{{2}}[A-Z0-9]{{6}}{RIGHT}"),
    ),
    (
        Scheme(
            name="a word and a number, as in subject_7",
            body=rf"{LEFT}{_ANY_CASE(_WORDS)}[-_ ]?{_NUMBER}{_END}|(?:(?<=^)|(?<=/))pt[-_]?{_NUMBER}{_END}",
        ),
        Scheme(
            name="a word and an identifier, as in patient_AB12",
            body=rf"{LEFT}{_ANY_CASE('subject|participant|patient|proband')}[-_]"
            rf"(?:[A-Z]{{1,3}}|(?=[A-Za-z]*\d)(?!\d{{4}}{RIGHT}|\d{{6,8}}{RIGHT})[A-Za-z0-9]{{2,12}}){RIGHT}",
        ),
    ),
    (
        Scheme(
            name="an identifier, as in A00054488",
            body=rf"{LEFT}(?:[A-Z]{{1,4}}|ID[-_]?)(?!(?:19|20)\d{{2}}(?:0\d|1[0-2])(?:[0-2]\d|3[01]){RIGHT})"
            rf"(?!\d\d(?:0\d|1[0-2])(?:[0-2]\d|3[01]){RIGHT})\d{{5,9}}{RIGHT}",
        ),
    ),
    (
        Scheme(
            name="a letter and a number, as in S01",
            body=rf"{LEFT}(?!P[1236]00{RIGHT})(?:[SsPp]|[Hh](?=\d\d)){_NUMBER}{_END}",
        ),
    ),
)
"""Naming schemes in groups (tiers). A path is searched with the schemes of the first, most reliable tier; if they find
nothing, with the schemes of the next tier, and so on."""
_TIER_PATTERNS = [re.compile("|".join(f"({scheme.body})" for scheme in tier)) for tier in TIERS]
SCHEMES = (BIDS, *(scheme for tier in TIERS for scheme in tier))


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """Subject that was found in the path of a recording."""

    subject: str = ""
    """Name of the subject; empty if the path names no subject, or several subjects."""
    scheme: Scheme | None = None
    """Naming scheme of the name; None if no scheme matches the path."""
    candidates: tuple[str, ...] = ()
    """All names in the path, if the path contains several different names and `subject` is therefore empty."""


def alike(name: str) -> str:
    """Return a normalised form of a subject's name. For example, S1, S01, s01 and sub-01 have the same form."""
    bare = re.sub(r"^sub-", "", name, flags=re.IGNORECASE)
    return re.sub(r"[-_ ]|(?<!\d)0+(?=\d)", "", bare).casefold()


@functools.lru_cache(maxsize=200_000)
def recognise(path: str) -> Recognised:
    """Find the subject in the path of a recording.

    Parameters
    ----------
    path : str
        Path of the recording, relative to the root of its corpus.

    Returns
    -------
    Recognised
        The subject and the naming scheme that found it. If a path contains two different names that are equally likely,
        such as ``s13_S07.set``, the subject is empty, because one of the two names may be the session.
    """
    stem = re.sub(r"\.[A-Za-z0-9]{1,6}$", "", path)
    if not re.search(r"\d|subject|participant|patient|proband", stem, re.IGNORECASE):
        return Recognised()
    for tier, pattern in zip(TIERS, _TIER_PATTERNS, strict=True):
        names: dict[str, tuple[str, Scheme]] = {}
        for match in pattern.finditer(stem):
            names.setdefault(alike(match.group()), (match.group(), tier[(match.lastindex or 1) - 1]))
        if not names:
            continue
        (name, scheme), *others = names.values()
        if others:
            return Recognised(scheme=scheme, candidates=(name, *(other for other, _ in others)))
        return Recognised(subject=name, scheme=scheme)
    return Recognised()


def confirming_pattern(schemes: Iterable[Scheme], subjects: dict[str, str]) -> str | None:
    """Make a regular expression for the key 'subject_pattern' that finds the same subjects as the naming schemes.

    Parameters
    ----------
    schemes : iterable of Scheme
        Naming schemes that were recognised in the paths.
    subjects : dict of str to str
        The recognised subject of each path.

    Returns
    -------
    str or None
        The regular expression; None if it would not find exactly the recognised subject in every path.
    """
    chosen = [scheme for scheme in SCHEMES if scheme in set(schemes)]
    pattern = f"(?P<subject>{'|'.join(scheme.body for scheme in chosen)})"
    for path, subject in subjects.items():
        match = re.search(pattern, path)
        if match is None or match.group("subject") != subject:
            return None
    return pattern


def find_look_alikes(subjects: Iterable[str]) -> list[Sequence[str]]:
    """Find groups of names that differ only in letter case, leading zeros and separators, such as S1, S01 and s01."""
    groups: dict[str, set[str]] = {}
    for name in subjects:
        groups.setdefault(alike(name), set()).add(name)
    return [sorted(names) for _, names in sorted(groups.items()) if len(names) > 1]
