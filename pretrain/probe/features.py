"""Compute the features that a probe classifies: an encoder's tokens, and classical features of the same trials.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.

References
----------
Ledoit and Wolf, Journal of Multivariate Analysis 88 (2004): shrinkage of a covariance.
Arsigny et al., Magnetic Resonance in Medicine 56 (2006): log-Euclidean means of covariances.
Blankertz et al., NeuroImage 56 (2011): means over intervals as features of evoked responses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_sharding.audit.fingerprints import window_digest
from data_sharding.common.errors import RequestError
from data_sharding.common.progress import progress
from data_sharding.dataset.batch import sequential
from data_sharding.dataset.dataset import EEGDataset
from pretrain.evidence.copies import find_copies
from pretrain.evidence.trials import TrialTable, join_tables, merge_copies, tabulate_trials
from pretrain.probe.config import Standardize

if TYPE_CHECKING:
    import torch

    from pretrain.encoder.encoder import EEGEncoder


@dataclasses.dataclass(kw_only=True)
class Trials:
    """Labelled trials and the tokens that encoders compute from them."""

    splits_n: np.ndarray
    """[n] name of each trial's split."""
    table: TrialTable
    """Label, image, person, recording and time of each trial. `pretrain.evidence.trials.tabulate_trials` describes the
    names of missing images. All copies of an image have the same name (`pretrain.evidence.copies.find_copies`)."""
    channels: list[str]
    """Channels that all trials have in common, in the order of the first trial."""
    eeg_nCT: np.ndarray
    """[n, C, T] signal of the common channels in float16 microvolts."""
    digests_n: np.ndarray
    """[n] checksum of the signal of each trial; equal signals have equal checksums."""
    window_s: float
    """Duration of the signal of a trial in seconds."""
    metas: list[dict[str, Any]]
    """[n] metadata of each trial. The channels in the metadata are in the order of the recording."""
    electrodes: list[dict[str, Any]]
    """[n] for each trial, how many common channels there are, and the positions of their electrodes, as arguments for
    `EEGEncoder.inputs_of`."""
    tokens: dict[str, np.ndarray]
    """For each encoder, the tokens of all trials, averaged within each time bin: an array [n, F] in float32."""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def labels_n(self) -> np.ndarray:
        """[n] label of each trial, as a number."""
        return self.table.labels_n

    @property
    def images_n(self) -> np.ndarray:
        """[n] name of each trial's image."""
        return self.table.images_n

    @property
    def subjects_n(self) -> np.ndarray:
        """[n] each trial's subject, written as corpus/subject."""
        return self.table.subjects_n


