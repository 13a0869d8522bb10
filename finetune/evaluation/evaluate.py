"""Evaluate generated images: compute metrics, compare them with the metrics of control images, and write a report.

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
from data_sharding.common.storage import AnyPath, as_path, is_remote
from data_sharding.dataset.dataset import EEGDataset
from finetune.evaluation import metrics
from finetune.evaluation.classifier import ClassifierConfig, ImageClassifier, train_classifier
from finetune.evaluation.controls import find_controls, read_controls
from finetune.evaluation.generated import GeneratedSet, Images, read_generated
from finetune.evaluation.judgement import THUMBNAIL, Judge, judge_images, pixel_features
from finetune.evaluation.limits.other_images import (
    OtherImages,
    hash_images,
    measure_other_images,
    read_folder,
    take_training_images,
)
from finetune.evaluation.limits.repeats import measure_noise_ceiling
from finetune.evaluation.limits.training_seeds import measure_training_seeds
from finetune.evaluation.measure import MeasureOptions, compare_random_pairs, list_tasks, measure, measure_real
from finetune.evaluation.metrics import JUDGE
from finetune.evaluation.networks.judges import (
    Judges,
    RealImages,
    find_judges,
    make_classifier_network,
    resize_images,
)
from finetune.evaluation.networks.sharing import Sharing
from finetune.evaluation.per_trial import ACCURACY, write_trials
from finetune.evaluation.pixel_metrics import ImageSource
from finetune.evaluation.report import render_report
from finetune.generation.trials import Trial, list_trials
from finetune.generators import read_part
from finetune.images import ImageTable, open_paired
from finetune.training.accelerate import WAIT_S, get_world, make_accelerator
from pretrain.evidence.copies import find_copies
from pretrain.evidence.openings import record_opening
from pretrain.evidence.rules import NotApplicable
from pretrain.evidence.windows import KnownEEG, find_known_eeg
from pretrain.runs.distributed import launched_world

BLOCK = 256
"""Number of images that are compared with all training images at once."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compute metrics of generated images, compare the metrics with controls, and write a report."""

    RENAMED: ClassVar[dict[str, str]] = {"control_dir": "controls"}

    directory: str
    """Folder that `dreamscale generate` wrote. The evaluation writes metrics.json, trials.json and
    report.html into this folder."""
    controls: list[str] | None = None
    """Folders of control images, generated for the same trials with `--control NAME`. Empty: use the folders next to
    `directory` whose name is the name of `directory`, a hyphen and the name of a control, such as images-shuffle for
    images."""
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
    """Number of random draws of categories for the standard deviation of the n-way accuracy. The n-way accuracy itself
    is the exact mean over all possible draws."""
    permutations: int = 10_000
    """Number of times that the labels are shuffled between images to compute the p-value. The verdict uses the same
    number of bootstrap resamples, but at least 500 and at most 5000."""
    inception: str | None = None
    """File of the weights of Inception-V3: pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or a safetensors file
    with the same names. Without the weights of Inception-V3, FID and KID are not computed."""
    clip: str | None = None
    """Directory or hub id of a CLIP model, such as openai/clip-vit-large-patch14. Without a CLIP model, the CLIP
    similarity is not computed."""
    dinov2: str | None = None
    """Directory or hub id of a DINOv2 model, such as facebook/dinov2-base. Without a DINOv2 model, no embeddings of
    DINOv2 are compared."""
    lpips: list[str] = field(default_factory=lambda: ["alex"])
    """Variants of LPIPS: alex (AlexNet) and vgg (VGG-16, about forty times slower). LPIPS needs the packages of the
    extra `judges`."""
    design_evidence: str = ""
    """Published evidence that the images were shown in random order, for datasets that do not contain the order of the
    trials, such as the preprocessed THINGS-EEG2. The evidence is printed with the verdict."""
    verify: Literal["windows", "names", "none"] = "windows"
    """How the splits are checked for shared data, by the checks of `dreamscale verify`. windows: decode and compare
    every window. names: compare subjects, recordings and images. none: no check."""
    pretraining: str | None = None
    """Dataset on which the encoder was pretrained. The evaluation checks which data the pretraining dataset shares with
    the EEG-image dataset. Empty: no check."""
    real_images: str | None = None
    """Folder of real images that nobody saw in the trials. These real images are judged as if a model had generated
    them. If a subfolder's name is a label of the dataset, the images in the subfolder have this category. Empty: use
    the images of the training split."""
    training_seeds: list[str] = field(default_factory=list)
    """Folders with the images of models that were trained with other seeds, evaluated with `dreamscale evaluate`. The
    result has the mean and the spread of each metric over all models."""
    require: Literal["", "signal"] = ""
    """Verdict that is required for exit code 0. signal: the exit code is 1 if the verdict is not "signal". Empty: the
    exit code does not depend on the verdict."""
    examples: int = 24
    """Number of example trials whose images the report shows; the examples are spread over the categories. The report
    also shows the trials with the best, the middle and the worst images."""
    seed: int = 0
    """Seed for training the classifier, drawing random pairs of images, shuffling labels, the predictors and the
    bootstrap."""
    num_processes: int = 1
    """Number of processes among which the images are divided. The number of processes does not change the result,
    except for single-precision rounding errors if the number of threads of each process also changes."""

    def __post_init__(self) -> None:
        if not set(self.lpips) <= {"alex", "vgg"}:
            raise ValueError(f"'lpips' can hold only 'alex' and 'vgg', got {self.lpips}")
        if self.permutations < 99 or self.examples < 1 or any(n < 2 for n in self.n_way):
            raise ValueError(
                "'permutations' must be at least 99, 'examples' at least 1 and every number of 'n_way' at least 2"
            )
        if self.draws < 2 or any(k < 1 for k in self.top_k):
            raise ValueError("'draws' must be at least 2 and every number of 'top_k' at least 1")
        if self.num_processes < 1:
            raise ValueError(f"num_processes must be at least 1, got {self.num_processes}")


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
    train_MX, flat_BX = (x.reshape(len(x), -1) for x in (train_MHW3, images_BHW3))
    # A product of matrices in single precision finds the nearest image. To keep the rounding errors small, the pixel
    # values are centred around zero.
    train = train_MX.astype(np.float32) - 127.5
    lengths_M = np.square(train).sum(axis=1)
    found = []
    for start in range(0, len(flat_BX), BLOCK):
        block = flat_BX[start : start + BLOCK].astype(np.float32) - 127.5
        nearest = (lengths_M - 2 * block @ train.T).argmin(axis=1)
        found.append(np.square(block - train[nearest]).mean(axis=1, dtype=np.float64))
    return np.sqrt(np.concatenate(found))


