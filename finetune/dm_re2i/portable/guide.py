"""The part of a DM-RE2I model that turns EEG into the guiding vector, in a form that runs without this project.

`finetune.dm_re2i.portable.write` copies the classes of this module, with all code that they need, into the package
folders of models. There, these classes read the same files as the classes of `finetune.dm_re2i.model`.

Tensor shapes: B trials, C channels (up to 128), T time points, D width of the vector.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

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


class PortableGuide(ModelMixin, ConfigMixin):
    """Compute the vector that guides EG-DDPM from EEG in microvolts, with the network of a model's package.

    Parameters
    ----------
    network : Module
        Classifier of EEG, which returns features and class scores.
    about : dict
        Content of the package's file ``guide.json``: the kind of guide, the number of channels, and the scaling.
    """

    config_name = "config.json"
    NETWORK: ClassVar[Any] = None
    """Class of the network that the guide runs; the last line of the Python file in a model's package sets this
    class."""

    def __init__(self, network: nn.Module, about: dict[str, Any]) -> None:
        super().__init__()
        self.network: Any = network
        self.about = about

    def forward(self, eeg_BCT: Tensor) -> Tensor:
        """Compute the guiding vectors of trials.

        Parameters
        ----------
        eeg_BCT : Tensor, shape (B, C, T)
            Trials in microvolts, preprocessed as the file ``preprocess.json`` of the package says.

        Returns
        -------
        Tensor, shape (B, D)
            Vector of each trial.

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
        """Compute the vectors [B, D] of padded and scaled trials [B, 128, T]."""
        e_BD, logits_BK = self.network(x_BCT[:, None, : self.about["n_channels"]])
        return logits_BK if self.about["guide"] == "logits" else e_BD

    def scale_channels(self) -> int | None:
        """Return the number of rows (channels) over which a trial is scaled; None for all rows."""
        return None

    @classmethod
    def build(cls, values: dict[str, Any], about: dict[str, Any]) -> Self:
        """Build the guide with new weights, from the contents of the network's config.json and of guide.json."""
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name != "kind"}
        return cls(cls.NETWORK(cls.NETWORK.CONFIG(**options)), about)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> Self:
        """Read the guide from its folder in the package of a model, in evaluation mode."""
        folder = Path(folder)
        files: list[Any] = [cls.load_config(str(folder / name)) for name in ("config.json", "guide.json")]
        guide = cls.build(*files)
        guide.load_weights(load_file(folder / "model.safetensors"))
        return guide.eval().requires_grad_(False)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Load the weights of the network."""
        self.network.load_state_dict(weights)


class PortableEncoderGuide(PortableGuide):
    """Guide whose vector is the mean token of a pretrained encoder. The arguments are those of `PortableGuide`.

    The weights and the config of the guide are those of the encoder's package.
    """

    positions_C3: Tensor | None = None

    def embed(self, x_BCT: Tensor) -> Tensor:
        """Compute the mean token [B, D] of padded and scaled trials [B, 128, T]."""
        positions = self.positions_C3
        if positions is not None:
            positions = positions.to(x_BCT.device).expand(len(x_BCT), -1, -1)
        return self.network.over_time(x_BCT, positions, None).mean(dim=1)

    def scale_channels(self) -> int | None:
        """Return the number of electrodes, if the encoder uses electrodes; otherwise None."""
        return self.network.channels_for_scale(None, self.positions_C3)

    @classmethod
    def build(cls, values: dict[str, Any], about: dict[str, Any]) -> Self:
        """Build the guide with new weights, from the encoder's config.json."""
        guide = cls(build_encoder(EncoderConfig(**values["encoder"])), about)
        if values.get("positions"):
            places = [place or [float("nan")] * 3 for place in values["positions"]]
            guide.positions_C3 = torch.tensor(places)
        return guide

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Load the weights of the encoder without its head."""
        prefix = "backbone."
        self.network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
