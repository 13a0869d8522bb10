"""The survey finds the unit, the bad channels and the mains frequency of a recording. Fingerprints find duplicates."""

from __future__ import annotations

import numpy as np
import pytest

from data_sharding.audit.duplicates import Copy, RecordingFingerprint, find_duplicates
from data_sharding.formats.signal import Segment
from data_sharding.processing.survey import Survey, _row_medians, assess, stretches_of

RATE = 250.0


def make_eeg(n: int = 6, seconds: float = 10.0, seed: int = 0, rate: float = RATE) -> np.ndarray:
    """Make pink noise of about 10 microvolts."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.normal(size=(n, int(seconds * rate))), axis=1)
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(int(seconds * rate), 1 / rate), 0.5))
    x = np.fft.irfft(spectrum, axis=1)
    return 20 * x / x.std(axis=1, keepdims=True)


class TestUnits:
    def test_microvolts_are_plausible_with_any_offset(self) -> None:
        for offset in (0.0, 4e4, -2.3e5):
            verdict = assess(make_eeg() + offset, RATE)
            assert verdict.unit == "plausible" and verdict.factor == 1.0 and not verdict.bads
            assert 5 < verdict.amplitude_uv < 40

    @pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
    def test_other_units_are_unknown(self, factor: float) -> None:
        assert assess(factor * make_eeg(), RATE).unit == "unknown"

    def test_configured_factor_corrects_the_unit(self) -> None:
        verdict = assess(1e6 * make_eeg(), RATE, factor=1e-6)
        assert verdict.unit == "configured" and 5 < verdict.amplitude_uv < 40 and not verdict.bads

    def test_bad_channels_get_a_reason(self) -> None:
        x = make_eeg(7)
        x[1] = 3.0
        x[2] = np.clip(x[2], -15, 15)
        x[3] *= 1e3
        x[4] *= 1e-4
        x[5, 200:] = x[5, 200]
        assert assess(x, RATE).bads == {1: "flat", 2: "clipped", 3: "too large", 4: "too small", 5: "flat"}

    def test_channels_with_nan_or_inf_are_named_and_do_not_affect_others(self) -> None:
        x = make_eeg(6)
        clean = assess(x, RATE)
        x[1, 700], x[4, 2499] = np.nan, np.inf
        verdict = assess(x, RATE)
        assert verdict.not_finite == [1, 4] and verdict.unit == "plausible" and not verdict.bads
        np.testing.assert_array_equal(verdict.fingerprint[[0, 2, 3, 5]], clean.fingerprint[[0, 2, 3, 5]])

    def test_trigger_channel_is_not_eeg_and_dying_electrode_is_flat(self) -> None:
        x = make_eeg(8)
        x[2] = 0.0
        x[2, 300:320], x[2, 900:920], x[2, 1500:1520] = 255.0, 64.0, 255.0
        x[3] = -2e5
        x[3, :40] += np.linspace(900, 0, 40)
        x[5] = 0.0
        x[5, ::50] = 0.1
        verdict = assess(x, RATE)
        assert verdict.not_eeg == {2: "trigger"}
        assert verdict.bads == {2: "trigger", 3: "flat", 5: "flat"}

    def test_strong_tone_is_a_test_signal_but_mains_is_not(self) -> None:
        t = np.arange(2500) / RATE
        for hz, bad in ((RATE / 4, True), (40.0, True), (50.0, False), (10.0, False), (100.0, False)):
            x = make_eeg()
            x[0] += 150 * np.sign(np.sin(2 * np.pi * hz * t + 0.3)) if bad else 150 * np.sin(2 * np.pi * hz * t)
            assert assess(x, RATE, factor=1.0).bads.get(0) == ("test tone" if bad else None), hz

    def test_channels_that_differ_from_all_others_are_noisy(self) -> None:
        rng = np.random.default_rng(3)
        common = make_eeg(1, 20)
        x = common + 0.3 * make_eeg(12, 20, seed=1)
        x[4] += rng.normal(0, 60, x.shape[1])
        x[7] = make_eeg(1, 20, seed=9)[0]
        assert assess(x, RATE).bads == {4: "noisy", 7: "noisy"}
        # In three cases, no channel is noisy: with muscle activity, with uncorrelated channels, and with few channels.
        x = common + 0.3 * make_eeg(12, 20, seed=1)
        x[4] += rng.normal(0, 2 * np.std(np.diff(x[4])), x.shape[1])
        assert assess(x, RATE).bads == {} == assess(make_eeg(12, 20), RATE).bads
        few = common + 0.3 * make_eeg(5, 20, seed=1)
        few[2] = make_eeg(1, 20, seed=9)[0]
        assert assess(few, RATE).bads == {}


class TestSurvey:
    @pytest.mark.parametrize("sizes", [[97], [2500, 13], [1, 4096]])
    def test_verdict_does_not_depend_on_the_block_sizes(self, sizes: list[int]) -> None:
        x = make_eeg(9, 60) + 2e4
        x[1] = 3.0
        x[2] = np.clip(x[2], 2e4 - 10, 2e4 + 10)
        x[3, 5000:5050] = np.nan
        x[4] += 5 * np.sin(2 * np.pi * 50 * np.arange(x.shape[1]) / RATE)
        x[5] = 0.0
        x[5, 400:14000:700] = 300.0
        segments = [Segment(start=0, stop=6000, onset=0.0), Segment(start=6000, stop=15000, onset=30.0)]
        verdicts = []
        for cut in (sizes, [15000]):
            survey, at, i = Survey(9, RATE, segments), 0, 0
            while at < 15000:
                survey.push(at, x[:, at : min(at + cut[i % len(cut)], 15000)])
                at, i = at + cut[i % len(cut)], i + 1
            verdicts.append(survey.verdict())
        one, other = verdicts
        assert one.bads == other.bads == {1: "flat", 2: "clipped", 5: "trigger"}
        assert one.not_eeg == other.not_eeg == {5: "trigger"} and one.not_finite == other.not_finite == [3]
        np.testing.assert_array_equal(one.fingerprint, other.fingerprint)
        # Leave out row 3: NaN values are replaced block by block, so the amplitude of this row depends on the size of
        # the blocks.
        rows = [0, 4, 6, 7, 8]
        np.testing.assert_array_equal(one.channel_uv[rows], other.channel_uv[rows])

    def test_measured_stretches_are_spread_and_limited(self) -> None:
        day = [Segment(start=0, stop=40_000_000, onset=0.0), Segment(start=50_000_000, stop=86_400_000, onset=5e4)]
        plan = stretches_of(day, 1000.0)
        assert len(plan) == 64 and all(b - a == 4000 for a, b in plan)
        assert plan[0][0] == 0 and plan[-1][1] > 86_390_000 and not any(40_000_000 < b < 50_004_000 for _, b in plan)
        epochs = [Segment(start=500 * i, stop=500 * i + 500, onset=0.5 * i) for i in range(4000)]
        assert len(stretches_of(epochs, 1000.0)) == 512

    def test_high_sampling_rate_is_reduced_for_the_survey(self) -> None:
        x = np.repeat(make_eeg(6, 12, rate=1000.0), 5, axis=1)
        fast, slow = assess(x, 5000.0), assess(x[:, ::5], 1000.0)
        assert fast.bads == slow.bads == {}
        np.testing.assert_allclose(fast.channel_uv, slow.channel_uv, rtol=0.05)
        same = (fast.fingerprint * slow.fingerprint).sum(axis=1)
        assert (same > 0.99).all()

    def test_mains_that_begins_late_is_found(self) -> None:
        x = make_eeg(4, 400)
        x[:, 50_000:] += 20 * np.sin(2 * np.pi * 60 * np.arange(50_000) / RATE)
        assert assess(x, RATE).line_freq == 60.0


class TestMains:
    @pytest.mark.parametrize("line", [50.0, 60.0])
    def test_mains_frequency_is_found(self, line: float) -> None:
        x = make_eeg() + 5 * np.sin(2 * np.pi * line * np.arange(2500) / RATE)
        assert assess(x, RATE).line_freq == line

    def test_no_mains_is_reported_without_evidence(self) -> None:
        assert assess(make_eeg(), RATE).line_freq is None
        assert assess(make_eeg(seconds=1), RATE).line_freq is None
        assert assess(make_eeg(rate=80), 80.0).line_freq is None


class TestDuplicates:
    def make_fingerprint(
        self, key: str, x: np.ndarray, names: str | None = None, sha: str = "", rate: float = RATE
    ) -> RecordingFingerprint:
        return RecordingFingerprint(
            key=key,
            sha256=sha or key,
            seconds=x.shape[1] / rate,
            names=list(names or "abcdef")[: len(x)],
            points=assess(x, rate).fingerprint,
        )

    def test_same_signal_in_another_format_is_a_duplicate(self) -> None:
        x = make_eeg()
        rounded = np.round(x / 0.1) * 0.1
        padded = np.concatenate([x, np.zeros((6, 200))], axis=1)
        other = make_eeg(seed=1)
        fewer = x[[5, 3, 1, 0]]
        prints = [
            self.make_fingerprint("a", x),
            self.make_fingerprint("rounded", rounded),
            self.make_fingerprint("padded", padded),
            self.make_fingerprint("other", other),
        ]
        prints += [self.make_fingerprint("fewer", fewer, "fdba"), self.make_fingerprint("scaled", 1e-3 * x + 50)]
        assert find_duplicates(prints) == {
            "rounded": Copy(kept="a"),
            "padded": Copy(kept="a"),
            "fewer": Copy(kept="a"),
            "scaled": Copy(kept="a"),
        }

    def test_equal_bytes_are_a_duplicate(self) -> None:
        assert find_duplicates(
            [self.make_fingerprint("a", make_eeg(), sha="x"), self.make_fingerprint("b", make_eeg(seed=2), sha="x")]
        ) == {"b": Copy(kept="a")}

    def test_many_recordings_of_one_length_are_different(self) -> None:
        assert find_duplicates([self.make_fingerprint(str(i), make_eeg(seed=i)) for i in range(60)]) == {}

    def test_two_stretches_of_one_recording_are_different(self) -> None:
        x = make_eeg(seconds=20)
        assert find_duplicates([self.make_fingerprint("a", x[:, :2500]), self.make_fingerprint("b", x[:, 2500:])]) == {}

    def test_flat_recordings_are_not_duplicates(self) -> None:
        assert (
            find_duplicates(
                [self.make_fingerprint("a", np.zeros((6, 2500))), self.make_fingerprint("b", np.zeros((6, 2500)))]
            )
            == {}
        )


@pytest.mark.parametrize("n", [1, 2, 7, 8, 4096])
def test_medians_of_rows_are_those_of_numpy(n: int) -> None:
    x = np.random.default_rng(n).normal(size=(5, n)).astype(np.float32)
    np.testing.assert_array_equal(_row_medians(x), np.median(x, axis=1))
    x[1, n // 2] = np.nan
    np.testing.assert_array_equal(_row_medians(x), np.median(x, axis=1))
