"""EG-DDPM: the paper's U-Net that predicts the noise in the pixels of an image, guided by EEG.

A linear map of the EEG feature is added to the embedding of the diffusion step. `finetune.dm_re2i.unet2d` has another
backbone.

Shapes: B batch, C image channels, F feature maps, H rows, W columns, D width of the EEG feature, E width of
the embedding, N positions (H times W).
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from finetune.dm_re2i.guided import GuidedUNet


class SinusoidalEmbedding(nn.Module):
    """Embed a diffusion step as sines and cosines at geometrically spaced frequencies.

    Parameters
    ----------
    width : int
        Width E of the embedding, an even number.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, step_B: Tensor) -> Tensor:
        """Embed the diffusion steps.

        Parameters
        ----------
        step_B : Tensor, shape (B,)
            Steps of the forward process (the process that adds noise).

        Returns
        -------
        Tensor of float32, shape (B, E)
            Embedding of each step.
        """
        half = self.width // 2
        rate = torch.exp(torch.arange(half, device=step_B.device) * -(math.log(10000) / (half - 1)))
        angle = step_B.float()[:, None] * rate[None, :]
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class ChannelNorm(nn.Module):
    """Apply layer norm over the feature maps, separately for each pixel.

    Parameters
    ----------
    width : int
        Number of feature maps F.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, width, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x_BFHW: Tensor) -> Tensor:
        """Normalise the feature maps of each pixel.

        Parameters
        ----------
        x_BFHW : Tensor, shape (B, F, H, W)
            Input feature maps.

        Returns
        -------
        Tensor, shape (B, F, H, W)
            Normalised feature maps. Before the learned scale and shift, each pixel has zero mean and unit variance over
            its F values.
        """
        # In memory, `x_BFHW` has the layout channels-last in training and in sampling on the CPU, so that the permuted
        # tensor is contiguous, and the layer norm is one fused operation.
        norm_BHWF = nn.functional.layer_norm(
            x_BFHW.permute(0, 2, 3, 1), (x_BFHW.shape[1],), self.weight.flatten(), self.bias.flatten()
        )
        return norm_BHWF.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """ConvNeXt block: a depthwise 7x7 convolution and two 3x3 convolutions, with a shortcut from input to output.

    A layer norm follows the depthwise convolution, and a GELU is between the two 3x3 convolutions. The embedding of the
    diffusion step and of the EEG is added before the layer norm, or scales and shifts the output of the layer norm.

    Parameters
    ----------
    inputs, outputs : int
        Number of feature maps at the input, and number of feature maps at the output.
    embedding : int or None
        Width E of the embedding; None for a block without an embedding, such as the last block.
    expansion : int
        Number of feature maps between the two 3x3 convolutions, as a multiple of `outputs`.
    scale_shift : bool
        True: the embedding scales and shifts the normalised feature maps (FiLM). False: the embedding is added to the
        feature maps before the layer norm.
    """

    def __init__(self, inputs: int, outputs: int, embedding: int | None, expansion: int, scale_shift: bool) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.mlp = None
        if embedding is not None:
            self.mlp = nn.Sequential(nn.GELU(), nn.Linear(embedding, inputs * (2 if scale_shift else 1)))
        self.depthwise = nn.Conv2d(inputs, inputs, 7, padding=3, groups=inputs)
        self.norm = ChannelNorm(inputs)
        self.net = nn.Sequential(
            nn.Conv2d(inputs, outputs * expansion, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(outputs * expansion, outputs, 3, padding=1),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x_BFHW: Tensor, embedding_BE: Tensor | None = None) -> Tensor:
        """Apply the ConvNeXt block.

        Parameters
        ----------
        x_BFHW : Tensor, shape (B, F, H, W)
            Input feature maps.
        embedding_BE : Tensor, shape (B, E), optional
            Embedding of the diffusion step and of the EEG.

        Returns
        -------
        Tensor, shape (B, F', H, W)
            Output feature maps.
        """
        h = self.depthwise(x_BFHW)
        if self.mlp is None or embedding_BE is None:
            h = self.norm(h)
        elif self.scale_shift:
            scale, shift = self.mlp(embedding_BE)[:, :, None, None].chunk(2, dim=1)
            h = self.norm(h) * (1 + scale) + shift
        else:
            h = self.norm(h + self.mlp(embedding_BE)[:, :, None, None])
        return self.net(h) + self.shortcut(x_BFHW)


class ResidualAttention(nn.Module):
    """Attention over the pixels with a residual connection: ``x + attention(LayerNorm(x))``.

    Parameters
    ----------
    width : int
        Number of feature maps.
    heads, head_dim : int
        Number of attention heads and width of each head.
    linear : bool
        True: linear attention; its cost grows linearly with the number of pixels. False: full attention.
    """

    def __init__(self, width: int, heads: int, head_dim: int, *, linear: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.linear = heads, head_dim, linear
        self.norm = ChannelNorm(width)
        self.qkv = nn.Conv2d(width, 3 * heads * head_dim, 1, bias=False)
        self.out = nn.Conv2d(heads * head_dim, width, 1)

    def forward(self, x_BFHW: Tensor) -> Tensor:
        """Apply the attention.

        Parameters
        ----------
        x_BFHW : Tensor, shape (B, F, H, W)
            Input feature maps.

        Returns
        -------
        Tensor, shape (B, F, H, W)
            Output feature maps.
        """
        b, _, height, width = x_BFHW.shape
        qkv = self.qkv(self.norm(x_BFHW)).reshape(b, 3, self.heads, self.head_dim, height * width)
        q, k, v = qkv.unbind(1)  # shape of each: (B, heads, head_dim, N)
        if self.linear:
            q = q.softmax(dim=-2) * self.head_dim**-0.5
            context = k.softmax(dim=-1) @ v.transpose(-1, -2)  # (B, heads, head_dim, head_dim)
            out = context.transpose(-1, -2) @ q
        else:
            q, k, v = (part.transpose(-1, -2) for part in (q, k, v))
            out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x_BFHW + self.out(out.reshape(b, self.heads * self.head_dim, height, width))


class CABlock(nn.Module):
    """One level of the U-Net: two ConvNeXt blocks and a linear attention with a residual connection.

    Parameters
    ----------
    inputs, outputs : int
        Number of feature maps at the input, and number of feature maps at the output.
    embedding : int
        Width E of the embedding.
    expansion : int
        Argument `expansion` of the ConvNeXt blocks.
    heads, head_dim : int
        Number of attention heads and width of each head.
    scale_shift : bool
        Whether the embedding scales and shifts feature maps in the ConvNeXt blocks (FiLM).
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int, expansion: int, heads: int, head_dim: int, scale_shift: bool
    ) -> None:
        super().__init__()
        self.first = ConvNeXtBlock(inputs, outputs, embedding, expansion, scale_shift)
        self.second = ConvNeXtBlock(outputs, outputs, embedding, expansion, scale_shift)
        self.attention = ResidualAttention(outputs, heads, head_dim, linear=True)

    def forward(self, x_BFHW: Tensor, embedding_BE: Tensor) -> Tensor:
        """Apply the two ConvNeXt blocks and the attention, one after another.

        Parameters
        ----------
        x_BFHW : Tensor, shape (B, F, H, W)
            Input feature maps.
        embedding_BE : Tensor, shape (B, E)
            Embedding of the diffusion step and of the EEG.

        Returns
        -------
        Tensor, shape (B, F', H, W)
            Output feature maps.
        """
        return self.attention(self.second(self.first(x_BFHW, embedding_BE), embedding_BE))