def _quartiles(values: NDArray[np.float64]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "quartile_1": float(low), "quartile_3": float(high)}


def _classifier(
    config: EvaluateConfig, table: ImageTable, dataset_id: str, labels: list[str], output: Path
) -> tuple[ImageClassifier, Path]:
    """Load the classifier that the config gives, or train and save a new classifier; return it and its file."""
    if config.classifier is not None:
        classifier, about = ImageClassifier.load(config.classifier)
        if about.get("dataset_id") != dataset_id or classifier.n_classes != len(labels):
            raise RequestError(
                f"{config.classifier}: this classifier was trained on another dataset; leave --classifier out to train "
                "a new classifier"
            )
        return classifier, Path(config.classifier)
    images = table.pixels(size=config.training.size)
    classifier = train_classifier(images, table.labels, len(labels), config=config.training, seed=config.seed)
    path = output / "classifier.safetensors"
    classifier.save(path, {"dataset_id": dataset_id, "seed": str(config.seed)})
    return classifier, path


def _list_trials(data: EEGDataset, own: GeneratedSet) -> list[Trial]:
    """Find, in the dataset, the trials from which the images were generated."""
    number_of = {data.key(number): number for number in range(len(data))}
    keys = [trial.get("eeg_keys") or [trial.get("eeg_key") or trial["key"]] for trial in own.trials]
    if missing := [key for group in keys for key in group if key not in number_of]:
        raise RequestError(
            f"{own.path}: {len(missing)} trials, such as {show(missing[0])}, are not in {data.path} ({data.split}); "
            "generate the images again"
        )
    groups = [[number_of[key] for key in group] for group in keys]
    trials = list_trials(data, groups, groups)
    for given, trial in zip(own.trials, trials, strict=True):
        stored = {"key": trial.key, **{name: trial.meta[name] for name in ("image_id", "label", "subject")}}
        if differ := [name for name, value in stored.items() if str(given[name]) != str(value)]:
            raise RequestError(
                f"{own.path}: trial {show(given['key'])} has another {differ[0]} than in {data.path} ({data.split}); "
                "generate the images again"
            )
    return trials


