"""The U-Net of diffusers as a backbone of EG-DDPM, for comparison with the U-Net of the paper.

Shapes: B batch, C image channels, H rows, W columns, D width of the EEG vector.
"""

from __future__ import annotations

import math

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from finetune.dm_re2i.guided import GuidedUNet


class GuidedUNet2D(GuidedUNet):
    """`diffusers.UNet2DModel`, guided by EEG.

    A linear map of the EEG vector is added to the embedding of the diffusion step: the U-Net gets the mapped EEG vector
    as its class embedding (``class_embed_type: identity``). The first level has two residual blocks; the other levels
    have two residual blocks with attention.

    Parameters
    ----------
    sample_size : int
        Number of rows and of columns of the images; a multiple of ``patch * 2 ** (len(multipliers) - 1)``.
    in_channels : int
        Number of colour channels of the images.
    condition_dim : int
        Width D of the EEG vector.
    base_channels : int
        Number of feature maps at the first level; a multiple of 4.
    multipliers : sequence of int
        Number of feature maps at each level, as a multiple of `base_channels`.
    head_dim : int
        Width of an attention head. At each level except the first, the number of feature maps must be a multiple of
        `head_dim`.
    scale_shift : bool
        True: the embedding scales and shifts feature maps (FiLM). False: the embedding is added to the feature maps.
    null_condition : bool
        Add a learned null vector, which classifier-free guidance needs.
    patch : int
        Side length in pixels of the squares that are folded into channels before the first level.

    References
    ----------
    Ho et al., "Denoising diffusion probabilistic models" (2020), whose network diffusers implements.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        condition_dim: int = 512,
        base_channels: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 4, 8),
        head_dim: int = 32,
        scale_shift: bool = False,
        null_condition: bool = True,
        patch: int = 1,
    ) -> None:
        super().__init__()
        levels, maps = len(multipliers), [base_channels * m for m in multipliers]
        if levels < 2 or patch < 1 or sample_size % (patch * 2 ** (levels - 1)):
            raise ValueError(
                f"sample_size must be a multiple of {patch * 2 ** (levels - 1)} for patch {patch} and {levels} "
                f"multipliers (at least 2 are needed), got {sample_size}"
            )
        if base_channels % 4 or any(width % head_dim for width in maps[1:]):
            raise ValueError(
                f"base_channels {base_channels} must be a multiple of 4, and the numbers of feature maps {maps[1:]} "
                f"must be multiples of head_dim {head_dim}"
            )
        self.unet = UNet2DModel(
            sample_size=sample_size // patch,
            in_channels=in_channels * patch**2,
            out_channels=in_channels * patch**2,
            block_out_channels=tuple(maps),
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * (levels - 1)),
            up_block_types=(*["AttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
            attention_head_dim=head_dim,
            norm_num_groups=math.gcd(32, base_channels),
            resnet_time_scale_shift="scale_shift" if scale_shift else "default",
            class_embed_type="identity",
        )
        self.add_condition(condition_dim, 4 * base_channels, null_condition)
        self.fold = nn.PixelUnshuffle(patch) if patch > 1 else nn.Identity()
        self.unfold = nn.PixelShuffle(patch) if patch > 1 else nn.Identity()

    def forward(self, sample: Tensor, timestep: Tensor | int, e_BD: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """Predict the noise in the images (see `GuidedUNet`)."""
        step_B = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        vector_BE = self.condition(self.encode_condition(e_BD, keep_B))
        return self.unfold(self.unet(self.fold(sample), step_B, class_labels=vector_BE).sample)
