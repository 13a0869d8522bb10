"""Evaluate generated images: compute metrics, compare each metric with control images, and write a report of one page.

Array shapes: B trials, M images, H rows, W columns, D feature width, K classes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from data_sharding.audit.leakage import Contents, Findings, compare_datasets, compare_splits
from data_sharding.common.config import command, to_dict
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, RequestError, printable, show
from data_sharding.common.files import atomic_write_text, sha256_file, write_json
from data_sharding.dataset.dataset import EEGDataset
from finetune.evaluation import metrics
from finetune.evaluation.classifier import ClassifierConfig, ImageClassifier, train_classifier
from finetune.evaluation.controls import find_controls, read_controls
from finetune.evaluation.generated import GeneratedSet, Images, read_generated
from finetune.evaluation.judgement import THUMBNAIL, Judge, judge_images, pixel_features
from finetune.evaluation.metrics import JUDGE, METRICS, JudgedImages
from finetune.evaluation.openings import record_opening
from finetune.evaluation.per_trial import ACCURACY, measure_trials, write_trials
from finetune.evaluation.pixel_metrics import PAIRED_METRICS, ImageRows, ImageSource, average_pairs
from finetune.evaluation.report import render_report
from finetune.generation.trials import Trial, list_trials
from finetune.images import ImageTable, open_paired
from pretrain.evidence.rules import NotApplicable

SAME_IMAGE = "not computed: all trials show the same image"
SAME_SET = "not computed: compares images with themselves"
RANDOM_PAIRS = 10_000
"""Number of random pairs above which each trial is compared with only one other trial."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compute metrics of generated images, compare them with controls, and write a report."""

    RENAMED: ClassVar[dict[str, str]] = {"control_dir": "controls"}

    directory: str
    """Folder that `dreamscale generate` wrote. The evaluation writes metrics.json, trials.json and
    report.html into this folder."""
    controls: list[str] | None = None
    """Folders of control images, generated for the same trials with `--control NAME`. Empty: all folders beside
    `directory` whose name begins with the name of `directory` and a hyphen, such as images-shuffle for images."""
    dataset: str | None = None
    """Path of the EEG-image dataset; only needed if the dataset was moved after the images were generated."""
    classifier: str | None = None
    """File classifier.safetensors of an earlier evaluation on this dataset. By default, a new classifier is trained."""
    training: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Size and training settings of the image classifier."""
    n_way: list[int] = field(default_factory=lambda: [2, 50])
    """Values of n for the n-way accuracy. Values above the dataset's number of classes are ignored."""
    top_k: list[int] = field(default_factory=lambda: [1, 5])
    """Values of k for the n-way accuracy: the true category is among the k best of n categories. Only values below n
    are used."""
    draws: int = 100
    """Number of random draws of categories from which the standard deviation of the n-way accuracy is computed. The
    n-way accuracy itself is the exact mean over all possible draws."""
    permutations: int = 10_000
    """Number of times that the labels are shuffled between images to compute the p-value."""
    inception: str | None = None
    """TorchScript file of Inception-V3 (inception-2015-12-05.pt), without which FID and KID are not computed.
    A TorchScript file is a program, so it needs trust_programs: true."""
    lpips: str | None = None
    """TorchScript file of VGG-16 with LPIPS weights (vgg16.pt), without which LPIPS is not computed. A TorchScript
    file is a program, so it needs trust_programs: true."""
    trust_programs: bool = False
    """True: run the programs in the files `inception` and `lpips`. A TorchScript program may do anything that you may
    do, so give only files that you downloaded from their authors and whose checksums you compared."""
    design_evidence: str = ""
    """Published evidence that the images were shown in random order, for files that have lost the order of the trials,
    such as the preprocessed THINGS-EEG2. The evidence is printed beside the verdict."""
    verify: Literal["windows", "names", "none"] = "windows"
    """How the splits are checked for shared data, as `dreamscale verify` does. windows: decode and compare every
    window. names: compare subjects, recordings and images. none: no check."""
    pretraining: str | None = None
    """Dataset on which the encoder was pretrained. If the dataset is given, it is checked that it shares no data with
    the test data."""
    require: Literal["", "signal"] = ""
    """signal: end with exit code 1 unless the verdict is "signal"."""
    examples: int = 24
    """Number of trials whose images the report shows."""
    seed: int = 0
    """Seed for training the classifier, drawing random pairs of images and shuffling labels."""

    def __post_init__(self) -> None:
        if (self.inception or self.lpips) and not self.trust_programs:
            raise ValueError(
                "inception and lpips are TorchScript files, which are programs and could do anything that you can do; "
                "if you trust their authors, set trust_programs: true; otherwise leave inception and lpips out"
            )
        if self.permutations < 99 or self.examples < 1 or any(n < 2 for n in self.n_way):
            raise ValueError("need permutations >= 99, examples >= 1 and every n_way >= 2")
        if self.draws < 2 or any(k < 1 for k in self.top_k):
            raise ValueError("need draws >= 2 and every top_k >= 1")


