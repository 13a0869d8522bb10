"""Ridge regressions from time courses of EEG to vectors of images, such as CLIP embeddings or latents of a VAE.

Array shapes: B trials, M images, F features, P numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data_sharding.common.errors import RequestError, one_line, show
from data_sharding.common.files import read_json, write_json
from data_sharding.common.progress import progress
from data_sharding.common.untrusted import check_count, check_group, check_list, check_number, check_text
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.eeg import PART, compute_in_parts
from finetune.images import ImageTable
from finetune.linear.model import Floats, pick_time_courses, read_channels
from finetune.linear.time_courses import read_time_courses
from finetune.people import name_person
from pretrain.evidence.channels import find_common_channels
from pretrain.evidence.ridge import STRENGTHS, RidgeFit, RidgeSums
from pretrain.evidence.trials import tabulate_trials
from pretrain.model.weights import WEIGHTS, read_tensors

Fit = Literal["pooled", "each"]
FOLDS = 5
"""Number of parts into which the images are divided to predict each image by a regression that was not fitted to it."""
_ARRAYS = ("mean_F", "mean_P", "weight_FP")


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Ridge regression that was fitted to the trials of one person, or of all people."""

    mean_F: Floats
    mean_P: Floats
    weight_FP: Floats
    penalty: float
    """Penalty, as a multiple of the mean eigenvalue of the features' covariance."""

    def predict(self, x_BF: Floats) -> Floats:
        """Return the vectors [B, P] for features."""
        return np.asarray((x_BF - self.mean_F) @ self.weight_FP + self.mean_P, np.float32)


