"""Tests of the probe on simulated trials.

Each method must find the labels that its features show, controls must stay at chance, and no label of the test split
may be used in training.
"""

from __future__ import annotations

import io
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_sharding.common.files import sha256_file
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.samples import Sample
from data_sharding.processing.preprocess import PreprocessSpec
from pretrain.encoder.encoder import EEGEncoder
from pretrain.evidence.ridge import STRENGTHS, ridge_scores
from pretrain.evidence.trials import TrialTable
from pretrain.model.config import EncoderConfig
from pretrain.probe.compare import TUNED, TUNED_RANDOM
from pretrain.probe.config import DEFAULT_METHODS, ProbeConfig
from pretrain.probe.eegnet import EEGNet, EEGNetConfig, predict_eegnet, train_eegnet
from pretrain.probe.features import Trials, average_bins, covariance, standardize
from pretrain.probe.finetune import finetune_and_predict, one_cycle
from pretrain.probe.folds import Fold, make_inner_folds, make_outer_folds, shuffle_labels
from pretrain.probe.ridge import choose_and_predict
from pretrain.probe.run import main

SPEC = PreprocessSpec(sfreq=128.0, highpass=0.5, lowpass=45.0, window=128, stride=128)
SUBJECTS = {"train": ("s1", "s2", "s3", "s4"), "val": ("s5",), "test": ("s6", "s7")}


def write_trials(path: Path, *, images: dict[str, int], caps: bool = False, own_images: bool = False) -> Path:
    """Write trials with two labels: the label is the sign of a bump 0.4 s after stimulus onset.

    All subjects of a split see the same images, unless `own_images` is true.
    """
    rng = np.random.default_rng(5)
    splits: dict[str, list[Sample]] = {}
    names = [f"E{i + 1}" for i in range(8)]
    for split, subjects in SUBJECTS.items():
        for subject in subjects:
            for image in range(images[split]):
                label = image % 2
                eeg = rng.normal(0, 10, (8, SPEC.window))
                eeg += (1 if label else -1) * 12 * np.exp(-((np.arange(SPEC.window) - 50) ** 2) / 200)
                channels = names[::-1] if caps and subject == "s6" else names
                identity = f"{subject}-{image}" if own_images else f"{split}-{image}"
                meta: dict[str, Any] = {
                    "n": 8,
                    "ch_names": channels,
                    "positions": [None] * 8,
                    "reference": "average",
                    "sfreq": SPEC.sfreq,
                    "start": float(image),
                    "recording": f"rec-{subject}",
                    "subject": subject,
                    "session": "",
                    "corpus": "tiny",
                    "bads": [],
                    "split": split,
                    "image_id": identity,
                    "label": label,
                    "label_name": ("minus", "plus")[label],
                }
                sample = Sample(key=f"{subject}-{image:04d}", eeg=eeg.astype(np.float32), meta=meta)
                splits.setdefault(split, []).append(sample)
    write_dataset(path, splits, SPEC, labels=["minus", "plus"], samples_per_shard=64)
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trials(tmp_path_factory.mktemp("probe") / "data", images={"train": 16, "val": 8, "test": 12})


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "encoder"
    torch.manual_seed(11)
    shape = {"patch": 8, "dim": 32, "depth": 1, "heads": 2, "mlp_ratio": 1.0}
    EEGEncoder(spec=SPEC, n_times=128, sfreq=128.0, **shape).eval().save_pretrained(path)
    return path


