"""Maps from EEG to the embeddings of a frozen image model: an alignment run, or a ridge regression.

Tensor shapes: B trials, M images, F features, P width of the embeddings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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
from finetune.eeg import PART, group_repeats, read_means, scale_eeg
from finetune.generators import read_part
from finetune.images import ImageTable
from finetune.linear.model import compute_time_courses
from pretrain.encoder.encoder import EEGEncoder
from pretrain.evidence.ridge import STRENGTHS, ridge_scores
from pretrain.evidence.trials import tabulate_trials

Floats = NDArray[np.float32]
RIDGE = "ridge"
"""Value of the key `model` for the ridge regression, in place of the path of an alignment run."""
Fit = Literal["pooled", "each"]


@dataclass(frozen=True, kw_only=True)
class AlignmentRun:
    """An alignment run: the encoder, the head, and the names of the CLIP model and the dataset of the training."""

    encoder: EEGEncoder
    head: ClipHead
    clip: str
    """Path or hub id of the CLIP model of the run."""
    part: dict[str, float | None]
    """Part of each trial that the encoder reads (arguments `tmin` and `tmax` of `open_paired`)."""
    dataset_id: str
    """Id of the dataset of the run."""

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
class RidgeMap:
    """Ridge regression from time courses to embeddings, fitted on the train split.

    With `fit` "each", every person has a separate regression. The difference to "pooled" shows how much a regression
    for all people loses.
    """

    bins: int
    """Number of time bins of each channel."""
    fit: Fit
    """pooled: one regression for all people. each: one regression for each person."""

    def embed(
        self,
        train: EEGDataset,
        target_MP: Floats,
        test: EEGDataset,
        groups: Sequence[Sequence[int]],
    ) -> tuple[Floats, dict[str, float]]:
        """Fit the regression, and compute the embeddings of groups of test presentations.

        The penalty is chosen inside the train split: a fifth of the images is held out, and the penalty with the best
        mean cosine similarity on these images is used.

        Parameters
        ----------
        train : EEGDataset
            Trials of the train split.
        target_MP : ndarray, shape (M, P)
            Embeddings of the images of the train split, in the order of ``ImageTable(train)``.
        test : EEGDataset
            Trials of the split whose images are searched.
        groups : sequence of sequence of int
            Groups of presentations of the split `test`, from `group_repeats`.

        Returns
        -------
        embeds_BP : ndarray, shape (B, P)
            Embeddings of the groups.
        penalties : dict
            Maps corpus and person to the penalty of the person's regression. The name of the regression for all people
            is an empty text.

        Raises
        ------
        RequestError
            If a person of the test split has no trials in the train split and `fit` is "each".
        """
        channels = int(min(train.trials.numbers("n").min(), test.trials.numbers("n").min()))
        x_BF = self._read(train, group_repeats(train, 1), channels)
        new_BF = self._read(test, groups, channels)
        table = ImageTable(train)
        rows_B = table.row_of
        owner_B, owner_new = _people(train, self.fit), _people(test, self.fit)[[group[0] for group in groups]]
        out_BP = np.empty((len(groups), target_MP.shape[1]), np.float32)
        penalties = {}
        for person in np.unique(owner_new):
            own = owner_B == person
            if not own.any():
                raise RequestError(
                    f"{test.path}: {person} is not in the train split, so no regression can be fitted for this person; "
                    f"set fit: pooled"
                )
            fitted_BF, wanted_BF = _standardise(x_BF[own], new_BF[owner_new == person])
            chosen = _choose_penalty(fitted_BF, rows_B[own], target_MP)
            # The scores of only one penalty are kept, because those of all penalties can be larger than the memory.
            scores = ridge_scores(fitted_BF, target_MP[rows_B[own]], wanted_BF)
            out_BP[owner_new == person] = next(itertools.islice(scores, chosen, None))
            penalties[str(person)] = float(STRENGTHS[chosen])
        return out_BP, penalties

    def _read(self, data: EEGDataset, groups: Sequence[Sequence[int]], channels: int) -> Floats:
        bins = min(self.bins, data.n_times)

        def read(part: Sequence[Sequence[int]]) -> Floats:
            return compute_time_courses(read_means(data, part), data.spec, channels=channels, bins=bins)

        return _in_parts(read, groups, "time courses")


def _standardise(x_BF: Floats, new_BF: Floats) -> tuple[Floats, Floats]:
    """Standardise training features and new features with the mean and standard deviation of the training features."""
    mean_F, std_F = x_BF.mean(axis=0), x_BF.std(axis=0)
    # A constant feature, such as that of a dead channel, becomes 0. Dividing a constant feature by its standard
    # deviation, which is almost 0, would let this feature decide about all predictions.
    std_F = np.where(std_F > 1e-6, std_F, np.inf)
    return ((x_BF - mean_F) / std_F).astype(np.float32), ((new_BF - mean_F) / std_F).astype(np.float32)


def _people(data: EEGDataset, fit: Fit) -> NDArray[np.str_]:
    """Return corpus and person of each trial, or empty names if all people share one regression."""
    if fit == "pooled":
        return np.full(len(data), "", dtype=np.str_)
    return tabulate_trials(data).subjects_n


def _choose_penalty(x_BF: Floats, row_B: NDArray[np.integer], target_MP: Floats) -> int:
    """Return the position in `STRENGTHS` of the penalty with the best similarity on held-out training images."""
    images = np.unique(row_B)
    held_B = np.isin(row_B, images[::5])
    if held_B.all() or not held_B.any():
        return len(STRENGTHS) // 2
    truth_BP = _unit(target_MP[row_B[held_B]] - target_MP[row_B[~held_B]].mean(axis=0))
    middle_P = target_MP[row_B[~held_B]].mean(axis=0)
    similarities = [
        float((_unit(found_BP - middle_P) * truth_BP).sum(axis=1).mean())
        for found_BP in ridge_scores(x_BF[~held_B], target_MP[row_B[~held_B]], x_BF[held_B])
    ]
    # If several penalties are equally good, use the strongest penalty.
    return len(STRENGTHS) - 1 - int(np.argmax(similarities[::-1]))
