from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_sharding.common.errors import run_main
from data_sharding.dataset.dataset import EEGDataset
from finetune.evaluation import generated, metrics, pixel_metrics
from finetune.evaluation.compare import main as compare
from finetune.evaluation.evaluate import main, measure_nearest_training_image
from finetune.evaluation.generated import read_generated
from finetune.evaluation.measure import SAME_SET, compare_random_pairs
from finetune.evaluation.networks.inception import InceptionV3, load_inception
from finetune.evaluation.networks.network import NetworkOutput
from finetune.images import ImageTable

JUDGE = "dataset-classifier"
QUICK = ["--training.steps", "60", "--training.width", "8", "--permutations", "499"]


def _write(
    folder: Path, dataset: Path, *, donors: Callable[[int, int], int], control: str, split: str = "test"
) -> Path:
    """Write a folder of generated images as 'dreamscale generate' does.

    Each generated image is the real image of another trial.
    """
    data = EEGDataset(dataset, split)
    table = ImageTable(data)
    pixels = table.pixels()
    for name in ("images", "real"):
        (folder / name).mkdir(parents=True)
    trials = []
    for number in range(len(data)):
        donor, meta, key = donors(number, len(data)), data.meta(number), data.key(number)
        Image.fromarray(pixels[table.row_of[donor]]).save(folder / "images" / f"{key}.png")
        Image.fromarray(pixels[table.row_of[number]]).save(folder / "real" / f"{key}.png")
        trial = {name: meta[name] for name in ("image_id", "label", "subject")}
        eeg_key = data.key(donor if control == "shuffle" else number)
        trials.append(
            {"key": key, "eeg_key": eeg_key, **trial, "file": f"images/{key}.png", "real_file": f"real/{key}.png"}
        )
    about = {"kind": "eg_ddpm", "steps": 1, "guidance_scale": 1.0, "seed": 0, "split": split, "control": control}
    about["model_digest"] = "0" * 64
    about |= {"dataset": str(dataset), "dataset_id": data.manifest.dataset_id, "labels": data.labels, "trials": trials}
    (folder / "generated.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def perfect(paired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluate a model that shows, for each trial, another real image of the trial's category."""
    root = tmp_path_factory.mktemp("evaluate")
    own = _write(root / "own", paired_dataset, donors=lambda i, n: (i + 2) % n, control="none")
    shuffled = _write(root / "own-shuffle", paired_dataset, donors=lambda i, n: (i + 1 + i % 4) % n, control="shuffle")
    assert main([str(own), *QUICK]) == 0 and shuffled.name == "own-shuffle"
    return root


def test_metrics_and_controls_of_a_model_that_knows_the_category(perfect: Path) -> None:
    found = json.loads((perfect / "own" / "metrics.json").read_text())
    own, shuffled, real = (found[name][f"accuracy[{JUDGE}]"] for name in ("generated", "shuffled", "real"))
    assert found["classifier"]["held_out"]["n"] == 32 and found["classifier"]["trained_on"]["images"] == 64
    assert real["accuracy"] > 0.9 and own["accuracy"] == real["accuracy"] and own["chance"] == pytest.approx(0.5)
    assert own["p_value"] < 0.01 < 0.05 < shuffled["p_value"]
    assert found["shuffled"][f"accuracy_of_eeg[{JUDGE}]"]["accuracy"] == real["accuracy"]
    assert found["images_also_in_train"] == 0 and found["trials"] == 16
    assert found["generated"][f"frechet_distance[{JUDGE}]"] == pytest.approx(
        0, abs=1e-3
    )  # The generated images are the real images in another order.
    assert found["generated"]["psnr"] > found["random_pairs"]["psnr"]
    assert found["real"]["psnr"] == found["real"]["ssim"] == SAME_SET
    # The distance of the real images is computed between two halves of the real images, so the distance is not zero.
    assert found["real"][f"frechet_distance[{JUDGE}]"] > 0.01
    assert own["constant"] == own["uniform"] == 0.5
    assert found["memorisation"]["generated"] == found["memorisation"]["real"]
    # Images of the training split, judged like generated images, show the category but not the seen image.
    other = found["other_real"]
    assert other["paired"] and other["images"] == 16 and other["source"] == "images of the training split"
    assert other["metrics"][f"accuracy[{JUDGE}]"]["accuracy"] > 0.9
    assert 0 < other["metrics"]["psnr"] < 40 and other["metrics"][f"frechet_distance[{JUDGE}]"] > 0.01
    assert all(found["noise_ceiling"][name].startswith("not applicable") for name in ("eeg", "generated"))
    assert found["training_seeds"].startswith("not applicable: one training run")
    for name in ("fid", "kid", "cosine_similarity[clip]", "cosine_similarity[dinov2]"):
        assert found["generated"][name].startswith("not computed")
    assert found["networks"][0]["name"] == JUDGE and len(found["networks"][0]["sha256"]) == 64
    # Each generated image shows another image of the right category, so the right image is not found within its
    # category.
    assert found["generated"][f"two_way_identification[{JUDGE}]"] > 0.6
    assert found["generated"][f"two_way_within_category[{JUDGE}]"] < 0.6
    assert found["generated"][f"retrieval_top_1[{JUDGE}]"]["chance"] == 1 / 16
    same_class = found["generated"][f"2-way-top-1[{JUDGE}, class of the real image]"]
    assert same_class["accuracy"] > 0.9
    trials = json.loads((perfect / "own" / "trials.json").read_text())["trials"]
    assert {f"two_way_within_category[{JUDGE}]", "psnr", "accuracy"} <= trials[0]["values"].keys()
    assert trials[0]["values"].keys() == trials[0]["shuffled"].keys()
    assert not any(name.startswith("50-way") and JUDGE in name for name in found["generated"])
    assert found["generated"][f"2-way-top-1[{JUDGE}]"]["accuracy"] == own["accuracy"]


def test_the_result_has_the_published_schema(perfect: Path) -> None:
    schema = json.loads(files("finetune.evaluation").joinpath("metrics.schema.json").read_text())
    found = json.loads((perfect / "own" / "metrics.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(found, schema)
    found["verdict"]["word"] = "proven"
    with pytest.raises(jsonschema.ValidationError, match="'proven' is not one of"):
        jsonschema.validate(found, schema)


def test_the_report_is_one_file_with_the_numbers_of_the_metrics(perfect: Path) -> None:
    page = (perfect / "own" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 * 16 + 3 * 3 * 6
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    found = json.loads((perfect / "own" / "metrics.json").read_text())
    assert f"{found['generated'][f'accuracy[{JUDGE}]']['accuracy']:.1%}" in page and "not computed" in page


def test_a_second_evaluation_with_the_saved_classifier_gives_the_same_numbers(perfect: Path, tmp_path: Path) -> None:
    first = json.loads((perfect / "own" / "metrics.json").read_text())
    copy = shutil.copytree(perfect / "own", tmp_path / "copy")
    kept = str(perfect / "own" / "classifier.safetensors")
    assert main([str(copy), "--controls", f"[{perfect / 'own-shuffle'}]", "--classifier", kept, *QUICK]) == 0
    again = json.loads((copy / "metrics.json").read_text())
    # Only one entry has changed: how often the test split was opened.
    assert again["protocol"].pop("openings") != first["protocol"].pop("openings")
    assert again == first


def test_images_that_are_not_kept_in_memory_give_the_same_results(
    perfect: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["--classifier", str(perfect / "own" / "classifier.safetensors")]
    found = {}
    for name, limit in (("memory", 2**28), ("files", 1000)):
        monkeypatch.setattr(generated, "IN_MEMORY", limit)
        copy = shutil.copytree(perfect / "own", tmp_path / name)
        assert isinstance(read_generated(copy).images_BHW3, np.ndarray) == (name == "memory")
        assert main([str(copy), *kept, *QUICK, "--verify", "none"]) == 0
        found[name] = json.loads((copy / "metrics.json").read_text())
    for name in ("generated", "real", "random_pairs", "memorisation", "verdict"):
        assert found["memory"][name] == found["files"][name]


def _evaluate_in_two_processes(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", "evaluate", str(folder), *QUICK, *words, "--num_processes", "2"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_give_the_same_numbers(perfect: Path, tmp_path: Path) -> None:
    for name in ("own", "own-shuffle"):
        shutil.copytree(perfect / name, tmp_path / name)
    done = _evaluate_in_two_processes(tmp_path / "own")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verdict: ") == 1
    for name in ("metrics.json", "trials.json"):
        one, two = (json.loads((root / "own" / name).read_text()) for root in (perfect, tmp_path))
        if name == "metrics.json":
            assert one["protocol"].pop("openings") != two["protocol"].pop("openings")
            assert one["networks"][0].pop("file") != two["networks"][0].pop("file")
        assert one == two


def test_two_processes_end_with_the_exit_code_of_one(perfect: Path, tmp_path: Path) -> None:
    done = _evaluate_in_two_processes(tmp_path / "missing")
    assert done.returncode == 2 and done.stderr.count("has no generated.json") == 1
    copy = shutil.copytree(perfect / "own", tmp_path / "copy")
    words = ["--controls", "[]", "--classifier", str(copy / "classifier.safetensors"), "--verify", "none"]
    done = _evaluate_in_two_processes(copy, *words, "--require", "signal")
    assert done.returncode == 1 and "verdict: " in done.stdout and "Traceback" not in done.stderr


def test_two_models_are_compared_on_the_same_trials(
    perfect: Path, paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = _write(tmp_path / "other", paired_dataset, donors=lambda i, n: (i + 1 + i % 2) % n, control="none")
    words = [str(perfect / "own"), str(other)]
    assert run_main(compare, words) == 2
    assert "run 'dreamscale evaluate" in capsys.readouterr().err
    assert main([str(other), *QUICK, "--seed", "1"]) == 0
    assert run_main(compare, words) == 2
    assert "different classifiers" in capsys.readouterr().err
    assert main([str(other), *QUICK, "--classifier", str(perfect / "own" / "classifier.safetensors")]) == 0
    assert compare([*words, "-o", str(tmp_path / "comparison.json"), "--resamples", "499"]) == 0
    found = json.loads((tmp_path / "comparison.json").read_text())
    own, there = (json.loads((folder / "metrics.json").read_text())["generated"] for folder in map(Path, words))
    accuracy = f"accuracy[{JUDGE}]"
    difference = found["metrics"]["accuracy"]["difference"]
    assert difference["mean"] == pytest.approx(there[accuracy]["accuracy"] - own[accuracy]["accuracy"])
    assert difference["mean"] < 0 and difference["n"] == 16
    assert difference["p_images"] <= difference["p_images_corrected"] <= 1
    assert "B minus A on 16 shared trials" in capsys.readouterr().out


def test_given_inception_weights_are_used(perfect: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "inception.safetensors"
    torch.manual_seed(0)
    save_file(InceptionV3().state_dict(), weights)
    copy = shutil.copytree(perfect / "own", tmp_path / "copy")
    kept = ["--classifier", str(copy / "classifier.safetensors")]
    assert main([str(copy), "--inception", str(weights), *kept, *QUICK]) == 0
    found, images = json.loads((copy / "metrics.json").read_text()), read_generated(copy)
    network = load_inception(weights)
    a, b = (network.judge(x) for x in (images.real_BHW3, images.images_BHW3))
    assert isinstance(a, NetworkOutput) and isinstance(b, NetworkOutput)
    ids = [trial["image_id"] for trial in images.trials]
    assert found["generated"]["fid"] == pytest.approx(metrics.frechet_distance(a.features_BD, b.features_BD), rel=1e-4)
    kid = metrics.kernel_distance(a.features_BD, b.features_BD, real_ids=ids, generated_ids=ids)
    assert found["generated"]["kid"] == pytest.approx(kid, rel=1e-4)
    assert 1 <= found["generated"]["inception_score"] <= 1008
    assert network.describe() in found["networks"]
    assert found["shuffled"].startswith("not computed")
    assert run_main(main, [str(copy), "--inception", str(copy / "classifier.safetensors"), *kept, *QUICK]) == 2
    assert "give a file of weights of InceptionV3" in capsys.readouterr().err


def test_copies_of_training_images_are_detected(paired_dataset: Path) -> None:
    train = ImageTable(EEGDataset(paired_dataset, "train")).pixels()
    assert measure_nearest_training_image(train[3:6], train).max() == 0
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    by_hand = min(np.sqrt(np.square(noise[0].astype(float) - t).mean()) for t in train)
    assert measure_nearest_training_image(noise, train)[0] == pytest.approx(by_hand, rel=1e-5)


def test_a_new_paired_metric_gets_its_control(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        pixel_metrics.PAIRED_METRICS, "red", lambda a, b: np.abs(a[:][..., 0] * 1.0 - b[:][..., 0]).mean((1, 2))
    )
    images = np.zeros((2, 12, 12, 3), np.uint8)
    images[1, ..., 0] = 30
    found = compare_random_pairs(images, images, ["a", "b"], seed=0)
    assert found["red"] == pytest.approx(30.0) and set(found) == {*pixel_metrics.PAIRED_METRICS, "red"}
    small = compare_random_pairs(images[:, :5], images[:, :5], ["a", "b"], seed=0)
    assert small["ssim"] == pixel_metrics.TOO_SMALL and small["red"] == pytest.approx(30.0)


def test_random_pairs_never_take_a_trials_own_image() -> None:
    images = np.stack([np.full((12, 12, 3), 40 * i, np.uint8) for i in range(3)])[[0, 0, 1, 2]]
    found = compare_random_pairs(images, images, ["a", "a", "b", "c"], seed=0)
    # The PSNR of an image and itself is infinite, so a finite mean shows that no image was paired with itself.
    assert found["psnr"] < 20 * np.log10(255 / 40) + 1e-6
    assert compare_random_pairs(images[:2], images[:2], ["a", "a"], seed=0)["psnr"].startswith("not computed")


def _change_json(folder: Path, **changes: object) -> None:
    about = json.loads((folder / "generated.json").read_text())
    (folder / "generated.json").write_text(json.dumps(about | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "generated.json").unlink(), "no generated.json"),
        (lambda d: (d / "generated.json").write_text("{"), "not valid JSON"),
        (lambda d: _change_json(d, trials=[]), "an entry that 'dreamscale generate' writes is missing"),
        (lambda d: next((d / "images").iterdir()).unlink(), "No such file"),
        (lambda d: next((d / "images").iterdir()).write_bytes(b"\x89PNG"), "cannot be decoded"),
        (lambda d: Image.new("RGB", (8, 8)).save(next((d / "images").iterdir())), "different sizes"),
        (lambda d: _change_json(d, dataset_id="0"), "from another dataset"),
        (lambda d: _change_json(d, dataset="/nowhere"), "/nowhere"),
        (lambda d: _change_json(d, dataset="memory://nowhere"), "give the dataset as --dataset"),
        (lambda d: _change_json(d, labels=["a", "b", "c"]), "the labels in generated.json differ"),
        (lambda d: _change_json(d, control="shuffle"), "images of the control 'shuffle'"),
        (lambda d: _change_json(d, guidance_scale=3.0), "guidance_scale"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    spoil: Callable[[Path], object], message: str, perfect: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(perfect / "own", tmp_path / "copy")
    spoil(copy)
    control = (
        []
        if message in ("from another dataset", "/nowhere", "the labels in generated.json differ")
        else ["--controls", f"[{perfect / 'own-shuffle'}]"]
    )
    before = (copy / "metrics.json").read_bytes()
    assert run_main(main, [str(copy), *control]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert (copy / "metrics.json").read_bytes() == before


def test_a_folder_that_is_not_a_control_is_refused(perfect: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, [str(perfect / "own"), "--controls", f"[{perfect / 'own'}]"]) == 2
    assert "does not hold control images" in capsys.readouterr().err
