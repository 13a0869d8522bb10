"""Resampling and filtering in blocks, with a scratch file between these two steps, gives the same result as processing
the whole signal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.signal import butter, sosfiltfilt

from data_sharding.formats.signal import Segment
from data_sharding.processing import streaming
from data_sharding.processing.preprocess import BEFORE, PreprocessSpec, clean_blocks, preprocess, window_starts
from data_sharding.processing.streaming import (
    Resampler,
    Scratch,
    blocks_of,
    lookahead,
    resample,
    resampled_length,
    zero_phase,
)

RATES = [(1000.0, 256.0), (512.0, 256.0), (250.0, 256.0), (160.3, 256.0), (1000.0, 200.0), (512.0, 200.0)]
RATES += [(250.0, 200.0), (160.3, 200.0), (256.0, 256.0)]


def make_noise(n: int, samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 10, (n, samples))


def split_into_blocks(x: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    out, at, i = [], 0, 0
    while at < x.shape[1]:
        out.append(x[:, at : at + sizes[i % len(sizes)]])
        at, i = at + sizes[i % len(sizes)], i + 1
    return out


class TestResampling:
    @pytest.mark.parametrize(("sfreq", "target"), RATES)
    def test_resampling_in_blocks_equals_resampling_at_once(self, sfreq: float, target: float) -> None:
        x = make_noise(2, int(9.7 * sfreq)) + 2.3e5
        whole = resample(x, sfreq, target, 70.0)
        assert whole.shape == (2, resampled_length(x.shape[1], sfreq, target))
        for sizes in ([17], [1, 500, 3], [1000], [4096, 5]):
            resampler = Resampler(sfreq, target, 70.0)
            parts = [resampler.push(block) for block in split_into_blocks(x, sizes)]
            np.testing.assert_allclose(np.concatenate([*parts, resampler.finish()], axis=1), whole, rtol=0, atol=1e-8)

    @pytest.mark.parametrize(("sfreq", "target"), RATES)
    @pytest.mark.parametrize("samples", [1, 2, 16, 40, 257])
    def test_short_segment_keeps_its_duration_and_level(self, sfreq: float, target: float, samples: int) -> None:
        out = resample(np.full((2, samples), 7.0), sfreq, target)
        assert out.shape == (2, resampled_length(samples, sfreq, target))
        np.testing.assert_allclose(out, 7.0, atol=1e-9)

    @pytest.mark.parametrize(("sfreq", "target"), [r for r in RATES if r[0] != r[1]])
    def test_tones_in_the_band_pass_and_aliases_are_removed(self, sfreq: float, target: float) -> None:
        t, tt = np.arange(int(12 * sfreq)) / sfreq, np.arange(resampled_length(int(12 * sfreq), sfreq, target)) / target
        lower, passband = min(sfreq, target), 0.36 * min(sfreq, target)
        middle = slice(int(2 * target), int(-2 * target))
        for tone in (3.0, 0.2 * lower, passband):
            got = resample(2.3e5 + np.sin(2 * np.pi * tone * t)[None], sfreq, target, passband)[0] - 2.3e5
            assert np.abs(got - np.sin(2 * np.pi * tone * tt))[middle].max() < 5e-4
        for tone in (0.65 * target, 0.8 * target, 1.1 * target, target + 10, 2 * target - 10):
            if lower - passband < tone < sfreq / 2:
                got = resample(np.sin(2 * np.pi * tone * t)[None], sfreq, target, passband)[0]
                assert np.abs(got)[middle].max() < 5e-4, tone

    def test_resampling_equals_convolution_with_its_filter(self) -> None:
        x = make_noise(1, 4000)
        plan = streaming._plan(1000.0, 200.0, 75.0)
        # For downsampling by a whole factor (here 5), the weights are the same for every output sample. The first
        # column of the plan's matrix contains these weights.
        taps = plan.groups[0][2][: 2 * plan.reach + 1, 0]
        wanted = np.correlate(x[0], taps, mode="same")[::5]
        np.testing.assert_allclose(resample(x, 1000.0, 200.0, 75.0)[0, 50:-50], wanted[50:-50], atol=1e-9)

    @pytest.mark.parametrize(("sfreq", "target"), [r for r in RATES if r[0] != r[1]])
    def test_outputs_use_only_inputs_of_their_frame(self, sfreq: float, target: float) -> None:
        plan = streaming._plan(sfreq, target, 70.0)
        for _, begin, matrix in plan.groups:
            assert begin >= 0 and begin + len(matrix) <= plan.inputs + 2 * plan.reach + 1
            np.testing.assert_allclose(matrix.sum(axis=0), 1.0, atol=1e-12)

    def test_resampled_slope_is_right_at_both_ends(self) -> None:
        x = np.linspace(0, 500, 2000)[None]
        got = resample(x, 500.0, 100.0)[0]
        np.testing.assert_allclose(got, np.linspace(0, 500, 2000)[::5], atol=1e-6)


class TestFiltering:
    @pytest.mark.parametrize("band", [(0.5, 40.0), (1.0, 75.0), (5.0, 95.0)])
    def test_filtering_in_blocks_equals_sosfiltfilt(self, band: tuple[float, float]) -> None:
        sos = np.asarray(butter(4, band, btype="bandpass", fs=256.0, output="sos"))
        x = make_noise(3, 40_000) + np.cumsum(make_noise(3, 40_000, seed=1), axis=1)
        pad = int(2 * 256 / band[0])
        wanted = sosfiltfilt(sos, x, padlen=pad)
        for block, tolerance in ((40_000, 1e-9), (10_000, 1e-6), (1, 1e-6)):
            got = np.concatenate(list(zero_phase(lambda a, b: x[:, a:b], 40_000, sos, pad, block)), axis=1)
            assert got.shape == wanted.shape
            # The limit is relative to the amplitude of the input, because the input has a large, slow drift.
            assert np.abs(got - wanted).max() < tolerance * np.abs(x).max(), block

    @pytest.mark.parametrize(("samples", "pad"), [(40_000, 5000), (1000, 999), (1, 0)])
    def test_filter_with_minutes_of_lookahead_uses_the_disk(
        self, samples: int, pad: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sos = np.asarray(butter(4, [0.02, 40.0], btype="bandpass", fs=256.0, output="sos"))
        x = make_noise(3, samples) + np.cumsum(make_noise(3, samples, seed=1), axis=1)
        monkeypatch.setattr(streaming, "HELD_BYTES", 0)
        blocks = list(zero_phase(lambda a, b: x[:, a:b], samples, sos, pad, 7000))
        assert max(block.shape[1] for block in blocks) <= 7000
        wanted = sosfiltfilt(sos, x, padlen=pad)
        np.testing.assert_allclose(np.concatenate(blocks, axis=1), wanted, atol=1e-6 * max(1.0, np.abs(wanted).max()))

    def test_lookahead_depends_on_the_slowest_pole(self) -> None:
        slow, fast = (
            lookahead(np.asarray(butter(4, [low, 40.0], btype="bandpass", fs=256.0, output="sos"))) for low in (0.5, 5)
        )
        assert 8 * fast < slow < 12 * fast

    @pytest.mark.parametrize("samples", [1, 5, 300])
    def test_short_segments_can_be_filtered(self, samples: int) -> None:
        sos = np.asarray(butter(4, [1.0, 40.0], btype="bandpass", fs=256.0, output="sos"))
        (got,) = zero_phase(lambda a, b: make_noise(2, samples)[:, a:b], samples, sos, 512, 1)
        assert got.shape == (2, samples) and np.isfinite(got).all()


class TestPreprocessing:
    @pytest.mark.parametrize(("sfreq", "target"), RATES)
    def test_preprocessing_in_blocks_equals_preprocessing_at_once(self, sfreq: float, target: float) -> None:
        spec = PreprocessSpec(sfreq=target, highpass=1.0, lowpass=70.0, window=200, stride=200)
        x = make_noise(3, int(30 * sfreq)) + 2.3e5
        wanted = preprocess(x, sfreq, spec, line_freq=50.0)
        resampler, length = Resampler(sfreq, target, 70.0), resampled_length(x.shape[1], sfreq, target)
        with Scratch(3) as scratch:
            for block in split_into_blocks(1e-6 * x, [777, 4000]):
                scratch.write(resampler.push(block, 1e6, x[:, :1]))
            scratch.write(resampler.finish())
            assert scratch.n_samples == length
            blocks = clean_blocks(scratch.read, length, sfreq, spec, line_freq=50.0, reference=[0, 1, 2], block=1)
            got = np.concatenate(list(blocks), axis=1)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)

    def test_scratch_leaves_no_file_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DREAMSCALE_SCRATCH", str(tmp_path / "fast"))
        scratch = Scratch(2)
        for part in split_into_blocks(make_noise(2, 100), [7, 31]):
            scratch.write(part)
        np.testing.assert_array_equal(scratch.read(3, 90), make_noise(2, 100)[:, 3:90].astype(np.float32))
        assert list((tmp_path / "fast").iterdir()) == []
        with pytest.raises(EOFError):
            scratch.read(90, 101)
        scratch.close()


class TestBlocks:
    def test_blocks_read_each_sample_once_and_do_not_cross_gaps(self) -> None:
        segments = [Segment(start=a, stop=b, onset=a / 100) for a, b in ((0, 5000), (5000, 5100), (5300, 9001))]
        blocks = list(blocks_of(segments, 1, block_bytes=8 * 1200))
        seen = np.zeros(9001, int)
        for block in blocks:
            assert block[-1].stop - block[0].start <= 1200
            for piece, following in zip(block, [*block[1:], None], strict=True):
                assert segments[piece.segment].start <= piece.start < piece.stop <= segments[piece.segment].stop
                assert following is None or following.start == piece.stop
                seen[piece.start : piece.stop] += 1
        assert (seen[:5100] == 1).all() and (seen[5100:5300] == 0).all() and (seen[5300:] == 1).all()

    def test_short_segments_are_read_together(self) -> None:
        segments = [Segment(start=100 * i, stop=100 * i + 100, onset=float(i)) for i in range(500)]
        assert len(list(blocks_of(segments, 1, block_bytes=8 * 10_000))) == 5


class TestSpec:
    def test_digests_stay_the_same_in_all_releases(self) -> None:
        assert PreprocessSpec(**BEFORE).digest() == "eb3689f326f3eb0ca7f315016a4c667cea0f0f608ba578a5c6dc201f0482420a"
        assert "reject_uv" not in PreprocessSpec().to_dict()
        spec = PreprocessSpec(reject_uv=150.0, reference=["M1", "M2"], notch=50.0)
        same = PreprocessSpec(reference="Cz", notch=50), PreprocessSpec(reference=["Cz"], notch=50.0)
        assert same[0].digest() == same[1].digest()
        assert PreprocessSpec.from_dict(spec.to_dict()) == spec and spec.digest() != PreprocessSpec().digest()

    @pytest.mark.parametrize(
        "wrong", [{"notch": 200.0}, {"notch": "on"}, {"reference": []}, {"reference": ""}, {"reject_uv": -1.0}]
    )
    def test_error_of_a_wrong_option_names_its_key(self, wrong: dict) -> None:
        with pytest.raises(ValueError, match=rf"preprocess\.{next(iter(wrong))}"):
            PreprocessSpec(**wrong)

    def test_notch_false_is_the_same_as_off(self) -> None:
        assert PreprocessSpec(notch=False).digest() == PreprocessSpec(notch="off").digest()

    def test_fixed_notch_is_applied_without_a_known_mains_frequency(self) -> None:
        spec = PreprocessSpec(sfreq=256.0, highpass=1.0, reference="keep", notch=50.0)
        tone = 10 * np.sin(2 * np.pi * 50 * np.arange(8 * 512) / 512)[None]
        assert preprocess(tone, 512.0, spec)[0, 512:-512].std() < 0.1
        assert preprocess(tone, 512.0, PreprocessSpec(notch="off", reference="keep"), line_freq=50.0).std() > 5

    def test_named_reference_channels_are_subtracted(self) -> None:
        x, names = make_noise(4, 2000), ["Fz", "Pz", "M1", "M2"]
        keep = preprocess(x, 256.0, PreprocessSpec(reference="keep"))
        got = preprocess(x, 256.0, PreprocessSpec(reference=["M1", "m2"]), names=names)
        np.testing.assert_allclose(got, keep - keep[2:].mean(axis=0), atol=1e-4)
        with pytest.raises(ValueError, match="Cz is not in the recording"):
            preprocess(x, 256.0, PreprocessSpec(reference="Cz"), names=names)
        with pytest.raises(ValueError, match="M1 is bad"):
            preprocess(x, 256.0, PreprocessSpec(reference="M1"), names=names, bads=[2])

    def test_recording_shorter_than_a_window_has_no_windows(self) -> None:
        assert list(window_starts(511, PreprocessSpec())) == []
