"""Base class of the backbones (U-Nets) of EG-DDPM, with everything that a U-Net needs to use the EEG vector.

Shapes: B batch, C image channels, H rows, W columns, D width of the EEG vector, E width of the embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class GuidedUNet(ModelMixin, ConfigMixin):
    """Base class of the backbones of EG-DDPM, which predict the noise in images and are guided by an EEG vector.

    The config of a subclass has at least ``sample_size``, ``in_channels``, ``condition_dim`` and ``null_condition``.
    `save_pretrained` and `from_pretrained` of diffusers write and read the network.
    """

    config: Any
    null: nn.Parameter | None
    condition_mean: Tensor
    condition_std: Tensor

    def add_condition(self, condition_dim: int, embedding: int, null_condition: bool) -> None:
        """Add a linear map (EEG vector to embedding), the EEG vector's mean and standard deviation, and a null vector.

        Parameters
        ----------
        condition_dim : int
            Width D of the EEG vector.
        embedding : int
            Width E of the embedding of the diffusion step, to which the result of the linear map is added.
        null_condition : bool
            True: add a learned null vector, which classifier-free guidance needs. The paper has no null vector.
        """
        self.condition = nn.Linear(condition_dim, embedding)
        self.null = nn.Parameter(torch.zeros(condition_dim)) if null_condition else None
        # The initial mean 0 and standard deviation 1 leave the EEG vector as it is.
        self.register_buffer("condition_mean", torch.zeros(condition_dim))
        self.register_buffer("condition_std", torch.ones(condition_dim))

    @torch.no_grad()
    def set_condition_statistics(self, mean_D: Tensor, std_D: Tensor) -> None:
        """Set the mean and standard deviation for standardising EEG vectors; both are saved with the weights.

        The scale of EEG vectors depends on the network that computes them. After standardisation, the effect of a
        vector on the U-Net does not depend on this scale. The paper does not standardise EEG vectors.

        Parameters
        ----------
        mean_D, std_D : Tensor, shape (D,)
            Mean and standard deviation of the EEG vectors over the training trials.
        """
        self.condition_mean.copy_(mean_D)
        # If an entry of the vector was almost constant in training, use the standard deviation 1, because division by a
        # tiny standard deviation would amplify small changes.
        self.condition_std.copy_(
            torch.where(std_D > 1e-3 * std_D.max().clamp_min(1e-12), std_D, torch.ones_like(std_D))
        )

    def encode_condition(self, e_BD: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """Standardise EEG vectors, and replace the vectors of dropped conditions with the learned null vector.

        Parameters
        ----------
        e_BD : Tensor, shape (B, D)
            EEG features.
        keep_B : Tensor of bool, shape (B,), optional
            False for trials whose EEG condition is dropped; by default all conditions are kept.

        Returns
        -------
        Tensor, shape (B, D)
            Standardised features, the input of the linear map to the embedding.

        Raises
        ------
        ValueError
            If `keep_B` is given, but the network has no null vector.
        """
        e_BD = (e_BD - self.condition_mean) / self.condition_std
        if keep_B is None:
            return e_BD
        if self.null is None:
            raise ValueError("this EG-DDPM has no null vector; build it with null_condition=True to drop conditions")
        # Use torch.where instead of a branch, because all processes must build the same autograd graph, even if only
        # some of them have dropped conditions.
        return torch.where(keep_B[:, None], e_BD, self.null[None, :])

    def forward(self, sample: Tensor, timestep: Tensor | int, e_BD: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """Predict the noise in the images.

        Parameters
        ----------
        sample : Tensor, shape (B, C, H, W)
            Noisy images x_t.
        timestep : Tensor, shape (B,) or (), or int
            Steps t of the forward process (the process that adds noise).
        e_BD : Tensor, shape (B, D)
            EEG features.
        keep_B : Tensor of bool, shape (B,), optional
            False for trials whose EEG condition is replaced by the null vector; by default all conditions are kept.

        Returns
        -------
        Tensor, shape (B, C, H, W)
            Predicted noise.
        """
        raise NotImplementedError