def _check_protocol(
    config: EvaluateConfig, path: AnyPath, train: EEGDataset, data: EEGDataset
) -> tuple[dict[str, Any], KnownEEG]:
    """Find data that are in two splits, and data that are in the pretraining dataset and in the EEG-image dataset.

    The EEG of the evaluated trials is compared with the EEG of the training trials even with ``verify: none``, because
    the verdict needs this comparison.
    """
    if config.verify == "none":
        return {"splits": None, "pretraining": None}, find_known_eeg(train, data)
    windows = config.verify == "windows"
    contents = Contents.read(path, windows=windows)
    found: dict[str, Any] = {"splits": _show_findings(compare_splits(contents)), "pretraining": None}
    before = None
    if config.pretraining is not None:
        before = Contents.read(config.pretraining, windows=windows)
        found["pretraining"] = _show_findings(compare_datasets(before, contents))
    return found, find_known_eeg(train, data, before, contents)


def _show_findings(findings: Findings) -> dict[str, list[str]]:
    return {
        "shared": [finding.text for finding in findings.proofs],
        "to_look_at": [finding.text for finding in findings.found if not finding.proof],
        "compared": findings.compared,
        "not_compared": findings.not_compared,
    }


def _find_real_images(control: GeneratedSet, own: GeneratedSet, real: RealImages) -> RealImages:
    """Return the real images of the trials of `control`, in the order of these trials.

    `control` may lack some trials of `own`, the images that were generated from the right EEG.
    """
    if [trial["key"] for trial in control.trials] == [trial["key"] for trial in own.trials]:
        return real
    return RealImages(control.real_BHW3, [trial["image_id"] for trial in control.trials], control.labels_B)


def _held_out(path: AnyPath, classifier: ImageClassifier, dataset_split: str) -> dict[str, Any]:
    """Measure the classifier's accuracy on real images that were not used in its training."""
    correct, total, ids = 0, 0, []
    # The test split is opened only if the generated images belong to the test split.
    for split in dict.fromkeys(("val", dataset_split)):
        if split == "train":
            continue
        try:
            table = ImageTable(open_paired(path, split))
        except RequestError:
            # A dataset may have no val split. The result's entry "splits" names the splits whose images the classifier
            # judged.
            continue
        _, probabilities = classifier.judge(table.pixels(size=classifier.size))
        correct += int((probabilities.argmax(axis=1) == table.labels).sum())
        total += len(table)
        ids.append(split)
    if not total:
        return {"accuracy": "not computed: there are no held-out images", "n": 0, "splits": []}
    return {
        "accuracy": correct / total,
        "n": total,
        "splits": ids,
        "interval": list(metrics.wilson_interval(correct, total)),
    }


def _load_judges(config: EvaluateConfig, classifier: ImageClassifier, file: Path, sharing: Sharing) -> Judges:
    return find_judges(
        make_classifier_network(classifier, file),
        lpips_variants=config.lpips,
        inception_file=config.inception,
        clip=config.clip,
        dinov2=config.dinov2,
        sharing=sharing,
    )


def _make_judge(classifier: ImageClassifier, sharing: Sharing) -> Judge:
    """Return the classifier and the feature function that score images for the verdict."""
    return Judge(
        classify=lambda images: classifier.judge(resize_images(images, classifier.size))[1].argmax(axis=1),
        features=pixel_features,
        features_name=f"correlation of the pixels at {THUMBNAIL} x {THUMBNAIL}",
        sharing=sharing,
    )


