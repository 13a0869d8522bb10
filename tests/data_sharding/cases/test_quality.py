"""Bad parts of a signal are left out, or are marked in each window. The good parts are not changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mne
import numpy as np
import pytest
from PIL import Image

from data_sharding.processing.preprocess import PreprocessSpec
from data_sharding.processing.quality import UNCHECKED, QualitySpec

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4"]
SPEC = PreprocessSpec(window=256, stride=256)
SECONDS = 60


def write_fif(path: Path, uv: np.ndarray, sfreq: float = 250.0, fmt: str = "double") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = mne.io.RawArray(1e-6 * uv, mne.create_info(NAMES[: len(uv)], sfreq, "eeg"), verbose="ERROR")
    raw.save(path, fmt=fmt, overwrite=True, verbose="ERROR")


def write_edf(path: Path, uv: np.ndarray, sfreq: float = 250.0, limit: float = 3276.7) -> None:
    import edfio

    path.parent.mkdir(parents=True, exist_ok=True)
    signals = [
        edfio.EdfSignal(row, sfreq, label=name, physical_dimension="uV", physical_range=(-limit, limit))
        for name, row in zip(NAMES, np.clip(uv, -limit, limit), strict=False)
    ]
    edfio.Edf(signals).write(path)


@pytest.fixture
def shard_one(tmp_path: Path, shard_all):
    """Return a function that writes one recording and shards it."""

    def run(uv: np.ndarray, sfreq: float = 250.0, *, write=write_fif, spec: PreprocessSpec = SPEC, **more):
        name = "a.edf" if write is write_edf else "a_raw.fif"
        write(tmp_path / "eeg" / name, uv, sfreq, **more)
        return shard_all(tmp_path / "eeg", spec=spec)[name]

    return run


def get_times(sfreq: float = 250.0, seconds: float = SECONDS) -> np.ndarray:
    return np.arange(int(seconds * sfreq)) / sfreq


def assert_adds_up(sharded) -> None:
    """Check that every second of the recording is in a window, or was left out for a reason in the ledger."""
    row = sharded.row
    assert row.seconds_written + sum(row.seconds_left_out.values()) == pytest.approx(row.seconds, abs=0.02)


class TestCases:
    def test_dropout(self, cases: Path, shard_all, assert_true) -> None:
        sharded = shard_all(cases / "edf")["dropout.edf"]
        assert not sharded.touches(40, 80) and sharded.row.windows_left_out == {"flat in every channel": 40}
        assert sharded.row.windows >= 76 and not sharded.row.bads
        assert_true(sharded, 1201, ends=True)
        assert_adds_up(sharded)

    def test_nan(self, cases: Path, shard_all, assert_true) -> None:
        sharded = shard_all(cases / "eeglab")["s09_nan.set"]
        assert not sharded.touches(20, 21) and sharded.row.windows_left_out == {"missing values in every channel": 1}
        assert sharded.row.windows >= 55
        assert_true(sharded, 413, ends=True)

    def test_garbage_channel(self, cases: Path, shard_all, assert_true) -> None:
        sharded = shard_all(cases / "edf")["e14_dmineq.edf"]
        assert all("F4" in meta["bads"] or "F4" not in meta["ch_names"] for meta, _ in sharded.samples)
        assert_true(sharded, 167, skip=["F4"], ends=True)


class TestDropouts:
    """In a part of the recording, no channel has a signal."""

    @pytest.mark.parametrize(
        ("value", "sfreq"),
        [*((v, 250.0) for v in ("zero", "rail", "noise", "drift", "flicker")), ("noise", 128.0), ("zero", 1000.0)],
    )
    def test_dead_time_is_left_out(self, shard_one, assert_true, true_uv, value: str, sfreq: float) -> None:
        t, rng = get_times(sfreq), np.random.default_rng(0)
        uv = true_uv(5, 8, t)
        dead = (t >= 20.03) & (t < 40.07)
        n = np.count_nonzero(dead)
        uv[:, dead] = {
            "zero": np.zeros(n),
            "rail": np.full(n, 3276.7),
            "noise": rng.normal(0, 0.05, (8, n)),
            "drift": 2000 + 40 * t[dead] + rng.normal(0, 0.03, (8, n)),
            "flicker": np.where(rng.random((8, n)) < 0.3, 3276.6, 3276.7),
        }[value]
        sharded = shard_one(uv, sfreq, spec=dataclasses.replace(SPEC, sfreq=256.0, lowpass=40.0))
        assert not sharded.touches(20.03, 40.07)
        assert sum(sharded.row.windows_left_out.values()) == pytest.approx(21, abs=2)
        assert sharded.row.windows >= 35 and not sharded.row.bads, sharded.row.bads
        assert_true(sharded, 5, spec=dataclasses.replace(SPEC, lowpass=40.0), ends=True)
        assert_adds_up(sharded)

    @pytest.mark.parametrize(("write", "fmt"), [("edf", None), ("fif", "single")])
    def test_number_formats(self, shard_one, assert_true, true_uv, write: str, fmt: str | None) -> None:
        t = get_times()
        uv = true_uv(6, 8, t)
        uv[:, (t >= 30) & (t < 30.7)] = 8.0
        sharded = shard_one(uv, write=write_edf) if write == "edf" else shard_one(uv, fmt=fmt)
        assert not sharded.touches(30, 30.7) and sum(sharded.row.windows_left_out.values()) == 1
        assert sharded.row.windows >= 55
        assert_true(sharded, 6, ends=fmt is None)

    @pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
    def test_much_dead_time_does_not_make_channels_bad(self, shard_one, assert_true, true_uv, share: float) -> None:
        t = get_times()
        uv = true_uv(7, 8, t)
        begin = 10.0
        uv[:, (t >= begin) & (t < begin + share * SECONDS)] = -3276.7
        sharded = shard_one(uv, write=write_edf)
        assert not sharded.row.bads and not sharded.touches(begin, begin + share * SECONDS)
        assert_true(sharded, 7)

    def test_quiet_eeg_is_kept(self, shard_one, assert_true, true_uv) -> None:
        uv = 0.05 * true_uv(8, 8, get_times())
        sharded = shard_one(uv)
        assert sharded.row.windows >= 58 and not sharded.row.windows_left_out and not sharded.row.bad_in_windows

    def test_the_check_can_be_switched_off(self, shard_one, true_uv) -> None:
        t = get_times()
        uv = true_uv(5, 8, t)
        uv[:, (t >= 20) & (t < 40)] = 0.0
        sharded = shard_one(uv, spec=dataclasses.replace(SPEC, quality=UNCHECKED))
        assert (
            sharded.spans[0][0] == 0.0
            and sharded.row.windows + sharded.row.windows_left_out.get("flat in every good channel", 0) == 60
        )


class TestBadChannels:
    """Some channels are bad in a part of the recording. These channels must not change the other channels."""

    @pytest.mark.parametrize(
        ("kind", "n_bad"), [("flat", 3), ("clipped", 1), ("too small", 3), ("missing values", 1), ("too large", 2)]
    )
    def test_only_the_windows_of_the_fault_are_marked(self, shard_one, assert_true, true_uv, kind, n_bad) -> None:
        t, rng = get_times(), np.random.default_rng(0)
        uv = true_uv(9, 8, t)
        dead = (t >= 25) & (t < 40.5)
        n = np.count_nonzero(dead)
        uv[:n_bad, dead] = {
            "flat": np.zeros(n),
            "clipped": np.full(n, 3e4),
            "too small": 20 + rng.normal(0, 0.05, n),
            "missing values": np.full(n, np.nan),
            "too large": rng.normal(0, 1e9, n),
        }[kind]
        sharded = shard_one(uv)
        names = NAMES[:n_bad]
        assert sharded.row.windows >= 58 and not sharded.row.windows_left_out and not sharded.row.bads
        assert kind in sharded.row.bad_in_windows
        for (meta, x), (begin, end) in zip(sharded.samples, sharded.spans, strict=True):
            touches = begin < 40.5 and end > 25
            assert (not touches or meta["bads"] == names) and meta["bads"] in ([], names)
            assert not touches or not x[:n_bad].any(), "a row without a signal holds zeros"
            if not -1.5 < begin - 40.5 < 1.5 and not -1.5 < end - 25 < 1.5 and not touches:
                assert meta["bads"] == []
        clean = dataclasses.replace(sharded, samples=[s for s in sharded.samples if not s[0]["bads"]])
        assert_true(clean, 9, ends=True)
        # The reference is the mean over the good channels only.
        for meta, x in sharded.samples:
            if meta["bads"]:
                own = x[n_bad:]
                np.testing.assert_allclose(own.mean(axis=0), 0, atol=0.05)
                assert own.std() == pytest.approx(clean.samples[0][1].std(), rel=0.5)

    def test_good_rows_are_right_beside_a_bad_row(self, shard_one, true_uv) -> None:
        from scipy.signal import sosfiltfilt

        from data_sharding.processing.preprocess import filters

        t = get_times()
        uv = true_uv(10, 8, t)
        uv[2, (t >= 20) & (t < 40)] = 1e5
        sharded = shard_one(uv)
        seen = 0
        for meta, x in sharded.samples:
            if meta["bads"] != ["F3"]:
                continue
            seen += 1
            at = meta["start"] + np.arange(-2048, 2048 + 256) / 256
            truth = sosfiltfilt(filters(250.0, SPEC, None), true_uv(10, 8, at), axis=1)[:, 2048:-2048]
            good = [0, 1, 3, 4, 5, 6, 7]
            truth -= truth[good].mean(axis=0)
            for i in good:
                assert abs(x[i] @ truth[i] / (truth[i] @ truth[i]) - 1) < 1e-3
                assert np.corrcoef(x[i], truth[i])[0, 1] > 0.998
        assert seen >= 20

    def test_half_of_the_channels_are_bad(self, shard_one, assert_true, true_uv) -> None:
        t = get_times()
        uv = true_uv(11, 8, t)
        uv[:4, (t >= 20) & (t < 40)] = 5.0
        sharded = shard_one(uv)
        assert sharded.row.windows >= 58 and any(meta["bads"] == NAMES[:4] for meta, _ in sharded.samples)
        uv[4, (t >= 20) & (t < 40)] = 5.0
        sharded = shard_one(uv)
        assert not sharded.touches(20, 40) and "too many bad channels: flat" in sharded.row.windows_left_out
        assert_true(sharded, 11)
        assert_adds_up(sharded)

    def test_clipping_in_a_part_of_the_recording(self, shard_one, assert_true, true_uv) -> None:
        t = get_times()
        uv = true_uv(12, 8, t)
        part = (t >= 20) & (t < 40)
        uv[1, part] = np.clip(40 * uv[1, part], -500, 500)
        sharded = shard_one(uv)
        assert not sharded.row.bads and sharded.row.bad_in_windows.get("clipped", 0) > 17
        assert all(meta["bads"] == ["Fp2"] for meta, _ in sharded.samples if 21 < meta["start"] < 38)
        assert all(meta["bads"] == [] for meta, _ in sharded.samples if not 18 < meta["start"] < 42)

    @pytest.mark.parametrize("kind", ["muscle", "mains noise"])
    def test_muscle_and_mains_are_marked(self, shard_one, true_uv, kind: str) -> None:
        t, rng = get_times(), np.random.default_rng(1)
        uv = true_uv(13, 8, t)
        part = (t >= 20) & (t < 40)
        noise = rng.normal(0, 150, t.size) if kind == "muscle" else 1500 * np.sin(2 * np.pi * 50.1 * t)
        uv[3, part] += noise[part]
        sharded = shard_one(uv)
        assert sharded.row.windows >= 58 and sharded.row.bad_in_windows.get(kind, 0) >= 18, sharded.row
        inside = [(meta, x) for meta, x in sharded.samples if 20 < meta["start"] < 38.5]
        assert all(meta["bads"] == ["F4"] and x[3].any() for meta, x in inside), "the row keeps its signal"
        assert all(not meta["bads"] for meta, _ in sharded.samples if not 18 < meta["start"] < 42)
        uv[:6, part] += noise[part]
        sharded = shard_one(uv)
        assert sharded.row.windows_left_out.get(f"too many bad channels: {kind}", 0) >= 18

    @pytest.mark.parametrize(("line", "sfreq"), [(50, 250.0), (60, 500.0), (50, 1000.0), (60, 5000.0)])
    def test_harmonics_of_mains_are_no_muscle_activity(self, shard_one, true_uv, line: int, sfreq: float) -> None:
        t, rng = get_times(sfreq), np.random.default_rng(3)
        uv = true_uv(15, 8, t) + rng.normal(0, 2, (8, t.size))
        phase = 2 * np.pi * np.cumsum(line + 0.1 * np.sin(t)) / sfreq
        for number, share in ((1, 1.0), (2, 0.8), (3, 0.5), (5, 0.4)):
            if number * line < 0.45 * sfreq:
                uv += 200 * share * np.cos(number * phase)
        part = (t >= 20) & (t < 40)
        uv[3, part] += rng.normal(0, 150, np.count_nonzero(part))
        sharded = shard_one(uv, sfreq)
        marked = {round(meta["start"]) for meta, _ in sharded.samples if meta["bads"]}
        assert not sharded.row.windows_left_out and marked and all(18 < start < 42 for start in marked), marked
        assert sharded.row.line_freq == line and set(sharded.row.bad_in_windows) == {"muscle"}

    @pytest.mark.parametrize(("sfreq", "rhythm"), [(64.0, 10.0), (80.0, 10.0), (100.0, 20.0)])
    def test_rhythms_at_low_sampling_rates_are_no_muscle_activity(
        self, shard_one, true_uv, sfreq: float, rhythm: float
    ) -> None:
        t = get_times(sfreq)
        sharded = shard_one(true_uv(16, 8, t) + 150 * np.sin(2 * np.pi * rhythm * t), sfreq)
        assert sharded.row.windows > 50, sharded.row.reason
        assert not sharded.row.bad_in_windows and not sharded.row.windows_left_out

    def test_ordinary_eeg_has_no_bad_windows(self, shard_one, true_uv) -> None:
        t, rng = get_times(), np.random.default_rng(2)
        uv = true_uv(14, 8, t) + rng.normal(0, 3, (8, t.size)) + 30 * np.sin(2 * np.pi * 50 * t)
        for at in range(5, 55, 10):  # Add a blink every 10 s.
            uv[:2] += 250 * np.exp(-(((t - at) / 0.08) ** 2))
        for write in (write_fif, write_edf):
            sharded = shard_one(np.round(uv), write=write)
            assert not sharded.row.bad_in_windows and not sharded.row.windows_left_out and not sharded.row.bads


class TestMissingValues:
    @pytest.mark.parametrize("value", [np.nan, -np.inf, 1e30])
    def test_missing_values_in_every_channel_are_a_gap(self, shard_one, assert_true, true_uv, value: float) -> None:
        t = get_times(500.0, 60)
        uv = true_uv(15, 8, t)
        uv[:, (t >= 20) & (t < 20.3)] = value
        uv[:, :100] = value
        sharded = shard_one(uv, 500.0)
        assert not sharded.touches(20, 20.3) and not sharded.touches(0, 0.2)
        assert sharded.row.windows >= 56 and not sharded.row.bads
        assert_true(sharded, 15, ends=True)
        assert_adds_up(sharded)

    def test_channel_without_any_value_is_left_out(self, shard_one, assert_true, true_uv) -> None:
        uv = true_uv(16, 8, get_times())
        uv[4] = np.nan
        sharded = shard_one(uv)
        assert all("C3" not in meta["ch_names"] for meta, _ in sharded.samples)
        assert any("C3" in note for note in sharded.row.notes)
        assert_true(sharded, 16, skip=["C3"], ends=True)

    def test_missing_values_in_few_samples_cost_only_these_windows(self, shard_one, assert_true, true_uv) -> None:
        uv = true_uv(17, 8, get_times())
        uv[5, [5000, 10000]] = np.nan
        sharded = shard_one(uv)
        assert sharded.row.windows >= 58 and 2 <= sharded.row.bad_in_windows["missing values"] <= 6
        clean = dataclasses.replace(sharded, samples=[s for s in sharded.samples if not s[0]["bads"]])
        assert_true(clean, 17, ends=True)

    @pytest.mark.parametrize("size", [1e5, 1e9])
    def test_garbage_channel_costs_only_this_channel(self, shard_one, assert_true, true_uv, size: float) -> None:
        uv = true_uv(18, 8, get_times())
        uv[6] = size * np.random.default_rng(0).normal(size=uv.shape[1])
        sharded = shard_one(uv)
        assert sharded.row.windows >= 58
        assert all("P3" in meta["bads"] or "P3" not in meta["ch_names"] for meta, _ in sharded.samples)
        assert_true(sharded, 18, skip=["P3"], ends=True)


class TestEdges:
    @pytest.mark.parametrize(("highpass", "mains"), [(0.5, False), (1.0, True), (5.0, False), (5.0, True)])
    def test_windows_near_the_ends_are_right(self, shard_one, assert_true, true_uv, highpass, mains) -> None:
        t = get_times()
        uv = true_uv(19, 8, t) + (40 * np.sin(2 * np.pi * 50 * t) if mains else 0.0)
        spec = dataclasses.replace(SPEC, highpass=highpass)
        sharded = shard_one(uv, spec=spec)
        assert (sharded.row.line_freq == 50.0) is mains
        assert 0 < sharded.spans[0][0] < 2.6 / highpass + 0.5
        assert_true(sharded, 19, spec=spec, ends=True)
        assert_adds_up(sharded)

    def test_short_recording_is_kept_and_marked(self, shard_one, true_uv) -> None:
        sharded = shard_one(true_uv(20, 8, get_times(250.0, 1.3)))
        assert sharded.row.windows == 1 and sharded.samples[0][0]["transient_s"] > 0.2
        assert sharded.samples[0][0]["start"] == 0.0

    def test_trials_near_the_ends_and_gaps_are_marked(self, shard_one, tmp_path, true_uv, shard_all) -> None:
        t = get_times(250.0, 120)
        uv = true_uv(21, 8, t)
        uv[:, (t >= 60) & (t < 62)] = 0.0
        uv[:3, (t >= 80) & (t < 90)] = 0.0
        onsets = (0.1, 10.0, 58.6, 60.5, 62.4, 70.0, 85.0, 118.9)
        write_fif(tmp_path / "eeg" / "a_raw.fif", uv)
        Image.new("RGB", (8, 8)).save(tmp_path / "eeg" / "face.png")
        table = "onset\timage\n" + "".join(f"{onset}\tface.png\n" for onset in onsets)
        (tmp_path / "eeg" / "a_events.tsv").write_text(table)
        split = {"images": str(tmp_path / "eeg"), "kind": "events"}
        sharded = shard_all(tmp_path / "eeg", **split)["a_raw.fif"]
        found = {round(meta["start"] + meta["onset"] / 256, 1): meta for meta, _ in sharded.samples}
        assert sorted(found) == [0.1, 10.0, 58.6, 62.4, 70.0, 85.0, 118.9]
        assert sharded.row.windows_left_out == {"flat in every channel": 1}
        assert {at for at, meta in found.items() if meta.get("transient_s")} == {0.1, 58.6, 62.4, 118.9}
        assert found[85.0]["bads"] == NAMES[:3] and not found[70.0]["bads"]

    def test_old_settings_leave_nothing_out(self, shard_one, true_uv) -> None:
        spec = dataclasses.replace(SPEC, quality=QualitySpec(leave_out_edges=False))
        sharded = shard_one(true_uv(22, 8, get_times()), spec=spec)
        assert sharded.row.windows == 60 and sharded.samples[0][0]["transient_s"] > 0
