"""Tests of the presets: each runs from files in the published formats to images, retrieval and a report."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_sharding.common.config import parse_config, to_yaml
from data_sharding.common.errors import RequestError
from data_sharding.common.shipped import shipped_configs
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.job.request import ShardConfig
from launch.preset import PresetConfig, main, make_steps, read_preset
from launch.stages import STAGES

from ..published import CAPS, TEST_CONCEPTS, write_eeg_imagenet, write_things_eeg2

PRESETS = sorted(path.stem for path in (shipped_configs() / "presets").glob("*.yaml") if path.stem != "smoke")
GENERATED = {"generate": "images/generated.json", "evaluate": "images/report.html"}
PATHS = ["--encoder", "E", "--base", "B", "--clip", "C"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write both datasets in the published formats, and set the variables that the configs use."""
    root = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**write_eeg_imagenet(root / "imagenet"), **write_things_eeg2(root / "things")}.items():
            patch.setenv(name, value)
        patch.setenv("LAB_EEG", str(root))
        yield root


@pytest.fixture(scope="module")
def encoder(published: Path) -> Path:
    """Write an encoder package with the preprocessing of lab.yaml and random weights."""
    import torch

    from pretrain.encoder.encoder import EEGEncoder
    from pretrain.model.config import EncoderConfig

    lab = str(shipped_configs() / "data_sharding" / "lab.yaml")
    spec = parse_config(ShardConfig, [lab], prog="dreamscale shard", positionals=("config",)).preprocess
    torch.manual_seed(0)
    shape = EncoderConfig(samples=spec.window, dim=32, depth=1, heads=2, mlp_ratio=2.0)
    EEGEncoder(shape, spec).save_pretrained(published / "encoder")
    return published / "encoder"


def run(words: list[str]) -> PresetConfig:
    """Run the steps of a preset one after another in this process."""
    config = read_preset(words)
    for step in make_steps(config):
        name, *rest = step.words
        assert importlib.import_module(STAGES[name].module).main(rest) == 0, step.command
        assert all((Path(config.output) / path).exists() for path in (*step.outputs, *step.proofs))
    return config


@pytest.fixture(scope="module")
def imagenet(published: Path, encoder: Path) -> Callable[[str], Path]:
    """Return a function that runs a preset of EEG-ImageNet; later presets use the dataset and models of the first."""
    first = published / "sequential"
    run(["sequential", "--output", str(first), "--encoder", str(encoder), "--smoke", "true"])

    def again(name: str) -> Path:
        if name != "sequential":
            words = [name, "--output", str(published / name), "--smoke", "true", "--dataset", str(first / "dataset")]
            words += ["--encoder", str(encoder), "--base", str(first / "miniature" / "stable-diffusion")]
            run([*words, "--clip", str(first / "miniature" / "clip")])
        return published / name

    return again


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("things")])
def test_eeg_imagenet_from_files_to_a_report(name: str, imagenet: Callable[[str], Path]) -> None:
    folder = imagenet(name)
    found = json.loads((folder / "images" / "generated.json").read_text())
    assert len(list((folder / "images" / "images").glob("*.png"))) == len(found["trials"]) == 7
    assert (folder / "images-shuffle" / "generated.json").is_file()
    assert "block" in (folder / "images" / "report.html").read_text()
    assert (folder / "retrieval" / "retrieval.html").is_file() == (name == "sequential")


def test_eeg_imagenet_has_trials_of_every_length(imagenet: Callable[[str], Path], encoder: Path) -> None:
    """A trial of 450 samples ends before the window, so it is left out; trials of 459 to 600 samples are used."""
    data = [EEGDataset(imagenet("sequential") / "dataset", split) for split in ("train", "val", "test")]
    assert data[0].spec.sfreq == 256 and data[0].n_times == 112
    left_out = "left out: the epoch ends before the window of 0.4375 s"
    assert sum(map(len, data)) == 41 and data[0].manifest.counts[left_out] == 7, data[0].manifest.counts
    shown = [{split[n].meta["image_id"] for n in range(len(split))} for split in data]
    assert not shown[0] & shown[1] and not shown[0] & shown[2] and not shown[1] & shown[2]


