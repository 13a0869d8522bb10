"""Units by amplitude, bad channels, mains, and the same signal in two files."""

from __future__ import annotations

import numpy as np
import pytest

from data_sharding.duplicates import Print, find_duplicates
from data_sharding.units import assess, line_frequency

RATE = 250.0


def eeg(n: int = 6, seconds: float = 10.0, seed: int = 0, rate: float = RATE) -> np.ndarray:
    """Pink-like noise of about ten microvolts."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.normal(size=(n, int(seconds * rate))), axis=1)
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(int(seconds * rate), 1 / rate), 0.5))
    x = np.fft.irfft(spectrum, axis=1)
    return 20 * x / x.std(axis=1, keepdims=True)


class TestUnits:
    def test_microvolts_are_plausible_under_any_offset(self) -> None:
        for offset in (0.0, 4e4, -2.3e5):
            verdict = assess(eeg() + offset, RATE)
            assert verdict.unit == "plausible" and verdict.factor == 1.0 and not verdict.bads
            assert 5 < verdict.amplitude_uv < 40

    @pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
    def test_other_units_are_unknown(self, factor: float) -> None:
        assert assess(factor * eeg(), RATE).unit == "unknown"

    def test_configured_factor_mends_it(self) -> None:
        verdict = assess(1e6 * eeg(), RATE, factor=1e-6)
        assert verdict.unit == "configured" and 5 < verdict.amplitude_uv < 40 and not verdict.bads

    def test_bad_channels(self) -> None:
        x = eeg(7)
        x[1] = 3.0
        x[2] = np.clip(x[2], -15, 15)
        x[3] *= 1e3
        x[4] *= 1e-4
        x[5, 200:] = x[5, 200]
        assert assess(x, RATE).bads == {1: "flat", 2: "clipped", 3: "too large", 4: "too small", 5: "flat"}


class TestLine:
    @pytest.mark.parametrize("line", [50.0, 60.0])
    def test_found(self, line: float) -> None:
        x = eeg() + 5 * np.sin(2 * np.pi * line * np.arange(2500) / RATE)
        assert line_frequency(x, RATE) == line

    def test_not_invented(self) -> None:
        assert line_frequency(eeg(), RATE) is None
        assert line_frequency(eeg(seconds=1), RATE) is None
        assert line_frequency(eeg(rate=80), 80.0) is None


class TestDuplicates:
    def make(self, key: str, x: np.ndarray, names: str | None = None, sha: str = "", rate: float = RATE) -> Print:
        return Print(
            key=key,
            sha256=sha or key,
            seconds=x.shape[1] / rate,
            names=list(names or "abcdef")[: len(x)],
            points=assess(x, rate).fingerprint,
        )

    def test_the_same_signal_in_another_format(self) -> None:
        x = eeg()
        rounded = np.round(x / 0.1) * 0.1
        padded = np.concatenate([x, np.zeros((6, 200))], axis=1)
        other = eeg(seed=1)
        fewer = x[[5, 3, 1, 0]]
        prints = [
            self.make("a", x),
            self.make("rounded", rounded),
            self.make("padded", padded),
            self.make("other", other),
        ]
        prints += [self.make("fewer", fewer, "fdba"), self.make("scaled", 1e-3 * x + 50)]
        assert find_duplicates(prints) == {"rounded": "a", "padded": "a", "fewer": "a", "scaled": "a"}

    def test_the_same_bytes(self) -> None:
        assert find_duplicates([self.make("a", eeg(), sha="x"), self.make("b", eeg(seed=2), sha="x")]) == {"b": "a"}

    def test_many_recordings_of_one_length_are_different(self) -> None:
        assert find_duplicates([self.make(str(i), eeg(seed=i)) for i in range(60)]) == {}

    def test_two_stretches_of_one_recording_are_different(self) -> None:
        x = eeg(seconds=20)
        assert find_duplicates([self.make("a", x[:, :2500]), self.make("b", x[:, 2500:])]) == {}

    def test_silence_is_no_duplicate_of_silence(self) -> None:
        assert find_duplicates([self.make("a", np.zeros((6, 2500))), self.make("b", np.zeros((6, 2500)))]) == {}
