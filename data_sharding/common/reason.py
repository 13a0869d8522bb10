"""The class `Reason`: the reason why a recording is not used."""

from __future__ import annotations

from typing import Self


class Reason(str):
    """Reason why a recording is not used: a sentence for the ledger (table of recordings), and a category to count.

    A reason is a `str`, so it can be printed, compared and stored like any other text. Error messages can contain bytes
    of a damaged file, so unprintable characters are replaced by '?', and the reason is always one line.

    Parameters
    ----------
    category : str
        Kind of fault, without details of the recording; for example ``too short``.
    detail : str
        Details of this recording; for example ``0.45 s, a window has 4.00 s``.
    text : str
        The whole sentence. If the text is empty, the sentence is ``category: detail``.
    """

    category: str

    def __new__(cls, category: str, detail: str = "", *, text: str = "") -> Self:
        """Build the sentence."""
        text = text or (f"{category}: {detail}" if detail else category)
        self = super().__new__(cls, "".join(c if c.isprintable() else "?" for c in " ".join(text.split())))
        self.category = category
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, str]]:
        # `copy` and `pickle` make a new `Reason` from these arguments.
        return (self.category,), {"text": str(self)}

    def shortened(self, length: int) -> Reason:
        """Return the same reason with at most `length` characters."""
        return Reason(self.category, text=self[:length])
