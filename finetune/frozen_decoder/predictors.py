"""Predict image embeddings from EEG: by a ridge regression, or by an encoder that was aligned with CLIP.

Tensor shapes: B trials, C channels, T time points, P width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data_sharding.dataset.dataset import EEGDataset
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.clip_head import ClipHead
from finetune.eeg import compute_in_parts, read_means, scale_eeg
from finetune.electrodes import find_places
from finetune.linear.model import Floats, check_channels
from finetune.linear.ridge import RidgeMap
from finetune.people import PersonLayers, name_person
from pretrain.encoder.encoder import EEGEncoder


class Predictor(Protocol):
    """Model that predicts an image embedding from the EEG of a trial."""

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        ...

    def predict(self, eeg_BCT: Tensor, metas: Sequence[Mapping[str, Any]]) -> Floats:
        """Predict the embeddings [B, P] of trials from EEG in microvolts."""
        ...

    def check(self, metas: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Raise `RequestError` if the model can predict nothing for a trial."""
        ...

    def save_pretrained(self, folder: Path) -> None:
        """Write the model to a package folder."""
        ...


class RidgePredictor:
    """Predict vectors of images by ridge regressions.

    Parameters
    ----------
    model : RidgeMap
        The regressions.
    spec : PreprocessSpec
        Preprocessing of the EEG.
    name : str
        Name of the regressions' folder in a package.
    """

    def __init__(self, model: RidgeMap, spec: PreprocessSpec, name: str = "ridge") -> None:
        self.model, self.spec, self.name = model, spec, name

    @property
    def width(self) -> int:
        """Width of the vectors."""
        return self.model.width

    def predict(self, eeg_BCT: Tensor, metas: Sequence[Mapping[str, Any]]) -> Floats:
        """Predict the vectors [B, P] of trials from EEG in microvolts."""
        return self.model.embed_eeg(eeg_BCT, metas, self.spec)

    def check(self, metas: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Raise `RequestError` if a trial lacks a channel, or if its person has no regression."""
        check_channels(self.model.channels, metas, folder)
        self.model.check_people(metas)

    def save_pretrained(self, folder: Path) -> None:
        """Write the regressions to a package folder."""
        self.model.save_pretrained(folder / self.name)


class EncoderPredictor:
    """Predict image embeddings by an encoder and a head that were aligned with CLIP.

    Parameters
    ----------
    encoder : EEGEncoder
        The encoder.
    head : ClipHead
        The head, which maps tokens to CLIP's image space.
    device : torch.device
        Device of the computation.
    people : PersonLayers, optional
        Input layers of people.
    """

    def __init__(self, encoder: EEGEncoder, head: ClipHead, device: Any, people: PersonLayers | None = None) -> None:
        self.device = torch.device(device)
        self.encoder = encoder.requires_grad_(False).eval().to(self.device)
        self.head = head.requires_grad_(False).eval().to(self.device)
        self.people = None if people is None else people.requires_grad_(False).eval().to(self.device)

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return self.head.config.projection

    @torch.no_grad()
    def predict(self, eeg_BCT: Tensor, metas: Sequence[Mapping[str, Any]]) -> Floats:
        """Predict the embeddings [B, P] of trials from EEG in microvolts; they have unit length."""
        places = find_places(self.encoder, metas, self.device)
        x_BCT = scale_eeg(eeg_BCT, self.encoder, self.device, places)
        if self.people is not None:
            x_BCT = self.people(x_BCT, self.people.find(map(name_person, metas)).to(self.device))
        tokens_BND = self.encoder(x_BCT, **places)
        return torch.nn.functional.normalize(self.head(tokens_BND).float(), dim=-1).cpu().numpy()

    def check(self, metas: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Accept all trials, because the encoder reads all channels."""

    def save_pretrained(self, folder: Path) -> None:
        """Write encoder and head to a package folder."""
        self.encoder.save_pretrained(folder / "encoder")
        self.head.save_pretrained(folder / "align")
        if self.people is not None:
            self.people.save_pretrained(folder / "people")


def load_predictor(folder: Path, spec: PreprocessSpec, device: Any) -> Predictor:
    """Load the predictor of a package folder, which was written by `save_pretrained`."""
    if (folder / "encoder").is_dir():
        encoder, head = EEGEncoder.from_pretrained(folder / "encoder"), ClipHead.from_pretrained(folder / "align")
        people = PersonLayers.from_pretrained(folder / "people") if (folder / "people").is_dir() else None
        return EncoderPredictor(encoder, head, device, people)
    return RidgePredictor(RidgeMap.from_pretrained(folder / "ridge"), spec)


def predict_groups(predictor: Predictor, data: EEGDataset, groups: Sequence[Sequence[int]]) -> Floats:
    """Predict the embeddings [B, P] of groups of presentations; the EEG of a group is averaged."""

    def predict(part: Sequence[Sequence[int]]) -> np.ndarray:
        return predictor.predict(read_means(data, part), [data.meta(group[0]) for group in part])

    return compute_in_parts(predict, groups, "predictions from the EEG")
