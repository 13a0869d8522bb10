"""Copies of a recording are found even if they have another format, other units or other channels. Recordings with
different signals are not reported as copies."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.audit.duplicates import (
    NEIGHBOURS,
    SKETCH,
    Copy,
    RecordingFingerprint,
    candidate_pairs,
    compare,
    find_duplicates,
    find_matches,
    preference,
    signature,
)
from data_sharding.processing.preprocess import resample
from data_sharding.processing.survey import assess

RATE = 250.0


def make_eeg(seed: int, n: int = 8, seconds: float = 10.0, rate: float = RATE, alpha: float = 1.0) -> np.ndarray:
    """Make pink noise of about 20 microvolts with alpha bursts. A part of the noise is the same in all channels."""
    rng = np.random.default_rng(seed)
    size = int(seconds * rate)
    spectrum = np.fft.rfft(rng.normal(size=(n + 1, size)), axis=1)
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(size, 1 / rate), 0.5))
    x = np.fft.irfft(spectrum, size, axis=1)
    x /= x.std(axis=1, keepdims=True)
    t = np.arange(size) / rate
    wave = np.sin(2 * np.pi * rng.uniform(9, 11) * t + rng.uniform(0, 6)) * np.sin(
        2 * np.pi * 0.2 * t + rng.uniform(0, 6)
    )
    return 20 * (x[1:] + x[:1] + alpha * wave)


def make_fingerprint(key: str, x: np.ndarray, rate: float = RATE) -> RecordingFingerprint:
    points = assess(x, rate).fingerprint
    return RecordingFingerprint(
        key=key, sha256=key, seconds=x.shape[1] / rate, signature=signature(points), points=points
    )


def make_variants(x: np.ndarray) -> dict[str, RecordingFingerprint]:
    double = resample(x, RATE, 2 * RATE)
    return {
        "rounded to 0.1 microvolts": make_fingerprint("b", np.round(x / 0.1) * 0.1),
        "another unit and offset": make_fingerprint("b", 1e-3 * x + 50),
        "last record padded": make_fingerprint("b", np.concatenate([x, np.zeros((len(x), 300))], axis=1)),
        "another order of channels": make_fingerprint("b", x[::-1]),
        "half of the channels": make_fingerprint("b", x[::2]),
        "another rate": make_fingerprint("b", double, 2 * RATE),
        "one more channel": make_fingerprint("b", np.concatenate([x, make_eeg(99, 1)])),
        "some noise": make_fingerprint("b", x + np.random.default_rng(5).normal(0, 1.0, x.shape)),
        "only its beginning": make_fingerprint("b", x[:, : int(0.7 * x.shape[1])]),
    }


@pytest.mark.parametrize("what", list(make_variants(make_eeg(0))))
def test_changed_copy_is_found(what: str) -> None:
    found = find_duplicates(
        [make_fingerprint("a", make_eeg(0)), make_fingerprint("other", make_eeg(1)), make_variants(make_eeg(0))[what]]
    )
    assert list(found) == ["b"] and found["b"].kept == "a"
    assert ("same beginning, 7.0 of 10.0 s" in found["b"].difference) == (what == "only its beginning")


def test_copies_beyond_the_documented_limits_are_not_found() -> None:
    """Two kinds of copies are not found: a part from the middle of a recording, and a copy with another reference if
    there are more than 40 channels (see docs/leakage.md)."""
    x, many = make_eeg(0, alpha=0.0), make_eeg(1, 80, alpha=0.0)
    assert find_duplicates([make_fingerprint("a", x), make_fingerprint("b", x[:, 500:])]) == {}
    assert find_duplicates([make_fingerprint("a", many), make_fingerprint("b", many - many[:1])]) == {}


@pytest.mark.parametrize("n", [8, 19, 32])
def test_other_references_and_channel_combinations_are_found(n: int) -> None:
    rng = np.random.default_rng(n)
    x = make_eeg(0, n)
    mixing = rng.normal(size=(n, n))
    components = np.linalg.inv(mixing) @ x
    components[0] = 0
    others = {
        "average": x - x.mean(axis=0),
        "one electrode": np.delete(x - x[1], 1, axis=0),
        "bipolar": x[1:] - x[:-1],
        "inverted": -x,
        "one component taken out": mixing @ components,
    }
    for name, y in others.items():
        prints = [
            make_fingerprint("a", x),
            make_fingerprint("other", make_eeg(7, n)),
            make_fingerprint("b", np.round(y, 1)),
        ]
        found = find_duplicates(prints)
        assert list(found) == ["b"] and found["b"].kept == "a", name


@settings(max_examples=25, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 2**31), min_size=12, max_size=12, unique=True),
    n=st.integers(1, 32),
    seconds=st.sampled_from([2.0, 4.0, 8.0]),
    alpha=st.sampled_from([0.0, 1.0, 10.0]),
)
def test_different_recordings_are_different(seeds: list[int], n: int, seconds: float, alpha: float) -> None:
    """Different recordings are not duplicates, even if a strong rhythm or a common reference makes all channels
    similar."""
    points = [assess(make_eeg(seed, n, seconds, alpha=alpha), RATE).fingerprint for seed in seeds]
    assert not any(compare(points[i], points[j], seconds, seconds) for i in range(12) for j in range(i))


def test_switch_on_transient_is_not_a_match() -> None:
    """When an amplifier is switched on, the signal has a step of some millivolts. After filtering, this step has the
    same shape in every recording."""
    step = np.where(np.arange(2500) < 20, -5e3, 0.0)
    prints = [make_fingerprint(str(i), make_eeg(i) + step) for i in range(12)]
    corr = [np.corrcoef(prints[0].points[0], p.points[0])[0, 1] for p in prints[1:]]  # type: ignore[index]
    assert min(corr) > 0.99, "the first points of different recordings must be similar"
    assert find_duplicates(prints) == {}


def test_calibration_signal_at_the_start_is_not_a_match() -> None:
    t = np.arange(5000) / RATE
    wave = 50 * np.sign(np.sin(2 * np.pi * 0.9 * t[:2500]))
    prints = []
    for i in range(4):
        rest = make_eeg(i, 6, 8.0 + 3 * i)
        prints.append(
            make_fingerprint(str(i), np.concatenate([np.tile(wave, (6, 1)) + 0.05 * make_eeg(i, 6), rest], axis=1))
        )
    assert find_duplicates(prints) == {}


@pytest.mark.parametrize("seconds", [20.0, 60.0, 200.0])
@pytest.mark.parametrize("longer", [0.0, 9.0])
def test_two_people_with_the_same_calibration_are_two_recordings(seconds: float, longer: float) -> None:
    """The recordings begin with the same calibration signal. This signal is different in each channel, like EEG, and
    lasts longer than the first 64 points of the fingerprint."""
    calibration = make_eeg(50, 6, 9.0)
    prints = [
        make_fingerprint(str(i), np.concatenate([calibration, make_eeg(i, 6, seconds - 9 + i * longer)], axis=1))
        for i in range(3)
    ]
    assert signature(prints[0].points) == signature(prints[1].points), "equal signatures"  # type: ignore[arg-type]
    assert find_duplicates(prints) == {}


@pytest.mark.parametrize("seconds", [20.0, 60.0, 200.0])
def test_copies_of_a_longer_recording_are_found(seconds: float) -> None:
    x = make_eeg(60, 6, seconds)
    cut = np.delete(x, slice(int(0.6 * x.shape[1]), int(0.7 * x.shape[1])), axis=1)
    for other in (np.round(1e-3 * x + 5, 4), x - x.mean(axis=0), x[::2], x[:, : int(0.8 * x.shape[1])], cut):
        assert list(find_duplicates([make_fingerprint("a", x), make_fingerprint("b", other)])) == ["b"]
    double = resample(x, RATE, 2 * RATE)
    assert list(find_duplicates([make_fingerprint("a", x), make_fingerprint("b", double, 2 * RATE)])) == ["b"]


def test_fingerprints_of_older_datasets_are_compared_by_their_beginning() -> None:
    new = make_fingerprint("a", make_eeg(61, 6, 60.0))
    assert new.points is not None and new.points.shape == (6, 128)
    old = RecordingFingerprint(key="b", sha256="b", seconds=60.0, points=new.points[:, :64])
    assert list(find_duplicates([new, old])) == ["b"]


def test_too_short_recordings_are_compared_only_by_checksum() -> None:
    x = make_eeg(0, seconds=1.2)
    a, b = make_fingerprint("a", x), make_fingerprint("b", x)
    assert a.signature == [] and find_duplicates([a, b]) == {}
    b.sha256 = "a"
    assert find_duplicates([a, b]) == {"b": Copy(kept="a")}


def test_all_copies_in_a_chain_name_the_kept_recording() -> None:
    x = make_eeg(0)
    again = make_fingerprint("c", np.round(x))
    again.sha256 = "b"
    assert find_duplicates([make_fingerprint("a", x), make_fingerprint("b", np.round(x, 1)), again]) == {
        "b": Copy(kept="a"),
        "c": Copy(kept="a"),
    }


def test_matches_between_two_collections_are_found() -> None:
    ours, theirs = (
        [make_fingerprint(f"o{i}", make_eeg(i)) for i in range(4)],
        [make_fingerprint("t9", make_eeg(9)), make_fingerprint("t2", np.round(make_eeg(2), 1))],
    )
    load = {p.key: p.points for p in [*ours, *theirs]}
    assert find_matches(ours, theirs, load.__getitem__, load.__getitem__) == [(2, 1, "same")]  # type: ignore[arg-type]


def test_preferred_copy_has_trials_then_known_subject_then_length(make_row) -> None:
    rows = {
        "trials": make_row("t", subject="s", seconds=60.0, n_kept=8),
        "unknown": make_row("u", seconds=600.0, n_kept=128),
        "longer": make_row("l", subject="s", seconds=600.0, n_kept=8),
        "more": make_row("m", subject="s", seconds=601.0, n_kept=9),
        "interruptions": make_row("i", subject="s", seconds=601.0, n_kept=8, segments=3),
        "epochs": make_row("e", subject="s", seconds=601.0, n_kept=64, segments=300),
    }
    order = sorted(rows, key=lambda name: preference(rows[name], trials=name == "trials"))
    assert order == ["trials", "interruptions", "more", "longer", "epochs", "unknown"]


def test_candidate_pairs_of_100_000_recordings_fit_in_memory() -> None:
    """Compare the signatures of 100,000 recordings, of which 200 are copies. All recordings have one hash in common."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2**62, (100_000, SKETCH - 1))
    numbers[100:300] = numbers[10_000:10_200]
    prints = [
        RecordingFingerprint(key=str(i), sha256="", seconds=600.0 + i % 100, signature=[7, *row])
        for i, row in enumerate(numbers.tolist())
    ]
    tracemalloc.start()
    pairs = candidate_pairs(prints)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pairs == [(i, i + 9_900) for i in range(100, 300)]
    assert peak < 1e9 and NEIGHBOURS * len(prints) * 8 < 1e8