class EGDDPM(GuidedUNet):
    """U-Net that predicts the noise in an image, from the noisy image, the diffusion step and an EEG feature.

    A linear map of the EEG feature is added to the embedding of the diffusion step.

    Parameters
    ----------
    sample_size : int
        Number of rows and of columns of the images; a multiple of ``patch * 2 ** (len(multipliers) - 1)``.
    in_channels : int
        Number of colour channels of the images.
    condition_dim : int
        Width D of the EEG feature.
    base_channels : int
        Number of feature maps at the first level; an even number. The width of the embedding is 4 * `base_channels`.
    multipliers : sequence of int
        Number of feature maps at each level, as a multiple of `base_channels`.
    expansion : int
        Argument `expansion` of the ConvNeXt blocks.
    heads, head_dim : int
        Number of attention heads and width of each head.
    scale_shift : bool
        True: the embedding scales and shifts feature maps (FiLM), which the paper does not do. False: the embedding is
        added to the feature maps.
    null_condition : bool
        Add a learned null vector, which classifier-free guidance needs. The paper has no null vector.
    patch : int
        Side length in pixels of the squares that are folded into channels before the first level, and unfolded after
        the last level. With `patch` 1, as in the paper, no pixels are folded. With `patch` 2, every level needs a
        quarter of the computation of `patch` 1.
    join_first : bool
        Add a skip connection, which the paper does not have, from the first level to the last block. Without the skip
        connection from the first level, all details of the noise must pass through the second level, which is too much
        for narrow networks.

    References
    ----------
    Zeng et al., "DM-RE2I: A framework based on diffusion model for the reconstruction from EEG to image",
    Biomedical Signal Processing and Control 86 (2023) 105125.
    Ho & Salimans, "Classifier-free diffusion guidance" (2022).
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        condition_dim: int = 512,
        base_channels: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 4, 8),
        expansion: int = 2,
        heads: int = 4,
        head_dim: int = 32,
        scale_shift: bool = False,
        null_condition: bool = True,
        patch: int = 1,
        join_first: bool = False,
    ) -> None:
        super().__init__()
        levels = len(multipliers)
        if levels < 2:
            raise ValueError(f"multipliers must have two levels or more, not {list(multipliers)}")
        if base_channels < 4 or base_channels % 2:
            raise ValueError(f"base_channels must be even and 4 or more, not {base_channels}")
        if patch < 1 or sample_size % (patch * 2 ** (levels - 1)):
            raise ValueError(
                f"sample_size must be a multiple of {patch * 2 ** (levels - 1)} "
                f"for {levels} levels and patch {patch}, not {sample_size}"
            )
        width = base_channels
        maps = [width * m for m in multipliers]
        embedding = 4 * width
        self.time = nn.Sequential(
            SinusoidalEmbedding(width), nn.Linear(width, embedding), nn.GELU(), nn.Linear(embedding, embedding)
        )
        self.add_condition(condition_dim, embedding, null_condition)

        def ca(inputs: int, outputs: int) -> CABlock:
            return CABlock(inputs, outputs, embedding, expansion, heads, head_dim, scale_shift)

        self.down = nn.ModuleList(ca(i, o) for i, o in zip([in_channels * patch**2, *maps[:-1]], maps, strict=True))
        self.shrink = nn.ModuleList(nn.Conv2d(m, m, 4, 2, 1) for m in maps[:-1])
        self.middle_first = ConvNeXtBlock(maps[-1], maps[-1], embedding, expansion, scale_shift)
        self.middle_attention = ResidualAttention(maps[-1], heads, head_dim, linear=False)
        self.middle_second = ConvNeXtBlock(maps[-1], maps[-1], embedding, expansion, scale_shift)
        # As in the paper, every level except the first has a skip connection (for the first level, see `join_first`).
        self.up = nn.ModuleList(ca(2 * maps[k], maps[k - 1]) for k in range(levels - 1, 0, -1))
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(maps[k - 1], maps[k - 1], 4, 2, 1) for k in range(levels - 1, 0, -1)
        )
        self.last = ConvNeXtBlock(maps[0] * (2 if join_first else 1), maps[0], None, expansion, False)
        self.out = nn.Conv2d(maps[0], in_channels * patch**2, 1)
        self.fold = nn.PixelUnshuffle(patch) if patch > 1 else nn.Identity()
        self.unfold = nn.PixelShuffle(patch) if patch > 1 else nn.Identity()

    def forward(self, sample: Tensor, timestep: Tensor | int, e_BD: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """Predict the noise in the images (see `GuidedUNet`)."""
        step_B = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        embedding_BE = self.time[1:](self.time[0](step_B).to(sample.dtype))
        embedding_BE = embedding_BE + self.condition(self.encode_condition(e_BD, keep_B))
        h, copies = self.fold(sample), []
        for level, block in enumerate(self.down):
            h = block(h, embedding_BE)
            copies.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = self.middle_second(self.middle_attention(self.middle_first(h, embedding_BE)), embedding_BE)
        for block, grow in zip(self.up, self.grow, strict=True):
            h = grow(block(torch.cat([h, copies.pop()], dim=1), embedding_BE))
        if self.config.join_first:
            h = torch.cat([h, copies.pop()], dim=1)
        return self.unfold(self.out(self.last(h)))
