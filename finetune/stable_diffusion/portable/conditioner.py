"""The conditioner of a fine-tuned Stable Diffusion, in a form that runs without this project.

Tensor shapes: B trials, N EEG tokens of width D.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import Tensor

from finetune.stable_diffusion.conditioner import Conditioner, ConditionerConfig


class PortableConditioner(ModelMixin, ConfigMixin):
    """Compute the condition of Stable Diffusion from tokens of EEG.

    Parameters
    ----------
    network : Conditioner
        The network, with the weights of the package.
    """

    config_name = "config.json"

    def __init__(self, network: Conditioner) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens_BND: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the condition from tokens (see `Conditioner.forward`)."""
        return self.network(tokens_BND)

    def null(self, batch: int) -> tuple[Tensor | None, ...]:
        """Return the condition without EEG for `batch` trials (see `Conditioner.null`)."""
        return self.network.null(batch)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> Self:
        """Read the conditioner from its folder in the package of a model, in evaluation mode."""
        values: Any = cls.load_config(str(Path(folder) / "config.json"))
        network = Conditioner(ConditionerConfig(**{name: v for name, v in values.items() if name != "kind"}))
        network.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return cls(network).eval().requires_grad_(False)