def _resize(images_BHW3: ImageSource, size: int, sharing: Sharing) -> Images:
    """Resize images; the processes share the work. The task name "resize" must be a key in `_follow` too."""
    return np.concatenate(
        list(sharing.compute("resize", lambda images: resize_images(images, size), images_BHW3, block=BLOCK // 4))
    )


def _follow(config: EvaluateConfig, sharing: Sharing) -> None:
    """On every process except rank 0: compute what rank 0 asks for, such as embeddings of images."""
    file = sharing.wait()
    if file is None:
        return
    classifier, _ = ImageClassifier.load(file)
    sharing.follow(
        {
            **list_tasks(_load_judges(config, classifier, file, sharing)),
            **_make_judge(classifier, sharing).list_tasks(),
            "resize": lambda images: resize_images(images, classifier.size),
        }
    )


def _find_other_images(
    config: EvaluateConfig, own: GeneratedSet, table: ImageTable, data: EEGDataset, copies: list[tuple[str, str]]
) -> OtherImages | NotApplicable:
    """Return real images that nobody saw in the trials, from the user's folder or from the training split."""
    seen, size = {str(trial["image_id"]) for trial in own.trials}, own.real_BHW3.shape[1]
    if config.real_images is None:
        return take_training_images(table, seen, copies, size)
    digests = hash_images(ImageTable(data), seen)
    return read_folder(config.real_images, own.about["labels"], digests, size)


def evaluate(config: EvaluateConfig, sharing: Sharing | None = None) -> dict[str, Any]:
    """Compute the metrics, and write them to metrics.json, trials.json (values of each trial) and the report.

    Parameters
    ----------
    config : EvaluateConfig
        Config of the evaluation.
    sharing : Sharing, optional
        Processes among which the images are divided; by default, this process works alone. Only rank 0 calls this
        function.

    Returns
    -------
    dict
        Content of metrics.json. `finetune.evaluation.measure.measure` computes the values of ``generated``,
        ``shuffled`` and ``controls``, and `measure_real` computes the values of ``real``. ``metrics.schema.json``
        describes all keys of metrics.json.

    Raises
    ------
    RequestError
        If a folder is incomplete, or the folders and the dataset do not belong together.
    """
    sharing = sharing or Sharing()
    own = read_generated(config.directory)
    if own.about["control"] != "none":
        raise RequestError(
            f"{config.directory}: this folder holds images of the control '{own.about['control']}'; give the "
            "folder of images from the trials' own EEG as directory, and this folder in the key 'controls'"
        )
    wanted = find_controls(config.directory) if config.controls is None else config.controls
    controls = read_controls(own, wanted)
    shuffle = controls.get("shuffle")
    control = None if isinstance(shuffle, NotApplicable) else shuffle
    path = as_path(config.dataset or own.about["dataset"])
    if config.dataset is None and is_remote(path):
        # A folder of images may come from anybody, so it must not decide which dataset this command reads from the
        # network.
        raise RequestError(f"{path}: the images were generated from a remote dataset; give the dataset as --dataset")
    train = open_paired(path, "train")
    if train.manifest.dataset_id != own.about["dataset_id"]:
        raise RequestError(
            f"{path}: the images in {config.directory} were generated from another dataset, or another version of this "
            "dataset; give the right dataset as --dataset, or generate the images again"
        )
    table = ImageTable(train)
    labels = own.about["labels"]
    if labels != train.labels:
        raise RequestError(
            f"{config.directory}: the labels in generated.json differ from the labels of {path}; generate the images "
            "again"
        )
    classifier, classifier_file = _classifier(config, table, train.manifest.dataset_id, labels, own.path)
    judges = _load_judges(config, classifier, classifier_file, sharing)
    sharing.announce(classifier_file)
    y_B, ids = own.labels_B, [trial["image_id"] for trial in own.trials]

    real = RealImages(own.real_BHW3, ids, y_B)
    options = MeasureOptions(
        n_way=config.n_way,
        top_k=config.top_k,
        draws=config.draws,
        permutations=config.permutations,
        seed=config.seed,
    )
    part: dict[str, Any] = dict(read_part(own.about, str(own.path / "generated.json")))
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
    trials = _list_trials(data, own)
    copies = find_copies(train, data)
    generated = measure(own.images_BHW3, real, judges, options)
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
            "held_out": _held_out(path, classifier, own.about["split"]),
        },
        "networks": judges.describe(),
        "generated": generated.metrics,
        "shuffled": "not computed: there are no images that were generated with --control shuffle",
        "real": measure_real(real, judges, options),
        "random_pairs": compare_random_pairs(own.images_BHW3, own.real_BHW3, ids, judges, seed=config.seed),
        "other_real": measure_other_images(_find_other_images(config, own, table, data, copies), real, judges, options),
        "noise_ceiling": measure_noise_ceiling(data, trials, generated.predicted_B, seed=config.seed),
    }
    result["training_seeds"] = measure_training_seeds(own, result, config.training_seeds)
    result["controls"] = {
        name: f"not applicable: {found.reason}"
        if isinstance(found, NotApplicable)
        else measure(found.images_BHW3, _find_real_images(found, own, real), judges, options).metrics
        for name, found in controls.items()
        if name != "shuffle"
    }
    shuffled: dict[str, NDArray[np.float64]] = {}
    if control is not None:
        of_control = measure(control.images_BHW3, real, judges, options)
        result["shuffled"], shuffled = of_control.metrics, of_control.trials
        label_of = {trial["key"]: trial["label"] for trial in own.trials}
        image_of = {trial["key"]: trial["image_id"] for trial in own.trials}
        givers = [trial.get("eeg_key") for trial in control.trials]
        if set(givers) <= label_of.keys():
            # If a good model gets the EEG of another trial, the generated image shows the category of the other trial.
            # Therefore, `accuracy_of_eeg` compares each image with the label of the trial that gave the EEG.
            result["shuffled"][f"accuracy_of_eeg[{JUDGE}]"] = metrics.accuracy_with_p_value(
                of_control.predicted_B,
                np.array([label_of[key] for key in givers]),
                [image_of[key] for key in givers],
                permutations=config.permutations,
                seed=config.seed,
            )
    train_images = table.pixels(size=classifier.size)
    # If a generator copies training images, the generated images are closer to the training images than the real images
    # of the evaluated split are.
    size = classifier.size
    result["memorisation"] = {
        "measure": f"RMS pixel difference to the most similar of {len(table)} training images at {size} pixels",
        "generated": _quartiles(measure_nearest_training_image(_resize(own.images_BHW3, size, sharing), train_images)),
        "real": _quartiles(measure_nearest_training_image(_resize(own.real_BHW3, size, sharing), train_images)),
    }
    train_part = open_paired(path, "train", **part)
    protocol, known_eeg = _check_protocol(config, path, train_part, data)
    result["verdict"] = judge_images(
        own,
        controls,
        _make_judge(classifier, sharing),
        train=train_part,
        data=data,
        trials=trials,
        copies=copies,
        known_eeg=known_eeg,
        design_evidence=config.design_evidence,
        resamples=max(500, min(config.permutations, 5000)),
        seed=config.seed,
    )
    result["protocol"] = {
        **protocol,
        "openings": None if openings is None else openings.describe(own.about["split"]),
    }
    people_B = np.array([trial["subject"] for trial in own.trials], dtype=object)
    result["by_person"] = {
        str(person): {
            "trials": int((people_B == person).sum()),
            "accuracy": float(generated.trials[ACCURACY][people_B == person].mean()),
            "shuffled": float(shuffled[ACCURACY][people_B == person].mean()) if shuffled else None,
        }
        for person in np.unique(people_B)
    }
    write_trials(own.path, own.trials, generated.trials, shuffled)
    write_json(own.path / "metrics.json", result)
    similarity_B = generated.trials.get("pixel_correlation")
    page = render_report(result, own, control, examples=config.examples, similarity_B=similarity_B)
    atomic_write_text(own.path / "report.html", page)
    return result


