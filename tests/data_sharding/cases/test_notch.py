"""The notch filter removes the mains noise and its harmonics, even if the mains frequency drifts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import sosfiltfilt, welch

from data_sharding.audit.report_figures import measure_mains_peaks
from data_sharding.processing.preprocess import BEFORE, PreprocessSpec, filters
from data_sharding.processing.survey import assess

SECONDS = 120
CORPUS = Path(os.environ.get("DREAMSCALE_EEG_CORPUS") or "/nonexistent")


def make_pink(n: int, sfreq: float, seed: int = 0) -> np.ndarray:
    """Make pink noise of 20 microvolts, and add some white noise, like the noise of an amplifier."""
    rng, samples = np.random.default_rng(seed), int(SECONDS * sfreq)
    spectrum = np.fft.rfft(rng.normal(size=(n, samples)), axis=1)
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(samples, 1 / sfreq), 0.5))
    x = np.fft.irfft(spectrum, axis=1)
    return 20 * x / x.std(axis=1, keepdims=True) + 0.3 * rng.normal(size=(n, samples))


def filter_spectrum(x: np.ndarray, spec: PreprocessSpec, line: float) -> tuple[np.ndarray, np.ndarray]:
    y = sosfiltfilt(filters(spec.sfreq, spec, line), x, axis=1)
    frequency, power = welch(y[:, 1024:-1024], spec.sfreq, nperseg=int(2 * spec.sfreq), axis=1)
    return frequency, np.median(power, axis=0)


def measure_peak(frequency: np.ndarray, power: np.ndarray, line: float) -> float:
    """Return the largest power at most 1.5 Hz from the mains frequency, divided by the median power just outside the
    notch."""
    distance = np.abs(frequency - line)
    return float(power[distance <= 1.5].max() / np.median(power[(distance > 4) & (distance < 9)]))


@pytest.mark.parametrize("line", [50.0, 60.0])
@pytest.mark.parametrize("drift", ["none", "constant", "slow"])
def test_no_peak_is_left_at_the_mains_frequency_and_its_harmonics(line: float, drift: str) -> None:
    spec = PreprocessSpec(sfreq=300.0, lowpass=95.0)
    x = make_pink(4, 300.0)
    t = np.arange(x.shape[1]) / 300.0
    offset = {"none": 0.0 * t, "constant": 0.2 + 0.0 * t, "slow": 0.2 * np.sin(2 * np.pi * t / 60)}[drift]
    phase = 2 * np.pi * np.cumsum(line + offset) / 300.0
    frequency, power = filter_spectrum(x + 200 * np.sin(phase) + 40 * np.sin(2 * phase), spec, line)
    assert measure_peak(frequency, power, line) < 1.0
    # The harmonic at twice the mains frequency is above the pass band. The mains noise of this signal has no higher
    # harmonics.
    assert measure_peak(frequency, power, 2 * line) < 1.5
    # The filter does not change the frequencies next to the notch.
    _, without = filter_spectrum(x, PreprocessSpec(sfreq=300.0, notch="off"), line)
    beside = (np.abs(frequency - line) > 5) & (frequency > 10) & (frequency < line + 20)
    np.testing.assert_allclose(power[beside] / without[beside], 1.0, atol=0.25)


def test_harmonics_that_the_band_already_removes_get_no_filter() -> None:
    spec = PreprocessSpec(sfreq=500.0, lowpass=40.0)
    assert len(filters(500.0, spec, 50.0)) == 4 + 2, "only 50 Hz: 100 Hz is far above the band"
    assert len(filters(500.0, PreprocessSpec(sfreq=500.0), 50.0)) == 4 + 2 * 3, "50, 100 and 150 Hz"
    assert len(filters(500.0, spec, None)) == 4
    slow = PreprocessSpec(sfreq=100.0, lowpass=45.0)
    assert len(filters(100.0, slow, 50.0)) == 4, "50 Hz is not below half of the target rate"


def test_specs_of_older_versions_keep_their_filter() -> None:
    old = PreprocessSpec().to_dict()
    for key in BEFORE:
        old.pop(key, None)
    spec = PreprocessSpec.from_dict(old)
    assert spec.notch_width_hz == 0 and len(filters(256.0, spec, 50.0)) == 4 + 1
    assert spec.to_dict() == old and PreprocessSpec.from_dict(PreprocessSpec().to_dict()) == PreprocessSpec()


class TestMainsFrequency:
    def test_large_common_artefacts_do_not_hide_the_mains(self) -> None:
        x = make_pink(12, 250.0)
        rng, t = np.random.default_rng(1), np.arange(x.shape[1]) / 250.0
        x += 3 * np.sin(2 * np.pi * 50 * t) * rng.uniform(-1.5, 1.5, (12, 1))
        common = np.zeros(x.shape[1])
        common[rng.integers(0, x.shape[1], 400)] = 3000.0
        assert assess(x + common, 250.0).line_freq == 50.0
        assert assess(make_pink(12, 250.0) + common, 250.0).line_freq is None

    def test_the_hole_of_a_notch_filter_is_no_neighbourhood(self) -> None:
        frequency = np.arange(0, 120.5, 0.5)
        power = 1 / np.maximum(frequency, 1)
        power[np.abs(frequency - 50) < 4.5] *= 1e-3
        power[frequency > 62] *= 1e-4
        assert all(ratio < 2 for ratio in measure_mains_peaks(frequency, power).values())
        power[frequency == 60] *= 9
        assert measure_mains_peaks(frequency, power)[60.0] > 5


@pytest.mark.skipif(not CORPUS.is_dir(), reason="DREAMSCALE_EEG_CORPUS does not name the real recordings")
@pytest.mark.parametrize("folder", ["nihon-kohden", "eximia", "ant"])
def test_real_recordings_keep_no_mains_peak(folder: str, shard_all) -> None:
    seen = 0
    for path, sharded in shard_all(CORPUS / folder, spec=PreprocessSpec()).items():
        if sharded.row.status != "sharded":
            continue
        seen += 1
        assert sharded.row.line_freq == 50.0, path
        spectra = []
        for meta, x in sharded.samples:
            good = [i for i, name in enumerate(meta["ch_names"]) if name not in meta["bads"]]
            frequency, power = welch(x[good], 256.0, nperseg=x.shape[1], axis=1)
            spectra.append(power)
        power = np.median(np.concatenate(spectra), axis=0)
        for line in (50.0, 100.0):
            assert measure_peak(frequency, power, line) < 2.0, (path, line)
    assert seen
