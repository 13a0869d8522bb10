import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_sharding.common.errors import RequestError, run_main
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.evaluation.generated import check_control, read_generated
from finetune.generate import main
from finetune.generation.partial import PartialFolder
from finetune.generation.trials import derange, trial_seed
from finetune.generators import digest_model, load_generator
from finetune.images import decode_image
from finetune.stable_diffusion.train import main as finetune


@pytest.fixture(scope="module")
def model(
    paired_dataset: Path, encoder_package: Path, miniature: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    args = {"dataset": paired_dataset, "encoder": encoder_package, "base": miniature / "stable-diffusion"}
    args |= {"output": path, "device": "cpu", "tracker.kind": "none", "training.steps": 1, "training.batch_size": 8}
    assert finetune([str(word) for key, value in args.items() for word in (f"--{key}", value)]) == 0
    return path / "model"


def test_each_trial_gets_one_image_and_the_real_one_beside_it(
    model: Path, paired_dataset: Path, tmp_path: Path
) -> None:
    out, few = tmp_path / "out", ["--steps", "2", "--limit", "5"]
    assert main([str(model), str(paired_dataset), "-o", str(out), *few, "--batch_size", "2"]) == 0
    result = json.loads((out / "generated.json").read_text())
    assert (result["kind"], result["control"], result["split"]) == ("stable_diffusion", "none", "test")
    assert result["labels"] == ["circle", "square"] and len(result["trials"]) == 5
    data = EEGDataset(paired_dataset, "test")
    by_key = {data.key(number): number for number in range(len(data))}
    for trial in result["trials"]:
        sample = data[by_key[trial["key"]]]
        assert trial["eeg_key"] == trial["key"] and trial["label"] == sample.meta["label"]
        assert Image.open(out / trial["file"]).size == (32, 32)
        np.testing.assert_array_equal(Image.open(out / trial["real_file"]), decode_image(sample.image))

    # A second run generates the same images, even with another batch size.
    again = tmp_path / "again"
    assert main([str(model), str(paired_dataset), "-o", str(again), *few, "--batch_size", "5"]) == 0
    for trial in result["trials"]:
        a, b = (np.asarray(Image.open(d / trial["file"])).astype(int) for d in (out, again))
        assert abs(a - b).max() <= 1


def test_each_image_says_how_it_was_generated(model: Path, paired_dataset: Path, tmp_path: Path) -> None:
    args = [str(model.parent), str(paired_dataset), "-o", str(tmp_path / "out"), "--steps", "2", "--limit", "2"]
    assert main([*args, "--seed", "5"]) == 0
    about = json.loads((tmp_path / "out" / "generated.json").read_text())
    assert about["model_digest"] == digest_model(model)
    expected = {name: str(about[name]) for name in ("model_digest", "steps", "sampler", "guidance_scale", "precision")}
    for trial in about["trials"]:
        texts = Image.open(tmp_path / "out" / trial["file"]).text  # pyright: ignore[reportAttributeAccessIssue]
        noise_seed = str(trial_seed(5, trial["key"]))
        own = {"trial": trial["key"], "seed": "5", "control": "none", "sample": "0", "noise_seed": noise_seed}
        assert texts == expected | own


def test_samples_of_a_trial_start_from_other_noise_and_the_first_is_the_image_of_a_run_with_one_sample(
    model: Path, paired_dataset: Path, tmp_path: Path
) -> None:
    few = [str(model), str(paired_dataset), "--steps", "2", "--limit", "3"]
    several = [*few, "--samples", "3", "-o", str(tmp_path / "out")]
    assert main([*few, "-o", str(tmp_path / "one")]) == 0 and main([*several, "--controls", "[nearest]"]) == 0
    about = json.loads((tmp_path / "out" / "generated.json").read_text())
    assert about["samples"] == 3 and read_generated(tmp_path / "out").about == about
    generator = load_generator(model)
    data = EEGDataset(paired_dataset, "test")
    by_key = {data.key(number): number for number in range(len(data))}
    for trial in about["trials"]:
        files = [trial["file"], *trial["sample_files"]]
        assert files[1:] == [f"samples/{number}/{trial['key']}.png" for number in (1, 2)]
        pictures = [Image.open(tmp_path / "out" / file) for file in files]
        first = Image.open(tmp_path / "one" / trial["file"])
        assert np.array_equal(first, pictures[0]) and len({picture.tobytes() for picture in pictures}) == 3
        # The seed in the metadata gives the same image again.
        eeg = collate(data, [by_key[trial["key"]]]).eeg.float()
        for number, picture in enumerate(pictures):
            texts = picture.text  # pyright: ignore[reportAttributeAccessIssue]
            assert texts["sample"] == str(number)
            again = generator.generate(eeg, seeds=[int(texts["noise_seed"])], steps=2)[0]
            assert np.abs(again.astype(int) - np.asarray(picture).astype(int)).max() <= 1
    # A control that shows training images has one image for each trial.
    assert json.loads((tmp_path / "out-nearest" / "generated.json").read_text())["samples"] == 1
    assert not (tmp_path / "out-nearest" / "samples").exists()
    # A missing sample is made again.
    lost = tmp_path / "out" / "samples" / "2" / f"{about['trials'][0]['key']}.png"
    before = lost.read_bytes()
    lost.unlink()
    assert main(several) == 0 and lost.read_bytes() == before


def test_bf16_changes_the_images_only_a_little_and_a_control_must_have_the_same_precision(
    model: Path, paired_dataset: Path, tmp_path: Path
) -> None:
    few = [str(model), str(paired_dataset), "--steps", "2", "--limit", "2"]
    assert main([*few, "-o", str(tmp_path / "full"), "--controls", "[shuffle]"]) == 0
    assert main([*few, "-o", str(tmp_path / "half"), "--precision", "bf16"]) == 0
    full, half = (read_generated(tmp_path / name) for name in ("full", "half"))
    assert (full.about["precision"], half.about["precision"]) == ("fp32", "bf16")
    difference = np.abs(full.images_BHW3[:].astype(int) - half.images_BHW3[:].astype(int))
    assert 0 < difference.mean() < 5
    control = read_generated(tmp_path / "full-shuffle")
    check_control(full, control)
    with pytest.raises(RequestError, match="precision is 'fp32', but 'bf16'"):
        check_control(half, control)
    # A folder of an older version does not name the precision, which was fp32.
    del full.about["precision"]
    check_control(full, control)


def test_the_digest_of_a_model_depends_on_its_weights_but_not_on_its_place(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    assert digest_model(copy) == digest_model(model)
    weights = next(copy.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert digest_model(copy) != digest_model(model)


def test_a_stopped_run_is_resumed_by_two_processes_and_gives_the_images_of_an_undisturbed_run(
    model: Path, paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, out = (
        [str(model), str(paired_dataset), "--steps", "40", "--batch_size", "1", "--limit", "8"],
        tmp_path / "out",
    )
    partial = tmp_path / "out.partial"

    def stop_after_three_images() -> None:
        while len(list(partial.glob("images/*.png"))) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_after_three_images, daemon=True)
    watcher.start()
    assert run_main(main, [*args, "-o", str(out)]) == 75
    watcher.join()
    assert f"the finished images are kept in {partial}" in capsys.readouterr().err and not out.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("images/*.png")}
    assert 3 <= len(kept) < 8

    words = [sys.executable, "-m", "launch", "generate", *args, "-o", str(out), "--num_processes", "2"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{len(kept)} of 8 images are finished already") == done.stdout.count("8 images ->") == 1
    assert sorted(path.name for path in out.iterdir()) == ["generated.json", "images", "real"]
    assert {name: (out / "images" / name).stat().st_mtime_ns for name in kept} == kept
    assert main([*args, "-o", str(tmp_path / "alone")]) == 0
    for path in [out / "generated.json", *out.glob("real/*.png")]:
        assert path.read_bytes() == (tmp_path / "alone" / path.relative_to(out)).read_bytes()
    for path in out.glob("images/*.png"):
        own, alone = Image.open(path), Image.open(tmp_path / "alone" / "images" / path.name)
        assert np.abs(np.asarray(own).astype(int) - np.asarray(alone)).max() <= 1
    assert not partial.exists()


def test_unfinished_images_of_other_settings_are_generated_anew(
    model: Path, paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [str(model), str(paired_dataset), "--steps", "2", "--limit", "2"]
    assert main([*args, "-o", str(tmp_path / "out")]) == 0
    key = json.loads((tmp_path / "out" / "generated.json").read_text())["trials"][0]["key"]
    other = PartialFolder(tmp_path / "new", {"steps": 2})
    assert other.open() == set()
    grey = np.full((32, 32, 3), 9, np.uint8)
    other.add(key, [grey], grey, [{}])
    (other.path / "images" / ".x.png.1.tmp").write_bytes(b"")
    other.close(discard=True)
    assert PartialFolder(tmp_path / "new", {"steps": 2}).open() == {key}
    assert main([*args, "-o", str(tmp_path / "new")]) == 0
    assert "were made with other settings (average_repeats, control, dataset_id" in capsys.readouterr().out
    for path in (tmp_path / "new").glob("images/*"):
        assert path.read_bytes() == (tmp_path / "out" / "images" / path.name).read_bytes()
    # A folder of the user is never deleted.
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine.txt").write_text("keep")
    assert run_main(main, [*args, "-o", str(tmp_path / "new"), "--seed", "1"]) == 2
    assert "new.partial already exists and is not the output of an interrupted generation" in capsys.readouterr().err
    assert len(list((tmp_path / "new" / "images").iterdir())) == 2 and (tmp_path / "new.partial" / "mine.txt").exists()


def test_the_control_gives_each_trial_the_eeg_of_another_trial(
    model: Path, paired_dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main([str(model), str(paired_dataset), "-o", str(out), "--steps", "1", "--control", "shuffle"]) == 0
    trials = json.loads((out / "generated.json").read_text())["trials"]
    assert all(trial["key"] != trial["eeg_key"] for trial in trials)
    assert sorted(trial["key"] for trial in trials) == sorted(trial["eeg_key"] for trial in trials)
    assert len(trials) == 16


def test_one_command_generates_several_controls_and_keeps_complete_results(
    model: Path, paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [str(model), str(paired_dataset), "--steps", "2", "--limit", "4"]
    together = [*few, "-o", str(tmp_path / "out"), "--controls", "[shuffle, no_eeg, eyes]"]
    assert main(together) == 0
    for name in ("shuffle", "no_eeg", "eyes"):
        assert main([*few, "-o", str(tmp_path / f"alone-{name}"), "--control", name]) == 0
        for path in (tmp_path / f"alone-{name}").rglob("*.*"):
            other = tmp_path / f"out-{name}" / path.relative_to(tmp_path / f"alone-{name}")
            assert path.read_bytes() == other.read_bytes()
    assert "not_applicable" in json.loads((tmp_path / "out-eyes" / "generated.json").read_text())

    # If an image of one control is deleted, the same command makes only the images of this control again.
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*/images/*.png")}
    lost = min((tmp_path / "out-shuffle" / "images").iterdir())
    lost.unlink()
    capsys.readouterr()
    assert main(together) == 0
    assert capsys.readouterr().out.count("these 4 images exist already") == 2 and lost.is_file()
    changed = {path.parent for path, old in kept.items() if path.stat().st_mtime_ns != old}
    assert changed == {lost.parent}

    (tmp_path / "out-class").mkdir()
    (tmp_path / "out-class" / "mine.txt").write_text("keep")
    for controls, message in (
        ("[class]", "out-class: exists but does not hold generated images"),
        ("[shuffle, shuffle]", "'controls' repeats a control, or the control of the key 'control': shuffle"),
        ("[none]", "'controls' repeats a control, or the control of the key 'control': none"),
    ):
        assert run_main(main, [*few, "-o", str(tmp_path / "out"), "--controls", controls]) == 2
        assert message in capsys.readouterr().err


def test_floor_and_ceiling_do_not_use_the_eeg(model: Path, paired_dataset: Path, tmp_path: Path) -> None:
    pictures = {}
    for control in ("none", "no_eeg", "class"):
        out = tmp_path / control
        args = [str(model), str(paired_dataset), "-o", str(out), "--steps", "3", "--limit", "4", "--control", control]
        assert main(args) == 0
        about = json.loads((out / "generated.json").read_text())
        assert about["control"] == control and (about["steps"], about["guidance_scale"]) == (3, 2.0)
        pictures[control] = np.stack([np.asarray(Image.open(out / trial["file"])) for trial in about["trials"]])
    assert (pictures["none"] != pictures["class"]).any() and (pictures["no_eeg"] != pictures["class"]).any()
    generator = load_generator(model)
    metas = [{"label": 0, "label_name": "circle"}, {"label": 0, "caption": "a red square"}]
    options: dict = {"seeds": [1, 1], "steps": 3, "source": "class", "metas": metas}
    eeg = torch.randn(2, 128, 128)
    images = generator.generate(eeg, **options)
    np.testing.assert_array_equal(images, generator.generate(eeg + 1, **options))
    assert (images[0] != images[1]).any()  # The noise of the two images is equal, but their captions differ.


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (0.0, "this model was trained with drop 0"),
        (None, "dreamscale.json does not say with which 'drop' this model was trained"),
    ],
)
def test_a_model_that_never_saw_the_null_condition_refuses_guidance_and_no_eeg(
    drop: float | None,
    message: str,
    model: Path,
    paired_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    values = json.loads((copy / "dreamscale.json").read_text())
    assert values.pop("drop") == 0.1
    (copy / "dreamscale.json").write_text(json.dumps(values if drop is None else {**values, "drop": drop}))
    args = [str(copy), str(paired_dataset), "--steps", "1", "--limit", "2"]
    assert run_main(main, [*args, "-o", str(tmp_path / "guided"), "--guidance_scale", "2"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not (tmp_path / "guided").exists()
    assert main([*args, "-o", str(tmp_path / "out"), "--controls", "[no_eeg]"]) == 0
    said = "guidance_scale is 1 (earlier versions used 2); to hide this message, set guidance_scale to 1"
    assert capsys.readouterr().out.count(said) == (drop is None)
    assert json.loads((tmp_path / "out" / "generated.json").read_text())["guidance_scale"] == 1
    assert message in json.loads((tmp_path / "out-no_eeg" / "generated.json").read_text())["not_applicable"]
    with pytest.raises(RequestError, match="drop"):
        load_generator(copy).generate(torch.randn(1, 128, 128), seeds=[1], steps=1, source="no_eeg")


def test_the_ancestral_sampler_of_stable_diffusion_keeps_each_trials_noise(model: Path) -> None:
    generator, eeg = load_generator(model), torch.randn(3, 128, 128)
    assert generator.choose_sampling(sampler="ddpm").steps == 1000
    together = generator.generate(eeg, seeds=[1, 2, 3], sampler="ddpm", steps=12)
    alone = generator.generate(eeg[1:2], seeds=[2], sampler="ddpm", steps=12)
    assert np.abs(together[1].astype(int) - alone[0].astype(int)).max() <= 1
    assert (together[1] != generator.generate(eeg[1:2], seeds=[2], steps=12)[0]).any()


def test_derangements_and_trial_seeds_depend_on_the_seed() -> None:
    for n in (2, 3, 50):
        order = derange(n, 4)
        assert (order != np.arange(n)).all() and sorted(order) == list(range(n))
        np.testing.assert_array_equal(order, derange(n, 4))
    assert trial_seed(0, "a") == trial_seed(0, "a") != trial_seed(1, "a")


def test_wrong_requests_leave_nothing_behind(
    model: Path, paired_dataset: Path, unpaired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    data = EEGDataset(paired_dataset, "test")
    spec = PreprocessSpec(**{**data.spec.to_dict(), "lowpass": 40.0})
    write_dataset(other, {"test": [data[0], data[1]]}, spec, labels=data.labels)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    requests = [
        ([model, unpaired_dataset, "-o", tmp_path / "o"], "no paired images"),
        ([model, other, "-o", tmp_path / "o"], "lowpass 45.0 against 40.0"),
        ([model, paired_dataset, "-o", tmp_path / "o", "--split", "extra"], "no samples in split 'extra'"),
        ([tmp_path, paired_dataset, "-o", tmp_path / "o"], "not a fine-tuned model"),
        ([model, paired_dataset, "-o", full], "does not hold generated images"),
        ([model, paired_dataset, "-o", tmp_path / "o", "--steps", "0"], "steps must be at least 1"),
        ([model, paired_dataset, "-o", tmp_path / "o", "--steps", "2000"], "must not be above 1000"),
        ([model, paired_dataset, "-o", tmp_path / "o", "--num_processes", "2"], "1 process was started"),
    ]
    for args, message in requests:
        assert run_main(main, [str(word) for word in args]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["full", "other"]
