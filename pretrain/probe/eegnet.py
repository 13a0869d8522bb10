"""EEGNet, a small convolutional network; the probe uses it as a baseline.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.

References
----------
Lawhern et al., EEGNet, Journal of Neural Engineering 15 (2018), 056013.
"""

# Braindecode's EEGNet is not used: since version 1.0 Braindecode needs torchaudio, and the version of torchaudio must
# match the installed PyTorch. Only the tests depend on Braindecode.

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class EEGNetConfig:
    """Settings for the training of EEGNet-8,2; some default values differ from those of Lawhern et al."""

    epochs: int = 100
    """Largest number of epochs (500 in the article of Lawhern et al.)."""
    patience: int = 15
    """Training ends after this number of epochs without a lower validation loss."""
    batch_size: int = 64
    """Number of trials in one training step."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    dropout: float = 0.25
    """Dropout probability; 0.25 is the value of Lawhern et al. for unseen subjects."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.patience, self.batch_size) < 1 or self.lr <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "eegnet: epochs, patience and batch_size must be at least 1, lr above 0, and dropout from 0 to below 1"
            )


class EEGNet(nn.Module):
    """EEGNet-8,2: 8 temporal filters, 2 spatial filters for each temporal filter, and 16 separable filters.

    Parameters
    ----------
    channels, samples : int
        Number of channels and number of time samples in a window.
    sfreq : float
        Sampling rate in Hz. The temporal filters are half a second long.
    classes : int
        Number of labels.
    dropout : float
        Dropout probability in training.
    """

    def __init__(self, channels: int, samples: int, sfreq: float, classes: int, dropout: float = 0.25) -> None:
        super().__init__()
        F1, D, F2 = 8, 2, 16
        # Lawhern et al. pool by a factor of 4 and then by a factor of 8. For short windows, use smaller factors, so
        # that at least one time sample remains.
        pool = [min(4, samples), max(1, min(8, samples // 4))]
        # Lengths of the filters, e.g. 64 and 16 time samples at 128 Hz.
        half, eighth = max(1, round(sfreq / 2)), max(1, round(sfreq / 8))
        spatial = nn.Conv2d(F1, F1 * D, (channels, 1), groups=F1, bias=False)
        self.features = nn.Sequential(
            _same_length(half),
            nn.Conv2d(1, F1, (1, half), bias=False),
            nn.BatchNorm2d(F1),
            spatial,
            nn.BatchNorm2d(F1 * D),
            nn.ELU(),
            nn.AvgPool2d((1, pool[0])),
            nn.Dropout(dropout),
            _same_length(eighth),
            nn.Conv2d(F1 * D, F1 * D, (1, eighth), groups=F1 * D, bias=False),
            nn.Conv2d(F1 * D, F2, 1, bias=False),
            nn.BatchNorm2d(F2),
            nn.ELU(),
            nn.AvgPool2d((1, pool[1])),
            nn.Dropout(dropout),
            nn.Flatten(),
        )
        self.head = nn.Linear(F2 * (samples // pool[0] // pool[1]), classes)

    @property
    def spatial(self) -> nn.Conv2d:
        """The spatial filters.

        `spatial` is a property and not an attribute, because `state_dict` would list an attribute's weights twice.
        """
        spatial = self.features[3]
        assert isinstance(spatial, nn.Conv2d)
        return spatial

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Classify windows.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Standardised windows.

        Returns
        -------
        Tensor, [B, classes]
            Logits.
        """
        return self.head(self.features(x_BCT[:, None]))

    @torch.no_grad()
    def limit_norms(self) -> None:
        """Limit the norm of each spatial filter to 1 and of each class's weights to 0.25, as Lawhern et al. did."""
        for layer, most in ((self.spatial, 1.0), (self.head, 0.25)):
            layer.weight.copy_(layer.weight.renorm(2, 0, most))


def train_eegnet(
    x_nCT: np.ndarray,
    labels_n: np.ndarray,
    val_x_nCT: np.ndarray,
    val_labels_n: np.ndarray,
    *,
    sfreq: float,
    classes: int,
    config: EEGNetConfig,
    seed: int,
    device: torch.device,
) -> tuple[EEGNet, int]:
    """Train EEGNet until the validation loss stops falling, and keep the weights with the lowest validation loss.

    Parameters
    ----------
    x_nCT, labels_n : ndarray
        Standardised training trials [n, C, T] and their labels [n].
    val_x_nCT, val_labels_n : ndarray
        Trials and labels for the validation loss.
    sfreq : float
        Sampling rate in Hz.
    classes : int
        Number of labels.
    config : EEGNetConfig
        Settings of the training.
    seed : int
        Seed of the random numbers for initial weights, order of trials and dropout.
    device : torch.device
        Device of the training.

    Returns
    -------
    EEGNet
        The trained network, in evaluation mode, on the device.
    int
        Number of the epoch with the lowest validation loss, counted from 1. The returned network has the weights of the
        epoch with the lowest validation loss.
    """
    x, y = torch.from_numpy(x_nCT).float(), torch.from_numpy(labels_n).long()
    val_x, val_y = torch.from_numpy(val_x_nCT).float(), torch.from_numpy(val_labels_n).long()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = EEGNet(x.shape[1], x.shape[2], sfreq, classes, config.dropout).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
        best, best_epoch, state = float("inf"), 0, copy.deepcopy(model.state_dict())
        for epoch in range(1, config.epochs + 1):
            model.train()
            for rows in torch.randperm(len(x)).split(config.batch_size):
                if len(rows) < 2:
                    # Skip a batch of one trial, because batch normalisation needs the variance between trials.
                    continue
                loss = nn.functional.cross_entropy(model(x[rows].to(device)), y[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                model.limit_norms()
            lost = float(nn.functional.cross_entropy(_logits(model, val_x, device), val_y))
            if lost < best:
                best, best_epoch, state = lost, epoch, copy.deepcopy(model.state_dict())
            elif epoch - best_epoch >= config.patience:
                break
    model.load_state_dict(state)
    return model.eval(), best_epoch


def predict_eegnet(model: EEGNet, x_nCT: np.ndarray, device: torch.device) -> np.ndarray:
    """Predict the labels of trials.

    Parameters
    ----------
    model : EEGNet
        A trained network.
    x_nCT : ndarray, [n, C, T]
        Trials, standardised in the same way as the training trials.
    device : torch.device
        Device of the network.

    Returns
    -------
    ndarray, [n]
        Predicted labels.
    """
    return _logits(model, torch.from_numpy(x_nCT).float(), device).argmax(dim=1).numpy()


def _same_length(kernel: int) -> nn.ZeroPad2d:
    """Return the padding with which a convolution of `kernel` time samples returns as many time samples as it reads."""
    return nn.ZeroPad2d(((kernel - 1) // 2, kernel // 2, 0, 0))


@torch.no_grad()
def _logits(model: EEGNet, x_nCT: Tensor, device: torch.device) -> Tensor:
    model.eval()
    return torch.cat([model(x_BCT.to(device)).cpu() for x_BCT in x_nCT.split(256)])
