"""The guide: a network that computes, from EEG, the vector that guides EG-DDPM.

Tensor shapes: B trials, C channels, T time points, D width of the vector.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from data_sharding.processing.preprocess import PreprocessSpec
from finetune.dm_re2i.classifier import EEGClassifier
from finetune.dm_re2i.networks import load_classifier
from pretrain.encoder.encoder import EEGEncoder

GuideKind = Literal["feature", "logits", "encoder"]
FOLDERS = {"feature": "evrnet", "logits": "evrnet", "encoder": "encoder"}
"""Folder of the network in the package of a model, for each kind of guide."""


class EEGGuide(nn.Module):
    """Compute the vector that guides EG-DDPM.

    Parameters
    ----------
    network : EEGClassifier or EEGEncoder
        Classifier of EEG for the kinds ``feature`` and ``logits``; pretrained encoder for the kind ``encoder``.
    kind : str
        feature: the semantic feature of the classifier. logits: the class scores of the classifier. encoder: the mean
        token of the pretrained encoder.

    Notes
    -----
    The network is always in evaluation mode, also when it is trained together with the DDPM. Batch norms use the
    statistics from the first training stage, so the vector of a trial does not depend on the other trials of the batch.
    """

    def __init__(self, network: EEGClassifier | EEGEncoder, kind: GuideKind) -> None:
        super().__init__()
        self.network: Any = network
        self.kind: GuideKind = kind
        self.requires_grad_(False).eval()

    @property
    def dim(self) -> int:
        """Width D of the vector."""
        return self.network.config.n_classes if self.kind == "logits" else self.network.dim

    @property
    def n_channels(self) -> int:
        """Largest number of channels that a trial may have."""
        return self.network.config.channels if self.kind == "encoder" else self.network.config.n_channels

    def scaling(self, spec: PreprocessSpec) -> PreprocessSpec | EEGEncoder:
        """Return the object that scales trials for the network; `spec` is the preprocessing of the dataset."""
        return self.network if self.kind == "encoder" else self.network.scaling(spec)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode for every value of `mode`."""
        return super().train(False)

    def choose_trainables(self, x_BCT: Tensor) -> None:
        """Make the parameters that influence the EEG vector trainable, and freeze the other parameters.

        Parameters
        ----------
        x_BCT : Tensor, shape (B, C, T)
            A few scaled trials, padded by repeating channels. The gradients of the vectors of these trials show which
            parameters influence the vector.
        """
        self.requires_grad_(True)
        parameters = list(self.parameters())
        # In a training with several processes, every trainable parameter must have a gradient. The feature of a
        # classifier does not depend on the classifier's last layer, so for the kind "feature", the last layer must be
        # frozen.
        gradients = torch.autograd.grad(self(x_BCT).sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Compute the vectors of trials.

        Parameters
        ----------
        x_BCT : Tensor, shape (B, C, T)
            Trials, scaled by the object that `scaling` returns, and padded by repeating channels. A classifier uses
            only the first `n_channels` rows, because the other rows are copies of these rows.

        Returns
        -------
        Tensor, shape (B, D)
            Vector of each trial.
        """
        if self.kind == "encoder":
            return self.network.tokens(x_BCT).mean(dim=1)
        e_BD, logits_BK = self.network(x_BCT[:, None, : self.n_channels])
        return logits_BK if self.kind == "logits" else e_BD

    @torch.no_grad()
    def compute(self, x_BCT: Tensor, batch: int = 128, pulse: Callable[[], None] = lambda: None) -> Tensor:
        """Compute the vectors of many trials without gradients, `batch` trials at a time.

        `pulse` is called before each forward pass. If the run was asked to stop (e.g. by SIGTERM), `pulse` raises an
        error, which ends the computation.
        """
        parts = []
        for part in x_BCT.split(batch):
            pulse()
            parts.append(self(part))
        return torch.cat(parts)

    def save(self, folder: Path) -> None:
        """Write the network to its subfolder in the package folder of a model."""
        self.network.save_pretrained(folder / FOLDERS[self.kind])

    @classmethod
    def load(cls, folder: Path, kind: GuideKind) -> EEGGuide:
        """Read the guide from the package folder of a model.

        Raises
        ------
        RequestError
            If a file is missing or damaged.
        """
        path = folder / FOLDERS[kind]
        return cls(EEGEncoder.from_pretrained(path) if kind == "encoder" else load_classifier(path), kind)
