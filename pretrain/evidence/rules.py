"""Written rules that turn scores and controls into a verdict in words.

`judge` applies the rules in the order of `RULES`. The first rule that holds gives the verdict. There are five verdicts:

=============  =====================================================================================
confounded     the label can be predicted without a response to the picture
not judgeable  the data, or the judge of the images, cannot show a signal, even if a signal exists
no signal      the score is not better than a control without the right EEG
category only  the score shows the category of the picture, and nothing more about the picture
signal         the score is better than every control
=============  =====================================================================================

A comparison of two scores *holds* if three conditions are met. First, the 95 % interval of the difference lies above 0.
The bootstrap for this interval draws people and images at the same time if there are enough of both (see
`pretrain.evidence.statistics.compare_paired`). If a predictor that sees no response is compared with chance, the
bootstrap keeps the people and draws only images, because such a predictor shows a fault of the dataset even if it
succeeds for these people only. Second, the p-value of the comparison is below `LEVEL` of
`pretrain.evidence.comparisons` after Holm's correction over all comparisons with the same `question` (leak, signal or
content). Third, if the model's own score is compared and there are enough people, the permutation test over people has
p below `LEVEL`. The permutation test is needed for two reasons. The interval of a bootstrap over few people is too
narrow. And if only one of eight people has a strong effect, the mean can be above 0, although this shows nothing about
people in general.

docs/evaluation.md explains the controls, the verdicts and the limits of the verdicts. In array shapes, n is the number
of trials.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.errors import RequestError, show
from pretrain.evidence.comparisons import Comparison, measure_comparisons
from pretrain.evidence.statistics import FEWEST_IMAGES, FEWEST_SUBJECTS, accuracy_interval, check_finite
from pretrain.evidence.trials import TrialTable, group_recordings, join_tables, label_is_constant_in_recordings

Word = Literal["confounded", "not judgeable", "no signal", "category only", "signal"]
Design = Literal["random", "block", "unknown"]
DESIGNS: tuple[Design, ...] = get_args(Design)
"""Every design."""

MOST_KNOWN = 0.05
"""Largest share of test trials that the rules leave out because the image or the EEG of these trials was in the data
that trained the model. If the share is larger, the verdict is *not judgeable*."""
FEWEST_TRIALS = 20
"""Smallest number of test trials for a verdict, and smallest number of usable trials of a control."""
NOTHING_LOST = 0.5
"""Share of the difference between the model's own score and the score of the shuffle over all trials. If the shuffle
within neighbourhoods keeps at least this share of the difference, the rules say that this shuffle does not lower the
score."""
CONTROLS = {
    "shuffle": "EEG of another trial of the whole split",
    "shuffle_within": "EEG of another trial of the same neighbourhood in time",
    "noise": "noise with the spectrum of the trial's EEG",
    "no_eeg": "no EEG",
    "time": "a predictor that sees only the person, the recording and the time",
    "baseline": "a predictor that sees only the EEG before the picture",
    "eyes": "a predictor that sees only eye and face channels",
    "nearest": "the training image that is nearest to the generated image",
}
"""Name of each control, and what the control uses in place of the right EEG."""


@dataclass(frozen=True, kw_only=True)
class NotApplicable:
    """A control or measure that cannot be made from the data."""

    reason: str
    """Why the control or measure cannot be made from the data, as one sentence for the report."""

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise RequestError(
                "a control is not applicable without a reason; say why the control cannot be made from the data"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """Scores of a control on the same trials as the model's own scores."""

    hits_n: NDArray[np.float64]
    """[n] score of each trial, from 0 to 1."""
    checked: bool
    """True if it was checked that the control is valid. A control with other EEG must have the same model, seeds and
    trials as the model's own scores. A predictor of the label must get only the input that its name states, such as the
    time."""
    left_out_n: NDArray[np.bool_] | None = None
    """[n] True for trials for which the control could not be made, such as trials that are alone in their
    neighbourhood. The comparison leaves out these trials, and the verdict gives their number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """Everything that a verdict depends on."""

    trials: TrialTable
    """The test trials."""
    train: TrialTable | NotApplicable
    """The training trials of the model; they show whether the model was trained on test images."""
    design: Design
    """Order in which the categories were shown."""
    design_evidence: str
    """A sentence with the evidence that the categories were shown in the order that `design` names. `judge` refuses a
    random design whose evidence is empty."""
    hits_n: NDArray[np.float64]
    """[n] the model's own score of each trial, from 0 to 1; for example, 1 for the right category and 0 for a wrong
    category."""
    chance: float
    """Chance level of the score: the mean score that a model reaches by guessing."""
    score_of: Literal["label", "image"]
    """What the score of a trial measures. label: 1 if the label is right, else 0. image: share of the other test images
    that are less similar to the output than the seen image is. The chance level of the predictors depends on
    `score_of`; see `find_constant_score`.
    """
    controls: Mapping[str, Control | NotApplicable]
    """Every control of `CONTROLS`."""
    identification_n: NDArray[np.float64] | NotApplicable
    """[n] for each trial, the share of other images of the same category that are less similar to the generated image
    than the seen image is. Chance is 0.5."""
    identification_left_out_n: NDArray[np.bool_] | None = None
    """[n] True for trials without an identification, because their category has only one seen image. The comparison
    leaves out these trials, and the verdict gives their number."""
    judge_n: NDArray[np.float64] | NotApplicable
    """Scores, from 0 to 1, that the judge (the program that scores the generated images) gives to real images of the
    test labels. One value for each image."""
    judge_chance: float | None = None
    """Chance level of the judge's score; by default the value of `chance`."""
    known_eeg: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """For each name of data that trained the model, such as ``training trials``, an array [n] that is True for test
    trials whose EEG is also in these data. An empty mapping: the EEG was not compared."""
    new_people: bool
    """True if no test person is in the training trials."""
    people_in_pretraining: int = 0
    """Number of test people who also have EEG in the pretraining data of the encoder."""
    new_concepts: bool
    """True if no test label is among the training labels."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A verdict, its scope (people and concepts for which it holds), and everything that led to the verdict."""

    word: Word
    """Name of the verdict; the docstring of this file explains the five names."""
    scope: str | None
    """People and concepts for which a signal was shown; None unless the verdict is category only or signal."""
    why: tuple[str, ...]
    """Sentences that explain the verdict."""
    comparisons: tuple[Comparison, ...]
    """Every comparison that was made; empty if the design, the test trials or the judge alone decides the verdict."""
    not_applicable: dict[str, str]
    """For each control or measure that cannot be made from the data, the reason."""
    left_out: int = 0
    """Number of test trials that the verdict leaves out, because their image or their EEG was in the data that trained
    the model. If the verdict is *not judgeable* because of these trials, no trial is left out."""

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as plain texts, numbers and lists that JSON can store."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(one) for key, one in value.items()}
            return [plain(one) for one in value] if isinstance(value, tuple | list) else value

        return plain(dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What the rules read: the evidence, and the comparisons, which are made once for all rules."""

    evidence: Evidence
    rows: dict[str, Comparison] = field(default_factory=dict)
    """Comparisons by name; empty until the comparisons are made."""
    not_applicable: dict[str, str] = field(default_factory=dict)
    left_out: int = 0
    """Number of test trials that `_leave_out_known_trials` removed from the evidence."""
    notes: tuple[str, ...] = ()
    """Sentences about the test trials that `_leave_out_known_trials` removed from the evidence."""

    def holds(self, name: str) -> bool:
        """Return whether the comparison with this name was made and *holds* (see the docstring of this module)."""
        return name in self.rows and self.rows[name].holds

    def scores(self, name: str) -> str:
        """Describe the scores of a comparison, such as ``own - shuffle``."""
        row = self.rows[name]
        low, high = row.difference.interval
        return (
            f"{name}: {row.left:.1%} - {row.right:.1%} = {row.difference.mean:+.1%} ({low:+.1%} to {high:+.1%} over "
            f"{row.difference.decides}, corrected p = {row.p_corrected:.2g})"
        )


_Found = tuple[Word, list[str]]


def judge(evidence: Evidence, *, resamples: int = 2000, seed: int = 0) -> Verdict:
    """Apply the written rules to the evidence.

    Parameters
    ----------
    evidence : Evidence
        Scores, controls and design.
    resamples : int
        Number of bootstrap resamples and of random permutations, at least 500. With fewer than 320 permutations, no
        p-value could fall below `LEVEL` after the correction over the eight comparisons of the question signal.
    seed : int
        Seed of the resamples.

    Returns
    -------
    Verdict
        The verdict, with every comparison that was made.

    Raises
    ------
    RequestError
        If a score is NaN or outside 0 to 1, if a control is missing or was not checked to be a control, if a random
        design has no evidence, or if `new_people` or `new_concepts` contradicts the training trials.
    """
    if resamples < 500:
        raise RequestError(f"resamples is {resamples}; give at least 500, so that corrected p-values can be small")
    _check(evidence)
    evidence, left_out, removed = _leave_out_known_trials(evidence)
    missing = {name: found.reason for name, found in evidence.controls.items() if isinstance(found, NotApplicable)}
    others = {"training trials": evidence.train, "judge": evidence.judge_n, "identification": evidence.identification_n}
    missing |= {name: found.reason for name, found in others.items() if isinstance(found, NotApplicable)}
    case = _Case(evidence=evidence, not_applicable=missing, left_out=left_out, notes=tuple(removed))
    for rule in (decide_by_design, decide_if_judgeable):
        if found := rule(case):
            return _finish(case, found)
    case = _compare(case, resamples, seed)
    # The comparisons may find that a control has too few usable trials, so `decide_if_judgeable` is applied again.
    for rule in RULES[1:]:
        if found := rule(case):
            return _finish(case, found)
    return _finish(case, _signal(case))


def _finish(case: _Case, found: _Found) -> Verdict:
    word, why = found
    evidence = case.evidence
    notes = [f"The design is {evidence.design}: {evidence.design_evidence or 'no evidence was given'}."]
    notes += [f"Not applicable: {name}, because {reason.rstrip('.')}." for name, reason in case.not_applicable.items()]
    notes += [*case.notes, *_describe_left_out(case)]
    return Verdict(
        word=word,
        scope=_describe_scope(case) if word in ("signal", "category only") else None,
        why=(*why, *notes),
        comparisons=tuple(case.rows.values()),
        not_applicable=case.not_applicable,
        left_out=case.left_out,
    )


def find_known_trials(evidence: Evidence) -> list[tuple[str, NDArray[np.bool_]]]:
    """Find the test trials whose image or EEG was in the data that trained the model.

    Returns
    -------
    list of (str, ndarray)
        Sentences such as ``The EEG of 3 of 90 test trials, or a part of the EEG, is also in the training trials``. For
        each sentence, an array [n] that is True for the trials that the sentence counts.
    """
    found = [("EEG", "a part of the EEG", data, known_n) for data, known_n in evidence.known_eeg.items()]
    if isinstance(evidence.train, TrialTable):
        images_n = np.isin(evidence.trials.images_n, evidence.train.images_n)
        found.append(("image", "a copy of the image", "training trials", images_n))
    n = len(evidence.trials)
    return [
        (
            f"The {what} of {int(np.sum(known_n))} of {n} test trials, or {part}, is also in the {data}",
            np.asarray(known_n),
        )
        for what, part, data, known_n in found
        if np.any(known_n)
    ]


def _leave_out_known_trials(evidence: Evidence) -> tuple[Evidence, int, list[str]]:
    """Leave out the test trials that the model may remember, if their share is at most `MOST_KNOWN`.

    Returns the remaining evidence, the number of trials that were left out, and sentences about these trials. If their
    share is larger, all trials are kept, and `decide_if_judgeable` gives the verdict.
    """
    known, n = find_known_trials(evidence), len(evidence.trials)
    known_n = np.any([one_n for _, one_n in known], axis=0) if known else np.zeros(n, bool)
    count = int(known_n.sum())
    if not 0 < count <= MOST_KNOWN * n:
        return evidence, 0, []

    def pick(values_n: Any) -> Any:
        return values_n if values_n is None or isinstance(values_n, NotApplicable) else np.asarray(values_n)[~known_n]

    trials, chance = evidence.trials.select(~known_n), evidence.chance
    if evidence.score_of == "label" and (share := find_constant_score(trials, "label")) < 1:
        # The most common label can have a larger share of the remaining trials than of all trials, so compute chance
        # again.
        chance = max(chance, share)
    controls = {
        name: control
        if isinstance(control, NotApplicable)
        else dataclasses.replace(control, hits_n=pick(control.hits_n), left_out_n=pick(control.left_out_n))
        for name, control in evidence.controls.items()
    }
    kept = dataclasses.replace(
        evidence,
        trials=trials,
        hits_n=pick(evidence.hits_n),
        chance=chance,
        controls=controls,
        identification_n=pick(evidence.identification_n),
        identification_left_out_n=pick(evidence.identification_left_out_n),
        known_eeg={name: pick(values_n) for name, values_n in evidence.known_eeg.items()},
    )
    notes = [f"{sentence}." for sentence, _ in known]
    notes.append(f"The verdict leaves out {count} of {n} test trials, because the model may remember them.")
    return kept, count, notes


def _check(evidence: Evidence) -> None:
    """Refuse evidence that is incomplete, or that contradicts itself."""
    n = len(evidence.trials)
    if unknown := sorted(evidence.controls.keys() ^ CONTROLS.keys()):
        raise RequestError(
            f"controls: {', '.join(unknown)} missing or unknown; give scores, or NotApplicable with a reason, for each "
            f"of {', '.join(CONTROLS)}"
        )
    if evidence.design == "random" and not evidence.design_evidence.strip():
        raise RequestError(
            "design is random, but design_evidence is empty; name the measured order of the trials or the publication "
            "that describes the randomisation, or set design: unknown"
        )
    if not 0 <= evidence.chance < 1 or not 0 <= (evidence.judge_chance or 0) < 1:
        raise RequestError(
            f"chance is {evidence.chance} and judge_chance {evidence.judge_chance}; give values from 0 to below 1"
        )
    _check_scores("hits_n", evidence.hits_n, n)
    for name, control in evidence.controls.items():
        if isinstance(control, NotApplicable):
            continue
        if not control.checked:
            raise RequestError(
                f"control {name}: was not checked to be a control; check that the control has the same model, seeds "
                "and trials as the model's own scores, and other EEG, or make the control again"
            )
        _check_scores(f"control {name}", control.hits_n, n)
        _check_mask(f"control {name}: left_out_n", control.left_out_n, n)
    for name, known_n in evidence.known_eeg.items():
        _check_mask(f"known_eeg: {name}", known_n, n)
    _check_mask("identification_left_out_n", evidence.identification_left_out_n, n)
    if not isinstance(evidence.identification_n, NotApplicable):
        _check_scores("identification_n", evidence.identification_n, n)
    if not isinstance(evidence.judge_n, NotApplicable):
        _check_scores("judge_n", evidence.judge_n, None)
    _check_scope(evidence)


def _check_mask(name: str, mask_n: NDArray[np.bool_] | None, n: int) -> None:
    if mask_n is not None and np.shape(mask_n) != (n,):
        raise RequestError(f"{name} must have one value for each of the {n} trials; correct this array")


def _check_scores(name: str, hits_n: NDArray[np.float64], n: int | None) -> None:
    values = np.asarray(hits_n, float)
    if values.ndim != 1 or not len(values) or (n is not None and len(values) != n):
        wanted = "at least one value" if n is None else f"one value for each of the {n} trials"
        raise RequestError(f"{name}: has the shape {values.shape}; give {wanted}")
    check_finite(values, name)
    if values.min() < 0 or values.max() > 1:
        raise RequestError(f"{name}: values from {values.min():g} to {values.max():g}; give scores from 0 to 1")


def _check_scope(evidence: Evidence) -> None:
    if isinstance(evidence.train, NotApplicable):
        return
    for name, claimed, column in (
        ("new_people", evidence.new_people, "subjects_n"),
        ("new_concepts", evidence.new_concepts, "labels_n"),
    ):
        shared = np.intersect1d(getattr(evidence.trials, column), getattr(evidence.train, column))
        if claimed and len(shared):
            raise RequestError(
                f"{name} is true, but {len(shared)} of the test trials' {column} are in the training trials too, such "
                f"as {shared[0]}; set {name} to false"
            )


def find_constant_score(trials: TrialTable, score_of: Literal["label", "image"]) -> float:
    """Find the best mean score of a predictor that predicts the same label in every trial.

    Parameters
    ----------
    trials : TrialTable
        The test trials.
    score_of : str
        What the score of a trial measures; see `Evidence.score_of`.

    Returns
    -------
    float
        For labels, the share of trials with the most common test label. For images, the score of a predictor that
        predicts only a label: all images of the predicted label get one high similarity, and all other images get one
        lower similarity. The score for images is 0.5 if all test images were shown equally often, however many images a
        label has.
    """
    labels_L, label_n = np.unique(trials.labels_n, return_inverse=True)
    share_L = np.bincount(label_n) / len(trials)
    if score_of == "label":
        return float(share_L.max())
    _, first = np.unique(trials.images_n, return_index=True)
    images_L, images = np.bincount(label_n[first], minlength=len(labels_L)), len(first)
    if images < 2:
        return 0.5
    # An image of the predicted label is tied with the other images of this label, and beats all images of other labels.
    right_L = (0.5 * (images_L - 1) + images - images_L) / (images - 1)
    # An image of another label loses against the images of the predicted label, and is tied with the other images.
    wrong_L = 0.5 * (images - images_L - 1) / (images - 1)
    return float((share_L * right_L + (1 - share_L) * wrong_L).max())


def decide_by_design(case: _Case) -> _Found | None:
    """Apply the rule about the design of the experiment.

    The verdict is *confounded* if the design is block or unknown. In a block design, the time of a trial reveals its
    label, and no score can distinguish the response to the picture from the drift of the EEG. The verdict is also
    *confounded* if the label is constant within each recording, because then every property of the recording reveals
    the label. No score can change the verdict of this rule, so this rule is applied first. A control that cannot be
    made from the data does not make the verdict *confounded*: the verdict only names the control and the reason.
    """
    evidence = case.evidence
    known = [table for table in (evidence.trials, evidence.train) if isinstance(table, TrialTable)]
    if label_is_constant_in_recordings(join_tables(*known)):
        return "confounded", ["Each recording has only one label, so everything that differs between recordings "
                              "reveals the label."]  # fmt: skip
    if evidence.design != "random":
        return "confounded", [
            f"The design is {evidence.design}, so the time of a trial may reveal its label. No score can distinguish "
            "a response to the picture from slow changes of the EEG."
        ]
    return None


def decide_if_judgeable(case: _Case) -> _Found | None:
    """Apply the rule for evidence that allows no conclusion.

    The verdict is *not judgeable* in five cases:

    - There are fewer than `FEWEST_TRIALS` test trials.
    - There are fewer than `FEWEST_IMAGES` test images. If a model finds the category of an image by chance, it can find
      it for every person who sees the image. With few images, such chance hits look like a signal.
    - More than the share `MOST_KNOWN` of the test trials is known to the model: the image, a copy of the image, or the
      EEG of the trial is also in the data that trained the model, so the model can show a remembered image. If the
      share is at most `MOST_KNOWN`, `_leave_out_known_trials` has left these trials out.
    - The control with shuffled EEG is missing.
    - The judge, which scores the images, fails on real images of the test labels: the 95 % interval of the judge's
      score does not lie above chance.
    """
    evidence = case.evidence
    trials, images, reasons = evidence.trials, len(np.unique(evidence.trials.images_n)), []
    if len(trials) < FEWEST_TRIALS:
        reasons.append(f"{len(trials)} test trials are too few; a verdict needs at least {FEWEST_TRIALS}.")
    if images < FEWEST_IMAGES:
        reasons.append(f"{images} test images are too few; a verdict needs at least {FEWEST_IMAGES}.")
    reasons += [
        f"{sentence}, such as a trial with the image {show(str(trials.images_n[known_n.argmax()]))}. The model may "
        f"remember these trials, and more than {MOST_KNOWN:.0%} of the test trials are such trials. Make a split whose "
        "test trials share no image and no EEG with the data that train the model."
        for sentence, known_n in find_known_trials(evidence)
    ]
    if "shuffle" in case.not_applicable:
        reasons.append(f"There is no control with shuffled EEG: {case.not_applicable['shuffle']}")
    if not isinstance(evidence.judge_n, NotApplicable):
        judge_n = np.asarray(evidence.judge_n, float)
        chance = evidence.chance if evidence.judge_chance is None else evidence.judge_chance
        low, high = accuracy_interval(judge_n, np.arange(len(judge_n)))
        if low <= chance:
            reasons.append(
                f"The judge fails on real images of the test labels: its score is {judge_n.mean():.1%} ({low:.1%} to "
                f"{high:.1%}), and chance is {chance:.1%}. Take a judge that knows the test labels."
            )
    return ("not judgeable", reasons) if reasons else None


def decide_by_leaks(case: _Case) -> _Found | None:
    """Apply the rule about predictors that need no response (leaks).

    The verdict is *confounded* in four cases:

    - A predictor that gets only the time, or only the EEG before the picture, is better than chance. The chance level
      of a predictor is the larger of two numbers: the best score of a predictor that predicts the same label in every
      trial (`find_constant_score`), and `Evidence.chance`.
    - EEG shuffled within neighbourhoods gives a better score than EEG shuffled over all trials. A part of the score
      then comes from slow changes of the EEG.
    - The shuffle within neighbourhoods does not lower the score. This case needs three conditions. The model's own
      score is better than the score with EEG shuffled over all trials. The model's own score is not better than the
      score with EEG shuffled within neighbourhoods. The shuffle within neighbourhoods keeps at least the share
      `NOTHING_LOST` of the difference between the model's own score and the score with EEG shuffled over all trials.
    - A predictor from eye and face channels is better than chance, and the model is not better than this predictor.
      The predictor alone proves no fault, because these channels may also contain a response to the picture.
    """
    reasons = [
        f"The label can be predicted from {what}, without a response to the picture. {case.scores(name)}."
        for name, what in (
            ("time - chance", "the time of the trial"),
            ("baseline - chance", "the EEG before the picture"),
        )
        if case.holds(name)
    ]
    if case.holds("shuffle_within - shuffle"):
        reasons.append(
            "EEG of a neighbouring trial gives a better score than EEG of a random trial, so a part of the score comes "
            f"from slow changes of the EEG. {case.scores('shuffle_within - shuffle')}."
        )
    elif "own - shuffle_within" in case.rows and case.holds("own - shuffle") and not case.holds("own - shuffle_within"):
        own, within = (case.rows[f"own - {name}"].difference.mean for name in ("shuffle", "shuffle_within"))
        if within <= (1 - NOTHING_LOST) * own:
            reasons.append(
                f"The shuffle within neighbourhoods does not lower the score. {case.scores('own - shuffle_within')}."
            )
    if case.holds("eyes - chance") and not case.holds("own - eyes"):
        reasons.append(
            "Eye and face channels predict the label, and the model is not better than this prediction. "
            f"{case.scores('own - eyes')}."
        )
    return ("confounded", reasons) if reasons else None


def decide_by_controls(case: _Case) -> _Found | None:
    """Apply the rule about the controls.

    The verdict is *no signal* if the model's own score is not better than chance, or not better than one of the
    controls. The controls are shuffled EEG, EEG shuffled within neighbourhoods, noise, no EEG, and predictors that get
    only the time, only the EEG before the picture, or only eye and face channels. The comparison with every control
    must hold, so the model must be better than the strongest control.
    """
    rows = [row for row in case.rows.values() if row.question == "signal"]
    lost = [row for row in rows if not row.holds]
    if not lost:
        return None
    reasons = []
    for row in sorted(lost, key=lambda row: -row.right):
        control = CONTROLS.get(row.name.removeprefix("own - "))
        other = f"the score of the control '{control}'" if control else "chance"
        reasons.append(f"The score is not better than {other}. {case.scores(row.name)}.")
        low = row.difference.over_images[0] if row.difference.over_images else 0.0
        if row.difference.p_people is not None and low > 0:
            reasons.append(
                "With the same people, the difference is above 0 for other images too. But the difference "
                f"depends on few people: the permutation test over people has p = {row.difference.p_people:.2g}."
            )
    return "no signal", reasons


def decide_by_content(case: _Case) -> _Found | None:
    """Apply the rule that tells whether the score shows only the category of the image, or more than the category.

    The verdict is *category only* if the generated image cannot identify the seen image among images of the same
    category. If the test concepts are new, the generated image is also compared with the training image that is most
    similar to it. If this training image scores as well as the generated image, the verdict is *category only*: the
    generated image shows only which trained concept is similar, and nothing about the new concept itself.
    """
    reasons = []
    if "identification - chance" in case.rows and not case.holds("identification - chance"):
        reasons.append(
            "The generated image does not identify the seen image among images of the same category. "
            f"{case.scores('identification - chance')}."
        )
    if case.evidence.new_concepts and "own - nearest" in case.rows and not case.holds("own - nearest"):
        reasons.append(
            "The nearest training image is as good as the generated image, so the generated image shows nothing of "
            f"the new concepts. {case.scores('own - nearest')}."
        )
    return ("category only", reasons) if reasons else None


RULES: tuple[Callable[[Any], _Found | None], ...] = (
    decide_by_design,
    decide_if_judgeable,
    decide_by_leaks,
    decide_by_controls,
    decide_by_content,
)
"""All rules, in the order in which `judge` applies them. If no rule holds, the verdict is *signal*."""


def _signal(case: _Case) -> _Found:
    rows = [row for row in case.rows.values() if row.question == "signal"]
    strongest = max(rows, key=lambda row: row.right)
    return "signal", [f"The score is better than every control. Strongest control: {case.scores(strongest.name)}."]


def _describe_scope(case: _Case) -> str:
    evidence = case.evidence
    people = len(np.unique(evidence.trials.subjects_n))
    who = "people who are not in the training trials" if evidence.new_people else "people of the training trials"
    if isinstance(evidence.train, TrialTable) and _share_recordings(evidence.trials, evidence.train):
        who += ", in recordings that also contain training trials"
    if evidence.new_people and evidence.people_in_pretraining:
        who += f" ({evidence.people_in_pretraining} of {people} people are in the pretraining data)"
    if people < FEWEST_SUBJECTS:
        who = f"only these {people} {who} (fewer than {FEWEST_SUBJECTS}, so no claim about people)"
    parts = [who, "new concepts" if evidence.new_concepts else "seen concepts"]
    if "identification" in case.not_applicable:
        parts.append("the category of the image; finer content was not tested")
    if isinstance(evidence.train, NotApplicable):
        parts.append("as declared, because the training trials were not given")
    return "; ".join(parts)


def _share_recordings(trials: TrialTable, train: TrialTable) -> bool:
    """Return whether a recording contains both test trials and training trials; unknown recordings do not count."""
    both, n = join_tables(trials, train), len(trials)
    group, known = group_recordings(both), both.recordings_n != ""
    return bool(np.isin(group[:n][known[:n]], group[n:][known[n:]]).any())


def _compare(case: _Case, resamples: int, seed: int) -> _Case:
    """Make all comparisons that the evidence allows."""
    evidence, n = case.evidence, len(case.evidence.trials)
    everything, none = np.ones(n, bool), np.zeros(n, bool)
    scores = {"own": (np.asarray(evidence.hits_n, float), everything)}
    missing = dict(case.not_applicable)
    found = {
        name: (control.hits_n, control.left_out_n)
        for name, control in evidence.controls.items()
        if not isinstance(control, NotApplicable)
    }
    if not isinstance(evidence.identification_n, NotApplicable):
        found["identification"] = (evidence.identification_n, evidence.identification_left_out_n)
    for name, (hits_n, left_out_n) in found.items():
        usable_n = ~(none if left_out_n is None else np.asarray(left_out_n, bool))
        if usable_n.sum() < FEWEST_TRIALS or len(np.unique(evidence.trials.images_n[usable_n])) < FEWEST_IMAGES:
            what = "same-category identification" if name == "identification" else "the control"
            missing[name] = f"{what} could be made for only {int(usable_n.sum())} of {n} trials."
            continue
        scores[name] = (np.asarray(hits_n, float), usable_n)
    chances = {"identification": 0.5, "own": evidence.chance}
    chance_of_predictors = max(evidence.chance, find_constant_score(evidence.trials, evidence.score_of))
    plan: list[tuple[Literal["leak", "signal", "content"], str, str]] = [
        *(("leak", name, "chance") for name in ("time", "baseline", "eyes")),
        ("leak", "shuffle_within", "shuffle"),
        ("signal", "own", "chance"),
        *(("signal", "own", name) for name in CONTROLS if name != "nearest"),
        ("content", "identification", "chance"),
        ("content", "own", "nearest"),
    ]
    columns = []
    for question, left, right in plan:
        if left not in scores or (right != "chance" and right not in scores):
            continue
        chance = chances.get(left, chance_of_predictors)
        other = (np.full(n, chance), everything) if right == "chance" else scores[right]
        columns.append((question, f"{left} - {right}", scores[left][0], other[0], scores[left][1] & other[1]))
    rows = measure_comparisons(evidence.trials, columns, resamples, seed)
    return dataclasses.replace(case, rows={row.name: row for row in rows}, not_applicable=missing)


def _describe_left_out(case: _Case) -> list[str]:
    n, notes = len(case.evidence.trials), []
    for name, control in case.evidence.controls.items():
        if isinstance(control, NotApplicable) or control.left_out_n is None or not np.any(control.left_out_n):
            continue
        what = "is not applicable" if name in case.not_applicable else "is not compared for these trials"
        notes.append(
            f"The control {name} could not be made for {int(np.sum(control.left_out_n))} of {n} trials and {what}."
        )
    single_n = case.evidence.identification_left_out_n
    if "identification" not in case.not_applicable and single_n is not None and np.any(single_n):
        notes.append(
            f"Same-category identification leaves out {int(np.sum(single_n))} of {n} trials, because the category of "
            "these trials has only one seen image."
        )
    return notes
