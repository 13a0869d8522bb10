"""Tests that the report of an evaluation shows the images and the numbers, and escapes every name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune.evaluation.generated import GeneratedSet
from finetune.evaluation.report import choose_trials, render_report

LABELS = ["circle", "<script>alert(1)</script>"]


def write_page(folder: Path, held_out: dict) -> Path:
    rng = np.random.default_rng(0)
    real, generated, shuffled = rng.integers(0, 256, (3, 8, 16, 16, 3), dtype=np.uint8)
    trials = [{"key": f"t{i}", "label": i % 2, "subject": "s1", "image_id": f"i{i}"} for i in range(8)]
    accuracy = {"accuracy": 0.75, "chance": 0.5, "n": 8, "images": 8, "p_value": 0.03, "interval": [0.4, 0.9]}
    measured = {"accuracy[judge]": accuracy, "psnr": 12.5, "fid": "not computed: no weights"}
    quartiles = {"quartile_1": 10.0, "median": 20.0, "quartile_3": 30.0}
    result = {
        "kind": "<script>alert(2)</script>",
        "split": "test",
        "dataset_id": "1" * 64,
        "sampling": {"sampler": "ddim", "steps": 25},
        "labels": LABELS,
        "trials": 8,
        "subjects": 1,
        "images": 8,
        "images_also_in_train": 2,
        "classifier": {
            "name": "judge",
            "trained_on": {"images": 64},
            "held_out": held_out,
        },
        "generated": measured | {"confusion": [[4, 0], [1, 3]], "frechet_note": "biased"},
        "shuffled": measured,
        "random_pairs": {"psnr": 10.0},
        "other_real": {
            "source": "images of the <script>folder</script>",
            "images": 8,
            "paired": True,
            "metrics": measured,
        },
        "noise_ceiling": {
            "eeg": {"reliability": 0.25, "ceiling": 0.5, "by_person": {"s1": 0.25}, "images": 8},
            "generated": "not applicable: each person and image has one generated image",
        },
        "training_seeds": {
            "runs": 2,
            "metrics": {"psnr": {"values": [12.5, 13.5], "mean": 13.0, "std": 0.707, "least": 12.5, "most": 13.5}},
        },
        "real": measured | {"psnr": "infinite: the images are the same"},
        "controls": {"shuffle_within": measured, "baseline": "not applicable: no <script>baseline</script>"},
        "by_person": {"s1": {"trials": 8, "accuracy": 0.75, "shuffled": None}},
        "verdict": {
            "word": "signal",
            "scope": "new people",
            "why": ["The score is better than every control.", "The design is random: <script>evidence</script>"],
            "comparisons": [
                {
                    "name": "own - shuffle",
                    "question": "signal",
                    "n": 8,
                    "left": 0.75,
                    "right": 0.25,
                    "difference": {
                        "mean": 0.5,
                        "over_images": [0.25, 0.75],
                        "over_people": None,
                        "interval": [0.25, 0.75],
                        "decides": "images",
                    },
                    "p_corrected": 0.01,
                    "holds": True,
                }
            ],
            "measure": "the category is right",
            "identification": "correlation of the pixels",
            "chance": 0.5,
            "judge": 0.9,
        },
        "protocol": {
            "openings": "The test split was opened once so far.",
            "splits": {
                "shared": ["image <script>x</script>"],
                "to_look_at": [],
                "compared": ["2 splits"],
                "not_compared": [],
            },
            "pretraining": None,
        },
        "memorisation": {"measure": "RMS pixel difference", "generated": quartiles, "real": quartiles},
    }
    about = {"trials": trials, "labels": LABELS, "dataset": "/data/<script>d</script>", "model_digest": "0" * 64}
    own = GeneratedSet(path=folder, about=about, images_BHW3=generated, real_BHW3=real)
    control = GeneratedSet(path=folder, about=about, images_BHW3=shuffled, real_BHW3=real)
    (folder / "report.html").write_text(render_report(result, own, control, examples=6, similarity_B=np.arange(8.0)))
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("report"), {"accuracy": 0.9, "n": 16, "interval": [0.8, 1.0]})


def test_numbers_and_names(page: Path) -> None:
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3 * 6 + 3 * 3 * 6
    assert "Signal." in text and "Scope: new people" in text and "+25.0% to +75.0% (images)" in text
    assert "signal needs" in text and "shuffle: EEG of another trial of the whole split." in text
    assert "1 findings of shared data" in text and "opened once" in text and "not applicable: no &lt;script&gt;" in text
    assert "<script" not in text and text.count("&lt;script&gt;alert(1)") > 3 and "&lt;script&gt;alert(2)" in text
    assert "75.0%" in text and "0.750 [0.40, 0.90]\np = 0.03" in text and "fid: not computed: no weights" in text
    assert "sampler ddim, steps 25" in text and "0" * 64 in text and "DreamDiffusion" in text and "/data/" not in text
    assert "2 of the images are also in the training split" in text
    assert "other real images" in text and "a reliability of\n0.250" in text and "knows only the category" in text
    assert "one generated image.</p>" in text and "Spread over 2 models" in text and "standard deviation" in text


def test_a_dataset_without_held_out_images(page: Path, tmp_path: Path) -> None:
    assert "On 16 real held-out images, the classifier's accuracy is\n0.900." in page.read_text()
    without = {"accuracy": "not computed: there are no held-out images", "n": 0, "splits": []}
    assert (
        "The classifier's accuracy is not computed: there are no held-out images."
        in write_page(tmp_path, without).read_text()
    )


def test_in_a_browser(page: Path, open_in_browser) -> None:
    assert {view["pictures"] for view in open_in_browser(page)} == {18 + 54}


def test_trials_are_chosen_evenly() -> None:
    labels_B = np.array([0] * 9 + [1] * 3)
    assert choose_trials(labels_B, 6) == [0, 4, 8, 9, 10, 11]
    assert choose_trials(labels_B, 1) == [0]
