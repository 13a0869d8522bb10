"""Constructed sets of trials whose true verdict is known, for `benchmarks/verdict_rates.py` and for the tests.

A set is a small simulated experiment: people look at images, and features of their EEG are simulated. Ridge regression
learns to predict an embedding of the image. The controls are made, and the verdict is found, with the same functions as
for real data.

In array shapes, n is the number of trials, I of images, L of labels, and F of features of the EEG, and D is the width
of an embedding.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np

from pretrain.evidence.predictors import predict_from_features, predict_from_time
from pretrain.evidence.ridge import STRENGTHS, ridge_scores
from pretrain.evidence.rules import Control, Evidence, NotApplicable
from pretrain.evidence.trials import TrialTable, derange_within, find_neighbourhoods, group_by, merge_copies

WIDTH = 8
FEATURES = 12
"""Number of features of a trial: six channels times two parts of a window. The window is after the picture, or before
it for the baseline."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """Settings of a constructed (simulated) set of trials."""

    people: int = 8
    labels: int = 4
    images: int = 40
    """Images of each label."""
    recordings: int = 2
    """Recordings of each person. Every person sees every image once, and the images are divided over the recordings."""
    category: float = 1.0
    """Strength of the response to the category; the noise of a feature has the standard deviation 1."""
    exemplar: float = 1.0
    """Strength of the response to the image within its category."""
    strong_people: int | None = None
    """Number of people who have a response; by default, all people have a response."""
    drift: float = 0.0
    """Drift of the EEG, a random walk: standard deviation of its step from one trial to the next."""
    blocks: bool = False
    """Whether all images of a label are shown one after the other in each recording."""
    common: bool = False
    """Whether the blocks of all people have the same order."""
    trend: float = 0.0
    """Change of the EEG from the beginning to the end of a recording; the change is the same for all people."""
    split: str = "images"
    """images: a quarter of the images is for the test. time: a quarter of the time of each recording is for the test,
    and every person has images of their own. trials: a quarter of the trials is for the test. people: the trials in
    which the second half of the people see a quarter of the images are for the test. labels: half of the labels are for
    the test."""
    labels_of_person: int | None = None
    """Number of labels that a person sees; by default, a person sees all labels. If people see only some of the labels,
    the EEG also has a different offset for each person."""
    skewed: bool = False
    """Whether seven of ten images have the first label."""
    generator: str = "ridge"
    """ridge: shows the predicted embedding. memory: shows the training image that is nearest to the predicted
    embedding. constant: shows in all trials the mean embedding of the most common training label. collapsed: shows in
    all trials the mean of all training embeddings."""
    search: bool = False
    """Whether the score of a trial is a rank, as in a retrieval: the share of all other test images that are less
    similar to the shown image than the seen image is. If False, the score is 1 for the right category and 0 for a wrong
    one. If False and the split is by labels (new concepts), the score is a rank among the test images of the other
    labels."""
    copies: int = 1
    """Number of names under which each image is stored. The names of equal images are merged, as after a search for
    copies."""
    shared_images: int = 0
    """Number of test images whose trials are also training trials, for the split by images."""
    forged: bool = False
    """Whether the control with shuffled EEG is wrong: each trial gets its own EEG."""


CLEAN = Design(category=0.6)
NULL = Design(category=0, exemplar=0)
CONCEPTS = Design(labels=16, images=5, split="labels", category=1.5, exemplar=1.5)
SETS: dict[str, tuple[Design, str]] = {
    "clean": (CLEAN, "signal"),
    "clean, new people": (replace(CLEAN, people=12, split="people"), "signal"),
    "clean, with drift": (replace(CLEAN, drift=0.1), "signal"),
    "clean, three people": (replace(CLEAN, people=3), "signal"),
    "random order, block-wise split, drift and response": (replace(CLEAN, split="time", drift=0.1), "signal"),
    "new concepts, good generator": (CONCEPTS, "signal"),
    "clean, one test image of forty also in training": (replace(CLEAN, shared_images=1), "signal"),
    "null": (NULL, "no signal"),
    "null, one test image of forty also in training": (replace(NULL, shared_images=1), "no signal"),
    "null, images have responses of their own": (replace(NULL, exemplar=1.5), "no signal"),
    "null, twelve test images under four names each": (replace(NULL, exemplar=1.5, images=12, copies=4), "no signal"),
    "null, three people": (replace(NULL, people=3), "no signal"),
    "null, three people, twelve test images": (replace(NULL, people=3, exemplar=3.0, images=12), "no signal"),
    "random order, block-wise split, drift": (replace(NULL, split="time", drift=0.5), "no signal"),
    "blocks and drift": (replace(NULL, blocks=True, drift=0.5), "confounded"),
    "blocks and drift, four people": (replace(NULL, people=4, recordings=1, blocks=True, drift=0.5), "confounded"),
    "blocks, drift and response": (replace(CLEAN, blocks=True, drift=0.5), "confounded"),
    "one order of blocks for all, common trend, new people": (
        replace(NULL, people=12, recordings=1, split="people", blocks=True, common=True, trend=4.0),
        "confounded",
    ),
    "search of images, skewed labels, blocks and drift": (
        replace(NULL, search=True, skewed=True, blocks=True, drift=0.5),
        "confounded",
    ),
    "labels tied to people": (replace(NULL, labels_of_person=2), "confounded"),
    "repeated images in both splits": (replace(CLEAN, recordings=4, split="trials"), "not judgeable"),
    "repeated images in both splits, under two names each": (
        replace(CLEAN, recordings=4, split="trials", images=20, copies=2),
        "not judgeable",
    ),
    "category only": (replace(CLEAN, exemplar=0), "category only"),
    "new concepts, remembering generator": (replace(CONCEPTS, generator="memory"), "category only"),
    "skewed labels, constant generator": (replace(CLEAN, skewed=True, generator="constant"), "no signal"),
    "collapsed embeddings": (replace(CLEAN, generator="collapsed"), "no signal"),
    "one strong person of eight": (Design(strong_people=1, category=4.0, exemplar=4.0), "no signal"),
    "shuffled control with the trial's own EEG": (replace(CLEAN, forged=True), "no signal"),
}
"""Settings and true verdict of each set. In each set, the order of the trials is declared to be random, so that only
the scores can show a block design."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Images:
    label_I: np.ndarray
    embedding_ID: np.ndarray
    response_IF: np.ndarray
    """[I, F] response of the EEG to each image."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Trials:
    table: TrialTable
    image_n: np.ndarray
    """[n] number of the image of each trial."""
    eeg_nF: np.ndarray
    baseline_nF: np.ndarray

    def select(self, chosen_n: np.ndarray) -> _Trials:
        return _Trials(
            table=self.table.select(chosen_n),
            image_n=self.image_n[chosen_n],
            eeg_nF=self.eeg_nF[chosen_n],
            baseline_nF=self.baseline_nF[chosen_n],
        )


def make_evidence(design: Design, seed: int) -> Evidence:
    """Simulate a set, train the model, and compute all controls.

    Parameters
    ----------
    design : Design
        Settings of the set.
    seed : int
        Seed of all random numbers.

    Returns
    -------
    Evidence
        The evidence that `pretrain.evidence.rules.judge` turns into a verdict.
    """
    rng = np.random.default_rng([seed, 7])
    images = _make_images(design, rng)
    trials = _simulate(design, images, rng)
    train, test = (trials.select(chosen_n) for chosen_n in _split(design, images, trials, rng))
    generator, measure = _Generator(design, images, train), _Measure(design, images, train, test)
    x_nF, n = test.eeg_nF, len(test.table)
    everywhere = np.arange(n) if design.forged else derange_within(np.zeros(n), test.image_n, seed)[0]
    within, alone_n = derange_within(find_neighbourhoods(test.table), test.image_n, seed)
    noise_nF = x_nF * rng.choice([-1.0, 1.0], x_nF.shape)
    own_nD = generator.show(x_nF)
    return Evidence(
        trials=test.table,
        train=train.table,
        design="random",
        design_evidence="declared by the constructed set",
        hits_n=measure.hits(own_nD),
        chance=measure.chance,
        score_of="image" if measure.by_image else "label",
        controls={
            "shuffle": _control(measure.hits(generator.show(x_nF[everywhere]))),
            "shuffle_within": _control(measure.hits(generator.show(x_nF[within])), alone_n),
            "noise": _control(measure.hits(generator.show(noise_nF))),
            "no_eeg": _control(measure.hits(generator.show(np.zeros_like(x_nF)))),
            "eyes": NotApplicable(reason="the constructed set has no eye channels."),
            "nearest": _control(measure.hits(generator.remember(own_nD))),
            **_predict(design, train, test, measure, seed),
        },
        identification_n=measure.identify(own_nD),
        judge_n=measure.judge(),
        new_people=design.split == "people",
        new_concepts=design.split == "labels",
    )


def _control(hits_n: np.ndarray, left_out_n: np.ndarray | None = None) -> Control:
    return Control(hits_n=np.asarray(hits_n, float), checked=True, left_out_n=left_out_n)


def _predict(
    design: Design, train: _Trials, test: _Trials, measure: _Measure, seed: int
) -> dict[str, Control | NotApplicable]:
    """Predict the labels of the test trials twice: from the trials' times, and from the EEG before the pictures."""
    if design.split == "labels":
        return dict.fromkeys(("time", "baseline"), NotApplicable(reason="no test label is in the training trials."))
    found = {
        "time": predict_from_time(train.table, test.table),
        "baseline": predict_from_features(train.baseline_nF, train.table.labels_n, test.baseline_nF, seed=seed),
    }
    return {name: _control(measure.predicted(found_n)) for name, found_n in found.items()}


