"""Why a recording is not used."""

from __future__ import annotations

from typing import Self


class Reason(str):
    """A sentence for the ledger, and the category by which such sentences are counted.

    It is a `str`, so that it can be printed, compared and stored like any other text. It is always one line of
    printable characters, whatever a damaged file has put into the error message that it repeats.

    Parameters
    ----------
    category : str
        What kind of fault this is, without anything that belongs to one recording: ``too short``.
    detail : str
        What belongs to this recording: ``0.45 s, a window has 4.00 s``.
    text : str
        The whole sentence. Empty: category and detail with a colon between them.
    """

    category: str

    def __new__(cls, category: str, detail: str = "", *, text: str = "") -> Self:
        """Build the sentence."""
        text = text or (f"{category}: {detail}" if detail else category)
        self = super().__new__(cls, "".join(c if c.isprintable() else "?" for c in " ".join(text.split())))
        self.category = category
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, str]]:
        # Copying and pickling rebuild the object with these arguments.
        return (self.category,), {"text": str(self)}

    def shortened(self, length: int) -> Reason:
        """Return the same reason with at most `length` characters."""
        return Reason(self.category, text=self[:length])