def test_things_eeg2_from_files_to_images_and_retrieval(published: Path, encoder: Path) -> None:
    """Epochs begin before the onset, two people have different channels, and no test concept is in training."""
    out = published / "things_run"
    words = ["--output", str(out), "--encoder", str(encoder), "--smoke", "true"]
    run(["things_eeg2_stable_diffusion", *words])
    data = {split: EEGDataset(out / "dataset", split) for split in ("train", "val", "test")}
    assert data["train"].n_times == 204
    found = {split: [d.meta(n) for n in range(len(d))] for split, d in data.items()}
    assert {(m["subject"], m["n"]) for m in found["test"]} == {(name, len(cap)) for name, cap in CAPS.items()}
    # A stored trial begins 0.2 s before the onset, but is read from the onset on.
    assert all(set(d.index["onset"]) == {51} and set(d.index["samples"]) == {255} for d in data.values())
    concepts = {split: {m["label_name"] for m in metas} for split, metas in found.items()}
    assert concepts["test"] == set(TEST_CONCEPTS) and not concepts["train"] & (concepts["val"] | concepts["test"])
    assert "Gifford" in (out / "retrieval" / "retrieval.html").read_text()
    images = json.loads((out / "images" / "generated.json").read_text())
    assert len(images["trials"]) == 8 and (out / "images" / "report.html").is_file()
    # The preset for retrieval alone uses the same dataset and the same CLIP model.
    words = ["--output", str(published / "retrieval"), "--encoder", str(encoder), "--smoke", "true"]
    run(["things_eeg2_retrieval", *words, "--dataset", str(out / "dataset"), "--clip", str(out / "miniature" / "clip")])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_parsed(name: str, published: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = make_steps(read_preset([name, "--output", str(out), *PATHS, "--num_processes", "4"]))
    words = {step.name: step.words for step in steps}
    assert next(iter(words)) == "shard" and set(words) & {"generate", "retrieve"}
    trained = {"align", "finetune", "ddpm", "generate"} & set(words)
    assert all(words[name][-2:] == ["--num_processes", "4"] for name in trained)
    assert ("--encoder" in words["shard"]) == bool({"align", "finetune"} & set(words))


def test_the_smoke_form_makes_all_models_itself(published: Path, tmp_path: Path) -> None:
    steps = make_steps(read_preset(["sequential", "--output", str(tmp_path / "out"), "--smoke", "true"]))
    names = [step.name for step in steps]
    assert names[:4] == ["shard", "pretrain", "export", "miniature"] and not (tmp_path / "out").exists()
    needs = {step.name: set(step.needs) for step in steps}
    assert needs["align"] == {"shard", "export", "miniature"} and needs["finetune"] == {"shard", "align", "miniature"}
    assert needs["retrieve"] == {"align"} and needs["evaluate"] == {"generate"}


def test_wrong_presets_end_with_one_line(published: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no preset 'paper'; give one of dreamdiffusion_paper, dreamdiffusion_rel"):
        read_preset(["paper"])
    with pytest.raises(RequestError, match="give --base, which this preset needs"):
        make_steps(read_preset(["sequential", "--output", str(tmp_path), "--encoder", "E", "--clip", "C"]))
    with pytest.raises(RequestError, match="settings: 'steps' does not begin with a command of the preset"):
        make_steps(read_preset(["sequential", "--output", str(tmp_path), *PATHS, "--settings", '{"steps": 3}']))
    with pytest.raises(RequestError, match=r"finetune: .*tune"):
        make_steps(
            read_preset(["sequential", "--output", str(tmp_path), *PATHS, "--settings", '{"finetune.tune": "B"}'])
        )
    for stages, results, message in (
        ("{align: a.yaml}", "[generate]", "'generate' needs a stage after align"),
        ("{linear: a.yaml}", "[retrieve]", "'retrieve' needs the stage align"),
        ("{demo: a.yaml}", "[]", "'demo' cannot be a stage"),
        ("{shard: a.yaml}", "[]", "no command trains a model"),
        (
            "{finetune: a.yaml, shard: b.yaml}",
            "[]",
            "stages: finetune, shard is a wrong order; write them in the order",
        ),
        (
            "{shard: b.yaml, linear: a.yaml}",
            "[evaluate, generate]",
            "results: write each command once, in the order of",
        ),
        (
            "{shard: b.yaml, linear: a.yaml}",
            "[generate, generate]",
            "results: write each command once, in the order of",
        ),
    ):
        path = tmp_path / "p.yaml"
        path.write_text(f"output: x\nstages: {stages}\nresults: {results}\n")
        with pytest.raises(RequestError, match=message):
            read_preset([str(path)])


def plan(name: str, *words: str) -> dict[str, dict[str, str]]:
    """Return the keys with their values of each step, from the last value of each key in the words of the step."""
    steps = make_steps(read_preset([name, *words]))
    found = {}
    for step in steps:
        at = [n for n, word in enumerate(step.words) if word.startswith("--")]
        found[step.name] = {step.words[n].removeprefix("--"): step.words[n + 1] for n in at}
    return found


def test_the_tiny_encoder_fits_the_settings_of_shard(published: Path, tmp_path: Path) -> None:
    words = ["--output", str(tmp_path), "--smoke", "true", "--settings", '{"shard.preprocess.window": 256}']
    keys = plan("sequential", *words)
    assert keys["shard"]["preprocess.window"] == keys["pretrain"]["model.encoder.samples"] == "256"


def test_settings_are_added_to_those_of_the_file(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output", str(tmp_path), *PATHS, "--settings", '{"generate.steps": 9, "evaluate.clip": "C"}']
    keys = plan("dreamdiffusion_released", *words)
    generate = {key: keys["generate"][key] for key in ("steps", "sampler", "controls")}
    assert generate["steps"] == "9" and generate["sampler"] == "plms" and "nearest" in generate["controls"]
    assert keys["finetune"]["time_path"] == "true" and keys["evaluate"]["clip"] == "C"
    assert keys == plan("dreamdiffusion_released", *words[:-1], '{"evaluate.clip": "C"}', "--settings.generate.steps=9")
    with pytest.raises(SystemExit):
        read_preset(["dreamdiffusion_released", *words, "--print_config"])
    assert "generate.sampler: plms\n  generate.steps: 9" in capsys.readouterr().out


def test_own_settings_win_over_the_smoke_form(published: Path, tmp_path: Path) -> None:
    own = '{"finetune": {"training": {"steps": 3}}, "pretrain.steps": 5, "generate.limit": 4}'
    words = ["--output", str(tmp_path), "--smoke", "true"]
    config = read_preset(["dreamdiffusion_released", *words, "--settings", own])
    keys = plan("dreamdiffusion_released", *words, "--settings", own)
    assert keys["finetune"]["training.steps"] == "3" and keys["finetune"]["training.batch_size"] == "8"
    assert keys["pretrain"]["steps"] == "5" and keys["pretrain"]["batch_size"] == "8"
    # The smoke form replaces the 250 steps of the file.
    assert keys["generate"]["steps"] == "2" and keys["generate"]["limit"] == "4"
    (tmp_path / "preset.yaml").write_text(to_yaml(config))
    assert plan(str(tmp_path / "preset.yaml")) == keys


def test_settings_cannot_set_what_the_preset_sets(published: Path, tmp_path: Path) -> None:
    for key, advice in (
        ("finetune.output", "give --output"),
        ("align.dataset", "give --dataset"),
        ("shard.encoder", "give --encoder"),
        ("finetune.base", "give --base"),
        ("align.target.model", "give --clip"),
        ("align.config", "write the config in 'stages'"),
        ("generate.model", "remove this key"),
        ("evaluate.directory", "remove this key"),
    ):
        words = ["sequential", "--output", str(tmp_path), *PATHS, "--settings", json.dumps({key: "x"})]
        with pytest.raises(
            RequestError, match=f"settings: '{key}' cannot be set, because the preset sets it; {advice}"
        ):
            make_steps(read_preset(words))


@pytest.mark.parametrize("stage", ["shard", "finetune"])
@pytest.mark.parametrize("text", [None, "- a\n- b\n", "a: [1\n"])
def test_a_wrong_config_of_a_stage_ends_with_one_line(
    stage: str, text: str | None, published: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.yaml"
    if text is not None:
        wrong.write_text(text)
    stages = {"shard": "configs/data_sharding/eeg_imagenet.yaml", "finetune": "configs/finetune/stable_diffusion.yaml"}
    (tmp_path / "p.yaml").write_text(json.dumps({"output": "x", "stages": {**stages, stage: str(wrong)}}))
    for words in (PATHS, ["--smoke", "true"]):
        with pytest.raises(RequestError, match=f"^dreamscale preset: {stage}: .*wrong.yaml") as error:
            make_steps(read_preset([str(tmp_path / "p.yaml"), *words]))
        assert "\n" not in str(error.value)


def test_the_command_runs_a_chain_that_is_not_repeated(
    imagenet: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "p.yaml"
    config.write_text("output: unused\nstages: {linear: configs/finetune/linear.yaml}\nresults: []\n")
    words: list[Any] = [config, "--output", tmp_path / "out", "--smoke", "true"]
    words += ["--dataset", imagenet("sequential") / "dataset"]
    assert main([*map(str, words)]) == 0
    assert (tmp_path / "out" / "linear" / "model").is_dir()
    capfd.readouterr()
    assert main([*map(str, words)]) == 0 and "already complete" in capfd.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main([*map(str, words), "--output", str(tmp_path / "full")]) == 2
    assert "is not empty and is not of a preset" in capfd.readouterr().err


def test_sizes_of_the_presets() -> None:
    """Build each model of Stable Diffusion 1.5 on the meta device, and count its parameters and what is trained."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    from finetune.clip_head import ClipHead, ClipHeadConfig
    from finetune.stable_diffusion.conditioner import Conditioner, ConditionerConfig
    from finetune.stable_diffusion.model import EEGDiffusion, open_time_path
    from finetune.stable_diffusion.train import StableDiffusionConfig
    from pretrain.encoder.encoder import EEGEncoder
    from pretrain.model.presets import PRESETS as MODELS

    sizes: dict[str, dict[str, int]] = {}
    for name in ("dreamdiffusion_paper", "dreamdiffusion_released", "sequential"):
        words = next(
            step.words for step in make_steps(read_preset([name, "--output", "x", *PATHS])) if step.name == "finetune"
        )
        config = parse_config(StableDiffusionConfig, words[1:], prog="finetune", positionals=("config",))
        with torch.device("meta"):
            encoder = EEGEncoder(MODELS["released" if name == "dreamdiffusion_released" else "paper"].encoder)
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
            shape = ConditionerConfig(
                tokens=encoder.n_tokens,
                dim=encoder.dim,
                length=77,
                width=768,
                hidden=config.hidden,
                time_dim=open_time_path(unet) if config.time_path else 0,
            )
            head = ClipHead(ClipHeadConfig(tokens=encoder.n_tokens, dim=encoder.dim, projection=768))
            noising = DDPMScheduler()
            model = EEGDiffusion(
                encoder, Conditioner(shape), unet, noising, head if config.order == "joint" else None, 1.0
            )
        model.choose_trainables(config.tune)
        parts = {key: sum(p.numel() for p in part.parameters()) for key, part in model.named_children()}
        sizes[name] = {**parts, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    unet, clip_head = 859_520_964, 787_329
    paper, released = 302_837_760, 151_769_088
    assert sizes == {
        "dreamdiffusion_paper": {
            "encoder": paper,
            "conditioner": 859_597,
            "unet": unet,
            "head": clip_head,
            "trained": 348_472_206,
        },
        "dreamdiffusion_released": {
            "encoder": released,
            "conditioner": 1_846_920,
            "unet": unet,
            "head": clip_head,
            "trained": 198_390_857,
        },
        "sequential": {"encoder": paper, "conditioner": 1_846_920, "unet": unet, "trained": 348_672_200},
    }
