"""Base class of the EEG classifiers of DM-RE2I's first stage: EVRNet and the networks with which EVRNet is compared.

A classifier computes a feature vector and class scores for each EEG trial. The feature vector can guide EG-DDPM, the
diffusion model of the second stage.

Tensor shapes: B trials, C channels (electrodes), T time points, D feature width, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from data_sharding.processing.preprocess import PreprocessSpec
from finetune.training.module_files import load_module, save_module
from pretrain.encoder.encoder import EEGEncoder


def scale_to_unit_variance(x: Tensor) -> Tensor:
    """Scale each trial to unit variance over its channels and time points.

    Parameters
    ----------
    x : Tensor, shape (..., C, T)
        EEG trials.

    Returns
    -------
    Tensor, shape (..., C, T)
        Scaled trials. A trial that is zero everywhere stays zero.
    """
    return x / x.std(dim=(-2, -1), keepdim=True).clamp_min(1e-6)


def whitening_matrix(x_BCT: Tensor, shrinkage: float) -> Tensor:
    """Compute the symmetric matrix that whitens the channels of trials.

    Parameters
    ----------
    x_BCT : Tensor, shape (B, C, T)
        Scaled trials.
    shrinkage : float
        Fraction of the mean variance that is added to the variance of every channel. Without shrinkage, the whitening
        would strongly amplify directions that have almost no activity.

    Returns
    -------
    Tensor, shape (C, C)
        ``(S + shrinkage * mean(diag S) * I)^(-1/2)``, where S is the mean covariance of the trials.

    References
    ----------
    Guggenmos et al., "Multivariate pattern analysis for MEG: a comparison of dissimilarity measures",
    NeuroImage 173 (2018).
    """
    x = (x_BCT - x_BCT.mean(dim=2, keepdim=True)).double()
    covariance_CC = torch.einsum("bct,bdt->cd", x, x) / (x.shape[0] * x.shape[2])
    values_C, vectors_CC = torch.linalg.eigh(covariance_CC)
    floor = shrinkage * values_C.mean().clamp_min(1e-12)
    return ((vectors_CC * (values_C.clamp_min(0) + floor).rsqrt()) @ vectors_CC.T).to(x_BCT.dtype)


class EEGClassifier(nn.Module):
    """Base class of the classifiers. A subclass defines `KIND`, `CONFIG`, `dim`, `embed` and `classify`.

    Parameters
    ----------
    config : dataclass instance
        Config of the subclass, with the fields ``n_classes``, ``n_channels`` and ``noise_normalisation``.
    """

    KIND: ClassVar[str]
    """Name of the kind of network, which is stored in the network's package."""
    CONFIG: ClassVar[type]
    """Class of the config."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        # The whitening matrix is a buffer, because it must be saved with the weights, but is not trained.
        eye = torch.eye(config.n_channels) if config.noise_normalisation else None
        self.register_buffer("whitening_CC", eye)

    @property
    def dim(self) -> int:
        """Width D of the feature."""
        raise NotImplementedError

    @property
    def n_times(self) -> int | None:
        """Required number of time points of a trial; None if any number is possible."""
        return getattr(self.config, "n_times", None)

    def scaling(self, spec: PreprocessSpec) -> PreprocessSpec | EEGEncoder:
        """Return the object that scales trials for this network; `spec` is the preprocessing of the dataset."""
        return spec

    def embed(self, x_B1CT: Tensor) -> Tensor:
        """Compute the features [B, D] of normalised trials."""
        raise NotImplementedError

    def classify(self, e_BD: Tensor) -> Tensor:
        """Compute the class scores [B, K] from features."""
        raise NotImplementedError

    def limit_norms(self) -> None:
        """Limit the norms of weights, if the network's publication does so; each training step calls this method."""

    def normalise(self, x_B1CT: Tensor) -> Tensor:
        """Whiten the background activity of trials, if the config switches noise normalisation on.

        Parameters
        ----------
        x_B1CT : Tensor, shape (B, 1, C, T)
            Scaled trials.

        Returns
        -------
        Tensor, shape (B, 1, C, T)
            Whitened trials of unit variance. If noise normalisation is off, the result is the input itself.
        """
        if not isinstance(self.whitening_CC, Tensor):
            return x_B1CT
        return scale_to_unit_variance(self.whitening_CC @ x_B1CT)

    def forward(self, x_B1CT: Tensor, *, normalised: bool = False) -> tuple[Tensor, Tensor]:
        """Compute the feature and the class scores.

        Parameters
        ----------
        x_B1CT : Tensor, shape (B, 1, C, T)
            Trials, scaled by the object that `scaling` returns.
        normalised : bool
            True if `normalise` has already been applied to the trials.

        Returns
        -------
        e_BD : Tensor, shape (B, D)
            Feature of each trial.
        logits_BK : Tensor, shape (B, K)
            Class scores of each trial.
        """
        e_BD = self.embed(x_B1CT if normalised else self.normalise(x_B1CT))
        return e_BD, self.classify(e_BD)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the network to config.json and model.safetensors."""
        save_module(self, self.config, folder, self.KIND)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a network that `save_pretrained` wrote, in evaluation mode; errors are as in `load_module`."""
        return load_module(cls, cls.CONFIG, folder, cls.KIND)
