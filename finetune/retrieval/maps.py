"""Models that map EEG to the embeddings of a frozen image model: an aligned encoder, or a ridge regression.

Tensor shapes: B trials, M images, F features, P width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json
from data_sharding.common.progress import progress
from data_sharding.common.untrusted import check_group, check_text
from data_sharding.dataset.dataset import EEGDataset
from finetune.clip_head import ClipHead
from finetune.eeg import PART, read_means, scale_eeg
from finetune.generators import read_part
from finetune.images import ImageTable
from finetune.linear.time_courses import read_time_courses
from pretrain.encoder.encoder import EEGEncoder
from pretrain.evidence.channels import find_common_channels
from pretrain.evidence.ridge import STRENGTHS, RidgeFit, RidgeSums
from pretrain.evidence.trials import tabulate_trials

Floats = NDArray[np.float32]
RIDGE = "ridge"
"""Value of the key `model` for the ridge regression, in place of the path of an alignment run."""
Fit = Literal["pooled", "each"]


@dataclass(frozen=True, kw_only=True)
class AlignmentRun:
    """Results of `dreamscale align`: encoder, head, name of the CLIP model, and id of the training dataset."""

    encoder: EEGEncoder
    head: ClipHead
    clip: str
    """Path or hub id of the CLIP model of the run."""
    part: dict[str, float | None]
    """Part of each trial that the encoder reads (arguments `tmin` and `tmax` of `open_paired`)."""
    dataset_id: str
    """Id of the dataset on which the encoder was aligned."""

    @classmethod
    def load(cls, run: str | Path) -> AlignmentRun:
        """Load a run that `dreamscale align` wrote; raise `RequestError` if the run is not complete."""
        run = Path(run)
        path = run / "align" / "result.json"
        if not path.is_file():
            raise RequestError(
                f"{run}: not a complete alignment run (no align/result.json); give the output of 'dreamscale align', "
                f"or '{RIDGE}'"
            )
        found = check_group(read_json(path), str(path))
        return cls(
            encoder=EEGEncoder.from_pretrained(run / "encoder"),
            head=ClipHead.from_pretrained(run / "align"),
            clip=check_text(found.get("clip"), str(path), "clip"),
            part=read_part(found, str(path)),
            dataset_id=check_text(found.get("dataset_id"), str(path), "dataset_id"),
        )

    def embed(self, data: EEGDataset, groups: Sequence[Sequence[int]], device: torch.device) -> Floats:
        """Compute the embeddings [B, P] of groups of presentations; the EEG of a group is averaged."""
        data.require_preprocess(self.encoder.spec, "encoder of the alignment run")
        encoder, head = self.encoder.to(device).eval(), self.head.to(device).eval()

        @torch.no_grad()
        def embed(part: Sequence[Sequence[int]]) -> Floats:
            return head(encoder(scale_eeg(read_means(data, part, device), encoder))).float().cpu().numpy()

        return _in_parts(embed, groups, "EEG embeddings")


def _in_parts(compute: Callable[[Any], Floats], groups: Sequence[Any], description: str) -> Floats:
    parts = []
    with progress(description, len(groups)) as advance:
        for start in range(0, len(groups), PART):
            parts.append(compute(groups[start : start + PART]))
            advance(len(parts[-1]))
    return np.concatenate(parts)


def _unit(x: NDArray[Any]) -> NDArray[Any]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Ridge regression that was fitted to the trials of one person, or of all people."""

    mean_F: Floats
    mean_P: Floats
    weight_FP: Floats
    penalty: float
    """Penalty, as a multiple of the mean eigenvalue of the features' covariance."""

    def predict(self, x_BF: Floats) -> Floats:
        """Return the embeddings [B, P] for features."""
        return np.asarray((x_BF - self.mean_F) @ self.weight_FP + self.mean_P, np.float32)


@dataclass(frozen=True, kw_only=True)
class RidgeMap:
    """Ridge regressions from time courses to embeddings, which were fitted on a train split by `fit_ridge`."""

    channels: list[str]
    """Channels that the regressions read."""
    bins: int
    """Number of time bins of each channel."""
    fit: Fit
    """pooled: one regression for all people. each: one regression for each person."""
    regressions: dict[str, Regression]
    """Maps corpus and person to the person's regression. The name of the regression for all people is an empty text."""

    @property
    def penalties(self) -> dict[str, float]:
        """Penalty of each regression."""
        return {person: found.penalty for person, found in self.regressions.items()}

    def embed(self, data: EEGDataset, groups: Sequence[Sequence[int]]) -> Floats:
        """Compute the embeddings [B, P] of groups of presentations; the EEG of a group is averaged.

        Every person of the groups must have a regression.
        """
        people = _people(data, self.fit)

        def embed(part: Sequence[Sequence[int]]) -> Floats:
            x_BF = read_time_courses(data, part, self.channels, self.bins)
            owner_B = people[[group[0] for group in part]]
            out_BP = np.empty((len(part), len(next(iter(self.regressions.values())).mean_P)), np.float32)
            for person in np.unique(owner_B):
                out_BP[owner_B == person] = self.regressions[str(person)].predict(x_BF[owner_B == person])
            return out_BP

        return _in_parts(embed, groups, "EEG embeddings")