def _resize(images_BHW3: ImageSource, size: int) -> Images:
    """Resize images as the dataset classifier's training images were resized."""
    from PIL import Image

    if isinstance(images_BHW3, np.ndarray) and images_BHW3.shape[1:3] == (size, size):
        return images_BHW3
    resized = np.empty((len(images_BHW3), size, size, 3), np.uint8)
    for number in range(len(images_BHW3)):
        resized[number] = Image.fromarray(images_BHW3[number]).resize((size, size), Image.Resampling.LANCZOS)
    return resized


def _load_torchscript(path: str, key: str, folders: list[Path]) -> Any:
    """Load a TorchScript program of the user. Refuse a program in one of the `folders`, which others may have made."""
    import torch

    if any(Path(path).resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise RequestError(
            f"{key} '{path}': a TorchScript file is a program, and no program in a folder of images or of a dataset is "
            "run; give the file that you downloaded from its authors"
        )
    if not Path(path).is_file():
        raise RequestError(f"{key} '{path}': no such file; give the path of the TorchScript file, or leave {key} out")
    try:
        return torch.jit.load(path, map_location="cpu").eval()
    except RuntimeError as error:
        raise RequestError(f"{key} '{path}': not a TorchScript file ({str(error).splitlines()[0]})") from None


def _run_script(script: Any, images_BHW3: Images, batch: int = 32, **options: Any) -> NDArray[np.float64]:
    """Run a TorchScript network on images; the network's input is [B, 3, H, W] with values from 0 to 255."""
    import torch

    parts = []
    with torch.no_grad():
        for start in range(0, len(images_BHW3), batch):
            x = torch.from_numpy(images_BHW3[start : start + batch]).permute(0, 3, 1, 2).float()
            parts.append(script(x, **options).double().numpy())
    return np.concatenate(parts)


@dataclass(kw_only=True)
class Judges:
    """The networks that compute features and class probabilities of images for the metrics."""

    classifier: ImageClassifier
    """Image classifier that was trained on the dataset's training images."""
    size: int
    """Width and height, in pixels, of the images that the classifier takes."""
    inception: Any = None
    """TorchScript network Inception-V3 for FID and KID; None if no file was given."""
    lpips: Any = None
    """TorchScript network VGG-16 for LPIPS; None if no file was given."""


def _classify(
    probabilities_BK: NDArray[np.float64], labels_B: NDArray[np.integer], image_ids: list[str], config: EvaluateConfig
) -> dict[str, Any]:
    """Compute the accuracies and the confusion matrix of images whose class probabilities are given."""
    predicted, classes = probabilities_BK.argmax(axis=1), probabilities_BK.shape[1]
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels_B, predicted), 1)
    return {
        f"accuracy[{JUDGE}]": metrics.accuracy_with_p_value(
            predicted, labels_B, image_ids, permutations=config.permutations, seed=config.seed
        ),
        **{
            f"{n}-way-top-{k}[{JUDGE}]": metrics.n_way_top_k(
                probabilities_BK, labels_B, n=n, k=k, draws=config.draws, seed=config.seed
            )
            for n in config.n_way
            if n <= classes
            for k in config.top_k
            if k < n
        },
        "confusion": confusion.tolist(),
    }