@dataclass(frozen=True, kw_only=True)
class RidgeMap:
    """Ridge regressions from time courses to vectors, which were fitted on a train split by `fit_ridge`."""

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

    @property
    def width(self) -> int:
        """Number of numbers of a vector, P."""
        return len(next(iter(self.regressions.values())).mean_P)

    def embed(self, data: EEGDataset, groups: Sequence[Sequence[int]]) -> Floats:
        """Compute the vectors [B, P] of groups of presentations; the EEG of a group is averaged.

        Every person of the groups must have a regression.
        """
        people = _people(data, self.fit)

        def embed(part: Sequence[Sequence[int]]) -> Floats:
            x_BF = read_time_courses(data, part, self.channels, self.bins)
            return self._predict(x_BF, people[[group[0] for group in part]])

        return compute_in_parts(embed, groups, "predictions from the EEG")

    def embed_eeg(self, eeg_BCT: Tensor, metas: Sequence[Mapping[str, Any]], spec: PreprocessSpec) -> Floats:
        """Compute the vectors [B, P] of trials.

        Parameters
        ----------
        eeg_BCT : Tensor, shape (B, C, T)
            EEG in microvolts.
        metas : sequence of mapping
            Metadata of the trials, with the names of the channels. Every trial must have all channels.
        spec : PreprocessSpec
            Preprocessing of the EEG.

        Raises
        ------
        RequestError
            If a person has no regression.
        """
        x_BF = pick_time_courses(eeg_BCT, [meta["ch_names"] for meta in metas], self.channels, spec, bins=self.bins)
        self.check_people(metas)
        return self._predict(x_BF, np.array([self._name(meta) for meta in metas]))

    def check_people(self, metas: Iterable[Mapping[str, Any]]) -> None:
        """Raise `RequestError` if the person of a trial has no regression."""
        for meta in metas:
            if self._name(meta) not in self.regressions:
                raise RequestError(
                    f"the ridge regressions were fitted for each person, but there is none for {show(self._name(meta))}"
                    "; fit one regression for all people ('fit: pooled')"
                )

    def _name(self, meta: Mapping[str, Any]) -> str:
        return "" if self.fit == "pooled" else name_person(meta)

    def _predict(self, x_BF: Floats, owner_B: NDArray[np.str_]) -> Floats:
        out_BP = np.empty((len(x_BF), self.width), np.float32)
        for person in np.unique(owner_B):
            out_BP[owner_B == person] = self.regressions[str(person)].predict(x_BF[owner_B == person])
        return out_BP

    def save_pretrained(self, folder: Path) -> None:
        """Write the regressions to config.json and model.safetensors."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        people = list(self.regressions)
        arrays = {
            f"{number}.{name}": np.ascontiguousarray(getattr(self.regressions[person], name))
            for number, person in enumerate(people)
            for name in _ARRAYS
        }
        save_file(arrays, folder / WEIGHTS)
        about = {"kind": "ridge", "channels": self.channels, "bins": self.bins, "fit": self.fit}
        write_json(folder / "config.json", {**about, "people": people, "penalties": list(self.penalties.values())})

    @classmethod
    def from_pretrained(cls, folder: Path) -> RidgeMap:
        """Read regressions that `save_pretrained` wrote.

        Raises
        ------
        RequestError
            If a file is missing or damaged.
        """
        path = folder / "config.json"
        where = str(path)
        values = check_group(read_json(path), where)
        fit = values.get("fit")
        if values.get("kind") != "ridge" or fit not in ("pooled", "each"):
            raise RequestError(f"{folder}: holds no ridge regressions; train the model again")
        channels = read_channels(values.get("channels"), where)
        bins = check_count(values.get("bins"), where, "bins", least=1, most=2**16)
        # In the table of the people, an empty text is the name of the regression for all people.
        people = [
            name and check_text(name, where, "people") for name in check_list(values.get("people"), where, "people")
        ]
        penalties = check_list(values.get("penalties"), where, "penalties")
        tensors = {name: value.numpy() for name, value in read_tensors(folder / WEIGHTS).items()}
        try:
            regressions = {
                person: Regression(
                    **{name: tensors[f"{number}.{name}"] for name in _ARRAYS},
                    penalty=float(check_number(penalties[number], where, "penalties")),
                )
                for number, person in enumerate(people)
            }
            _check(regressions, len(channels) * bins)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RequestError(f"{folder}: the model is damaged ({one_line(error)}); train it again") from None
        return cls(channels=list(channels), bins=bins, fit=fit, regressions=regressions)


def _check(regressions: dict[str, Regression], features: int) -> None:
    """Raise `ValueError` if the arrays of regressions do not fit each other."""
    widths = {len(found.mean_P) for found in regressions.values()}
    if len(widths) != 1:
        raise ValueError("there is no regression, or the regressions have different widths")
    for found in regressions.values():
        arrays = [getattr(found, name) for name in _ARRAYS]
        fits = [array.shape for array in arrays] == [(features,), (*widths,), (features, *widths)]
        if not fits or any(array.dtype != np.float32 or not np.isfinite(array).all() for array in arrays):
            raise ValueError("the arrays in model.safetensors do not fit config.json, or are not finite")


def _unit(x: NDArray[Any]) -> NDArray[Any]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


class _Reader:
    """Read the features and the targets of trials of a train split, in parts."""

    def __init__(self, train: EEGDataset, target_MP: Floats, channels: list[str], bins: int) -> None:
        self.train, self.target_MP, self.channels, self.bins = train, target_MP, channels, bins
        self.row_B = ImageTable(train).row_of

    def read(self, numbers: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Floats, Floats]]:
        """Yield, for parts of the trials, their numbers, features [B, F] and targets [B, P]."""
        with progress("time courses of the train split", len(numbers)) as advance:
            for start in range(0, len(numbers), PART):
                part = numbers[start : start + PART]
                groups = [[number] for number in part.tolist()]
                x_BF = read_time_courses(self.train, groups, self.channels, self.bins)
                yield part, x_BF, self.target_MP[self.row_B[part]]
                advance(len(part))

    def add_up(self, numbers: NDArray[np.int64]) -> RidgeSums:
        """Return the sums over trials."""
        sums = RidgeSums(len(self.channels) * self.bins, self.target_MP.shape[1])
        for _, x_BF, y_BP in self.read(numbers):
            sums.add(x_BF, y_BP)
        return sums


def fit_ridge(
    train: EEGDataset,
    target_MP: Floats,
    test: EEGDataset,
    *,
    bins: int,
    fit: Fit,
    people: EEGDataset | None = None,
) -> RidgeMap:
    """Fit ridge regressions from time courses to vectors of images on the train split.

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
        Vectors of the images of the train split, in the order of ``ImageTable(train)``.
    test : EEGDataset
        Split whose trials will be used. Of this split, the fit uses only the people and the channel names.
    bins : int
        Number of time bins of each channel.
    fit : str
        pooled or each.
    people : EEGDataset, optional
        Split whose people get a regression if `fit` is "each"; by default `test`.

    Returns
    -------
    RidgeMap
        One regression for all people, or one regression for each person.

    Raises
    ------
    RequestError
        If the splits have no channel in common, or if a person has no trials in the train split and `fit` is "each".
    """
    channels = find_common_channels([(split, range(len(split))) for split in (train, test)])
    if not channels:
        raise RequestError(
            f"{train.path}: the trials of the splits train and {test.split} have no channel in common, so no "
            "regression can be fitted; make a dataset from recordings with common channels"
        )
    reader, owner_B = _Reader(train, target_MP, channels, min(bins, train.n_times)), _people(train, fit)
    row_B = reader.row_B
    regressions = {}
    for person in np.unique(_people(people or test, fit)):
        own = np.flatnonzero(owner_B == person)
        if not len(own):
            raise RequestError(
                f"{test.path}: {person} is not in the train split, so no regression can be fitted for this person; "
                "set 'fit: pooled'"
            )

        held = np.isin(row_B[own], np.unique(row_B[own])[::5])
        sums = [reader.add_up(numbers) for numbers in (own[~held], own[held])]
        total = sums[0] + sums[1]
        scale_F = total.compute_scale()
        # If there is only one training image, it is held out and no image is left to fit, so the penalty cannot be
        # chosen: use the middle penalty.
        chosen = len(STRENGTHS) // 2
        if sums[0].n:
            chosen = _choose_penalty(sums[0].fit(scale_F), ((x, y) for _, x, y in reader.read(own[held])))
        found = total.fit(scale_F)
        regressions[str(person)] = Regression(
            mean_F=found.mean_F.astype(np.float32),
            mean_P=found.mean_L.astype(np.float32),
            weight_FP=found.compute_weights(chosen).astype(np.float32),
            penalty=float(STRENGTHS[chosen]),
        )
    return RidgeMap(channels=channels, bins=reader.bins, fit=fit, regressions=regressions)


def predict_out_of_fold(train: EEGDataset, target_MP: Floats, model: RidgeMap) -> Floats:
    """Predict the vector of each train trial by a regression that was fitted without the trial's image.

    The predictions of a regression for the trials to which it was fitted are better than its predictions for new
    trials. The predictions of this function are as good as those for new images, so that another model can be trained
    on them. The images are divided into `FOLDS` parts, and the penalties are those of `model`.

    Parameters
    ----------
    train : EEGDataset
        Trials of the train split.
    target_MP : ndarray, shape (M, P)
        Vectors of the images of the train split.
    model : RidgeMap
        Regressions that `fit_ridge` fitted to this split.

    Returns
    -------
    ndarray of float32, shape (trials, P)
        Prediction for each trial of the split. For a person without a regression, the prediction is NaN.

    Raises
    ------
    RequestError
        If a person has trials of only one image.
    """
    reader, owner_B = _Reader(train, target_MP, model.channels, model.bins), _people(train, model.fit)
    out_BP = np.full((len(train), target_MP.shape[1]), np.nan, np.float32)
    for person, regression in model.regressions.items():
        own = np.flatnonzero(owner_B == person)
        rows = np.unique(reader.row_B[own])
        if len(rows) < 2:
            raise RequestError(
                f"{train.path}: the train split has only one image{f' of {show(person)}' if person else ''}, so the "
                "prior cannot be trained; give a dataset with more images, or set 'prior.training.steps: 0'"
            )
        fold_B = np.searchsorted(rows, reader.row_B[own]) % FOLDS
        parts = [own[fold_B == fold] for fold in np.unique(fold_B)]
        sums = [reader.add_up(part) for part in parts]
        number = int(np.argmin(np.abs(STRENGTHS - regression.penalty)))
        for left_out, part in enumerate(parts):
            others = RidgeSums(*sums[0].xy_FL.shape)
            for more in (own_sums for place, own_sums in enumerate(sums) if place != left_out):
                others = others + more
            found = others.fit(others.compute_scale())
            weight_FP = found.compute_weights(number)
            for trials, x_BF, _ in reader.read(part):
                out_BP[trials] = (x_BF - found.mean_F) @ weight_FP + found.mean_L
    return out_BP


def _people(data: EEGDataset, fit: Fit) -> NDArray[np.str_]:
    """Return the name of each trial's person (with the corpus), or empty names if all people share one regression."""
    if fit == "pooled":
        return np.full(len(data), "", dtype=np.str_)
    return tabulate_trials(data).subjects_n


def _choose_penalty(kept: RidgeFit, held: Iterable[tuple[Floats, Floats]]) -> int:
    """Return the index in `STRENGTHS` of the penalty with the best mean similarity on held-out training images."""
    similarities = np.zeros(len(STRENGTHS))
    for x_BF, y_BP in held:
        truth_BP = _unit(y_BP - kept.mean_L)
        # In the basis of the eigenvectors, a penalty only divides the features. Therefore, no weights [F, P] are
        # computed for each penalty, which would need much memory for long vectors.
        basis_BF = ((x_BF - kept.mean_F) / kept.scale_F) @ kept.vector_FF
        for number, strength in enumerate(STRENGTHS):
            guess_BP = (basis_BF / (kept.value_F + strength * kept.unit)) @ kept.rotated_FL
            similarities[number] += float((_unit(guess_BP) * truth_BP).sum())
    # If several penalties are equally good, use the strongest penalty.
    return len(STRENGTHS) - 1 - int(np.argmax(similarities[::-1]))
