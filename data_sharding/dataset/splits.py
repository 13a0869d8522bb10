"""Assignment of subjects, images and concepts to the splits train, val and test.

A split that is chosen by hash depends only on the config and on the name of the subject, image or concept. So the split
does not change when new data are added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from data_sharding.common.errors import RequestError

SPLITS = ("train", "val", "test")
TRAIN_OR_VAL = "train+val"
"""Name for the split of trials that are not in the test set of their corpus. A hash of the image's or concept's name
decides whether such a trial is in train or val."""


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Subjects, images and concepts to hold out for val and test. A held-out subject or image is never in two splits.

    All sessions of a subject are in the same split. If subjects in two corpora have the same name, they count as one
    subject.
    """

    seed: int = 0
    """Seed for the random assignment of subjects and images to splits (by hash)."""
    val_fraction: float = 0.1
    """Fraction of the subjects to put into the split val, chosen by hash; ignored if val_subjects or test_subjects is
    given."""
    test_fraction: float = 0.1
    """Fraction of the subjects to put into the split test, chosen by hash; ignored if val_subjects or test_subjects is
    given."""
    val_subjects: list[str] = field(default_factory=list)
    """Names of the subjects in the split val, with or without the prefix that the names have in paths: sub-11 or 11."""
    test_subjects: list[str] = field(default_factory=list)
    """Names of the subjects in the split test. If val_subjects or test_subjects is given, all other subjects are in the
    split train."""
    by: Literal["image", "concept"] = "image"
    """Hold out single images, or all images of a concept together. With ``concept``, no concept of the test split is in
    the training split (zero-shot). `by` is used only for EEG-image corpora."""
    image_val_fraction: float = 0.1
    """Fraction of the images (or concepts) to put into the split val, chosen by hash; not used for images that the
    corpus assigns to train, val or test."""
    image_test_fraction: float = 0.1
    """Fraction of the images (or concepts) to put into the split test, chosen by hash; not used for images whose split
    the corpus gives."""

    def __post_init__(self) -> None:
        for a, b in (("val_fraction", "test_fraction"), ("image_val_fraction", "image_test_fraction")):
            x, y = getattr(self, a), getattr(self, b)
            if x < 0 or y < 0 or x + y >= 1:
                raise ValueError(
                    f"split: {a} and {b} must not be negative, and their sum must be below 1, got {x} and {y}"
                )
        both = {_bare(s) for s in self.val_subjects} & {_bare(s) for s in self.test_subjects}
        if both:
            raise ValueError(
                f"split: {', '.join(sorted(both))} cannot be in both 'val_subjects' and 'test_subjects'; remove each "
                "subject from one of these lists"
            )

    @property
    def by_subject(self) -> bool:
        """Whether the config holds out subjects."""
        return bool(self.val_subjects or self.test_subjects or self.val_fraction or self.test_fraction)

    def subject(self, subject: str) -> str:
        """Return the split of the subject with the name `subject`: train, val or test."""
        if self.val_subjects or self.test_subjects:
            if _bare(subject) in {_bare(s) for s in self.val_subjects}:
                return "val"
            return "test" if _bare(subject) in {_bare(s) for s in self.test_subjects} else "train"
        return _by_hash(f"{self.seed}/subject/{_bare(subject)}", self.val_fraction, self.test_fraction)

    def image(self, image_id: str, column: str = "", concept: str = "") -> str | None:
        """Return the split of an image.

        Parameters
        ----------
        image_id : str
            Name of the image; empty for a trial without an image.
        column : str
            Split that the corpus gives to the image: train, val, test or `TRAIN_OR_VAL`; empty if the corpus gives no
            split.
        concept : str
            Concept of the image; required if whole concepts are held out.

        Returns
        -------
        str or None
            train, val or test. None if the corpus gives no split, and either the trial has no image or the config holds
            out no images.

        Raises
        ------
        RequestError
            If concepts are held out, and the image has no concept.
        """
        if column and column != TRAIN_OR_VAL:
            return column
        val, test = self.image_val_fraction, 0.0 if column else self.image_test_fraction
        if not image_id or not (val or test):
            return "train" if column else None
        if self.by == "image":
            return _by_hash(f"{self.seed}/image/{image_id}", val, test)
        if not concept:
            raise RequestError(
                f"the key 'split.by' is 'concept', but image '{image_id}' has no concept; set 'split.by' to 'image'"
            )
        return _by_hash(f"{self.seed}/concept/{concept}", val, test)

    def trial(self, subject: str, image_id: str, column: str = "", concept: str = "") -> str | None:
        """Return the split of a trial, which depends on the splits of its subject and of its image.

        Parameters
        ----------
        subject, image_id : str
            Names of the subject and of the image.
        column : str
            Split that the corpus gives to the trial; empty if the corpus gives no split.
        concept : str
            Concept of the image.

        Returns
        -------
        str or None
            train, val or test; None if subject and image belong to different splits, such as a training subject with a
            test image. A trial with the result None is left out, because it would leak its subject or its image into
            another split.

        Raises
        ------
        RequestError
            If concepts are held out, and the image has no concept.
        """
        of_image = self.image(image_id, column, concept)
        if not self.by_subject:
            return of_image or "train"
        of_subject = self.subject(subject)
        return of_subject if of_image in (None, of_subject) else None

    def check_subjects(self, subjects: Iterable[str]) -> None:
        """Raise an error if a subject in the config does not exist, or if no subject is left for train.

        Parameters
        ----------
        subjects : iterable of str
            Names of all subjects in the corpora.

        Raises
        ------
        RequestError
            If a subject in the config does not exist, or no subject is left for train.
        """
        everyone = set(subjects)
        bare = {_bare(s) for s in everyone}
        for name in (*self.val_subjects, *self.test_subjects):
            if _bare(name) not in bare:
                some = ", ".join(sorted(everyone)[:6])
                raise RequestError(
                    f"split: subject '{name}' is not in the corpora; "
                    f"the corpora have {some}{' ...' * (len(everyone) > 6)}"
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
