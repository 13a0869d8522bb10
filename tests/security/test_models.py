"""Changed models, whose small config asks for a huge network or for code, are refused with one error line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_sharding.processing.preprocess import PreprocessSpec

SPEC = PreprocessSpec(sfreq=128.0, lowpass=50.0, window=32, stride=32)
LOAD = """
import json
from pathlib import Path
from data_sharding.common.errors import RequestError
from finetune.training.accelerate import quiet_libraries
from tests.security.test_models import load
quiet_libraries()
for kind, folder in json.loads(sys.stdin.read() if len(sys.argv) < 2 else Path(sys.argv[1]).read_text()):
    try:
        load(kind, Path(folder))
    except RequestError as error:
        print(json.dumps(["refused", str(error)]))
    except Exception as error:
        print(json.dumps(["traceback", f"{type(error).__name__}: {error}"]))
    else:
        print(json.dumps(["loaded", ""]))
"""


def load(kind: str, folder: Path) -> object:
    """Load a model package of the kind `kind`, as the commands do."""
    if kind == "encoder":
        from pretrain.encoder.encoder import EEGEncoder

        return EEGEncoder.from_pretrained(folder)
    if kind == "eg_ddpm":
        from finetune.generators import load_generator

        return load_generator(folder)
    if kind == "pipeline":
        from finetune.base_models.load import load_base

        return load_base(folder)
    if kind == "classifier":
        from finetune.evaluation.classifier import ImageClassifier

        return ImageClassifier.load(folder / "classifier.safetensors")
    if kind == "clip":
        from finetune.targets.models import load_clip

        return load_clip(folder)
    from finetune.clip_head import ClipHead
    from finetune.stable_diffusion.conditioner import Conditioner

    return {"conditioner": Conditioner, "clip_head": ClipHead}[kind].from_pretrained(folder)


def _write_encoder(folder: Path) -> None:
    from pretrain.encoder.encoder import EEGEncoder
    from pretrain.model.config import EncoderConfig

    shape = EncoderConfig(samples=32, dim=8, depth=1, heads=2, mlp_ratio=1.0, tokenizer="montage")
    EEGEncoder(shape, SPEC).save_pretrained(folder)


def _write_eg_ddpm(folder: Path) -> None:
    from diffusers import DDPMScheduler

    from finetune.dm_re2i.eg_ddpm import EGDDPM
    from finetune.dm_re2i.evrnet import EVRNet, EVRNetConfig
    from finetune.dm_re2i.guide import EEGGuide
    from finetune.dm_re2i.model import ClassMeans, save_model

    evrnet = EVRNet(EVRNetConfig(n_classes=2, n_channels=4, widths=(2, 2, 2, 2, 2))).eval()
    unet = EGDDPM(sample_size=8, condition_dim=2, base_channels=4, multipliers=(1, 2), heads=1, head_dim=4)
    means = ClassMeans(torch.zeros(2, 2), torch.ones(2, dtype=torch.long))
    noising, card = (
        DDPMScheduler(num_train_timesteps=10),
        {"license": "cc0-1.0", "data": {}, "settings": {}, "results": {}},
    )
    save_model(folder, EEGGuide(evrnet, "feature"), unet, noising, means, SPEC, {"sampler": "ddim"}, card)


def _write_heads(conditioner: Path, head: Path) -> None:
    from finetune.clip_head import ClipHead, ClipHeadConfig
    from finetune.stable_diffusion.conditioner import Conditioner, ConditionerConfig

    Conditioner(ConditionerConfig(tokens=4, dim=6, length=3, width=5, hidden=2)).save_pretrained(conditioner)
    ClipHead(ClipHeadConfig(tokens=4, dim=6, projection=3)).save_pretrained(head)


def _write_clip_and_pipeline(clip: Path, pipeline: Path) -> None:
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from finetune.stable_diffusion.miniature import make_tokenizer

    tokenizer = make_tokenizer(["a bar"])
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower["projection_dim"] = 8
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(clip)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(clip)
    blocks: dict[str, Any] = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    unet: Any = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        **blocks,
    )
    coders: Any = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae: Any = AutoencoderKL(**coders, **blocks)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(model.config.text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True),
        safety_checker=None,  # pyright: ignore[reportArgumentType] - the library's annotation is too narrow
        feature_extractor=None,  # pyright: ignore[reportArgumentType] - the library's annotation is too narrow
        requires_safety_checker=False,
    ).save_pretrained(pipeline)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny model of each kind, with random weights."""
    from finetune.evaluation.classifier import ImageClassifier

    root = tmp_path_factory.mktemp("packages")
    torch.manual_seed(0)
    _write_encoder(root / "encoder")
    _write_eg_ddpm(root / "eg_ddpm")
    _write_heads(root / "conditioner", root / "clip_head")
    _write_clip_and_pipeline(root / "clip", root / "pipeline")
    (root / "classifier").mkdir()
    ImageClassifier(2, 4, 16).save(root / "classifier" / "classifier.safetensors", {})
    return root


