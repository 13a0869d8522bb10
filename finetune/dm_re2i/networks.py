"""Build an EEG classifier from a config, or load it from a folder."""

from __future__ import annotations

from pathlib import Path

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json
from data_sharding.dataset.dataset import EEGDataset
from finetune.dm_re2i.classification.baselines import (
    ConvolutionConfig,
    EEGNetClassifier,
    EncoderClassifier,
    EncoderClassifierConfig,
    TSConv,
)
from finetune.dm_re2i.classifier import EEGClassifier
from finetune.dm_re2i.config import EVRNetStage
from finetune.dm_re2i.evrnet import EVRNet, EVRNetConfig
from finetune.eeg import load_encoder

NAMES = {"evrnet": "EVRNet", "eegnet": "EEGNet", "tsconv": "TSConv", "encoder": "encoder with a linear head"}
"""Name of each network for messages and figures."""
_CLASSES: tuple[type[EEGClassifier], ...] = (EVRNet, EEGNetClassifier, TSConv, EncoderClassifier)
DROPOUT = {"evrnet": 0.0, "eegnet": 0.25, "tsconv": 0.5, "encoder": 0.0}
"""Dropout rate of each network if the config does not give a rate: the rate of the network's article, and 0 for an
encoder."""


def build_classifier(stage: EVRNetStage, data: EEGDataset) -> EEGClassifier:
    """Build the network of the first stage with new weights.

    Parameters
    ----------
    stage : EVRNetStage
        Config of the first stage.
    data : EEGDataset
        Trials of the train split.

    Returns
    -------
    EEGClassifier
        The network. The weights of the network are random, except for the weights of a pretrained encoder.

    Raises
    ------
    RequestError
        If the trials are too short for the network, or the encoder cannot be loaded or does not fit the dataset.
    """
    n_classes, whiten = len(data.labels), stage.whiten > 0
    dropout = DROPOUT[stage.network] if stage.dropout is None else stage.dropout
    if stage.network == "encoder":
        assert stage.encoder is not None
        encoder = load_encoder(stage.encoder, data)
        config = EncoderClassifierConfig(
            n_classes=n_classes,
            n_channels=encoder.config.channels,
            n_times=encoder.n_times,
            dim=encoder.dim,
            dropout=dropout,
            train_encoder=stage.train_encoder,
        )
        return EncoderClassifier(config, encoder)
    if stage.network == "evrnet":
        return EVRNet(
            EVRNetConfig(
                n_classes=n_classes,
                n_channels=stage.channels,
                widths=stage.widths,
                skip=stage.skip,
                mkrb=stage.mkrb,
                dropout=dropout,
                noise_normalisation=whiten,
            )
        )
    convolution = ConvolutionConfig(
        n_classes=n_classes,
        n_channels=stage.channels,
        n_times=data.n_times,
        sfreq=data.spec.sfreq,
        dropout=dropout,
        noise_normalisation=whiten,
    )
    try:
        return {"eegnet": EEGNetClassifier, "tsconv": TSConv}[stage.network](convolution)
    except ValueError as error:
        raise RequestError(
            f"{data.path}: {error}; set eeg.tmin and eeg.tmax to a longer part of the trial, or choose "
            "another evrnet.network"
        ) from None


def load_classifier(folder: str | Path) -> EEGClassifier:
    """Load a classifier of any kind from a folder that `save_pretrained` wrote, in evaluation mode.

    Parameters
    ----------
    folder : str or Path
        Directory of the classifier, e.g. ``<run>/model/evrnet``.

    Returns
    -------
    EEGClassifier
        The network.

    Raises
    ------
    RequestError
        If a file is missing or damaged, or the folder does not hold an EEG classifier.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    kind = values.get("kind") if isinstance(values, dict) else None
    for network in _CLASSES:
        if kind == network.KIND:
            return network.from_pretrained(folder)
    raise RequestError(
        f"{folder}: not the folder of an EEG classifier ({', '.join(n.KIND for n in _CLASSES)}); give the folder "
        f"RUN/model/evrnet of a run of 'dreamscale ddpm'"
    )
