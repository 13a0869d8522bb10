"""Electrode positions of trials, for encoders that read them: a dataset may contain people with different channels.

Tensor shapes: B trials, C channels (at most 128), T time points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_sharding.dataset.dataset import EEGDataset
from pretrain.encoder.encoder import EEGEncoder

Places = dict[str, Tensor]
"""Arguments `positions` [B, C, 3] and `count_B` [B] of `EEGEncoder.tokens`; empty if the encoder needs no arguments,
because it reads no positions or stores the positions of the only montage."""


class Electrodes:
    """Electrode positions of the trials of a split.

    Parameters
    ----------
    encoder : EEGEncoder
        Encoder that reads the trials.
    dataset : EEGDataset
        The split.
    """

    def __init__(self, encoder: EEGEncoder, dataset: EEGDataset) -> None:
        trials = dataset.trials
        keys_n2 = np.stack([trials.numbers("n"), trials.codes("positions")], 1)
        _, first, montage_n = np.unique(keys_n2, axis=0, return_index=True, return_inverse=True)
        self._montage_n = montage_n.reshape(-1)
        self._places = find_places(encoder, [dataset.meta(number) for number in first.tolist()])

    def of(self, numbers: Sequence[int] | np.ndarray, device: Any = None) -> Places:
        """Return the positions of the electrodes of some trials."""
        montage_B = torch.as_tensor(self._montage_n[np.asarray(numbers)])
        return {name: value[montage_B].to(device) for name, value in self._places.items()}


def find_places(encoder: EEGEncoder, metas: Sequence[Mapping[str, Any]], device: Any = None) -> Places:
    """Return the positions of the electrodes of trials from their metadata.

    Parameters
    ----------
    encoder : EEGEncoder
        Encoder that reads the trials.
    metas : sequence of mapping
        Metadata of the trials, with ``n`` and ``positions``.
    device : torch.device, optional
        Device of the result.

    Returns
    -------
    dict of str to Tensor
        Arguments of `EEGEncoder.tokens` (see `Places`).
    """
    places = encoder.inputs_of([dict(meta) for meta in metas], "cpu" if device is None else device)
    own_C3 = encoder.positions_C3
    if not places or own_C3 is None:
        return places
    found_BC3 = places["positions"]
    if found_BC3.shape[1:] != own_C3.shape or (places["count_B"] != len(own_C3)).any():
        return places
    same = torch.isclose(found_BC3, own_C3.to(found_BC3.device), rtol=0, atol=0, equal_nan=True)
    return {} if bool(same.all()) else places


@dataclass(frozen=True, kw_only=True)
class EncoderInput:
    """Scaled EEG of trials, with the positions of their electrodes: the input of an encoder."""

    x: Tensor
    """EEG [B, 128, T], scaled for the encoder."""
    places: Places
    """Arguments of `EEGEncoder.tokens`."""

    def __len__(self) -> int:
        return len(self.x)

    @property
    def device(self) -> torch.device:
        """Device of the EEG."""
        return self.x.device

    def split(self, size: int) -> list[EncoderInput]:
        """Divide the trials into parts of at most `size` trials, as `Tensor.split` does."""
        parts = [range(start, min(start + size, len(self))) for start in range(0, len(self), size)]
        return [
            EncoderInput(
                x=self.x[part.start : part.stop],
                places={name: value[part.start : part.stop] for name, value in self.places.items()},
            )
            for part in parts
        ]
