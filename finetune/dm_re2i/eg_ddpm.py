"""EG-DDPM: a U-Net in pixel space that predicts noise. The EEG's feature is added to the embedding of the step.

Shapes: B batch, C image channels, F feature maps, H rows, W columns, D width of the EEG feature, E width of
the embedding, N positions (H times W).
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    """Embedding of a diffusion step: sine and cosine at geometrically spaced frequencies.

    Parameters
    ----------
    width : int
        Width E of the embedding, an even number.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, step_B: Tensor) -> Tensor:
        """Embed the steps.

        Parameters
        ----------
        step_B : Tensor, shape (B,)
            Steps of the forward process.

        Returns
        -------
        Tensor of float32, shape (B, E)
            Embedding.
        """
        half = self.width // 2
        rate = torch.exp(torch.arange(half, device=step_B.device) * -(math.log(10000) / (half - 1)))
        angle = step_B.float()[:, None] * rate[None, :]
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class ChannelNorm(nn.Module):
    """Layer norm over the feature maps, for each pixel.

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
        """Normalise.

        Parameters
        ----------
        x_BFHW : Tensor, shape (B, F, H, W)
            Feature maps.

        Returns
        -------
        Tensor, shape (B, F, H, W)
            Feature maps. Before the learned scale and shift, they have zero mean and unit variance over F.
        """
        variance, mean = torch.var_mean(x_BFHW, dim=1, unbiased=False, keepdim=True)
        return (x_BFHW - mean) * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


class ConvNeXtBlock(nn.Module):
    """Convolutions: depthwise 7x7, then 3x3 and 3x3, with a 1x1 shortcut from input to output.

    After the depthwise convolution, the embedding is added and a layer norm follows; a GELU stands between the others.

    Parameters
    ----------
    inputs, outputs : int
        Number of feature maps at input and output.
    embedding : int or None
        Width E of the embedding; None for a block without an embedding, as the last block is.
    expansion : int
        Feature maps between the two 3x3 convolutions, as a multiple of `outputs`.
    scale_shift : bool
        Let the embedding scale and shift the normalised feature maps (FiLM) instead of adding it before the norm.
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
        """Apply the block.

        Parameters
        ----------
        x_BFHW : Tensor, shape (B, F, H, W)
            Feature maps.
        embedding_BE : Tensor, shape (B, E), optional
            Embedding of the step and the EEG.

        Returns
        -------
        Tensor, shape (B, F', H, W)
            Feature maps.
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
    """``x + attention(LayerNorm(x))`` over the pixels.

    Parameters
    ----------
    width : int
        Number of feature maps.
    heads, head_dim : int
        Number of heads and width of each.
    linear : bool
        Linear attention, whose cost grows linearly with the number of pixels; False for full attention.
    """

    def __init__(self, width: int, heads: int, head_dim: int, *, linear: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.linear = heads, head_dim, linear
        self.norm = ChannelNorm(width)
        self.qkv = nn.Conv2d(width, 3 * heads * head_dim, 1, bias=False)
        self.out = nn.Conv2d(heads * head_dim, width, 1)

    def forward(self, x_BFHW: Tensor) -> Tensor:
        """Attend.

        Parameters
        ----------
        x_BFHW : Tensor, shape (B, F, H, W)
            Feature maps.

        Returns
        -------
        Tensor, shape (B, F, H, W)
            Feature maps.
        """
        b, _, height, width = x_BFHW.shape
        qkv = self.qkv(self.norm(x_BFHW)).reshape(b, 3, self.heads, self.head_dim, height * width)
        q, k, v = qkv.unbind(1)  # each (B, heads, head_dim, N)
        if self.linear:
            q = q.softmax(dim=-2) * self.head_dim**-0.5
            context = k.softmax(dim=-1) @ v.transpose(-1, -2)  # (B, heads, head_dim, head_dim)
            out = context.transpose(-1, -2) @ q
        else:
            q, k, v = (part.transpose(-1, -2) for part in (q, k, v))
            out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x_BFHW + self.out(out.reshape(b, self.heads * self.head_dim, height, width))


class CABlock(nn.Module):
    """Two ConvNeXt blocks and a residual linear attention.

    Parameters
    ----------
    inputs, outputs : int
        Number of feature maps at input and output.
    embedding : int
        Width E of the embedding.
    expansion : int
        Width multiple of the ConvNeXt blocks.
    heads, head_dim : int
        Attention heads and the width of each.
    scale_shift : bool
        Whether the ConvNeXt blocks use FiLM.
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int, expansion: int, heads: int, head_dim: int, scale_shift: bool
    ) -> None:
        super().__init__()
        self.first = ConvNeXtBlock(inputs, outputs, embedding, expansion, scale_shift)
        self.second = ConvNeXtBlock(outputs, outputs, embedding, expansion, scale_shift)
        self.attention = ResidualAttention(outputs, heads, head_dim, linear=True)

    def forward(self, x_BFHW: Tensor, embedding_BE: Tensor) -> Tensor:
        """Apply the three parts, one after the other.

        Parameters
        ----------
        x_BFHW : Tensor, shape (B, F, H, W)
            Feature maps.
        embedding_BE : Tensor, shape (B, E)
            Embedding of the step and the EEG.

        Returns
        -------
        Tensor, shape (B, F', H, W)
            Feature maps.
        """
        return self.attention(self.second(self.first(x_BFHW, embedding_BE), embedding_BE))


