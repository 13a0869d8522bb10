"""Read time courses of trials: the features of a linear map from EEG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data_sharding.dataset.dataset import EEGDataset
from finetune.eeg import read_means
from finetune.linear.model import Floats, compute_time_courses
from pretrain.evidence.channels import make_row_finder


def read_time_courses(
    dataset: EEGDataset, groups: Sequence[Sequence[int]], channels: Sequence[str], bins: int
) -> Floats:
    """Read the mean EEG of groups of presentations, and compute the time courses of some channels.

    Parameters
    ----------
    dataset : EEGDataset
        Split of the presentations.
    groups : sequence of sequence of int
        Groups of presentations, from `finetune.eeg.group_repeats`. All presentations of a group have the same channels.
    channels : sequence of str
        Names of channels that all presentations have, from `pretrain.evidence.channels.find_common_channels`.
    bins : int
        Number of time bins.

    Returns
    -------
    ndarray of float32, shape (groups, channels x bins)
        Features, from `compute_time_courses`.
    """
    find_rows = make_row_finder(dataset, channels)
    rows_BC = torch.as_tensor(np.stack([find_rows(group[0]) for group in groups]))
    eeg_BCT = read_means(dataset, groups)
    picked_BCT = eeg_BCT[torch.arange(len(groups))[:, None], rows_BC]
    return compute_time_courses(picked_BCT, dataset.spec, bins=bins)