def evaluate_and_print(config: EvaluateConfig) -> int:
    """Evaluate generated images, in one or several processes, and print the most important numbers.

    Parameters
    ----------
    config : EvaluateConfig
        Config of the evaluation.

    Returns
    -------
    int
        Exit code of the command.
    """
    if config.num_processes == 1 and launched_world()[1] == 1:
        return _print_result(config, evaluate(config))
    accelerator = make_accelerator(num_processes=config.num_processes, device="cpu", timeout_s=WAIT_S)
    sharing, code = Sharing(get_world(accelerator)), EXIT_DONE
    if accelerator.is_main_process:
        with sharing.lead():
            code = _print_result(config, evaluate(config, sharing))
    else:
        _follow(config, sharing)
    accelerator.end_training()
    return code


def _print_result(config: EvaluateConfig, result: dict[str, Any]) -> int:
    """Print the most important numbers of an evaluation, and return the exit code."""
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
    if verdict["left_out"]:
        print(
            f"left out of the verdict: {verdict['left_out']} test trials, because their image or EEG was in the data "
            "that trained the model"
        )
    for name, where in (("splits", "by two splits"), ("pretraining", "with any split of the pretraining dataset")):
        for text in (result["protocol"][name] or {}).get("shared", [])[:5]:
            print(f"shared {where}: {printable(text)}")
    print(f"report: {report}{following}")
    return EXIT_FAILED if config.require == "signal" and verdict["word"] != "signal" else EXIT_DONE


main = command(EvaluateConfig, evaluate_and_print, prog="dreamscale evaluate", positionals=("directory",))


if __name__ == "__main__":
    sys.exit(main())