class EGDDPM(ModelMixin, ConfigMixin):
    """EEG-guided U-Net eps(x_t, t, e): a linear map of the EEG feature e is added to the embedding of t.

    Parameters
    ----------
    sample_size : int
        Rows and columns of the images; a multiple of ``patch * 2 ** (levels - 1)``.
    in_channels : int
        Image channels.
    condition_dim : int
        Width D of the EEG feature.
    base_channels : int
        Feature maps at the first level, an even number. The embedding is four times as wide.
    multipliers : sequence of int
        Feature maps of each level as multiples of `base_channels`.
    expansion : int
        Width multiple inside the ConvNeXt blocks.
    heads, head_dim : int
        Attention heads and the width of each.
    scale_shift : bool
        Let the embedding scale and shift feature maps (FiLM) instead of adding it; not in the paper.
    null_condition : bool
        Add a learned null vector, for classifier-free guidance; not in the paper.
    patch : int
        Fold squares of this many pixels a side into channels before the first level, and unfold them after the last.
        2 makes every level four times cheaper. 1, as in the paper, folds nothing.
    join_first : bool
        Add a skip connection from the first level to the last block. Without it, all details of the noise must pass
        through the second level, which is too much for narrow networks. Not in the paper.

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
        self.condition = nn.Linear(condition_dim, embedding)
        self.null = nn.Parameter(torch.zeros(condition_dim)) if null_condition else None
        # The features are standardised, because their scale depends on EVRNet's training, and guidance should not.
        self.register_buffer("condition_mean", torch.zeros(condition_dim))
        self.register_buffer("condition_std", torch.ones(condition_dim))

        def ca(inputs: int, outputs: int) -> CABlock:
            return CABlock(inputs, outputs, embedding, expansion, heads, head_dim, scale_shift)

        self.down = nn.ModuleList(ca(i, o) for i, o in zip([in_channels * patch**2, *maps[:-1]], maps, strict=True))
        self.shrink = nn.ModuleList(nn.Conv2d(m, m, 4, 2, 1) for m in maps[:-1])
        self.middle_first = ConvNeXtBlock(maps[-1], maps[-1], embedding, expansion, scale_shift)
        self.middle_attention = ResidualAttention(maps[-1], heads, head_dim, linear=False)
        self.middle_second = ConvNeXtBlock(maps[-1], maps[-1], embedding, expansion, scale_shift)
        # As published, every level but the first has a skip connection.
        self.up = nn.ModuleList(ca(2 * maps[k], maps[k - 1]) for k in range(levels - 1, 0, -1))
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(maps[k - 1], maps[k - 1], 4, 2, 1) for k in range(levels - 1, 0, -1)
        )
        self.last = ConvNeXtBlock(maps[0] * (2 if join_first else 1), maps[0], None, expansion, False)
        self.out = nn.Conv2d(maps[0], in_channels * patch**2, 1)
        self.fold = nn.PixelUnshuffle(patch) if patch > 1 else nn.Identity()
        self.unfold = nn.PixelShuffle(patch) if patch > 1 else nn.Identity()

    @torch.no_grad()
    def set_condition_statistics(self, mean_D: Tensor, std_D: Tensor) -> None:
        """Set the mean and standard deviation that standardise features; they are saved with the weights.

        Parameters
        ----------
        mean_D, std_D : Tensor, shape (D,)
            Statistics of the features over the training trials.
        """
        self.condition_mean.copy_(mean_D)
        # A feature that was constant in training keeps its scale; otherwise a small change would be enlarged a lot.
        self.condition_std.copy_(
            torch.where(std_D > 1e-3 * std_D.max().clamp_min(1e-12), std_D, torch.ones_like(std_D))
        )

    def encode_condition(self, e_BD: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """Standardise features, and replace those of dropped conditions by the learned null vector.

        Parameters
        ----------
        e_BD : Tensor, shape (B, D)
            EEG features.
        keep_B : Tensor of bool, shape (B,), optional
            False where the condition is dropped; by default every condition is kept.

        Returns
        -------
        Tensor, shape (B, D)
            Input of the linear map to the embedding.

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
        # torch.where, not a branch: all processes must have the same graph.
        return torch.where(keep_B[:, None], e_BD, self.null[None, :])

    def forward(self, sample: Tensor, timestep: Tensor | int, e_BD: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """Predict the noise.

        Parameters
        ----------
        sample : Tensor, shape (B, C, H, W)
            Noisy images, x_t.
        timestep : Tensor, shape (B,) or (), or int
            Steps of the forward process, t.
        e_BD : Tensor, shape (B, D)
            EEG features.
        keep_B : Tensor of bool, shape (B,), optional
            False where the condition is replaced by the null vector; by default every condition is kept.

        Returns
        -------
        Tensor, shape (B, C, H, W)
            Predicted noise.
        """
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