HUGE = 10**9
# Kind of package, file, key in the file, and value. The changed values are far too large or too small, unknown, or of a
# wrong type.
CASES: list[tuple[str, str, str, Any]] = [
    *(("encoder", "config.json", f"encoder.{key}", HUGE) for key in ("dim", "depth", "heads", "samples", "patch")),
    *(
        ("encoder", "config.json", f"encoder.{key}", value)
        for key in ("dim", "depth")
        for value in ("8", 8.5, None, [])
    ),
    ("encoder", "config.json", "encoder.channels", HUGE),
    ("encoder", "config.json", "encoder.mlp_ratio", 1e12),
    ("encoder", "config.json", "encoder.unknown", 1),
    ("encoder", "config.json", "encoder.class_token", "no"),
    ("encoder", "config.json", "encoder", [1]),
    ("encoder", "config.json", "n_outputs", HUGE),
    ("encoder", "config.json", "n_chans", "x"),
    ("encoder", "config.json", "positions", [["a", "b", "c"]]),
    ("encoder", "config.json", "positions", [[1e308, 0, 0]]),
    ("encoder", "config.json", "positions", [[10**400, 0, 0]]),
    ("encoder", "config.json", "positions", [[0, 0, 0]] * 1000),
    ("encoder", "config.json", "schema", "\x1b[31m" * 10**5),
    ("encoder", "config.json", "extra", [[1, 2]]),
    ("encoder", "preprocess.json", "quality", 5),
    ("encoder", "preprocess.json", "quality", {"check": "x"}),
    ("encoder", "preprocess.json", "scaling", "x"),
    ("encoder", "preprocess.json", "reference", [5]),
    ("encoder", "preprocess.json", "unknown", 5),
    ("encoder", "preprocess.json", "sfreq", 1e12),
    ("encoder", "preprocess.json", "highpass", 1e-12),
    ("encoder", "preprocess.json", "notch", 1e-9),
    ("encoder", "preprocess.json", "notch_width_hz", 1e-9),
    ("eg_ddpm", "evrnet/config.json", "n_classes", HUGE),
    ("eg_ddpm", "evrnet/config.json", "widths", [HUGE] * 5),
    ("eg_ddpm", "evrnet/config.json", "widths", ["a"] * 5),
    ("eg_ddpm", "evrnet/config.json", "multi_kernels", [99_999, 99_999]),
    ("eg_ddpm", "unet/config.json", "base_channels", HUGE),
    ("eg_ddpm", "unet/config.json", "multipliers", [1] * 10_000),
    ("eg_ddpm", "unet/config.json", "multipliers", "many"),
    ("eg_ddpm", "unet/config.json", "sample_size", 2**20),
    ("eg_ddpm", "unet/config.json", "condition_dim", 10**12),
    ("eg_ddpm", "unet/config.json", "heads", HUGE),
    ("eg_ddpm", "scheduler/scheduler_config.json", "num_train_timesteps", 10**12),
    ("eg_ddpm", "scheduler/scheduler_config.json", "beta_schedule", "none"),
    ("eg_ddpm", "scheduler/scheduler_config.json", "trained_betas", [0.1] * 9),
    ("pipeline", "scheduler/scheduler_config.json", "trained_betas", "many"),
    ("eg_ddpm", "dreamscale.json", "eeg", {"tmin": "x"}),
    ("eg_ddpm", "dreamscale.json", "kind", ["eg_ddpm"]),
    *(("conditioner", "config.json", key, HUGE) for key in ("tokens", "length", "width", "hidden", "time_dim")),
    ("conditioner", "config.json", "tokens", -4),
    ("conditioner", "config.json", "dim", {}),
    ("clip_head", "config.json", "projection", HUGE),
    ("clip", "config.json", "vision_config.num_hidden_layers", HUGE),
    ("clip", "config.json", "vision_config.hidden_size", 10**7),
    ("clip", "config.json", "vision_config.image_size", 8 * 10**6),
    ("clip", "config.json", "vision_config.attn_implementation", "owner/kernel"),
    ("clip", "config.json", "quantization_config", {"quant_method": "bitsandbytes"}),
    ("clip", "config.json", "auto_map", {"AutoModel": "code.Model"}),
    ("clip", "preprocessor_config.json", "size", {"shortest_edge": HUGE}),
    ("clip", "preprocessor_config.json", "crop_size", {"height": HUGE, "width": HUGE}),
    ("clip", "preprocessor_config.json", "image_mean", ["a"]),
    ("pipeline", "unet/config.json", "layers_per_block", HUGE),
    ("pipeline", "unet/config.json", "block_out_channels", [HUGE, HUGE]),
    ("pipeline", "unet/config.json", "sample_size", 10**6),
    ("pipeline", "unet/config.json", "sample_size", "8"),
    ("pipeline", "vae/config.json", "latent_channels", 10**7),
    ("pipeline", "vae/config.json", "block_out_channels", "x"),
    ("pipeline", "text_encoder/config.json", "vocab_size", 10**12),
    ("pipeline", "text_encoder/config.json", "num_hidden_layers", HUGE),
    ("pipeline", "tokenizer/tokenizer_config.json", "model_max_length", 10**12),
    ("pipeline", "scheduler/scheduler_config.json", "num_train_timesteps", 10**12),
    ("pipeline", "model_index.json", "unet", ["antigravity", "Model"]),
    ("pipeline", "model_index.json", "scheduler", ["os", "system"]),
    ("pipeline", "model_index.json", "tokenizer", {"a": 1}),
]