def fit_ridge(train: EEGDataset, target_MP: Floats, test: EEGDataset, *, bins: int, fit: Fit) -> RidgeMap:
    """Fit ridge regressions from time courses to embeddings on the train split.

    With `fit` "each", every person has a separate regression. With "pooled", all people share one regression. A
    comparison of the two results shows how much worse the shared regression is. The penalty is chosen inside the train
    split: a fifth of the images is held out, and the penalty with the best mean cosine similarity on these images is
    used. The features are read in parts, and only sums over trials are kept, so the memory does not grow with the
    number of trials.

    Parameters
    ----------
    train : EEGDataset
        Trials of the train split.
    target_MP : ndarray, shape (M, P)
        Embeddings of the images of the train split, in the order of ``ImageTable(train)``.
    test : EEGDataset
        Split whose images will be searched. Of this split, the fit uses only the people and the channel names.
    bins : int
        Number of time bins of each channel.
    fit : str
        pooled or each.

    Returns
    -------
    RidgeMap
        One regression for all people, or one regression for each person of the split `test`.

    Raises
    ------
    RequestError
        If the splits have no channel in common, or if a person of the test split has no trials in the train split and
        `fit` is "each".
    """
    channels = find_common_channels([(split, range(len(split))) for split in (train, test)])
    if not channels:
        raise RequestError(
            f"{train.path}: the trials of the splits train and {test.split} have no channel in common, so no "
            "regression can be fitted; make a dataset from recordings with common channels"
        )
    bins = min(bins, train.n_times)
    row_B, owner_B = ImageTable(train).row_of, _people(train, fit)

    def read(numbers: NDArray[np.int64]) -> Iterator[tuple[Floats, Floats]]:
        with progress("time courses of the train split", len(numbers)) as advance:
            for start in range(0, len(numbers), PART):
                part = numbers[start : start + PART]
                groups = [[number] for number in part.tolist()]
                yield read_time_courses(train, groups, channels, bins), target_MP[row_B[part]]
                advance(len(part))

    regressions = {}
    for person in np.unique(_people(test, fit)):
        own = np.flatnonzero(owner_B == person)
        if not len(own):
            raise RequestError(
                f"{test.path}: {person} is not in the train split, so no regression can be fitted for this person; "
                "set 'fit: pooled'"
            )

        held = np.isin(row_B[own], np.unique(row_B[own])[::5])
        sums = []
        for numbers in (own[~held], own[held]):
            sums.append(RidgeSums(len(channels) * bins, target_MP.shape[1]))
            for x_BF, y_BP in read(numbers):
                sums[-1].add(x_BF, y_BP)
        total = sums[0] + sums[1]
        scale_F = total.compute_scale()
        # If there is only one training image, it is held out and no image is left to fit, so the penalty cannot be
        # chosen: use the middle penalty.
        chosen = _choose_penalty(sums[0].fit(scale_F), read(own[held])) if sums[0].n else len(STRENGTHS) // 2
        found = total.fit(scale_F)
        regressions[str(person)] = Regression(
            mean_F=found.mean_F.astype(np.float32),
            mean_P=found.mean_L.astype(np.float32),
            weight_FP=found.compute_weights(chosen).astype(np.float32),
            penalty=float(STRENGTHS[chosen]),
        )
    return RidgeMap(channels=channels, bins=bins, fit=fit, regressions=regressions)


def _people(data: EEGDataset, fit: Fit) -> NDArray[np.str_]:
    """Return the name of each trial's person (with the corpus), or empty names if all people share one regression."""
    if fit == "pooled":
        return np.full(len(data), "", dtype=np.str_)
    return tabulate_trials(data).subjects_n


def _choose_penalty(kept: RidgeFit, held: Iterable[tuple[Floats, Floats]]) -> int:
    """Return the index in `STRENGTHS` of the penalty with the best mean similarity on held-out training images."""
    weights = [kept.compute_weights(number).astype(np.float32) for number in range(len(STRENGTHS))]
    mean_F, mean_P = kept.mean_F.astype(np.float32), kept.mean_L.astype(np.float32)
    similarities = np.zeros(len(STRENGTHS))
    for x_BF, y_BP in held:
        x_BF, truth_BP = x_BF - mean_F, _unit(y_BP - mean_P)
        for number, weight_FP in enumerate(weights):
            similarities[number] += float((_unit(x_BF @ weight_FP) * truth_BP).sum())
    # If several penalties are equally good, use the strongest penalty.
    return len(STRENGTHS) - 1 - int(np.argmax(similarities[::-1]))
