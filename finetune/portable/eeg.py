"""Networks that read EEG in microvolts, in a form that runs without this project.

The module `write` of each paper copies classes of this module, with all code that they need, into the package folders
of models. There, these classes read the same weights as the project's own classes.

Tensor shapes: B trials, C channels (up to 128), T time points, N tokens of width D.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn

from data_sharding.dataset.samples import pad_channels
from data_sharding.processing.scaling import scale_windows
from pretrain.model.build import build_encoder
from pretrain.model.config import EncoderConfig


def count_true_channels(eeg_CT: Tensor) -> int:
    """Return the number of channels that a window had before padding. The padding rows repeat channels.

    Parameters
    ----------
    eeg_CT : Tensor, shape (C, T)
        A padded window.

    Returns
    -------
    int
        The smallest `n` for which every row `i` is equal to row `i % n`.
    """
    rows = len(eeg_CT)
    return next((n for n in range(1, rows) if torch.equal(eeg_CT[n:], eeg_CT[: rows - n])), rows)


class PortableNetwork(ModelMixin, ConfigMixin):
    """Run a network on EEG in microvolts. A subclass says how the network is built and what it computes.

    Parameters
    ----------
    network : Module
        Network that reads scaled EEG.
    about : dict
        Content of the package's file ``eeg.json``: the largest number of channels, the scaling, and what else the
        subclass needs.
    """

    config_name = "config.json"

    def __init__(self, network: nn.Module, about: dict[str, Any]) -> None:
        super().__init__()
        self.network: Any = network
        self.about = about

    def forward(self, eeg_BCT: Tensor) -> Tensor:
        """Compute the output of the network for trials.

        Parameters
        ----------
        eeg_BCT : Tensor, shape (B, C, T)
            Trials in microvolts, preprocessed as the file ``preprocess.json`` of the package says.

        Returns
        -------
        Tensor, shape (B, ...)
            Output of the network for each trial.

        Raises
        ------
        ValueError
            If a trial has more channels than the network was made for.
        """
        rows, x_BCT = self.about["n_channels"], pad_channels(eeg_BCT.float())
        if rows < x_BCT.shape[1] and (most := max(count_true_channels(x_CT) for x_CT in x_BCT)) > rows:
            raise ValueError(f"this model takes up to {rows} channels, but a trial has {most}")
        return self.embed(scale_windows(x_BCT, channels=self.scale_channels(), **self.about["scaling"]))

    def embed(self, x_BCT: Tensor) -> Tensor:
        """Compute the output of the network for padded and scaled trials [B, 128, T]."""
        raise NotImplementedError

    def scale_channels(self) -> int | None:
        """Return the number of rows (channels) over which a trial is scaled; None for all rows."""
        return None

    @classmethod
    def build(cls, values: dict[str, Any], about: dict[str, Any]) -> Self:
        """Build the network with new weights, from the contents of its config.json and of eeg.json."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> Self:
        """Read the network from its folder in the package of a model, in evaluation mode."""
        folder = Path(folder)
        files: list[Any] = [cls.load_config(str(folder / name)) for name in ("config.json", "eeg.json")]
        model = cls.build(*files)
        model.load_weights(load_file(folder / "model.safetensors"))
        return model.eval().requires_grad_(False)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Load the weights of the network."""
        self.network.load_state_dict(weights)


class PortableEncoder(PortableNetwork):
    """Compute tokens from EEG with a pretrained encoder. The arguments are those of `PortableNetwork`.

    The weights and the config are those of the encoder's package.
    """

    positions_C3: Tensor | None = None

    def embed(self, x_BCT: Tensor) -> Tensor:
        """Compute the tokens [B, N, D] of padded and scaled trials [B, 128, T].

        Raises
        ------
        ValueError
            If the trials have another number of samples than the encoder reads.
        """
        if x_BCT.shape[-1] != (samples := self.network.config.samples):
            raise ValueError(f"this model reads trials of {samples} samples, but a trial has {x_BCT.shape[-1]}")
        positions = self.positions_C3
        if positions is not None:
            positions = positions.to(x_BCT.device).expand(len(x_BCT), -1, -1)
        return self.network.over_time(x_BCT, positions, None)

    def scale_channels(self) -> int | None:
        """Return the number of electrodes, if the encoder uses electrodes; otherwise None."""
        return self.network.channels_for_scale(None, self.positions_C3)

    @classmethod
    def build(cls, values: dict[str, Any], about: dict[str, Any]) -> Self:
        """Build the encoder with new weights, from its config.json."""
        encoder = cls(build_encoder(EncoderConfig(**values["encoder"])), about)
        if values.get("positions"):
            places = [place or [float("nan")] * 3 for place in values["positions"]]
            encoder.positions_C3 = torch.tensor(places)
        return encoder

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Load the weights of the encoder without its head."""
        prefix = "backbone."
        self.network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
