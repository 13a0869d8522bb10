"""Tests of the demo's corpus.

A seed always gives the same bytes, and the recordings contain the effects that `truth.json` lists.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_sharding.audit.fingerprints import find_similar_images, fingerprint_image
from launch.demo.attributes import identify, measure_colour
from launch.demo.corpus import OTHER_PICTURES, make_corpus
from launch.demo.pictures import (
    CATEGORIES,
    NEW_IN_TEST,
    SPLIT_SIZES,
    draw_picture,
    encode_picture,
    make_pictures,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "corpus"
    make_corpus(path, 5)
    return path


@pytest.fixture(scope="module")
def truth(corpus: Path) -> dict:
    return json.loads((corpus / "truth.json").read_text())


def hash_files(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_seed_gives_the_same_bytes(corpus: Path, tmp_path: Path):
    make_corpus(tmp_path / "again", 5)
    assert hash_files(tmp_path / "again") == hash_files(corpus)
    assert make_pictures(5) != make_pictures(6)


def read(path: Path):
    import mne

    return mne.io.read_raw(path, preload=True, verbose="error")


def test_recordings_hold_what_truth_says(corpus: Path, truth: dict):
    assert len(truth["unpaired"]) == 12
    assert len({r["format"] for r in truth["unpaired"]}) == 5
    assert len({r["montage"] for r in truth["unpaired"]}) == 5
    assert len({r["sfreq"] for r in truth["unpaired"]}) == 4
    seen = set()
    for facts in truth["unpaired"]:
        if facts["format"] in seen and not facts["dead_channel"]:
            continue
        seen.add(facts["format"])
        raw = read(corpus / facts["path"])
        assert (len(raw.ch_names), raw.info["sfreq"]) == (facts["channels"], facts["sfreq"])
        assert len(raw.times) / facts["sfreq"] == pytest.approx(facts["seconds"], abs=1)
        x = raw.get_data() * 1e6
        x -= x.mean(axis=1, keepdims=True)
        flat = [name for name, row in zip(raw.ch_names, x, strict=True) if row.std() < 0.1]
        assert flat == ([facts["dead_channel"]] if facts["dead_channel"] else [])
        spread = np.median(x.std(axis=1))
        assert 3 < spread < 100, "the amplitude is that of EEG in microvolts"
        power = (np.abs(np.fft.rfft(x, axis=1)) ** 2).mean(axis=0)
        f = np.fft.rfftfreq(x.shape[1], 1 / facts["sfreq"])

        def band(low: float, high: float, power=power, f=f) -> float:
            return float(power[(f >= low) & (f < high)].mean())

        assert band(1, 4) > band(13, 20) > band(30, 45), "power falls with frequency"
        assert band(49.5, 50.5) > 5 * band(40, 48), "mains hum"
        own = truth["subjects"][facts["subject"]]["alpha_hz"]
        assert band(own - 0.5, own + 0.5) > 1.5 * band(14, 18), "alpha"


def test_events_and_pictures(corpus: Path, truth: dict):
    facts = truth["paired"][0]
    recording = corpus / facts["path"]
    with (recording.parent / f"{recording.stem}_events.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert len(rows) == len({row["image_id"] for row in rows}) == facts["trials"]
    assert all((corpus / "paired" / row["image"]).is_file() for row in rows)
    assert np.diff([float(row["onset"]) for row in rows]).min() > 1.05
    order = [CATEGORIES.index(row["label_name"]) for row in rows]
    repeats = np.mean(np.diff(order) == 0)
    assert 0.15 < repeats < 0.35, "no blocks: a category follows itself as often as in random order"
    for recording in truth["paired"]:
        with (corpus / recording["path"]).with_name(f"{Path(recording['path']).stem}_events.tsv").open() as stream:
            shown = [row["split"] for row in csv.DictReader(stream, delimiter="\t")]
        own = recording["split"]
        assert shown.count(own) == 4 * truth["pictures_per_category"][own], "a person sees all pictures of its split"
        assert len(shown) - shown.count(own) == OTHER_PICTURES
    others = [
        csv.DictReader((corpus / r["path"]).with_name(f"{Path(r['path']).stem}_events.tsv").open(), delimiter="\t")
        for r in truth["paired"][1:3]
    ]
    orders = [[row["image_id"] for row in rows], *([row["image_id"] for row in other] for other in others)]
    assert len({tuple(o) for o in orders}) == 3, "every subject sees the pictures in another order"


def test_colours_are_balanced_within_each_category():
    pictures = make_pictures(0)
    for category in range(len(CATEGORIES)):
        own = [p for p in pictures if p.category == category and p.split == "train"]
        assert list(Counter(p.colour for p in own).values()) == [20, 20, 20]
        assert np.mean([p.background for p in own]) == pytest.approx(0.3, abs=0.02)
    assert draw_picture(pictures[0]).shape == (32, 32, 3)


@pytest.mark.parametrize("seed", range(20))
def test_the_splits_share_no_picture_and_some_combinations_are_new(seed: int):
    pictures = make_pictures(seed)
    parts = {split: [p for p in pictures if p.split == split] for split in SPLIT_SIZES}
    prints = {split: [fingerprint_image(encode_picture(p)) for p in part] for split, part in parts.items()}
    for one, other in itertools.combinations(prints, 2):
        assert not find_similar_images(prints[one], prints[other])
    trained = {(p.category, p.colour) for p in parts["train"]}
    assert len(trained) == 12, "a quarter of the 16 combinations is never trained on"
    for p in pictures:
        assert p.new_combination == ((p.category, p.colour) not in trained)
    new = [p for p in parts["test"] if p.new_combination]
    assert len(new) == 4 * NEW_IN_TEST and len(parts["test"]) > len(new)


def test_the_colour_can_be_measured_in_every_picture():
    for seed in range(5):
        for picture in make_pictures(seed):
            assert measure_colour(draw_picture(picture)) == picture.colour


def test_identification_compares_with_pictures_of_the_same_group():
    real = np.zeros((4, 4, 4, 3), np.uint8)
    for i in range(4):
        real[i, i] = 200
    ids, groups = ["a", "b", "c", "d"], [0, 0, 0, 1]
    generated = real[[0, 2, 2, 3]]
    # The picture generated for "b" shows "c". So "c" is more similar to the generated picture than "b" is, and "a" is
    # as similar as "b".
    np.testing.assert_allclose(identify(generated, real, ids, groups), [1.0, 0.25, 1.0, np.nan])


def test_the_category_can_be_decoded_across_people(corpus: Path, truth: dict):
    from scipy.signal import butter, sosfiltfilt
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    def epochs(facts: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        path = corpus / facts["path"]
        raw = read(path)
        x = raw.get_data() * 1e6
        x = sosfiltfilt(butter(4, (0.5, 45), "band", fs=250, output="sos"), x - x.mean(axis=0))
        with (path.parent / f"{path.stem}_events.tsv").open() as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
        starts = [round(float(row["onset"]) * 250) for row in rows]
        windows = np.stack([x[:, s : s + 250].reshape(64, 25, 10).mean(axis=2) for s in starts]).reshape(len(rows), -1)
        windows /= windows.std(axis=1, keepdims=True)
        return windows, np.array([row["label_name"] for row in rows]), np.array([row["split"] for row in rows])

    people = {split: [epochs(r) for r in truth["paired"] if r["split"] == split] for split in ("train", "test")}
    x, y = (np.concatenate([p[i][p[2] == "train"] for p in people["train"]]) for i in (0, 1))
    held_x, held_y = (np.concatenate([p[i][p[2] == "test"] for p in people["test"]]) for i in (0, 1))
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x, y)
    accuracy = model.score(held_x, held_y)
    assert 0.6 < accuracy < 0.995, "decodable across people, but not perfectly"