def _change(path: Path, place: str, value: Any) -> None:
    values = json.loads(path.read_text())
    group = values
    *groups, last = place.split(".")
    for name in groups:
        group = group[name]
    group[last] = value
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def outcomes(
    packages: Path, tmp_path_factory: pytest.TempPathFactory, run_limited: Callable[..., Any]
) -> dict[str, list[str]]:
    """Load every changed package in one process with limited memory; return what happened to each package."""
    root = tmp_path_factory.mktemp("changed")
    jobs = [[kind.name, str(kind)] for kind in sorted(packages.iterdir())]
    names = [f"{kind} unchanged" for kind, _ in jobs]
    for number, (kind, file, place, value) in enumerate(CASES):
        folder = root / f"{number:03d}"
        shutil.copytree(packages / kind, folder)
        _change(folder / file, place, value)
        jobs.append([kind, str(folder)])
        names.append(f"{number:03d}")
    metadata = {"kind": "dreamscale-classifier", "n_classes": "2", "width": "4", "size": "16"}
    for key in ("n_classes", "width", "size"):
        from safetensors.torch import load_file, save_file

        folder = root / f"classifier-{key}"
        folder.mkdir()
        weights = load_file(packages / "classifier" / "classifier.safetensors")
        save_file(weights, folder / "classifier.safetensors", {**metadata, key: str(HUGE)})
        jobs.append(["classifier", str(folder)])
        names.append(f"classifier {key}")
    (root / "jobs.json").write_text(json.dumps(jobs))
    # More than 70 models are loaded, so the time limit is higher than the limit for one command.
    done = run_limited(LOAD, root / "jobs.json", seconds=600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(jobs), (len(lines), names[len(lines)], done.stderr[-2000:])
    return dict(zip(names, lines, strict=True))


def test_unchanged_models_are_loaded(outcomes: dict[str, list[str]]) -> None:
    found = {name: outcome for name, outcome in outcomes.items() if name.endswith("unchanged")}
    assert len(found) == 7 and {outcome[0] for outcome in found.values()} == {"loaded"}, found


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{a}-{b}-{c}-{str(d)[:20]}" for a, b, c, d in CASES])
def test_a_changed_config_is_refused_in_one_line(outcomes: dict[str, list[str]], number: int) -> None:
    outcome, message = outcomes[f"{number:03d}"]
    _, file, _, _ = CASES[number]
    assert outcome == "refused" and "\n" not in message and len(message) < 600, (outcome, message)
    assert Path(file).name in message or Path(file).parts[0] in message or "cannot be loaded" in message, message


@pytest.mark.parametrize("key", ["n_classes", "width", "size"])
def test_a_changed_classifier_is_refused(outcomes: dict[str, list[str]], key: str) -> None:
    outcome, message = outcomes[f"classifier {key}"]
    assert outcome == "refused" and "classifier.safetensors" in message, message


def test_a_changed_example_of_an_encoder_is_refused(packages: Path, tmp_path: Path) -> None:
    import numpy as np

    from data_sharding.common.errors import RequestError

    shutil.copytree(packages / "encoder", tmp_path / "encoder")
    arrays = dict(np.load(packages / "encoder" / "example.npz"))
    huge = np.zeros((20_000, *arrays["x"].shape[1:]), np.float16)
    for change in (
        {"tolerance": np.inf},
        {"tolerance": 1e9},
        {"x": huge},
        {"x": arrays["x"][:, :, :0]},
        {"x": huge[0]},
    ):
        np.savez(tmp_path / "encoder" / "example.npz", **{**arrays, **change})
        with pytest.raises(RequestError, match=r"example\.npz: damaged \(ValueError: its"):
            load("encoder", tmp_path / "encoder")


@pytest.mark.parametrize("kind", [torch.complex64, torch.int64, torch.bool])
def test_weights_of_another_type_or_with_a_long_name_are_refused(kind: Any, packages: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from data_sharding.common.errors import RequestError

    shutil.copytree(packages / "encoder", tmp_path / "encoder")
    path = tmp_path / "encoder" / "model.safetensors"
    weights = load_file(path)
    save_file({name: value.to(kind) for name, value in weights.items()}, path)
    with pytest.raises(RequestError, match="of another type"):
        load("encoder", tmp_path / "encoder")
    save_file({**weights, "x" * 10**6: torch.zeros(1)}, path)
    with pytest.raises(RequestError, match="unknown xxx") as caught:
        load("encoder", tmp_path / "encoder")
    assert len(str(caught.value)) < 600


def _change_linear(name: str) -> Callable[[dict[str, Any]], None]:
    changes: dict[str, Callable[[Any], Any]] = {
        "weight_FL": lambda value: value * float("nan"),
        "mean_F": lambda value: value.astype("uint8"),
        "labels_M": lambda value: value + 100,
        "images_MHW3": lambda value: value[:, :, :0],
    }
    return lambda arrays: arrays.update({name: changes[name](arrays[name])})


@pytest.mark.parametrize("name", ["weight_FL", "mean_F", "labels_M", "images_MHW3", "pipe"])
def test_a_changed_linear_model_is_refused(name: str, tmp_path: Path) -> None:
    import os

    import numpy as np
    from safetensors.numpy import load_file, save_file

    from data_sharding.common.errors import RequestError
    from finetune.generators import load_generator
    from finetune.linear.model import LinearModel, save_model

    model = LinearModel(
        channels=("Fz", "Cz"),
        bins=3,
        mean_F=np.zeros(6, np.float32),
        weight_FL=np.ones((6, 3), np.float32),
        bias_L=np.zeros(3, np.float32),
        labels_M=np.array([0, 1]),
        components_MP=np.ones((2, 1), np.float32),
        images_MHW3=np.zeros((2, 4, 4, 3), np.uint8),
    )
    folder = tmp_path / "model"
    save_model(folder, model, SPEC, {})
    assert load_generator(folder).image_size == 4
    path = folder / "model.safetensors"
    if name == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        arrays = load_file(path)
        _change_linear(name)(arrays)
        save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, path)
    with pytest.raises(RequestError, match=r"model is damaged|no such file"):
        load_generator(folder)


def test_a_huge_json_file_beside_a_model_is_not_read(packages: Path, tmp_path: Path) -> None:
    from data_sharding.common.errors import RequestError
    from finetune.generators import digest_model

    shutil.copytree(packages / "eg_ddpm", tmp_path / "eg_ddpm")
    digest = digest_model(tmp_path / "eg_ddpm")
    assert digest == digest_model(packages / "eg_ddpm")
    with (tmp_path / "eg_ddpm" / "more.json").open("wb") as stream:
        stream.truncate(10**12)  # a sparse file, which takes no space on the disk
    with pytest.raises(RequestError, match=r"more\.json: larger than"):
        digest_model(tmp_path / "eg_ddpm")


def test_pickled_weights_are_not_read(packages: Path, tmp_path: Path) -> None:
    from data_sharding.common.errors import RequestError

    for kind, weights in (("clip", "model.safetensors"), ("pipeline", "unet/diffusion_pytorch_model.safetensors")):
        shutil.copytree(packages / kind, tmp_path / kind)
        path = tmp_path / kind / weights
        torch.save({}, path.with_name(f"{path.stem.replace('model', 'pytorch_model')}.bin"))
        path.unlink()
        with pytest.raises(RequestError, match=r"no weights in a \.safetensors file"):
            load(kind, tmp_path / kind)


def test_a_model_whose_images_are_not_finite_generates_nothing(packages: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from data_sharding.common.errors import RequestError

    shutil.copytree(packages / "eg_ddpm", tmp_path / "model")
    path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(path).items()}, path)
    model: Any = load("eg_ddpm", tmp_path / "model")
    with pytest.raises(RequestError, match=r"model: the generated images have NaN or infinite values"):
        model.generate(torch.zeros(1, 128, SPEC.window), seeds=[0], steps=2, source="no_eeg")
