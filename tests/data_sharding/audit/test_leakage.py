"""All data that two datasets, or two splits of a dataset, have in common are reported, and nothing else."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from data_sharding.audit.fingerprints import Fingerprints, find_similar_images, fingerprint_image, window_digest
from data_sharding.audit.leakage import Contents, compare_splits
from data_sharding.audit.verify import main
from data_sharding.dataset.dataset import write_dataset
from data_sharding.dataset.samples import Sample, decode_eeg, encode_eeg
from data_sharding.processing.preprocess import PreprocessSpec


def make_image(seed: int, size: int = 96) -> Image.Image:
    """Make an image of smooth coloured blobs, with about as much detail as the thumbnail of a photograph."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def encode_image(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def recordings(make_raw) -> list[dict]:
    """Six recordings of four subjects; each subject is in one split."""
    splits = ["train", "train", "train", "train", "val", "test"]
    people = ["sub-01", "sub-01", "sub-02", "sub-02", "sub-03", "sub-04"]
    return [
        {"key": f"r{i}", "subject": people[i], "split": splits[i], "raw": make_raw(6, 200, 8, seed=i)} for i in range(6)
    ]


@pytest.fixture(scope="module")
def dataset(recordings, publish, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("a") / "a"
    publish(path, recordings)
    return path


def make_unrelated_recordings(make_raw, first: int = 50, **more) -> list[dict]:
    return [
        {"key": f"q{i}", "subject": f"p{i}", "corpus": "clinic", "raw": make_raw(6, 200, 8, seed=first + i), **more}
        for i in range(3)
    ]


class TestAgainst:
    def test_datasets_without_shared_data_pass(self, dataset, publish, make_raw, tmp_path, capsys) -> None:
        publish(tmp_path / "b", make_unrelated_recordings(make_raw))
        assert main([str(dataset), "--against", str(tmp_path / "b")]) == 0
        out = capsys.readouterr().out
        assert "no shared data" in out and "shared:" not in out and "not compared" not in out
        for what in ("subjects by corpus", "checksum", "by signal: 6 with 3", "windows by content: 48 with 24"):
            assert what in out

    def test_shared_recording_is_found_despite_other_format_and_preprocessing(
        self, dataset, publish, make_raw, tmp_path, capsys
    ) -> None:
        """The second dataset has a copy with rounded values, other channel names, another subject and other windows.
        Only the signal shows that it is a copy."""
        raw = make_raw(6, 200, 8, seed=2, names=["a", "b", "c", "d", "e", "f"])
        raw.apply_function(lambda x: np.round(x * 1e7) / 1e7)
        more = [{"key": "x", "subject": "anon", "corpus": "clinic", "raw": raw, "starts": [410]}]
        publish(tmp_path / "b", make_unrelated_recordings(make_raw) + more, window=150, lowpass=35.0)
        assert main([str(dataset), "--against", str(tmp_path / "b")]) == 1
        out = capsys.readouterr().out
        assert "shared: recording r2 here is x there: same signal" in out
        assert "2 of 8 windows of r2 overlap in time with x, at 4.00, 5.00 s" in out
        assert "not compared: windows by content" in out and "lowpass" in out
        assert out.count("\nshared: ") == 1

    def test_equal_windows_are_found_without_ledger_and_fingerprints(
        self, dataset, publish, make_raw, tmp_path, capsys
    ) -> None:
        """Even without ledger and fingerprints, equal windows show the leakage."""
        publish(tmp_path / "b", [{"key": "x", "subject": "x", "corpus": "c", "raw": make_raw(6, 200, 8, seed=3)}])
        for name in ("ledger.parquet", "fingerprints.parquet"):
            (tmp_path / "b" / name).unlink()
        assert main([str(tmp_path / "b"), "--against", str(dataset)]) == 1
        out = capsys.readouterr().out
        assert "8 windows of x equal to windows of r3" in out
        assert (
            "has no ledger.parquet" in out
            and "has no fingerprints.parquet" in out
            and "the subjects are unknown; set the key 'subject_pattern'" in out
        )

    def test_shared_subject_is_found(self, dataset, publish, make_raw, tmp_path, capsys) -> None:
        people = make_unrelated_recordings(make_raw)
        people[0] |= {"subject": "sub-02", "corpus": "lab"}
        people[1] |= {"subject": "sub-03"}
        publish(tmp_path / "b", people)
        assert main([str(dataset), "--against", str(tmp_path / "b")]) == 1
        out = capsys.readouterr().out
        assert "shared: subject sub-02 of corpus lab is in both" in out
        assert "to look at: same name: subject sub-03 of corpus lab, and of clinic in the other dataset" in out

    def test_equal_bytes_are_shared_and_equal_names_are_questions(
        self, dataset, publish, make_raw, tmp_path, capsys
    ) -> None:
        people = make_unrelated_recordings(make_raw)
        people[0]["sha256"] = "r5"
        people[1] |= {"key": "r0", "sha256": "another"}
        publish(tmp_path / "b", people)
        assert main([str(dataset), "--against", str(tmp_path / "b")]) == 1
        out = capsys.readouterr().out
        assert "recording r5 here is q0 there: equal bytes" in out
        assert "to look at: same name: recording r0; the files differ" in out

    def test_dataset_in_an_object_store_is_compared(self, dataset, capsys) -> None:
        store = UPath("memory://leakage/copy")
        for file in (f for f in dataset.rglob("*") if f.is_file()):
            target = store / file.relative_to(dataset).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        assert main(["memory://leakage/copy"]) == 0
        assert main(["memory://leakage/copy", "--against", str(dataset)]) == 1
        assert "share data: 4 about subjects, 6 about recordings" in capsys.readouterr().out

    def test_bad_requests_exit_with_code_2(self, dataset, tmp_path, capsys) -> None:
        assert main([str(dataset), "--against", str(tmp_path / "gone")]) == 2
        assert main([str(dataset), "--against", str(dataset)]) == 2
        damaged = shutil.copytree(dataset, tmp_path / "damaged")
        tar = damaged / "train" / "000000.tar"
        tar.write_bytes(tar.read_bytes()[:2000])
        assert main([str(dataset), "--against", str(damaged)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dreamscale:")]
        assert len(lines) == 3 and "no such dataset" in lines[0] and "to see what is damaged" in lines[2]


class TestSplits:
    def test_splits_without_shared_data_pass(self, dataset, capsys) -> None:
        assert main([str(dataset)]) == 0
        assert "the splits share nothing" in capsys.readouterr().out

    def test_subject_and_copy_in_two_splits_are_found(self, recordings, publish, tmp_path, capsys, make_raw) -> None:
        crossing = [*recordings, {**recordings[4], "key": "r6", "subject": "sub-01", "split": "test"}]
        publish(tmp_path / "a", crossing)
        assert main([str(tmp_path / "a")]) == 1
        out = capsys.readouterr().out
        assert "subject sub-01 of corpus lab is in train and test" in out
        assert "recording r6 is a copy of r4; they are in val and test" in out
        assert "8 windows of r4 (val) equal to windows of r6 (test)" in out

    def test_overlapping_trials_in_two_splits_are_found(self, publish, make_raw, tmp_path, capsys) -> None:
        """If images are shown quickly one after another, the window of a training image overlaps the window of a test
        image."""
        raw = make_raw(6, 200, 8, seed=0)
        trials = [(0, "train"), (300, "train"), (350, "test"), (600, "test")]
        publish(tmp_path / "a", [{"key": "r", "subject": "s", "raw": raw, "trials": trials}])
        self.set_split_config(tmp_path / "a", val_fraction=0, test_fraction=0)
        assert main([str(tmp_path / "a")]) == 1
        out = capsys.readouterr().out
        assert "1 window of r in train overlaps in time with windows in test, at 3.00 s" in out
        assert "to look at: subject s of corpus lab is in train and test (the config does not hold subjects out)" in out

    @staticmethod
    def set_split_config(path: Path, **split) -> None:
        from data_sharding.common.files import read_json, write_json

        values = read_json(path / "manifest.json")
        values["config"]["split"] = split
        write_json(path / "manifest.json", values)


def test_baselines_that_overlap_with_another_split_are_only_a_question(tmp_path: Path) -> None:
    spec = PreprocessSpec(sfreq=100, highpass=1, lowpass=40, window=100, stride=100)
    rng = np.random.default_rng(0)

    def make_trial(start: float, split: str) -> Sample:
        meta = {"n": 2, "sfreq": 100.0, "start": start - 0.5, "onset": 50, "recording": "r", "split": split}
        return Sample(key=f"r-{start}".replace(".", "-"), eeg=rng.normal(0, 10, (2, 150)), meta=meta)

    for following, proofs in ((21.2, 0), (20.8, 1)):
        data = {"train": [make_trial(20.0, "train")], "test": [make_trial(following, "test")]}
        write_dataset(tmp_path / f"{proofs}", data, spec)
        found = [f for f in compare_splits(Contents.read(tmp_path / f"{proofs}")).found if f.kind == "window"]
        assert [finding.proof for finding in found] == [bool(proofs)]
        assert ("only before or after the part that models read" in found[0].text) == (not proofs)


class TestImages:
    def make_trials(self, make_raw, pictures: list[tuple[str, bytes]], **more) -> list[dict]:
        base = {"key": "t", "subject": "who", "raw": make_raw(4, 200, 8, seed=7)}
        return [base | {"starts": [100 * i for i in range(len(pictures))], "images": pictures} | more]

    def test_image_that_was_encoded_again_or_resized_is_found(self, publish, make_raw, tmp_path, capsys) -> None:
        ours = [(f"cat_{i}", encode_image(make_image(i))) for i in range(5)]
        theirs = [
            ("x0", encode_image(make_image(0))),
            ("x1", encode_image(make_image(1), "JPEG", quality=60)),
            ("x2", encode_image(make_image(2).resize((40, 40)), "JPEG", quality=85)),
            ("cat_3", encode_image(make_image(33))),
            ("x4", encode_image(make_image(44))),
        ]
        publish(tmp_path / "a", self.make_trials(make_raw, ours))
        more = {"key": "u", "corpus": "web", "raw": make_raw(4, 200, 8, seed=8), "subject": "other"}
        publish(tmp_path / "b", self.make_trials(make_raw, theirs, **more))
        assert main([str(tmp_path / "a"), "--against", str(tmp_path / "b")]) == 1
        out = capsys.readouterr().out
        assert "image lab/cat_0 here is web/x0 there: equal bytes" in out
        assert "image lab/cat_1 here is web/x1 there: the same image, encoded again" in out
        assert "image lab/cat_2 here is web/x2 there: the same image, encoded again" in out
        assert "to look at: same name: image lab/cat_3 here, web/cat_3 there; the contents differ" in out
        assert out.count("image ") == 4

    def test_image_in_two_splits_is_found(self, publish, make_raw, tmp_path, capsys) -> None:
        train = [("a", encode_image(make_image(0))), ("b", encode_image(make_image(1)))]
        test = [("c", encode_image(make_image(1), "JPEG", quality=50)), ("a", encode_image(make_image(0)))]
        both = self.make_trials(make_raw, train)
        more = {"key": "u", "subject": "other", "raw": make_raw(4, 200, 8, seed=8), "split": "test"}
        publish(tmp_path / "a", both + self.make_trials(make_raw, test, **more))
        assert main([str(tmp_path / "a")]) == 1
        out = capsys.readouterr().out
        assert "image lab/a is in train and test" in out
        assert "image lab/b (train) is lab/c (test): the same image, encoded again" in out

    def test_sharing_that_the_config_allows_is_only_a_question(self, publish, make_raw, tmp_path, capsys) -> None:
        """At first, the config of the dataset holds out only subjects. Then the config splits the same trials by
        concept."""
        both = self.make_trials(make_raw, [("a", encode_image(make_image(0)))], concepts=["cat"])
        more = {"key": "u", "subject": "other", "raw": make_raw(4, 200, 8, seed=8), "split": "test"}
        publish(
            tmp_path / "a",
            both + self.make_trials(make_raw, [("a", encode_image(make_image(0)))], concepts=["cat"], **more),
        )
        TestSplits.set_split_config(
            tmp_path / "a", test_subjects=["other"], image_val_fraction=0, image_test_fraction=0
        )
        assert main([str(tmp_path / "a")]) == 0
        assert "to look at: image lab/a is in train and test (the config does not" in capsys.readouterr().out
        TestSplits.set_split_config(tmp_path / "a", test_subjects=["other"], image_test_fraction=0.1, by="concept")
        assert main([str(tmp_path / "a")]) == 1
        assert "shared: concept cat is in train and test" in capsys.readouterr().out

    def test_different_images_are_not_similar(self) -> None:
        prints = [fingerprint_image(encode_image(make_image(i))) for i in range(150)]
        assert find_similar_images(prints, prints) == [(i, i) for i in range(150)]
        grey = [fingerprint_image(encode_image(Image.new("RGB", (64, 64), (v, v, v)))) for v in (0, 40, 200, 255)]
        assert find_similar_images(grey, grey) == [(i, i) for i in range(4)]

    def test_file_that_is_not_an_image_matches_nothing(self) -> None:
        blind = fingerprint_image(b"not a picture")
        assert blind.phash is None and find_similar_images([blind], [blind]) == []


def test_window_digest_depends_only_on_shape_and_values() -> None:
    x = np.random.default_rng(0).normal(0, 20, (5, 64)).astype(np.float16)
    assert window_digest(decode_eeg(encode_eeg(x), 5)) == window_digest(x)
    assert window_digest(x) != window_digest(x[:4]) and window_digest(x) != window_digest(x.reshape(10, 32))
    y = x.copy()
    y[2, 3] = np.nextafter(y[2, 3], np.float16(np.inf))
    assert window_digest(x) != window_digest(y)


def test_stored_fingerprints_are_read_back(dataset, recordings) -> None:
    from data_sharding.processing.survey import assess

    stored = Fingerprints(dataset)
    assert [p.key for p in stored.recordings] == [r["key"] for r in recordings]
    raw = recordings[3]["raw"]
    expected = assess(1e6 * raw.get_data(), raw.info["sfreq"]).fingerprint
    np.testing.assert_allclose(stored.load("r3"), expected, atol=1e-3)
    assert stored.recordings[3].signature and stored.recordings[3].seconds == 8.0