def _make_images(design: Design, rng: np.random.Generator) -> _Images:
    # If the split is by time, no image is seen by two people.
    sets = design.people if design.split == "time" else 1
    label_I = np.tile(np.repeat(np.arange(design.labels), design.images), sets)
    if design.skewed:
        label_I = np.where(rng.random(len(label_I)) < 0.6, 0, label_I)
    prototype_LD = rng.normal(0, 1, (design.labels, WIDTH))
    own_ID = rng.normal(0, 0.5, (len(label_I), WIDTH))
    embedding_ID = prototype_LD[label_I] + own_ID
    if design.category == 0:
        # Without a response to the category, the EEG must contain no information about the embeddings. So the part of
        # the response that differs from image to image is drawn independently of the embeddings.
        own_ID = rng.normal(0, 0.5, own_ID.shape)
    to_eeg_DF = rng.normal(0, 1 / np.sqrt(WIDTH), (WIDTH, FEATURES))
    response_IF = (design.category * prototype_LD[label_I] + design.exemplar * own_ID) @ to_eeg_DF
    return _Images(label_I=label_I, embedding_ID=embedding_ID, response_IF=response_IF)


def _order_images(design: Design, images: _Images, person: int, rng: np.random.Generator) -> list[np.ndarray]:
    """For each recording of a person, return the numbers of the images in the order in which the images are shown."""
    shown = np.arange(len(images.label_I))
    if design.split == "time":
        shown = np.array_split(shown, design.people)[person]
    if design.labels_of_person is not None:
        seen = (np.arange(design.labels_of_person) + design.labels_of_person * person) % design.labels
        shown = shown[np.isin(images.label_I[shown], seen)]
    shown = rng.permutation(np.repeat(shown, design.copies))
    parts = np.array_split(shown, design.recordings)
    if design.split == "trials":
        # In the second half of the recordings, the images of the first half are shown again.
        parts = np.array_split(shown, design.recordings // 2) * 2
    parts = [rng.permutation(part) for part in parts]
    if not design.blocks:
        return parts
    ranks = [np.arange(design.labels) if design.common else rng.permutation(design.labels) for _ in parts]
    return [
        part[np.argsort(rank[images.label_I[part]], kind="stable")] for part, rank in zip(parts, ranks, strict=True)
    ]


def _simulate(design: Design, images: _Images, rng: np.random.Generator) -> _Trials:
    """Simulate that all people look at the images: compute features of the EEG before and after each picture."""
    image_n, person_n, recording_n, time_n, drift_nF = [], [], [], [], []
    for person in range(design.people):
        for recording, order in enumerate(_order_images(design, images, person, rng)):
            image_n.append(order)
            person_n.append(np.full(len(order), person))
            recording_n.append(np.full(len(order), recording))
            time_n.append(np.cumsum(rng.uniform(2, 4, len(order))))
            walk_nF = np.cumsum(rng.normal(0, design.drift, (len(order), FEATURES)), axis=0)
            drift_nF.append(walk_nF + np.linspace(0, design.trend, len(order))[:, None])
    image_n, person_n, recording_n = (np.concatenate(parts) for parts in (image_n, person_n, recording_n))
    n = len(image_n)
    strong = design.people if design.strong_people is None else design.strong_people
    gain_n = rng.uniform(0.7, 1.3, design.people)[person_n] * (person_n < strong)
    spread = 1.0 if design.labels_of_person else 0.2
    slow_nF = np.concatenate(drift_nF) + rng.normal(0, spread, (design.people, FEATURES))[person_n]
    names_n = np.array([f"image-{image}" for image in image_n])
    if design.copies > 1:
        names_n = np.char.add(names_n, [f"-copy-{copy}" for copy in rng.integers(0, design.copies, n)])
        first = {str(name).rsplit("-copy-", 1)[0]: str(name) for name in names_n}
        names_n = merge_copies(names_n, [(str(name), first[str(name).rsplit("-copy-", 1)[0]]) for name in names_n])
    table = TrialTable(
        labels_n=images.label_I[image_n],
        images_n=names_n,
        subjects_n=np.char.add("person-", person_n.astype(str)),
        sessions_n=np.full(n, ""),
        recordings_n=np.char.add("recording-", recording_n.astype(str)),
        times_n=np.concatenate(time_n),
    )
    return _Trials(
        table=table,
        image_n=image_n,
        eeg_nF=gain_n[:, None] * images.response_IF[image_n] + slow_nF + rng.normal(0, 1, (n, FEATURES)),
        baseline_nF=slow_nF + rng.normal(0, 1, (n, FEATURES)),
    )


def _split(design: Design, images: _Images, trials: _Trials, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return masks of the training trials and of the test trials."""
    table, n = trials.table, len(trials.table)
    if design.split == "labels":
        test_n = table.labels_n >= design.labels // 2
    elif design.split == "trials":
        test_n = rng.random(n) < 0.25
    elif design.split == "time":
        # Each recording is cut into four quarters. One of these quarters, chosen at random, is in the test split.
        test_n = np.zeros(n, bool)
        recording_n = group_by(table.subjects_n, table.recordings_n)
        for recording in range(recording_n.max() + 1):
            rows = np.flatnonzero(recording_n == recording)
            test_n[np.array_split(rows, 4)[rng.integers(4)]] = True
    else:
        held_I = np.zeros(len(images.label_I), bool)
        for label in np.unique(images.label_I):
            rows = rng.permutation(np.flatnonzero(images.label_I == label))
            held_I[rows[: max(2, len(rows) // 4)]] = True
        test_n = held_I[trials.image_n]
        if design.shared_images:
            shared = rng.permutation(np.flatnonzero(held_I))[: design.shared_images]
            return ~test_n | np.isin(trials.image_n, shared), test_n
    if design.split != "people":
        return ~test_n, test_n
    new_n = group_by(table.subjects_n) >= design.people // 2
    return ~test_n & ~new_n, test_n & new_n


class _Generator:
    """A model that generates an embedding from EEG: ridge regression, then the rule in `Design.generator`."""

    def __init__(self, design: Design, images: _Images, train: _Trials) -> None:
        self.kind = design.generator
        self.known_nD = images.embedding_ID[train.image_n]
        self.mean_F, self.scale_F = train.eeg_nF.mean(axis=0), train.eeg_nF.std(axis=0)
        self.x_nF = (train.eeg_nF - self.mean_F) / self.scale_F
        labels_n = train.table.labels_n
        self.constant_D = self.known_nD[labels_n == np.bincount(labels_n).argmax()].mean(axis=0)

    def show(self, eeg_nF: np.ndarray) -> np.ndarray:
        """Return the embedding of the image that the model generates ("shows") for each trial."""
        if self.kind in ("constant", "collapsed"):
            fixed_D = self.constant_D if self.kind == "constant" else self.known_nD.mean(axis=0)
            return np.tile(fixed_D, (len(eeg_nF), 1))
        new_nF = (eeg_nF - self.mean_F) / self.scale_F
        found_nD = list(ridge_scores(self.x_nF, self.known_nD, new_nF))[len(STRENGTHS) // 2 - 2]
        return self.remember(found_nD) if self.kind == "memory" else found_nD

    def remember(self, found_nD: np.ndarray) -> np.ndarray:
        """For each given embedding, return the nearest embedding of a training image."""
        return self.known_nD[_distances(found_nD, self.known_nD).argmin(axis=1)]


class _Measure:
    """Scores of shown embeddings."""

    def __init__(self, design: Design, images: _Images, train: _Trials, test: _Trials) -> None:
        self.images, self.seen_n = images, test.image_n
        self.gallery = np.unique(test.image_n)
        self.search = design.search
        self.by_image = design.search or design.split == "labels"
        known_nD, labels_n = images.embedding_ID[train.image_n], train.table.labels_n
        self.known = np.unique(labels_n)
        self.centre_LD = np.stack([known_nD[labels_n == label].mean(axis=0) for label in self.known])
        self.chance = 0.5 if self.by_image else 1 / design.labels

    def hits(self, shown_nD: np.ndarray, seen_n: np.ndarray | None = None) -> np.ndarray:
        """Return the score of each trial, as `Design.search` says.

        Either the score is 1 if the shown image has the right category and 0 otherwise, or the score is the share of
        the other images whose distance from the shown image is larger than that of the seen image.
        """
        seen_n = self.seen_n if seen_n is None else seen_n
        if self.by_image:
            return self._rank(shown_nD, seen_n, same_label=None if self.search else False)
        return (_distances(shown_nD, self.centre_LD).argmin(axis=1) == self.images.label_I[seen_n]).astype(float)

    def predicted(self, labels_n: np.ndarray) -> np.ndarray:
        """Return the scores of predicted labels.

        If `Design.search` is set, the mean embedding of the predicted label takes the place of the shown image.
        """
        if not self.search:
            return labels_n == self.images.label_I[self.seen_n]
        return self.hits(self.centre_LD[np.searchsorted(self.known, labels_n)])

    def identify(self, shown_nD: np.ndarray) -> np.ndarray:
        """Return the rank of the seen image.

        For each trial, the rank is the share of the other images of its category that are less similar to the shown
        (generated) image than the seen image is.
        """
        return self._rank(shown_nD, self.seen_n, same_label=True)

    def judge(self) -> np.ndarray:
        """Return the scores of a perfect model, which shows for each test image the image itself."""
        return self.hits(self.images.embedding_ID[self.gallery], self.gallery)

    def _rank(self, shown_nD: np.ndarray, seen_n: np.ndarray, *, same_label: bool | None) -> np.ndarray:
        far_nI = _distances(shown_nD, self.images.embedding_ID[self.gallery])
        own_n = far_nI[np.arange(len(seen_n)), np.searchsorted(self.gallery, seen_n)]
        label_I = self.images.label_I
        other_nI = self.gallery != seen_n[:, None]
        if same_label is not None:
            other_nI &= (label_I[self.gallery] == label_I[seen_n, None]) == same_label
        better_nI = (far_nI > own_n[:, None]) + 0.5 * (far_nI == own_n[:, None])
        return (better_nI * other_nI).sum(axis=1) / other_nI.sum(axis=1)


def _distances(a_nD: np.ndarray, b_mD: np.ndarray) -> np.ndarray:
    return np.round(((a_nD[:, None] - b_mD[None]) ** 2).sum(axis=-1), 9)