def average_bins(x: np.ndarray, bins: int) -> np.ndarray:
    """Average over equal parts of the last axis.

    If T is not a multiple of `bins`, neighbouring parts share a time sample.

    Parameters
    ----------
    x : ndarray, [..., T]
        Time courses.
    bins : int
        Number of parts, at most T.

    Returns
    -------
    ndarray, [..., bins]
        Mean of each part.
    """
    T = x.shape[-1]
    edges = [(bin_ * T // bins, -(-(bin_ + 1) * T // bins)) for bin_ in range(bins)]
    return np.stack([x[..., start:stop].mean(axis=-1) for start, stop in edges], axis=-1)


def covariance(x_nCT: np.ndarray) -> np.ndarray:
    """Compute the matrix logarithm of each trial's covariance between channels, with Ledoit-Wolf shrinkage.

    Parameters
    ----------
    x_nCT : ndarray, [n, C, T]
        Signal in microvolts.

    Returns
    -------
    ndarray, [n, C x (C + 1) / 2]
        The upper triangle of each matrix. Values off the diagonal are multiplied by the square root of 2, so that the
        distance between the features of two trials equals the distance between their matrices.
    """
    from sklearn.covariance import ledoit_wolf

    C = x_nCT.shape[1]
    upper = np.triu_indices(C)
    weight = np.where(upper[0] == upper[1], 1.0, np.sqrt(2.0))
    out = np.empty((len(x_nCT), len(weight)), np.float32)
    for row, x_CT in enumerate(x_nCT):
        value_C, vector_CC = np.linalg.eigh(ledoit_wolf(x_CT.T)[0])
        # Replace eigenvalues of 0, which flat trials have, because the logarithm of 0 is not finite.
        log_CC = (vector_CC * np.log(np.maximum(value_C, 1e-6))) @ vector_CC.T
        out[row] = log_CC[upper] * weight
    return out


def time_courses(x_nCT: np.ndarray, bins: int) -> np.ndarray:
    """Average the amplitude of each channel over each time bin, as the simplest features of an evoked response.

    Parameters
    ----------
    x_nCT : ndarray, [n, C, T]
        Signal in microvolts.
    bins : int
        Number of time bins in the window.

    Returns
    -------
    ndarray, [n, C x bins]
        Features.
    """
    return average_bins(x_nCT, bins).reshape(len(x_nCT), -1)


def standardize(features_nF: np.ndarray, subjects_n: np.ndarray, train_n: np.ndarray, how: Standardize) -> np.ndarray:
    """Scale features to mean 0 and variance 1, without using labels.

    Parameters
    ----------
    features_nF : ndarray, [n, ...]
        Features.
    subjects_n : ndarray, [n]
        Subject of each trial.
    train_n : ndarray of bool, [n]
        True for training trials.
    how : {"subject", "none"}
        subject: compute mean and variance over all trials of the same subject, including test trials. none: compute
        mean and variance over the training trials of all subjects.

    Returns
    -------
    ndarray, [n, ...], float32
        Standardised features.
    """
    x = features_nF.astype(np.float32)
    groups = [subjects_n == subject for subject in np.unique(subjects_n)] if how == "subject" else [slice(None)]
    for group in groups:
        basis = x[group] if how == "subject" else x[train_n]
        mean, scale = basis.mean(axis=0), basis.std(axis=0)
        # Set a constant feature to 0, because a division by its tiny standard deviation would enlarge rounding errors.
        x[group] = (x[group] - mean) / np.where(scale > 1e-6, scale, np.inf)
    return x


def collect(
    dataset: str,
    splits: Sequence[str],
    encoders: Mapping[str, EEGEncoder],
    *,
    bins: int,
    batch_size: int,
    device: torch.device,
) -> Trials:
    """Read the trials of a dataset and encode them.

    Parameters
    ----------
    dataset : str
        Directory of the dataset.
    splits : sequence of str
        Splits to read.
    encoders : mapping of str to EEGEncoder
        Encoders by name. All encoders must be on `device`.
    bins : int
        Number of time bins within which tokens are averaged; 1 for the mean over the whole window.
    batch_size : int
        Number of trials to encode in one forward pass.
    device : torch.device
        Device of the encoders.

    Returns
    -------
    Trials
        All trials, in the order of the dataset.

    Raises
    ------
    RequestError
        If a trial has no label or no subject, or if the trials have fewer than two channels in common.
    """
    import torch

    tokens: dict[str, list[np.ndarray]] = {name: [] for name in encoders}
    metas: list[dict[str, Any]] = []
    signals: list[np.ndarray] = []
    of_split: list[str] = []
    tables: list[TrialTable] = []
    parts: list[EEGDataset] = []
    for split in splits:
        part = EEGDataset(dataset, split)
        tables.append(tabulate_trials(part, images_needed=False))
        parts.append(part)
        with progress(f"features of {split}", len(part)) as advance, torch.no_grad():
            for batch in sequential(part, batch_size):
                uv_BCT = batch.padded(device, torch.float32)
                for name, encoder in encoders.items():
                    x_BCT = encoder.scale_for_model(uv_BCT, batch.channels)
                    tokens_BND = encoder.tokens(x_BCT, **encoder.inputs_of(batch.metas, device)).float().cpu().numpy()
                    tokens[name].append(average_bins(tokens_BND.swapaxes(1, 2), bins).reshape(len(batch), -1))
                signals += np.split(batch.packed.numpy().copy(), np.cumsum(batch.channels)[:-1])
                metas += batch.metas
                of_split += [split] * len(batch)
                advance(len(batch))
    table = join_tables(*tables)
    table = dataclasses.replace(table, images_n=merge_copies(table.images_n, find_copies(*parts)))
    channels, rows, electrodes = _pick_common_channels(dataset, metas, signals)
    return Trials(
        splits_n=np.array(of_split),
        table=table,
        channels=channels,
        eeg_nCT=np.stack(rows),
        digests_n=np.array([window_digest(row) for row in rows], np.uint64),
        window_s=parts[0].n_times / parts[0].spec.sfreq,
        metas=metas,
        electrodes=electrodes,
        tokens={name: np.concatenate(parts).astype(np.float32) for name, parts in tokens.items()},
    )


def _pick_common_channels(
    dataset: str, metas: list[dict[str, Any]], signals: list[np.ndarray]
) -> tuple[list[str], list[np.ndarray], list[dict[str, Any]]]:
    """Return the channels that all trials have, and each trial's signal and electrode positions of these channels."""
    shared = set.intersection(*(set(meta["ch_names"]) for meta in metas))
    channels = [name for name in metas[0]["ch_names"] if name in shared]
    if len(channels) < 2:
        raise RequestError(
            f"{dataset}: the trials have {len(channels)} channel(s) in common, but the baselines compare trials "
            "channel by channel; probe a dataset that was recorded with one cap"
        )
    picks: dict[tuple[str, ...], list[int]] = {}
    rows, electrodes = [], []
    for meta, x_CT in zip(metas, signals, strict=True):
        names, positions = tuple(meta["ch_names"]), meta.get("positions")
        if names not in picks:
            picks[names] = [names.index(channel) for channel in channels]
        rows.append(x_CT[picks[names]])
        places = [positions[pick] for pick in picks[names]] if positions else None
        electrodes.append({"n": len(channels), "positions": places})
    return channels, rows, electrodes
