"""The command ``dreamscale retrieve``: rank the images of a split by their similarity to EEG embeddings.

Array shapes: B trials, M images, P width of the embeddings.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.config import command, to_dict
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, RequestError, show
from data_sharding.common.files import atomic_write_text, write_json
from data_sharding.dataset.dataset import EEGDataset
from finetune.eeg import group_repeats
from finetune.evaluation.evidence import Setting, make_predictors
from finetune.evaluation.identification import rank_true_images, two_way_identification
from finetune.evaluation.per_trial import summarise
from finetune.generation.exchange import exchange_within
from finetune.generation.predictors import Prediction
from finetune.generation.trials import NotApplicableError, list_trials
from finetune.generators import digest_folder
from finetune.images import ImageTable, open_paired
from finetune.linear.ridge import Fit, RidgeMap, fit_ridge
from finetune.retrieval.maps import RIDGE, AlignmentRun
from finetune.retrieval.report import render_retrieval
from finetune.retrieval.scores import identify, match_images, measure_hubness, top_k
from finetune.targets.images import embed_images
from finetune.training.accelerate import quiet_libraries
from pretrain.evidence.copies import find_copies
from pretrain.evidence.openings import NAME as LOG
from pretrain.evidence.openings import record_opening
from pretrain.evidence.rules import Control, NotApplicable, judge
from pretrain.evidence.trials import derange_within, find_neighbourhoods
from pretrain.evidence.windows import find_known_eeg
from pretrain.runs.distributed import World, choose_device

NAME = "retrieval.json"
"""Name of the file in the output folder that holds the result of the retrieval."""


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig:
    """Find the image that a person saw among all images of a split, from EEG."""

    model: str
    """Alignment run (the output of `dreamscale align`), or the word ridge for a ridge regression from time courses to
    the embeddings, which is fitted on the train split."""
    dataset: str
    """Path of the EEG-image dataset."""
    output: str
    """Folder for retrieval.json, retrieval.html and ranks.json."""
    split: str = "test"
    """Split whose images are searched."""
    target: str = ""
    """Frozen image model that embeds the images: a directory, or a hub id. Empty: use the model of the alignment run,
    with its layer."""
    layer: int | None = None
    """Only for ridge: hidden layer of the image model whose class token is the embedding of an image. 0 is the input of
    the first layer, and -1 is the output of the last layer. Empty: the final embedding."""
    fit: Fit = "pooled"
    """Only for ridge. pooled: one regression for all people. each: one regression for each person of the split, who
    must be in the train split too (decoding within people)."""
    bins: int = 25
    """Only for ridge: number of time bins of each channel."""
    average_repeats: list[int] = field(default_factory=lambda: [1, 0])
    """How many presentations of an image to a person are averaged to one trial. The retrieval is measured once for each
    number in this list. 1: single trials. 0: all presentations, as papers do with test images."""
    n_way: list[int] = field(default_factory=lambda: [200])
    """The image of each trial is searched among all images of the split and, for each number n in this list, also among
    n images. A number is ignored if the split has no more than n images."""
    resamples: int = 2000
    """Number of bootstrap resamples for the confidence intervals, and number of permutations for the p-values."""
    design_evidence: str = ""
    """Published evidence that the images were shown in random order, for datasets that do not contain the order of the
    trials, such as the preprocessed THINGS-EEG2. The evidence is printed with the verdict."""
    require: Literal["", "signal"] = ""
    """Verdict that is required for exit code 0. signal: the exit code is 1 if the verdict is not "signal". Empty: the
    exit code does not depend on the verdict."""
    seed: int = 0
    """Seed for shuffling EEG embeddings and for resampling."""
    device: str = "auto"
    """Device of the computation: auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if not self.average_repeats or any(number < 0 for number in self.average_repeats):
            raise ValueError("'average_repeats' must hold at least one number, and no number below 0")
        if any(n < 2 for n in self.n_way) or self.resamples < 99 or self.bins < 1:
            raise ValueError(
                "every number of 'n_way' must be at least 2, 'resamples' at least 99 and 'bins' at least 1"
            )
        if self.model != RIDGE and (self.layer is not None or self.fit != "pooled"):
            raise ValueError("the keys 'layer' and 'fit' can be set only with 'model: ridge'")
        if self.model == RIDGE and not self.target:
            raise ValueError(
                "'model: ridge' needs the key 'target': give a CLIP model, such as openai/clip-vit-large-patch14"
            )


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The images among which each trial's own image is searched: all images of a split."""

    table: ImageTable
    target_MP: NDArray[np.float32]
    """Embeddings of the images, in the order of the table."""

    def rank(self, embeds_BP: NDArray[Any], rows_B: NDArray[np.integer]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Count the images that are more similar to a trial than its own image, and the equally similar images."""
        return rank_true_images(embeds_BP, self.target_MP, rows_B)


def measure_trials(
    gallery: Gallery, embeds_BP: NDArray[Any], rows_B: NDArray[np.integer], n_way: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    """Compute the retrieval scores of each trial: rank, identification and top-k.

    Parameters
    ----------
    gallery : Gallery
        Images that are searched.
    embeds_BP : ndarray
        EEG embeddings of the trials.
    rows_B : ndarray of int, shape (B,)
        For each trial, the row of its own image in the gallery (the set of images that are searched).
    n_way : sequence of int
        For each number n in this sequence, the trial's own image is also searched among n images.

    Returns
    -------
    dict
        Arrays with one number for each trial. ``rank``: 1 is best; among equally similar images, the expected rank.
        ``identification``: share of the other images that are less similar to the EEG embedding than the trial's own
        image; chance is 0.5. ``top1`` and ``top5``: top-k scores among all images. ``top1[n]`` and ``top5[n]``: top-k
        scores among n images.
    """
    images = len(gallery.table)
    better_B, tied_B = gallery.rank(embeds_BP, rows_B)
    found = {"rank": 1 + better_B + tied_B / 2, "identification": identify(better_B, tied_B, images)}
    for n in (images, *n_way):
        for k in (1, 5):
            if k < n <= images:
                name = f"top{k}" if n == images else f"top{k}[{n}]"
                found[name] = top_k(better_B, tied_B, images=images, n=n, k=k)
    return found


def chance_of(name: str, images: int) -> float:
    """Return the expected value of a score for EEG embeddings without any information about the images."""
    if name in ("rank", "identification"):
        return (images + 1) / 2 if name == "rank" else 0.5
    k, _, n = name.removeprefix("top").partition("[")
    return int(k) / (int(n.removesuffix("]")) if n else images)


def _embed_groups(
    config: RetrieveConfig, model: AlignmentRun | RidgeMap, data: EEGDataset, groups: Any
) -> NDArray[Any]:
    if isinstance(model, AlignmentRun):
        embeds_BP = model.embed(data, groups, choose_device(config.device))
    else:
        embeds_BP = model.embed(data, groups)
    return _check_embeddings(embeds_BP, f"{config.model}: the EEG embeddings")


def _check_embeddings(embeds_BP: NDArray[Any], what: str) -> NDArray[Any]:
    bad_B = ~np.isfinite(embeds_BP).all(axis=1)
    if bad_B.any():
        raise RequestError(f"{what} of {int(bad_B.sum())} of {len(embeds_BP)} are NaN or infinite; give another model")
    return embeds_BP


def _embed_with_neighbours(
    embed: Callable[[list[list[int]]], NDArray[Any]], data: EEGDataset, groups: list[list[int]], seed: int
) -> tuple[NDArray[Any], NDArray[Any] | NotApplicable | None]:
    """Return the embeddings of groups of presentations, and the value of `Question.neighbours_BP`."""
    if all(len(group) == 1 for group in groups):
        return embed(groups), None
    try:
        sources = exchange_within(data, groups, seed)
    except NotApplicableError as reason:
        return embed(groups), NotApplicable(reason=str(reason))
    return embed(groups), embed(sources)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A set of trials whose own images are searched; a trial is one presentation or a mean of several presentations."""

    gallery: Gallery
    rows_B: NDArray[np.integer]
    """For each trial, the row of its own image in the gallery (the set of images that are searched)."""
    embeds_BP: NDArray[Any]
    """EEG embeddings of the trials."""
    neighbours_BP: NDArray[Any] | NotApplicable | None
    """Embeddings for the control ``shuffle_within``, in which each presentation of a trial is replaced by a neighbour
    in time before the EEG is averaged. None if the trials are single presentations, whose embeddings can be exchanged
    directly."""
    setting: Setting
    """The trials, the training trials, and the design of the experiment (the order of the images)."""
    predictors: Callable[[Callable[[Prediction], NDArray[np.float64]]], dict[str, Control | NotApplicable]]
    """Function that scores the predictors that use no EEG response. The argument of this function is another function,
    which scores one prediction."""
    train_MP: NDArray[Any]
    """Embeddings of the training images."""
    train_labels_M: NDArray[np.integer]
    """Labels of the training images."""

    def exchange(self, name: str, seed: int) -> tuple[NDArray[Any], NDArray[np.bool_]] | NotApplicable:
        """Return the embeddings of the control ``shuffle`` or ``shuffle_within``, and a mask of the left-out trials."""
        trials = self.setting.trials
        if name == "shuffle_within" and self.neighbours_BP is not None:
            found = self.neighbours_BP
            return found if isinstance(found, NotApplicable) else (found, np.zeros(len(trials), bool))
        groups_n = np.zeros(len(trials)) if name == "shuffle" else find_neighbourhoods(trials)
        order_B, alone_B = derange_within(groups_n, trials.images_n, seed)
        if alone_B.all():
            return NotApplicable(reason="no trial has a neighbour in its recording, or the times are unknown")
        return self.embeds_BP[order_B], alone_B | (trials.images_n[order_B] == trials.images_n)

    def identify(self, embeds_BP: NDArray[Any]) -> NDArray[np.float64]:
        """Return, for each trial, the share of other images that are less similar to the trial than its own image."""
        return identify(*self.gallery.rank(embeds_BP, self.rows_B), len(self.gallery.table))

    def score_prediction(self, prediction: Prediction) -> NDArray[np.float64]:
        """Score predicted labels: search with the mean embedding of all training images with the predicted label."""
        labels = np.unique(self.train_labels_M)
        means_LP = np.stack([self.train_MP[self.train_labels_M == label].mean(axis=0) for label in labels])
        return self.identify(means_LP[np.searchsorted(labels, prediction.labels_B)])

    def identify_within_label(self) -> NDArray[np.float64]:
        """Return the share of other images with the same label that are less similar to the trial than its own image.

        This share of a trial is NaN if its image is the only image with this label.
        """
        return two_way_identification(
            self.embeds_BP,
            self.gallery.target_MP[self.rows_B],
            [self.gallery.table.ids[row] for row in self.rows_B],
            self.setting.trials.labels_n,
            within_label=True,
        )


def measure(question: Question, config: RetrieveConfig) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """Measure the retrieval of one set of trials with its controls, and judge the result.

    Parameters
    ----------
    question : Question
        Trials, their EEG embeddings, and the images.
    config : RetrieveConfig
        Config of the command.

    Returns
    -------
    result : dict
        Entry of retrieval.json for this set of trials.
    scores : dict
        Scores of each trial, from `measure_trials`. The names of the controls' scores begin with ``shuffle/`` or
        ``shuffle_within/``.
    """
    gallery, embeds_BP, trials = question.gallery, question.embeds_BP, question.setting.trials
    rows_B, images = question.rows_B, len(gallery.table)
    options: Any = {"resamples": config.resamples, "seed": config.seed}
    n_way = [n for n in config.n_way if n < images]
    scores = measure_trials(gallery, embeds_BP, rows_B, n_way)
    own = dict(scores)
    controls: dict[str, Control | NotApplicable] = {
        "noise": NotApplicable(reason="dreamscale retrieve computes no embeddings of noise"),
        "no_eeg": NotApplicable(reason="without EEG there is no embedding to search with"),
        "nearest": NotApplicable(reason="no image is generated"),
        **question.predictors(question.score_prediction),
    }
    for name in ("shuffle", "shuffle_within"):
        found = question.exchange(name, config.seed)
        if isinstance(found, NotApplicable):
            controls[name] = found
            continue
        exchanged, left_out_B = measure_trials(gallery, found[0], rows_B, n_way), found[1]
        controls[name] = Control(hits_n=exchanged["identification"], checked=True, left_out_n=left_out_B)
        scores |= {f"{name}/{key}": np.where(left_out_B, np.nan, values) for key, values in exchanged.items()}
    verdict = judge(
        question.setting.weigh(
            own["identification"],
            0.5,
            score_of="image",
            controls=controls,
            identification_n=question.identify_within_label(),
            judge_n=NotApplicable(reason="retrieval needs no judge of images"),
        ),
        resamples=max(500, config.resamples),
        seed=config.seed,
    )
    seen = set(question.setting.train.subjects_n.tolist())
    people = np.unique(trials.subjects_n)
    result = {
        "trials": len(trials),
        "images": images,
        "people": len(people),
        "scores": {
            key: {**summarise(values, trials.images_n, trials.subjects_n, **options), "chance": chance_of(key, images)}
            for key, values in own.items()
        },
        "shuffled": {
            key: summarise(scores[f"shuffle/{key}"], trials.images_n, trials.subjects_n, **options) for key in own
        },
        "by_person": {
            str(person): {
                "in_train": str(person) in seen,
                "trials": int((trials.subjects_n == person).sum()),
                **{key: float(values[trials.subjects_n == person].mean()) for key, values in own.items()},
            }
            for person in people
        },
        "matching": {
            "accuracy": match_images(embeds_BP, gallery.target_MP, rows_B),
            "chance": 1 / len(np.unique(rows_B)),
            "note": "transductive: every image may be chosen only once, so all trials are needed at the same time",
        },
        "hubness": measure_hubness(embeds_BP, gallery.target_MP),
        "verdict": verdict.as_json(),
    }
    return result, scores


def retrieve(config: RetrieveConfig) -> int:
    """Measure retrieval on a split, and write retrieval.json, ranks.json and the report.

    Parameters
    ----------
    config : RetrieveConfig
        Config of the command.

    Returns
    -------
    int
        Exit code of the command.
    """
    quiet_libraries()
    output = Path(config.output)
    _check_output(output)
    run = None if config.model == RIDGE else AlignmentRun.load(config.model)
    part: dict[str, Any] = dict(run.part) if run is not None else {"tmin": None, "tmax": None}
    train, data = (open_paired(config.dataset, split, **part) for split in ("train", config.split))
    tables = ImageTable(train), ImageTable(data)
    _check_images(data, tables[1])
    notes = []
    if run is not None and run.dataset_id != data.manifest.dataset_id:
        notes.append(
            f"{config.model} was trained on another dataset, or on another version of this dataset. The verdict "
            "considers only the training trials of this dataset."
        )
        print(notes[0])
    output.mkdir(parents=True, exist_ok=True)
    digest = "" if run is None else digest_folder(Path(config.model) / "encoder", Path(config.model) / "align")
    openings = record_opening(
        config.dataset,
        config.split,
        command="retrieve",
        dataset_id=data.manifest.dataset_id,
        model_digest=digest,
        config=to_dict(config),
        fallback=output,
    )
    target, layer = config.target, config.layer
    if run is not None:
        target, layer = target or run.target, run.layer
    world = World(device=choose_device(config.device))
    train_MP, gallery_MP = (
        _check_embeddings(
            embed_images(table, target, layer=layer, world=world).numpy(), f"{target}: the image embeddings"
        )
        for table in tables
    )
    model = fit_ridge(train, train_MP, data, bins=config.bins, fit=config.fit) if run is None else run
    copies, known_eeg = find_copies(train, data), find_known_eeg(train, data)
    rows: dict[str, Any] = {}
    ranks: dict[str, Any] = {}
    for average in config.average_repeats:
        groups = group_repeats(data, average)
        name = "single trials" if average == 1 else f"means of {average or 'all'} presentations"
        if average != 1 and len(groups) == len(data):
            rows[name] = "not applicable: every image was shown once to each person"
            continue
        embed = functools.partial(_embed_groups, config, model, data)
        embeds_BP, neighbours_BP = _embed_with_neighbours(embed, data, groups, config.seed)
        if embeds_BP.shape[1] != gallery_MP.shape[1]:
            raise RequestError(
                f"target '{target}' has embeddings of width {gallery_MP.shape[1]}, but the model {config.model} "
                f"predicts width {embeds_BP.shape[1]}; leave target out, or give the model of the alignment run"
            )
        trials = list_trials(data, groups, groups)
        question = Question(
            gallery=Gallery(table=tables[1], target_MP=gallery_MP),
            rows_B=tables[1].row_of[[group[0] for group in groups]],
            embeds_BP=embeds_BP,
            neighbours_BP=neighbours_BP,
            setting=Setting.read(train, data, trials, config.design_evidence, copies=copies, known_eeg=known_eeg),
            predictors=lambda score, trials=trials: make_predictors(tables[0], data, trials, score, config.seed),
            train_MP=train_MP,
            train_labels_M=tables[0].labels,
        )
        rows[name], scores = measure(question, config)
        ranks[name] = {trial.key: {n: _number(v[i]) for n, v in scores.items()} for i, trial in enumerate(trials)}
    if left_out := [n for n in config.n_way if n >= len(tables[1])]:
        notes.append(f"n_way {left_out}: not measured, because the split has only {len(tables[1])} images")
        print(notes[-1])
    result = {
        "schema": 1,
        "model": config.model,
        "model_digest": digest,
        "target": target,
        "layer": layer,
        "fit": config.fit if run is None else None,
        "penalties": model.penalties if isinstance(model, RidgeMap) else None,
        "channels": len(model.channels) if isinstance(model, RidgeMap) else None,
        "dataset_id": data.manifest.dataset_id,
        "dataset_version": data.manifest.version,
        "split": config.split,
        "seed": config.seed,
        "openings": None if openings is None else openings.describe(config.split),
        "notes": notes,
        "rows": rows,
    }
    write_json(output / "ranks.json", {"schema": 1, "trials": ranks})
    atomic_write_text(output / "retrieval.html", render_retrieval(result))
    write_json(output / NAME, result)
    measured = {name: row for name, row in rows.items() if isinstance(row, dict)}
    for name, row in measured.items():
        top1 = row["scores"].get("top1", {"mean": math.nan, "chance": math.nan})
        print(
            f"{name}: top-1 of {row['images']} {top1['mean']:.1%} (chance {top1['chance']:.1%}), identification "
            f"{row['scores']['identification']['mean']:.1%} (chance 50%); verdict: {row['verdict']['word']}"
            + (f", without {row['verdict']['left_out']} known test trials" if row["verdict"]["left_out"] else "")
        )
    print(f"report: {output / 'retrieval.html'}; next: 'dreamscale finetune' trains a generator of images")
    words = {row["verdict"]["word"] for row in measured.values()}
    return EXIT_FAILED if config.require == "signal" and words != {"signal"} else EXIT_DONE


def _check_output(output: Path) -> None:
    """Check that the output folder is empty, or holds an earlier retrieval."""
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    # After a failed retrieval, the folder may contain one file: the log that `pretrain.evidence.openings` writes.
    if output.is_file() or not (NAME in names or names <= {LOG}):
        raise RequestError(f"{output}: exists but does not hold a retrieval; choose another output")


def _check_images(data: EEGDataset, table: ImageTable) -> None:
    """Check that the split has at least two images, and that all trials of an image have the same label."""
    if len(table) < 2:
        raise RequestError(
            f"{data.path} ({data.split}): the split has only one image, so there is nothing to search; give another "
            "split"
        )
    differ = table.labels[table.row_of] != data.trials.numbers("label")
    if differ.any():
        raise RequestError(
            f"{data.path} ({data.split}): image {show(table.ids[table.row_of[int(differ.argmax())]])} has two labels; "
            "give each label its own image_id, and make the dataset again"
        )


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


main = command(
    RetrieveConfig, retrieve, prog="dreamscale retrieve", positionals=("model", "dataset"), aliases={"-o": "output"}
)

if __name__ == "__main__":
    sys.exit(main())