def measure(
    images_BHW3: ImageSource,
    real_BHW3: ImageSource,
    labels_B: Any,
    image_ids: list[str],
    judges: Judges,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Compute every metric for a set of generated images.

    Parameters
    ----------
    images_BHW3, real_BHW3 : ImageSource of uint8, shape (B, H, W, 3)
        Generated images, and the images that the person saw in the same trials.
    labels_B : ndarray of int, shape (B,)
        Category of the image that the person saw in each trial.
    image_ids : list of str
        Id of the image that the person saw in each trial.
    judges : Judges
        Networks that compute features and class probabilities.
    config : EvaluateConfig
        Config of the evaluation.

    Returns
    -------
    dict
        Maps the name of each metric to a number, to a dictionary of numbers, or to a text that says why the metric was
        not computed. The names of metrics that use the image classifier end with its name in brackets. Other keys are
        ``confusion`` (the confusion matrix) and ``frechet_note``.
    """
    features, probabilities = judges.classifier.judge(_resize(images_BHW3, judges.size))
    real_features, _ = judges.classifier.judge(_resize(real_BHW3, judges.size))
    judged = JudgedImages(
        features_BD=features,
        real_features_BD=real_features,
        ids=image_ids,
        real_ids=image_ids,
        probabilities_BK=probabilities,
    )
    different = len(set(image_ids))
    out: dict[str, Any] = _classify(probabilities, labels_B, image_ids, config)
    for name, compare in PAIRED_METRICS.items():
        out |= average_pairs(name, compare(images_BHW3, real_BHW3))
    out |= {f"{name}[{JUDGE}]": compute(judged) for name, compute in METRICS.items()}
    out["frechet_note"] = (
        f"biased: there are only {different} different images, papers use 2048 or more" if different < 2048 else ""
    )
    if judges.inception is not None and different >= 2:
        ours = _run_script(judges.inception, images_BHW3, return_features=True)
        theirs = _run_script(judges.inception, real_BHW3, return_features=True)
        out["fid"] = metrics.frechet_distance(theirs, ours)
        out["kid"] = metrics.kernel_distance(theirs, ours, real_ids=image_ids, generated_ids=image_ids)
    else:
        out["fid"] = out["kid"] = "not computed: needs Inception-V3 weights (--inception PATH) and two different images"
    if judges.lpips is not None:
        a, b = (_run_script(judges.lpips, x, resize_images=False, return_lpips=True) for x in (images_BHW3, real_BHW3))
        out["lpips"] = float(np.square(a - b).sum(axis=1).mean())
    else:
        out["lpips"] = "not computed: needs LPIPS weights (--lpips PATH)"
    return out


def measure_real(
    real_BHW3: ImageSource, labels_B: Any, image_ids: list[str], judges: Judges, config: EvaluateConfig
) -> dict[str, Any]:
    """Compute every metric that says something about the real images, as a limit for generated images.

    A metric that compares two sets of images compares one half of the different real images with the other half. A
    metric that compares a generated image with the real image of its trial has no value for real images.

    Parameters
    ----------
    real_BHW3, labels_B, image_ids, judges, config
        The arguments of `measure`.

    Returns
    -------
    dict
        The keys of `measure`.
    """
    features, probabilities = judges.classifier.judge(_resize(real_BHW3, judges.size))
    out: dict[str, Any] = _classify(probabilities, labels_B, image_ids, config)
    out |= dict.fromkeys((*PAIRED_METRICS, "fid", "kid", "lpips"), SAME_SET)
    names, rows_M = np.unique(np.asarray(image_ids), return_index=True)
    order = np.random.default_rng(config.seed).permutation(len(names))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    halves = JudgedImages(
        features_BD=features[rows_M[first]],
        real_features_BD=features[rows_M[second]],
        ids=names[first].tolist(),
        real_ids=names[second].tolist(),
        probabilities_BK=probabilities[rows_M],
    )
    return out | {f"{name}[{JUDGE}]": compute(halves) for name, compute in METRICS.items()}


def _choose_other_trials(image_ids: list[str], rng: np.random.Generator) -> NDArray[np.int64]:
    """Choose, for each trial, a random trial that shows another image."""
    ids = np.asarray(image_ids)
    order = np.argsort(ids, kind="stable")
    first, last = (np.searchsorted(ids[order], ids, side=side) for side in ("left", "right"))
    # The trials of the own image are neighbours in `order`, so a random number can skip them.
    chosen = rng.integers(0, len(ids) - (last - first))
    return order[chosen + np.where(chosen >= first, last - first, 0)]


def compare_random_pairs(
    images_BHW3: ImageSource, real_BHW3: ImageSource, image_ids: list[str], *, seed: int, draws: int | None = None
) -> dict[str, Any]:
    """Compare each generated image with the real image of a random other trial, by every paired metric.

    The paired metrics are those of `pixel_metrics.PAIRED_METRICS`.

    Parameters
    ----------
    images_BHW3, real_BHW3 : ImageSource of uint8, shape (B, H, W, 3)
        Generated and real images.
    image_ids : list of str
        Id of the image of each trial. A generated image is never compared with the image of its own trial.
    seed : int
        Seed for the random choice of the other trials.
    draws : int, optional
        Number of other trials with which each trial is compared. By default 10, but fewer if there would be more than
        `RANDOM_PAIRS` pairs.

    Returns
    -------
    dict
        Maps each metric's name to its mean, or to a text that says why the metric was not computed.
    """
    rng = np.random.default_rng(seed)
    if len(set(image_ids)) < 2:
        return dict.fromkeys(PAIRED_METRICS, SAME_IMAGE)
    number = draws or max(1, min(10, RANDOM_PAIRS // len(image_ids)))
    found: dict[str, list[Any]] = {name: [] for name in PAIRED_METRICS}
    for _ in range(number):
        others_BHW3 = ImageRows(real_BHW3, _choose_other_trials(image_ids, rng))
        for name, compare in PAIRED_METRICS.items():
            found[name].append(compare(images_BHW3, others_BHW3))
    return {
        name: average_pairs(name, values[0] if isinstance(values[0], str) else np.concatenate(values))[name]
        for name, values in found.items()
    }


def measure_nearest_training_image(images_BHW3: Images, train_MHW3: Images) -> NDArray[np.float64]:
    """Compute the distance of each image to the most similar training image.

    Parameters
    ----------
    images_BHW3, train_MHW3 : ndarray of uint8
        Generated images and training images; all must have the same width and height.

    Returns
    -------
    ndarray, shape (B,)
        Root mean squared difference of the pixel values, from 0 to 255.
    """
    train = train_MHW3.reshape(len(train_MHW3), -1).astype(np.float32)
    flat = images_BHW3.reshape(len(images_BHW3), -1).astype(np.float32)
    nearest = np.array([np.square(train - image).mean(axis=1).min() for image in flat], np.float64)
    return np.sqrt(nearest)


def _quartiles(values: NDArray[np.float64]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "quartile_1": float(low), "quartile_3": float(high)}


def _classifier(
    config: EvaluateConfig, table: ImageTable, dataset_id: str, labels: list[str], output: Path
) -> ImageClassifier:
    """Load the image classifier from its file. If no file is given, train a classifier and save its file."""
    if config.classifier is not None:
        classifier, about = ImageClassifier.load(config.classifier)
        if about.get("dataset_id") != dataset_id or classifier.n_classes != len(labels):
            raise RequestError(f"{config.classifier}: this classifier is of another dataset; leave --classifier out")
        return classifier
    images = table.pixels(size=config.training.size)
    classifier = train_classifier(images, table.labels, len(labels), config=config.training, seed=config.seed)
    classifier.save(output / "classifier.safetensors", {"dataset_id": dataset_id, "seed": str(config.seed)})
    return classifier


def _list_trials(data: EEGDataset, own: GeneratedSet) -> list[Trial]:
    """Find the trials of generated images in the dataset."""
    number_of = {data.key(number): number for number in range(len(data))}
    keys = [trial.get("eeg_keys") or [trial.get("eeg_key") or trial["key"]] for trial in own.trials]
    if missing := [key for group in keys for key in group if key not in number_of]:
        raise RequestError(
            f"{own.path}: {len(missing)} trials, such as {show(missing[0])}, are not in {data.path} ({data.split}); "
            "generate the images again"
        )
    groups = [[number_of[key] for key in group] for group in keys]
    return list_trials(data, groups, groups)


def _check_protocol(config: EvaluateConfig, path: Path) -> dict[str, Any]:
    """Check that the splits, and the pretraining data and the dataset, share no data."""
    if config.verify == "none":
        return {"splits": None, "pretraining": None}
    windows = config.verify == "windows"
    contents = Contents.read(path, windows=windows)
    found: dict[str, Any] = {"splits": _show_findings(compare_splits(contents)), "pretraining": None}
    if config.pretraining is not None:
        before = Contents.read(config.pretraining, windows=windows)
        found["pretraining"] = _show_findings(compare_datasets(before, contents))
    return found


def _show_findings(findings: Findings) -> dict[str, list[str]]:
    return {
        "shared": [finding.text for finding in findings.proofs],
        "to_look_at": [finding.text for finding in findings.found if not finding.proof],
        "compared": findings.compared,
        "not_compared": findings.not_compared,
    }


def _held_out(path: Path, judges: Judges, dataset_split: str) -> dict[str, Any]:
    """Measure the classifier's accuracy on real images that were not used in its training."""
    correct, total, ids = 0, 0, []
    for split in dict.fromkeys(("val", "test", dataset_split)):
        if split == "train":
            continue
        try:
            table = ImageTable(open_paired(path, split))
        except RequestError:
            continue  # A dataset may have no val or test split. The result's entry "splits" names the splits in use.
        _, probabilities = judges.classifier.judge(table.pixels(size=judges.size))
        correct += int((probabilities.argmax(axis=1) == table.labels).sum())
        total += len(table)
        ids.append(split)
    if not total:
        return {"accuracy": "not computed: no held-out images", "n": 0, "splits": []}
    return {
        "accuracy": correct / total,
        "n": total,
        "splits": ids,
        "interval": list(metrics.wilson_interval(correct, total)),
    }


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Compute the metrics, and write them to metrics.json, trials.json (values of each trial) and the report.

    Parameters
    ----------
    config : EvaluateConfig
        Config of the evaluation.

    Returns
    -------
    dict
        Content of metrics.json. `measure` computes the values of ``generated`` and ``shuffled`` (images from other
        trials' EEG), and `measure_real` computes the values of ``real``. Other keys of the result are, for example,
        ``random_pairs``, ``memorisation`` and ``classifier``.

    Raises
    ------
    RequestError
        If a folder is incomplete, or the folders and the dataset do not belong together.
    """
    own = read_generated(config.directory)
    if own.about["control"] != "none":
        raise RequestError(
            f"{config.directory}: this folder holds images of the control '{own.about['control']}'; give the folder of "
            "images from the right EEG, and the control in the key 'controls'"
        )
    wanted = find_controls(config.directory) if config.controls is None else config.controls
    controls = read_controls(own, wanted)
    shuffle = controls.get("shuffle")
    control = None if isinstance(shuffle, NotApplicable) else shuffle
    path = Path(config.dataset or own.about["dataset"])
    train = open_paired(path, "train")
    if train.manifest.dataset_id != own.about["dataset_id"]:
        raise RequestError(
            f"{path}: the images in {config.directory} are of another dataset; give that dataset as --dataset"
        )
    folders = [Path(folder) for folder in (config.directory, *wanted, path)]
    inception = _load_torchscript(config.inception, "inception", folders) if config.inception else None
    lpips = _load_torchscript(config.lpips, "lpips", folders) if config.lpips else None
    table = ImageTable(train)
    labels = own.about["labels"]
    classifier = _classifier(config, table, train.manifest.dataset_id, labels, own.path)
    judges = Judges(classifier=classifier, size=classifier.size, inception=inception, lpips=lpips)
    y_B, ids = own.labels_B, [trial["image_id"] for trial in own.trials]

    seen_in_training = sorted(set(ids) & set(table.ids))
    result: dict[str, Any] = {
        "schema": 1,
        "kind": own.about.get("kind"),
        "dataset_id": own.about["dataset_id"],
        "split": own.about["split"],
        "labels": labels,
        "trials": len(ids),
        "images": len(set(ids)),
        "subjects": len({trial["subject"] for trial in own.trials}),
        "images_also_in_train": len(seen_in_training),
        "repeats": {
            "average_repeats": own.about.get("average_repeats"),
            "least": int(own.repeats_B.min()),
            "most": int(own.repeats_B.max()),
            "presentations": int(own.repeats_B.sum()),
        },
        "sampling": {key: own.about.get(key) for key in ("sampler", "steps", "guidance_scale", "seed")},
        "classifier": {
            "name": JUDGE,
            "sha256": sha256_file(config.classifier or own.path / "classifier.safetensors"),
            "trained_on": {"split": "train", "images": len(table)},
            "held_out": _held_out(path, judges, own.about["split"]),
        },
        "generated": measure(own.images_BHW3, own.real_BHW3, y_B, ids, judges, config),
        "shuffled": "not computed: no images of --control shuffle",
        "real": measure_real(own.real_BHW3, y_B, ids, judges, config),
        "random_pairs": compare_random_pairs(own.images_BHW3, own.real_BHW3, ids, seed=config.seed),
    }
    result["controls"] = {
        name: f"not applicable: {found.reason}"
        if isinstance(found, NotApplicable)
        else measure(
            found.images_BHW3,
            found.real_BHW3,
            found.labels_B,
            [trial["image_id"] for trial in found.trials],
            judges,
            config,
        )
        for name, found in controls.items()
        if name != "shuffle"
    }
    if control is not None:
        result["shuffled"] = measure(control.images_BHW3, control.real_BHW3, y_B, ids, judges, config)
        label_of = {trial["key"]: trial["label"] for trial in own.trials}
        image_of = {trial["key"]: trial["image_id"] for trial in own.trials}
        givers = [trial["eeg_key"] for trial in control.trials]
        if set(givers) <= label_of.keys():
            _, probabilities = classifier.judge(_resize(control.images_BHW3, judges.size))
            # If a good model gets the EEG of another trial, the generated image shows the category of this other trial.
            # Therefore, compute `accuracy_of_eeg` with the labels of the trials whose EEG was used.
            result["shuffled"][f"accuracy_of_eeg[{JUDGE}]"] = metrics.accuracy_with_p_value(
                probabilities.argmax(axis=1),
                np.array([label_of[key] for key in givers]),
                [image_of[key] for key in givers],
                permutations=config.permutations,
                seed=config.seed,
            )
    train_images = table.pixels(size=judges.size)
    # If a generator does not copy training images, its images should not be closer to the training images than the real
    # images of the evaluated split are.
    result["memorisation"] = {
        "measure": f"RMS pixel difference to the most similar of {len(table)} training images at {judges.size} pixels",
        "generated": _quartiles(measure_nearest_training_image(_resize(own.images_BHW3, judges.size), train_images)),
        "real": _quartiles(measure_nearest_training_image(_resize(own.real_BHW3, judges.size), train_images)),
    }
    values, shuffled = (
        {}
        if given is None
        else measure_trials(
            given.images_BHW3, given.real_BHW3, y_B, classifier.judge(_resize(given.images_BHW3, judges.size))[1]
        )
        for given in (own, control)
    )
    eeg: dict[str, Any] = own.about.get("eeg") or {}
    part = {name: eeg.get(name) for name in ("tmin", "tmax")}
    data = open_paired(path, own.about["split"], **part)
    openings = record_opening(
        path,
        own.about["split"],
        command="evaluate",
        dataset_id=own.about["dataset_id"],
        model_digest=str(own.about.get("model_digest") or ""),
        config=to_dict(config),
        fallback=own.path,
    )
    result["verdict"] = judge_images(
        own,
        controls,
        Judge(
            classify=lambda images: classifier.judge(_resize(images, judges.size))[1].argmax(axis=1),
            features=pixel_features,
            features_name=f"correlation of the pixels at {THUMBNAIL} x {THUMBNAIL}",
        ),
        train=open_paired(path, "train", **part),
        data=data,
        trials=_list_trials(data, own),
        design_evidence=config.design_evidence,
        resamples=max(500, min(config.permutations, 5000)),
        seed=config.seed,
    )
    result["protocol"] = {
        **_check_protocol(config, path),
        "openings": None if openings is None else openings.describe(own.about["split"]),
    }
    people_B = np.array([trial["subject"] for trial in own.trials])
    result["by_person"] = {
        str(person): {
            "trials": int((people_B == person).sum()),
            "accuracy": float(values[ACCURACY][people_B == person].mean()),
            "shuffled": float(shuffled[ACCURACY][people_B == person].mean()) if shuffled else None,
        }
        for person in np.unique(people_B)
    }
    write_trials(own.path, own.trials, values, shuffled)
    write_json(own.path / "metrics.json", result)
    similarity_B = values.get("pixel_correlation")
    page = render_report(result, own, control, examples=config.examples, similarity_B=similarity_B)
    atomic_write_text(own.path / "report.html", page)
    return result


def evaluate_and_print(config: EvaluateConfig) -> int:
    """Evaluate generated images and print the most important numbers.

    Parameters
    ----------
    config : EvaluateConfig
        Config of the evaluation.

    Returns
    -------
    int
        Exit code of the command.
    """
    result = evaluate(config)
    found, real = (result[name][f"accuracy[{JUDGE}]"] for name in ("generated", "real"))
    line = f"accuracy {found['accuracy']:.3f} (chance {found['chance']:.3f}, p {found['p_value']:.2g}, n {found['n']})"
    following = ""
    if isinstance(result["shuffled"], dict):
        line += f"; with shuffled EEG {result['shuffled'][f'accuracy[{JUDGE}]']['accuracy']:.3f}"
    else:
        following = (
            "; next: dreamscale generate MODEL DATASET --control shuffle -o "
            f"{config.directory}-shuffle, and the same with --control shuffle_within; then evaluate again"
        )
    if result["repeats"]["most"] > 1:
        line += f"; each trial is the mean of up to {result['repeats']['most']} presentations"
    report = Path(config.directory) / "report.html"
    print(f"{line}; real images {real['accuracy']:.3f}")
    verdict = result["verdict"]
    scope = f" ({verdict['scope']})" if verdict["scope"] else ""
    print(f"verdict: {verdict['word']}{scope}. {verdict['why'][0]}")
    for shared in (found or {} for found in (result["protocol"]["splits"], result["protocol"]["pretraining"])):
        for text in shared.get("shared", [])[:5]:
            print(f"shared: {printable(text)}")
    print(f"report: {report}{following}")
    return EXIT_FAILED if config.require == "signal" and verdict["word"] != "signal" else EXIT_DONE


main = command(EvaluateConfig, evaluate_and_print, prog="dreamscale evaluate", positionals=("directory",))


if __name__ == "__main__":
    sys.exit(main())
