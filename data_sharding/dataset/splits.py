"""Train, val and test by subject, and by image or concept: a pure function of names, so that new data move nobody."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from data_sharding.common.errors import RequestError

SPLITS = ("train", "val", "test")
TRAIN_OR_VAL = "train+val"
"""What a corpus says of trials that are not its test: a share of them is held out for validation, by hash."""


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Who and what is held out. Subjects never cross splits; in EEG-image corpora, neither do images, or concepts.

    A subject is a subject in every session, and under the same name in every corpus.
    """

    seed: int = 0
    """Changes who falls where."""
    val_fraction: float = 0.1
    """Share of subjects for validation, by hash; not used where subjects are listed below."""
    test_fraction: float = 0.1
    """Share of subjects for the test, by hash; not used where subjects are listed below."""
    val_subjects: list[str] = field(default_factory=list)
    """Subjects for validation by name, as in paths: sub-11 or 11."""
    test_subjects: list[str] = field(default_factory=list)
    """Subjects for the test by name. Where either list is given, everyone else trains."""
    by: Literal["image", "concept"] = "image"
    """What is held out of EEG-image corpora beside subjects: single images, or all images of a concept together, so
    that the test shows what nobody trained on (zero-shot)."""
    image_val_fraction: float = 0.1
    """Share of images (or concepts) for validation, by hash; a split that the corpus brings along goes first."""
    image_test_fraction: float = 0.1
    """Share of images (or concepts) for the test, by hash; a split that the corpus brings along goes first."""

    def __post_init__(self) -> None:
        for a, b in (("val_fraction", "test_fraction"), ("image_val_fraction", "image_test_fraction")):
            x, y = getattr(self, a), getattr(self, b)
            if x < 0 or y < 0 or x + y >= 1:
                raise ValueError(
                    f"split: {a} and {b} must not be negative and must leave a share for train, got {x} and {y}"
                )
        both = {_bare(s) for s in self.val_subjects} & {_bare(s) for s in self.test_subjects}
        if both:
            raise ValueError(
                f"split: {', '.join(sorted(both))} stands in val_subjects and in test_subjects; choose one"
            )

    @property
    def by_subject(self) -> bool:
        """Whether subjects are held out at all."""
        return bool(self.val_subjects or self.test_subjects or self.val_fraction or self.test_fraction)

    def subject(self, subject: str) -> str:
        """Split of a subject.

        Parameters
        ----------
        subject : str
            Its name.

        Returns
        -------
        str
            train, val or test.
        """
        if self.val_subjects or self.test_subjects:
            if _bare(subject) in {_bare(s) for s in self.val_subjects}:
                return "val"
            return "test" if _bare(subject) in {_bare(s) for s in self.test_subjects} else "train"
        return _by_hash(f"{self.seed}/subject/{_bare(subject)}", self.val_fraction, self.test_fraction)

    def image(self, image_id: str, column: str = "", concept: str = "") -> str | None:
        """Split of an image.

        Parameters
        ----------
        image_id : str
            Its name; empty for a trial without an image.
        column : str
            What the corpus says: train, val, test, `TRAIN_OR_VAL`, or nothing.
        concept : str
            What is on it; needed where whole concepts are held out.

        Returns
        -------
        str or None
            train, val or test; None where images are not held out, or there is none.

        Raises
        ------
        RequestError
            If concepts are held out and the corpus names none.
        """
        if column and column != TRAIN_OR_VAL:
            return column
        val, test = self.image_val_fraction, 0.0 if column else self.image_test_fraction
        if not image_id or not (val or test):
            return "train" if column else None
        if self.by == "image":
            return _by_hash(f"{self.seed}/image/{image_id}", val, test)
        if not concept:
            raise RequestError(f"split.by: concept, but image '{image_id}' comes without its concept; use by: image")
        return _by_hash(f"{self.seed}/concept/{concept}", val, test)

    def trial(self, subject: str, image_id: str, column: str = "", concept: str = "") -> str | None:
        """Split of a trial: the cell of its subject's split and its image's split.

        Parameters
        ----------
        subject, image_id : str
            Who saw what.
        column : str
            The split that the corpus brings along, if any.
        concept : str
            What is on the image.

        Returns
        -------
        str or None
            train, val or test; None for a crossed cell (say, a training subject with a test image), which would leak
            one of the two and is left out.

        Raises
        ------
        RequestError
            If concepts are held out and the corpus names none.
        """
        of_image = self.image(image_id, column, concept)
        if not self.by_subject:
            return of_image or "train"
        of_subject = self.subject(subject)
        return of_subject if of_image in (None, of_subject) else None

    def check_subjects(self, subjects: Iterable[str]) -> None:
        """Refuse listed subjects that nobody is, and a split that leaves nobody to train on.

        Parameters
        ----------
        subjects : iterable of str
            Everyone in the corpora.

        Raises
        ------
        RequestError
            Naming the subject, or saying that the train split is empty.
        """
        everyone = set(subjects)
        bare = {_bare(s) for s in everyone}
        for name in (*self.val_subjects, *self.test_subjects):
            if _bare(name) not in bare:
                some = ", ".join(sorted(everyone)[:6])
                raise RequestError(
                    f"split: subject '{name}' is in none of the corpora; there are {some}{' ...' * (len(everyone) > 6)}"
                )
        if everyone and not any(self.subject(s) == "train" for s in everyone):
            raise RequestError(
                f"split: no subject is left for train, all {len(everyone)} are held out; lower val_fraction "
                "and test_fraction, or list val_subjects and test_subjects"
            )


def _bare(subject: str) -> str:
    return subject.removeprefix("sub-")


def _by_hash(text: str, val: float, test: float) -> str:
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "val" if share < val else "test" if share < val + test else "train"
