"""Tests of the written rules on scores that are given directly. `test_constructed_sets.py` simulates the EEG."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from data_sharding.common.errors import RequestError
from pretrain.evidence.rules import CONTROLS, Control, Evidence, NotApplicable, find_constant_score, judge
from pretrain.evidence.trials import TrialTable

PEOPLE, IMAGES, LABELS = 8, 40, 4
ABSENT = NotApplicable(reason="the cap has no such channels.")


def make_table(people: int = PEOPLE, images: int = IMAGES, prefix: str = "test", **columns: Any) -> TrialTable:
    person, image = (part.ravel() for part in np.meshgrid(np.arange(people), np.arange(images), indexing="ij"))
    values: dict[str, Any] = {
        "labels_n": image % LABELS,
        "images_n": [f"{prefix}-{i}" for i in image],
        "subjects_n": [f"s{p}" for p in person],
        "sessions_n": [""] * len(person),
        "recordings_n": ["r"] * len(person),
        "times_n": (image * 7 % images).astype(float),
    }
    return TrialTable(**(values | columns))


def draw(share: float, n: int, seed: int) -> np.ndarray:
    """Draw one score for each trial: a 1 with the probability `share`, and otherwise a 0."""
    return (np.random.default_rng(seed).random(n) < share).astype(float)


def make_evidence(own: float = 0.6, *, trials: TrialTable | None = None, **changes: Any) -> Evidence:
    """Make the evidence of an experiment without fault. `changes` replaces single fields of the evidence, or single
    controls."""
    trials = make_table() if trials is None else trials
    n = len(trials)
    shares = dict.fromkeys(CONTROLS, 0.25)
    controls: dict[str, Any] = {
        name: Control(hits_n=draw(share, n, 10 + number), checked=True)
        for number, (name, share) in enumerate(shares.items())
    }
    controls["eyes"] = ABSENT
    for name in [*CONTROLS]:
        if (value := changes.pop(name, None)) is not None:
            controls[name] = Control(hits_n=draw(value, n, 77), checked=True) if isinstance(value, float) else value
    values: dict[str, Any] = {
        "trials": trials,
        "train": make_table(prefix="train"),
        "design": "random",
        "design_evidence": "runs of one category are 1.3 trials long on average",
        "hits_n": draw(own, n, 1),
        "chance": 0.25,
        "score_of": "label",
        "controls": controls,
        "identification_n": np.random.default_rng(2).random(n) ** 0.4,
        "judge_n": np.ones(40),
        "new_people": False,
        "new_concepts": False,
    }
    return Evidence(**(values | changes))


def word(evidence: Evidence) -> str:
    return judge(evidence, resamples=500).word


class TestWords:
    def test_a_clean_experiment_shows_a_signal(self) -> None:
        verdict = judge(make_evidence(), resamples=500)
        assert verdict.word == "signal"
        assert verdict.scope == (
            "people of the training trials, in recordings that also contain training trials; seen concepts"
        )
        assert "runs of one category are 1.3 trials long" in " ".join(verdict.why)
        assert verdict.not_applicable == {"eyes": ABSENT.reason}
        assert {row.name for row in verdict.comparisons} == {
            *(f"{name} - chance" for name in ("time", "baseline", "own", "identification")),
            *(f"own - {name}" for name in CONTROLS if name != "eyes"),
            "shuffle_within - shuffle",
        }

    @pytest.mark.parametrize("design", ["block", "unknown"])
    def test_other_designs_are_confounded(self, design: Any) -> None:
        assert word(make_evidence(design=design, design_evidence="")) == "confounded"

    def test_a_constant_label_in_each_recording_is_confounded(self) -> None:
        # Each person has one recording for each label, as in a dataset of recordings during mental arithmetic and at
        # rest.
        labels = np.tile(np.repeat([0, 1], 20), 8)
        trials = make_table(labels_n=labels, recordings_n=[f"r{label}" for label in labels])
        verdict = judge(make_evidence(1.0, trials=trials, train=ABSENT), resamples=500)
        assert verdict.word == "confounded"
        assert "only one label" in verdict.why[0]

    @pytest.mark.parametrize("name", ["time", "baseline"])
    def test_predictors_without_response_confound(self, name: str) -> None:
        changes: dict[str, Any] = {name: 0.4}
        assert word(make_evidence(0.9, **changes)) == "confounded"

    def test_chance_of_a_predictor_is_the_commonest_label(self) -> None:
        labels = np.where(np.arange(IMAGES) < 28, 0, np.arange(IMAGES) % LABELS)
        trials = make_table(labels_n=np.tile(labels, PEOPLE))
        constant = Control(hits_n=(trials.labels_n == 0).astype(float), checked=True)
        found = judge(make_evidence(0.95, trials=trials, time=constant), resamples=500)
        assert found.word == "signal"

    def test_chance_of_a_predictor_in_a_search_of_images_is_a_half_whatever_the_labels(self) -> None:
        labels = np.where(np.arange(IMAGES) < 28, 0, np.arange(IMAGES) % LABELS)
        trials = make_table(labels_n=np.tile(labels, PEOPLE))
        rng = np.random.default_rng(5)
        changes: dict[str, Any] = {
            name: Control(hits_n=rng.random(len(trials)), checked=True) for name in CONTROLS if name != "eyes"
        }
        changes["time"] = Control(hits_n=rng.random(len(trials)) ** 0.6, checked=True)
        search = make_evidence(0.9, trials=trials, chance=0.5, score_of="image", **changes)
        verdict = judge(search, resamples=500)
        assert verdict.word == "confounded" and "predicted from the time" in verdict.why[0]
        row = next(row for row in verdict.comparisons if row.name == "time - chance")
        assert (row.left > 0.6, row.right) == (True, 0.5)
        # If the scores are called scores of labels, the chance level is the share of the most common label, 78 %. The
        # score of the time is below this level, so the rules do not notice that the time predicts the image.
        assert word(dataclasses.replace(search, score_of="label")) == "signal"

    def test_the_chance_of_a_search_is_the_score_of_the_best_constant_label(self) -> None:
        rng = np.random.default_rng(3)
        shown = rng.choice(IMAGES, 500, p=(p := rng.random(IMAGES) ** 3) / p.sum())
        shown[:IMAGES] = np.arange(IMAGES)
        label = rng.integers(0, LABELS, IMAGES)
        n = len(shown)
        trials = make_table(1, n, labels_n=label[shown], images_n=[f"i{i}" for i in shown], times_n=np.arange(n))
        scores = []
        for constant in range(LABELS):
            similar = (label == constant).astype(float)
            other = np.arange(IMAGES) != shown[:, None]
            better = (similar < similar[shown][:, None]) + 0.5 * (similar == similar[shown][:, None])
            scores.append((better * other).sum() / other.sum())
        assert find_constant_score(trials, "image") == pytest.approx(max(scores)) and max(scores) > 0.52
        assert find_constant_score(trials, "label") == np.bincount(label[shown]).max() / n
        skewed = make_table(labels_n=np.tile(np.arange(IMAGES) > 7, PEOPLE))
        assert find_constant_score(skewed, "image") == pytest.approx(0.5)

    def test_a_shuffle_within_neighbourhoods_that_costs_nothing_confounds(self) -> None:
        assert word(make_evidence(0.6, shuffle_within=0.6)) == "confounded"
        # If the shuffle within neighbourhoods lowers the score, but less than the shuffle over all trials, the verdict
        # is confounded, too.
        assert word(make_evidence(0.9, shuffle_within=0.5)) == "confounded"

    def test_eyes_confound_only_if_the_model_is_not_better(self) -> None:
        assert word(make_evidence(0.6, eyes=0.6)) == "confounded"
        assert word(make_evidence(0.9, eyes=0.4)) == "signal"

    @pytest.mark.parametrize("name", ["shuffle", "noise", "no_eeg"])
    def test_a_score_like_that_of_a_control_is_no_signal(self, name: str) -> None:
        changes: dict[str, Any] = {"own": 0.6, name: 0.6}
        if name == "shuffle":
            changes["shuffle_within"] = 0.6
        verdict = judge(make_evidence(**changes), resamples=500)
        assert verdict.word == "no signal"
        assert CONTROLS[name] in verdict.why[0]

    def test_a_score_at_chance_is_no_signal_even_if_controls_are_lower(self) -> None:
        zero: dict[str, Any] = dict.fromkeys(("shuffle", "shuffle_within", "noise", "no_eeg"), 0.0)
        assert word(make_evidence(0.25, **zero)) == "no signal"

    def test_one_strong_person_is_no_signal(self) -> None:
        trials = make_table()
        strong = trials.subjects_n == "s3"
        hits = np.where(strong, 1.0, draw(0.25, len(trials), 5))
        verdict = judge(make_evidence(hits_n=hits), resamples=500)
        assert verdict.word == "no signal"
        assert "the difference depends on few people" in " ".join(verdict.why)

    def test_category_only(self) -> None:
        verdict = judge(make_evidence(identification_n=np.random.default_rng(0).random(320)), resamples=500)
        assert verdict.word == "category only"
        assert verdict.scope is not None

    def test_new_concepts_need_more_than_the_nearest_training_image(self) -> None:
        train = make_table(labels_n=np.tile(np.arange(IMAGES) % LABELS, PEOPLE) + 10, prefix="train")
        absent = dict.fromkeys(("time", "baseline"), NotApplicable(reason="no test label was trained on."))
        good = judge(make_evidence(train=train, new_concepts=True, **absent), resamples=500)
        assert (good.word, good.scope) == (
            "signal",
            "people of the training trials, in recordings that also contain training trials; new concepts",
        )
        own = draw(0.6, 320, 1)
        memory = Control(hits_n=own, checked=True)
        assert word(make_evidence(train=train, new_concepts=True, nearest=memory, **absent)) == "category only"
        # If the concepts were seen in training, the nearest training image may be of the right category, so being equal
        # to it is no fault.
        assert word(make_evidence(nearest=memory)) == "signal"


class TestWhatCanBeJudged:
    def test_a_judge_that_does_not_know_the_labels(self) -> None:
        # The judge has no training image of any test label, so even a perfect generator would score 0.
        evidence = make_evidence(hits_n=np.zeros(320), chance=0.0, judge_n=np.zeros(40))
        verdict = judge(evidence, resamples=500)
        assert verdict.word == "not judgeable"
        assert "judge fails on real images" in verdict.why[0]

    def test_many_test_images_in_the_training_trials(self) -> None:
        verdict = judge(make_evidence(train=make_table(images=3)), resamples=500)
        assert verdict.word == "not judgeable" and verdict.left_out == 0
        assert "The image of 24 of 320 test trials, or a copy of the image" in verdict.why[0]

    def test_few_test_images_in_the_training_trials_are_left_out(self) -> None:
        verdict = judge(make_evidence(train=make_table(images=2)), resamples=500)
        assert verdict.word == "signal" and verdict.left_out == 16
        assert {row.n for row in verdict.comparisons} == {304}
        assert "The verdict leaves out 16 of 320 test trials" in " ".join(verdict.why)

    @pytest.mark.parametrize(("count", "found"), [(16, "signal"), (17, "not judgeable")])
    def test_eeg_in_the_training_trials(self, count: int, found: str) -> None:
        verdict = judge(make_evidence(1.0, known_eeg={"training trials": np.arange(320) < count}), resamples=500)
        assert verdict.word == found
        assert f"The EEG of {count} of 320 test trials, or a part of the EEG, is also in the training trials" in (
            " ".join(verdict.why)
        )

    def test_remembered_trials_alone_are_no_signal(self) -> None:
        # The model remembers the EEG of one trial in twenty and scores 1 in these trials, for all people. In all other
        # trials, its score is at chance.
        known_n = np.arange(320) % 20 == 0
        hits_n = np.where(known_n, 1.0, draw(0.25, 320, 3))
        assert word(make_evidence(hits_n=hits_n, known_eeg={"training trials": known_n})) == "no signal"

    def test_other_recordings_of_the_same_people_are_no_shared_recordings(self) -> None:
        train = make_table(prefix="train", recordings_n=["other"] * 320)
        for found in (train, make_table(prefix="train", recordings_n=[""] * 320)):
            assert judge(make_evidence(train=found), resamples=500).scope == (
                "people of the training trials; seen concepts"
            )

    def test_people_of_the_pretraining_data_change_the_scope(self) -> None:
        train = make_table(prefix="train", subjects_n=[f"t{i}" for i in range(320)])
        verdict = judge(make_evidence(train=train, new_people=True, people_in_pretraining=3), resamples=500)
        assert verdict.scope == (
            "people who are not in the training trials (3 of 8 people are in the pretraining data); seen concepts"
        )

    def test_too_few_trials_or_images(self) -> None:
        assert word(make_evidence(trials=make_table(people=1, images=19))) == "not judgeable"
        assert word(make_evidence(trials=make_table(images=9))) == "not judgeable"

    def test_no_shuffled_control(self) -> None:
        assert word(make_evidence(shuffle=NotApplicable(reason="there is one trial."))) == "not judgeable"
        alone = Control(hits_n=draw(0.25, 320, 3), checked=True, left_out_n=np.arange(320) >= 10)
        assert word(make_evidence(shuffle=alone)) == "not judgeable"

    def test_a_missing_control_is_named_and_does_not_block_a_random_design(self) -> None:
        missing = NotApplicable(reason="the files have lost the order of the trials.")
        verdict = judge(make_evidence(shuffle_within=missing, time=missing), resamples=500)
        assert verdict.word == "signal"
        assert "Not applicable: time, because the files have lost the order of the trials." in verdict.why

    def test_trials_without_a_control_are_left_out_and_counted(self) -> None:
        left_out = np.arange(320) < 40
        # In these 40 trials, the control has the same scores as the model, so the verdict must leave the trials out.
        hits = np.where(left_out, draw(0.6, 320, 1), draw(0.25, 320, 4))
        control = Control(hits_n=hits, checked=True, left_out_n=left_out)
        verdict = judge(make_evidence(shuffle_within=control), resamples=500)
        row = next(row for row in verdict.comparisons if row.name == "own - shuffle_within")
        assert row.n == 280
        assert row.right == pytest.approx(hits[40:].mean())
        assert any("40 of 320 trials" in sentence for sentence in verdict.why)

    def test_few_people_limit_the_scope(self) -> None:
        trials = make_table(people=3)
        verdict = judge(make_evidence(trials=trials, new_people=True, train=ABSENT), resamples=500)
        assert verdict.word == "signal"
        assert verdict.scope is not None
        assert "only these 3 people" in verdict.scope and "no claim about people" in verdict.scope
        assert "as declared" in verdict.scope
        assert all(row.difference.over_people is None for row in verdict.comparisons)

    def test_untested_content_limits_the_scope(self) -> None:
        single = NotApplicable(reason="each category has one image.")
        verdict = judge(make_evidence(identification_n=single), resamples=500)
        assert verdict.word == "signal"
        assert verdict.scope is not None and "finer content was not tested" in verdict.scope

    def test_trials_without_identification_are_left_out_and_counted(self) -> None:
        single_n = np.arange(320) < 20
        at_chance = np.where(single_n, 1.0, np.random.default_rng(0).random(320))
        verdict = judge(make_evidence(identification_n=at_chance, identification_left_out_n=single_n), resamples=500)
        assert verdict.word == "category only"
        (row,) = (row for row in verdict.comparisons if row.name == "identification - chance")
        assert row.n == 300 and any("leaves out 20 of 320 trials" in sentence for sentence in verdict.why)
        few = judge(make_evidence(identification_n=at_chance, identification_left_out_n=np.arange(320) > 9))
        assert few.word == "signal" and "could be made for only 10" in few.not_applicable["identification"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"hits_n": np.full(320, np.nan)}, "hits_n: 320 of 320 values are NaN"),
            ({"hits_n": np.full(320, 2.0)}, "from 0 to 1"),
            ({"hits_n": np.zeros(3)}, "one value for each of the 320 trials"),
            ({"identification_n": np.full(320, np.nan)}, "identification_n"),
            ({"judge_n": np.array([])}, "judge_n"),
            ({"noise": Control(hits_n=np.full(320, np.nan), checked=True)}, "control noise"),
            ({"shuffle": Control(hits_n=np.zeros(320), checked=False)}, "not checked to be a control"),
            ({"shuffle": Control(hits_n=np.zeros(320), checked=True, left_out_n=np.zeros(2, bool))}, "left_out_n"),
            ({"design_evidence": " "}, "design_evidence is empty"),
            ({"controls": {}}, "missing or unknown"),
            ({"chance": 1.0}, "chance"),
            ({"new_people": True}, "new_people is true, but 8"),
            ({"new_concepts": True}, "new_concepts is true, but 4"),
        ],
    )
    def test_wrong_evidence_is_refused(self, changes: dict[str, Any], says: str) -> None:
        with pytest.raises(RequestError, match=says):
            judge(make_evidence(**changes))

    def test_a_reason_is_needed(self) -> None:
        with pytest.raises(RequestError, match="without a reason"):
            NotApplicable(reason="")

    def test_few_resamples_are_refused(self) -> None:
        with pytest.raises(RequestError, match="at least 500"):
            judge(make_evidence(), resamples=100)


def test_the_verdict_is_the_same_again_and_goes_through_json() -> None:
    verdict = judge(make_evidence(), resamples=500)
    assert json.loads(json.dumps(verdict.as_json(), allow_nan=False)) == judge(make_evidence(), resamples=500).as_json()
    row = verdict.as_json()["comparisons"][0]
    assert row["difference"]["interval"] == list(verdict.comparisons[0].difference.interval)
    assert dataclasses.asdict(verdict.comparisons[0])["p_corrected"] == row["p_corrected"]


def test_p_values_are_corrected_within_a_question() -> None:
    rows = judge(make_evidence(), resamples=500).comparisons
    for question in ("leak", "signal", "content"):
        some = [row for row in rows if row.question == question]
        assert min(row.p_corrected for row in some) >= min(row.difference.p for row in some)
        smallest = min(some, key=lambda row: row.difference.p)
        assert smallest.p_corrected == pytest.approx(min(1.0, len(some) * smallest.difference.p))