def trials_of(subjects: int, images: int, *, shared: bool = True) -> Trials:
    subject, image = (part.ravel() for part in np.meshgrid(np.arange(subjects), np.arange(images), indexing="ij"))
    n = len(subject)
    return Trials(
        splits_n=np.where(subject == subjects - 1, "test", "train"),
        table=TrialTable(
            labels_n=image % 2,
            images_n=np.array([f"{i}" if shared else f"{s}-{i}" for s, i in zip(subject, image, strict=True)]),
            subjects_n=np.array([f"s{s}" for s in subject]),
            sessions_n=np.full(n, ""),
            recordings_n=np.array([f"r{s}" for s in subject]),
            times_n=image.astype(float),
        ),
        channels=["a", "b"],
        eeg_nCT=np.zeros((n, 2, 16), np.float16),
        digests_n=np.arange(n),
        window_s=0.5,
        metas=[{}] * n,
        electrodes=[{"n": 2, "positions": None}] * n,
        tokens={},
    )


def request(**values: Any) -> ProbeConfig:
    return ProbeConfig(encoder="e", dataset="d", **values)


class TestCommand:
    def test_every_method_on_the_same_trials(self, package: Path, dataset: Path, tmp_path: Path, capsys: Any) -> None:
        words = [str(package), str(dataset), "--output", str(tmp_path / "p.json"), "--figure", str(tmp_path / "p.png")]
        assert (
            main(
                [*words, "--random_seeds", "2", "--eegnet_epochs", "150", "--eegnet_patience", "60", "--shuffles", "20"]
            )
            == 0
        )
        found = json.loads((tmp_path / "p.json").read_text())
        score = {name: value["mean"] for name, value in found["accuracy"].items()}
        assert score.keys() == {"encoder", *DEFAULT_METHODS, "commonest label", "encoder, labels shuffled"}
        # A linear map of the signal can find the sign of the simulated bump, but power and covariance do not depend on
        # this sign.
        assert min(score["encoder"], score["random weights"], score["time courses"], score["EEGNet"]) > 0.8
        assert max(score["band power"], score["covariance"]) < 0.75
        assert 0.3 < score["encoder, labels shuffled"] < 0.7
        assert score["commonest label"] == 0.5
        assert found["trials"] == {"train": 64, "scored": 24}
        assert found["subjects"] == {"train": 4, "scored": 2}
        assert len(found["accuracy"]["random weights"]["each"]) == 2
        assert found["encoder_minus"]["band power"]["p"] < 0.05
        assert found["encoder_minus"]["random weights"]["p"] > 0.05
        assert found["encoder_minus"]["band power"]["p_subjects"] is None
        assert (tmp_path / "p.png").stat().st_size > 1000
        assert "on 24 test trials of 12 images and 2 subject(s)" in " ".join(capsys.readouterr().out.split())

    def test_leaving_subjects_out_scores_every_trial_once(self, package: Path, dataset: Path, tmp_path: Path) -> None:
        words = [str(package), str(dataset), "--folds", "subjects", "--output", str(tmp_path / "p.json")]
        assert main([*words, "--methods", '["band power", "time courses"]', "--shuffles", "0"]) == 0
        found = json.loads((tmp_path / "p.json").read_text())
        assert found["trials"]["scored"] == 64 + 8 + 24
        assert found["subjects"]["scored"] == 7
        assert found["subjects_in_both"] == []
        assert found["left_out_for_shared_images"]["train"] > 0
        assert found["accuracy"].keys() == {"encoder", "band power", "time courses", "commonest label"}
        assert found["accuracy"]["encoder"]["mean"] > 0.8
        # The encoder is better than band power for all seven subjects, so only 2 of the 128 combinations of signs give
        # such a large difference.
        assert found["encoder_minus"]["band power"]["p_subjects"] == 2 / 2**7
        low, high = found["encoder_minus"]["band power"]["ci95_subjects"]
        assert 0 < low < found["encoder_minus"]["band power"]["mean"] < high

    def test_fine_tuning_learns_and_leaves_the_encoder_as_it_is(
        self, package: Path, dataset: Path, tmp_path: Path
    ) -> None:
        words = [str(package), str(dataset), "--methods", '["fine-tuning"]', "--shuffles", "0", "--random_seeds", "1"]
        words += ["--finetune_epochs", "8", "--finetune_rates", "[2e-3, 4e-3]", "--output", str(tmp_path / "p.json")]
        assert main(words) == 0
        found = json.loads((tmp_path / "p.json").read_text())
        assert found["accuracy"].keys() == {"encoder", "commonest label", TUNED, TUNED_RANDOM}
        # There is only one fold, so the results hold one chosen learning rate.
        assert found["chosen"][TUNED][0] in (2e-3, 4e-3)
        assert found["accuracy"][TUNED]["mean"] > 0.8
        assert found["encoder_minus"][TUNED_RANDOM]["of"] == TUNED
        assert found["encoder_minus"]["commonest label"]["of"] == "encoder"
        # Fine-tuning must not change the encoder that computed the features for the other scores.
        assert main([*words[:2], "--methods", "[]", "--shuffles", "0", *words[-2:]]) == 0
        again = json.loads((tmp_path / "p.json").read_text())
        assert again["accuracy"]["encoder"] == found["accuracy"]["encoder"]

    def test_channels_are_compared_by_name(self, package: Path, tmp_path: Path) -> None:
        from pretrain.probe.features import collect

        data = write_trials(tmp_path / "caps", images={"train": 4, "val": 2, "test": 4}, caps=True)
        encoder = EEGEncoder.from_pretrained(package)
        device = torch.device("cpu")
        trials = collect(str(data), ["test"], {"encoder": encoder}, bins=4, batch_size=3, device=device)
        from data_sharding.dataset.dataset import EEGDataset

        first = EEGDataset(data, "test")[0]
        assert first.meta["subject"] == "s6"
        assert trials.channels == first.meta["ch_names"]
        last = EEGDataset(data, "test")[7]
        np.testing.assert_array_equal(trials.eeg_nCT[7], last.eeg[::-1])
        assert trials.tokens["encoder"].shape == (8, 4 * 32)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--time_bins", "17"], "16 tokens"),
            (["--figure", "x.txt"], ".png"),
            (["--output", "/no/such/folder/p.json"], "no such folder"),
            (["--methods", '["magic"]'], "methods"),
            (["--folds", "subjects", "--image_groups", "1"], "image_groups"),
        ],
    )
    def test_bad_requests(self, options: list[str], says: str, package: Path, dataset: Path, capsys: Any) -> None:
        assert main([str(package), str(dataset), *options]) == 2
        assert says in capsys.readouterr().err

    def test_labels_that_are_subjects_are_refused(self, package: Path, paired_dataset: Path, capsys: Any) -> None:
        # In `paired_dataset`, each subject saw images of one label only.
        assert main([str(package), str(paired_dataset), "--methods", "[]"]) == 2
        assert "standardize: none" in capsys.readouterr().err
        assert main([str(package), str(paired_dataset), "--methods", "[]", "--standardize", "none"]) == 0

    def test_needs_labels(self, package: Path, unpaired_dataset: Path, capsys: Any) -> None:
        assert main([str(package), str(unpaired_dataset)]) == 2
        assert "no labels" in capsys.readouterr().err

    def test_needs_the_same_preprocessing(self, package: Path, dataset: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(package, copy)
        values = json.loads((copy / "preprocess.json").read_text())
        (copy / "preprocess.json").write_text(json.dumps(values | {"highpass": 1.0}))
        assert main([str(copy), str(dataset)]) == 2


class TestFolds:
    @pytest.mark.parametrize("shared", [True, False])
    def test_no_subject_and_no_image_on_both_sides(self, shared: bool) -> None:
        trials = trials_of(5, 12, shared=shared)
        folds, left_out = make_outer_folds(trials, request(folds="subjects"))
        scored = np.concatenate([fold.test for fold in folds])
        assert sorted(scored) == list(range(60))
        assert len(folds) == (15 if shared else 5)
        assert (left_out["images"]["train"] > 0) == shared
        for fold in folds:
            pairs = [(fold.train, fold.test), *make_inner_folds(trials, fold)]
            assert len(pairs) > 2
            for fit, held in pairs:
                assert not set(trials.images_n[fit]) & set(trials.images_n[held])
                assert not set(trials.subjects_n[fit]) & set(trials.subjects_n[held])
            assert not {*fold.test} & {number for fit, held in pairs[1:] for number in (*fit, *held)}

    def test_shared_images_are_left_out_of_the_test_split(self) -> None:
        from data_sharding.common.errors import RequestError

        trials = trials_of(3, 8)
        with pytest.raises(RequestError, match="every image or all EEG of split 'test'"):
            make_outer_folds(trials, request())
        trials.images_n[-3:] = ["new 1", "new 2", "new 3"]
        (fold,), left_out = make_outer_folds(trials, request())
        assert fold.test.tolist() == [21, 22, 23]
        assert left_out == {"images": {"test": 5, "train": 0}, "eeg": {"test": 0, "train": 0}}

    @pytest.mark.parametrize("folds", ["split", "subjects"])
    def test_trials_with_the_same_eeg_are_not_on_both_sides(self, folds: str) -> None:
        trials = trials_of(3, 8, shared=False)
        trials.digests_n[-1] = trials.digests_n[0]
        # The third last trial becomes a training trial, and the second last trial begins 0.25 s after it, so their EEG
        # overlaps.
        trials.splits_n[-3] = "train"
        trials.table.times_n[-2] = trials.table.times_n[-3] + 0.25
        found, left_out = make_outer_folds(trials, request(folds=folds))
        if folds == "split":
            assert found[0].test.tolist() == list(range(16, 21)) and left_out["eeg"] == {"test": 2, "train": 0}
        else:
            assert left_out["eeg"] == {"test": 0, "train": 2}
        for fold in found:
            assert not set(trials.digests_n[fold.train]) & set(trials.digests_n[fold.test])

    def test_copies_of_training_images_are_left_out_of_the_test_split(
        self, package: Path, dataset: Path, tmp_path: Path
    ) -> None:
        def draw(seed: int, size: int, kind: str) -> bytes:
            pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(buffer, kind)
            return buffer.getvalue()

        splits: dict[str, list[Sample]] = {}
        for split, first in (("train", 0), ("val", 100), ("test", 200)):
            old = EEGDataset(dataset, split)
            for sample in (old[number] for number in range(len(old))):
                number = int(sample.meta["image_id"].split("-")[1])
                # Two test images are training images, under other names, in another size and another format.
                again = split == "test" and number in (0, 1)
                image = draw(number, 90, "JPEG") if again else draw(first + number, 64, "PNG")
                kind = "jpg" if again else "png"
                new = Sample(key=sample.key, eeg=sample.eeg, meta=sample.meta, image=image, image_ext=kind)
                splits.setdefault(split, []).append(new)
        write_dataset(tmp_path / "copies", splits, SPEC, labels=["minus", "plus"])
        words = [str(package), str(tmp_path / "copies"), "--methods", "[]", "--shuffles", "0"]
        assert main([*words, "--output", str(tmp_path / "p.json")]) == 0
        found = json.loads((tmp_path / "p.json").read_text())
        assert found["left_out_for_shared_images"]["test"] == 2 * 2 and found["images"] == 10

    def test_each_opening_of_the_test_split_is_recorded(
        self, package: Path, dataset: Path, tmp_path: Path, capsys: Any
    ) -> None:
        data = tmp_path / "data"
        shutil.copytree(dataset, data, ignore=shutil.ignore_patterns("openings.jsonl"))
        words = [str(package), str(data), "--methods", "[]", "--shuffles", "0", "--output", str(tmp_path / "p.json")]
        assert main([*words, "--split", "val"]) == 0
        assert json.loads((tmp_path / "p.json").read_text())["openings"] is None
        assert not (data / "openings.jsonl").exists()
        for times, more in (("once", []), ("2 times", ["--folds", "subjects"])):
            capsys.readouterr()
            assert main([*words, *more]) == 0
            found = json.loads((tmp_path / "p.json").read_text())["openings"]
            assert f"opened {times} so far, for 1 model (" in found and "opened " + times in capsys.readouterr().out
        line = json.loads((data / "openings.jsonl").read_text().splitlines()[0])
        assert (line["command"], line["split"]) == ("probe", "test")
        assert line["model_digest"] == sha256_file(package / "model.safetensors")

    def test_one_label_is_refused(self) -> None:
        from data_sharding.common.errors import RequestError

        trials = trials_of(3, 8, shared=False)
        trials.labels_n[:] = 0
        with pytest.raises(RequestError, match="the same label"):
            make_outer_folds(trials, request())

    def test_trials_of_an_image_keep_one_shuffled_label(self) -> None:
        trials = trials_of(4, 10)
        labels = shuffle_labels(trials, 3, seed=0)
        assert labels.shape == (3, 40)
        assert (labels.reshape(3, 4, 10) == labels[:, None, :10].reshape(3, 1, 10)).all()
        assert (labels != trials.labels_n).any(axis=1).all()


class TestFit:
    @pytest.mark.parametrize("features", [5, 60])
    def test_ridge_agrees_with_scikit_learn(self, features: int) -> None:
        from sklearn.linear_model import Ridge

        rng = np.random.default_rng(0)
        x, y, new = rng.normal(2, 3, (30, features)), rng.normal(size=(30, 2)), rng.normal(size=(7, features))
        centred = x - x.mean(axis=0)
        gram = centred.T @ centred
        unit = np.trace(gram) / min(gram.shape[0], 30)
        for strength, scores in zip(STRENGTHS, ridge_scores(x, y, new), strict=True):
            expected = Ridge(alpha=strength * unit).fit(x, y).predict(new)
            np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-8)

    def test_labels_of_test_trials_are_never_looked_at(self) -> None:
        rng = np.random.default_rng(1)
        trials = trials_of(4, 10, shared=False)
        x = rng.normal(size=(40, 6)).astype(np.float32)
        (fold,), _ = make_outer_folds(trials, request())
        inner = make_inner_folds(trials, fold)
        changed = trials.labels_n.copy()
        changed[fold.test] = 1 - changed[fold.test]
        one, _ = choose_and_predict(x, trials.labels_n[None], fold, inner, 2)
        other, _ = choose_and_predict(x, changed[None], fold, inner, 2)
        np.testing.assert_array_equal(one, other)

    def test_without_inner_folds_the_middle_penalty_is_taken(self) -> None:
        x = np.array([[-1.0], [1.0], [-2.0], [3.0]], np.float32)
        fold = Fold(train=np.array([0, 1]), val=np.array([], int), test=np.array([2, 3]))
        found, strength = choose_and_predict(x, np.array([[0, 1, 0, 0]]), fold, [], 2)
        assert found.tolist() == [[0, 1]]
        assert strength == pytest.approx(1.0)

    @pytest.mark.parametrize("epochs", [1, 2, 3, 10])
    def test_fine_tuning_takes_any_number_of_steps(self, epochs: int) -> None:
        encoder = EEGEncoder(EncoderConfig(channels=2, samples=16, dim=8, depth=1, heads=1))
        few, fold = np.arange(4), Fold(train=np.arange(4), val=np.array([], int), test=np.arange(4, 6))
        how: dict[str, Any] = {"classes": 2, "seed": 0, "device": torch.device("cpu")}
        labels, rate = finetune_and_predict(
            encoder, trials_of(2, 3), fold, (few, few), epochs=epochs, rates=[1e-3], **how
        )
        assert labels.shape == (2,) and rate == 1e-3

    @pytest.mark.parametrize("steps", [20, 33, 200])
    def test_fine_tuning_of_many_steps_warms_up_over_a_tenth(self, steps: int) -> None:
        def rates(schedule: Any) -> list[float]:
            optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
            scheduler, found = schedule(optimizer), []
            for _ in range(steps):
                found.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
            return found

        plain = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=steps, pct_start=0.1)
        assert rates(partial(one_cycle, rate=1.0, steps=steps)) == rates(plain)

    def test_eegnet_has_the_size_of_the_article(self) -> None:
        model = EEGNet(64, 128, 128.0, 4)
        # Numbers from Table 2 of the article on EEGNet. The four convolutions have 8x64 + 2x8x64 + 16x16 + 16x16
        # weights, and the batch normalisations have 2 x (8 + 16 + 16) values. The rest belongs to the head.
        count = sum(p.numel() for p in model.parameters())
        assert count == 512 + 1024 + 256 + 256 + 80 + 4 * (16 * 128 // 32) + 4
        model.limit_norms()
        assert model.spatial.weight.flatten(1).norm(dim=1).max() <= 1.0001

    def test_eegnet_learns_and_repeats(self) -> None:
        rng = np.random.default_rng(2)
        labels = np.arange(96) % 2
        x = rng.normal(size=(96, 4, 64)).astype(np.float32)
        x[labels == 1, 0] += 2 * np.sin(np.arange(64) / 3).astype(np.float32)
        how = {
            "sfreq": 64.0,
            "classes": 2,
            "config": EEGNetConfig(epochs=40, batch_size=16, lr=5e-3),
            "device": torch.device("cpu"),
        }
        runs = [train_eegnet(x[:64], labels[:64], x[64:80], labels[64:80], seed=3, **how) for _ in range(2)]
        assert runs[0][1] == runs[1][1] > 1
        found = predict_eegnet(runs[0][0], x[80:], torch.device("cpu"))
        assert (found == labels[80:]).mean() > 0.8
        np.testing.assert_array_equal(found, predict_eegnet(runs[1][0], x[80:], torch.device("cpu")))


class TestFeatures:
    def test_bins(self) -> None:
        x = np.arange(12.0)[None]
        np.testing.assert_allclose(average_bins(x, 4), [[1, 4, 7, 10]])
        np.testing.assert_allclose(average_bins(x, 1), [[5.5]])
        assert average_bins(np.ones((2, 10)), 4).tolist() == [[1.0] * 4] * 2

    def test_scaling_shifts_only_the_diagonal_of_the_covariance(self) -> None:
        x = np.random.default_rng(0).normal(size=(2, 5, 400))
        one, double = covariance(x), covariance(2 * x)
        assert one.shape == (2, 15)
        diagonal = np.flatnonzero(np.equal(*np.triu_indices(5)))
        np.testing.assert_allclose((double - one)[:, diagonal], np.log(4), atol=1e-4)
        np.testing.assert_allclose(np.delete(double - one, diagonal, axis=1), 0, atol=1e-4)
        assert np.isfinite(covariance(np.zeros((1, 3, 20)))).all()

    def test_standardizing_uses_only_the_trials_it_may(self) -> None:
        rng = np.random.default_rng(0)
        x = rng.normal(5, 3, (20, 4))
        x[:, 3] = 7
        subjects, train = np.repeat(["a", "b"], 10), np.arange(20) < 10
        own = standardize(x, subjects, train, "subject")
        for rows in (slice(0, 10), slice(10, 20)):
            np.testing.assert_allclose(own[rows, :3].mean(axis=0), 0, atol=1e-5)
            np.testing.assert_allclose(own[rows, :3].std(axis=0), 1, atol=1e-5)
        assert (own[:, 3] == 0).all()
        other = x.copy()
        other[10:] += 100
        np.testing.assert_array_equal(
            standardize(x, subjects, train, "none")[:10], standardize(other, subjects, train, "none")[:10]
        )
