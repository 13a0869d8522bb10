"""One row of the doctor's table."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from data_sharding.common.errors import one_line, show

State = Literal["ok", "note", "fails"]
"""A part works; or it works, but a user should know something; or it does not work."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the table that the doctor prints."""

    what: str
    state: State
    found: str
    advice: str = ""
    """Advice for the user; empty if the user does not have to do anything."""


def run_checks(checks: Iterable[tuple[str, Callable[[], Finding | list[Finding]]]]) -> list[Finding]:
    """Run checks, and return their findings in the same order.

    Parameters
    ----------
    checks : iterable of (str, callable)
        What a check examines, and the check. If a check raises an error, its finding is this error.

    Returns
    -------
    list of Finding
        The findings.
    """
    findings: list[Finding] = []
    for what, check in checks:
        try:
            found = check()
        except Exception as error:
            # A library can raise any error, and the other checks must still run.
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {show(one_line(error), 300)} ({where.filename}:{where.lineno})"
            found = Finding(what=what, state="fails", found=text, advice="install the package of this file again")
        findings += found if isinstance(found, list) else [found]
    return findings
