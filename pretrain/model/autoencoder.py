"""The masked autoencoder of DreamDiffusion: each token holds a few time samples of all channels.

The encoder sees some of the tokens of a window. From the encoder's output, the decoder predicts the signal of all
tokens. The loss is the error on the tokens that the encoder did not see. Tensor names end with the shape, such as BCT
in `x_BCT`; the docstring of `pretrain.model` explains these letters.

References
----------
.. [1] Bai et al., "DreamDiffusion: generating high-quality images from brain EEG signals", arXiv 2306.16934.
.. [2] He et al., "Masked autoencoders are scalable vision learners", CVPR 2022.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from data_sharding.dataset.samples import pad_channels
from pretrain.model.config import DecoderConfig, EncoderConfig, MaskedAutoencoderConfig
from pretrain.model.masking import dropped_channels, keep_indices
from pretrain.model.transformer import Blocks, apply_options, initialise, sincos_positions

if TYPE_CHECKING:
    from data_sharding.dataset.dataset import EEGDataset
    from data_sharding.processing.preprocess import PreprocessSpec


class SignalEncoder(nn.Module):
    """Encoder with the temporal tokenizer: it turns a window of EEG into a sequence of tokens over time.

    Parameters
    ----------
    config : EncoderConfig
        Architecture of the encoder.
    """

    positions_ND: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv1d(config.channels, config.dim, config.patch, stride=config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim)) if config.class_token else None
        self.blocks = Blocks(config)
        self.norm = nn.LayerNorm(config.dim)
        # Fixed position embeddings are not saved with the weights, because they can be computed from the config. The
        # class token has no position embedding.
        positions_ND = sincos_positions(config.tokens, config.dim)
        if config.learned_positions:
            self.positions_ND = nn.Parameter(positions_ND)
        else:
            self.register_buffer("positions_ND", positions_ND, persistent=False)
        initialise(self)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(config.dim, -1))
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, x_BCT: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Encode windows.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Scaled signal, padded to the encoder's number of channels.
        keep_BK : Tensor, [B, K], int64, optional
            Indices of the visible tokens, in rising order; by default, all tokens are visible.

        Returns
        -------
        Tensor, [B, 1 + K, D]
            The class token if the encoder has one, then the visible tokens in the order of time.
        """
        x_BCT = x_BCT.to(self.patch_embed.weight.dtype)
        x_BND = self.patch_embed(x_BCT).transpose(1, 2) + self.positions_ND.to(x_BCT.dtype)
        if keep_BK is not None:
            x_BND = x_BND.gather(1, keep_BK.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))
        if self.cls_token is not None:
            x_BND = torch.cat([self.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        return self.norm(self.blocks(x_BND))

    def over_time(self, x_BCT: Tensor, positions_BC3: Tensor | None = None, count_B: Tensor | None = None) -> Tensor:
        """Encode windows, which may have fewer channels than `config.channels`.

        Parameters
        ----------
        x_BCT : Tensor, [B, C or fewer, T]
            Scaled signal. Windows with fewer than `config.channels` channels are padded with copies of their channels.
        positions_BC3, count_B : Tensor, optional
            Ignored, because this encoder does not use electrode positions.

        Returns
        -------
        Tensor, [B, N, D]
            Tokens in the order of time, without the class token.
        """
        return self(pad_channels(x_BCT, self.config.channels))[:, int(self.cls_token is not None) :]

    def electrode_inputs(self, metas: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return an empty dictionary, because this encoder needs no electrode positions in `EEGEncoder.tokens`."""
        return {}

    def common_positions(self, dataset: EEGDataset) -> Tensor | None:
        """Return None, because this encoder does not use electrode positions."""
        return None

    def channels_for_scale(self, channels: Any, positions_C3: Tensor | None = None) -> Any:
        """Return None: the scale of a window is computed over all rows of the padded window."""
        return None


class SignalDecoder(nn.Module):
    """Decoder with the temporal tokenizer: it predicts the signal of all tokens from the visible tokens.

    Parameters
    ----------
    config : DecoderConfig
        Architecture of the decoder.
    encoder : EncoderConfig
        Architecture of the encoder.
    """

    positions_ND: Tensor

    def __init__(self, config: DecoderConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder.dim, config.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.blocks = Blocks(config)
        self.norm = nn.LayerNorm(config.dim)
        self.predict = nn.Linear(config.dim, encoder.channels * encoder.patch)
        self.register_buffer("positions_ND", sincos_positions(encoder.tokens, config.dim), persistent=False)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x_BKD: Tensor, keep_BK: Tensor) -> Tensor:
        """Predict the signal of all tokens.

        Parameters
        ----------
        x_BKD : Tensor, [B, 1 + K, D]
            The encoder's output: the class token, then the visible tokens.
        keep_BK : Tensor, [B, K], int64
            Indices of the visible tokens.

        Returns
        -------
        Tensor, [B, N, P]
            Predicted signal of all tokens, visible and hidden. The values of a token are ordered by channel, then time.
        """
        x_BKD = self.embed(x_BKD)
        B, _, D = x_BKD.shape
        N = self.positions_ND.shape[0]
        x_BND = (
            self.mask_token.to(x_BKD.dtype)
            .expand(B, N, D)
            .scatter(1, keep_BK.unsqueeze(-1).expand(-1, -1, D), x_BKD[:, 1:])
        )
        x_BND = torch.cat([x_BKD[:, :1], x_BND + self.positions_ND.to(x_BKD.dtype)], dim=1)
        return self.predict(self.norm(self.blocks(x_BND))[:, 1:])


class Samples(Protocol):
    """The fields of a batch that a model uses; `data_sharding.dataset.batch.Batch` has these fields."""

    channels: list[int]
    """[B] number of recorded channels of each sample."""
    numbers: list[int]
    """[B] number that identifies each sample in the dataset."""
    epochs: list[int]
    """[B] epoch in which each sample is read."""
    metas: list[dict[str, Any]]
    """[B] metadata of each sample (docs/data_format.md): ``n`` recorded channels, ``positions`` in metres."""

    def padded(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return the windows in microvolts, [B, C, T], padded with copies of their channels."""
        ...


class MaskedAutoencoder(nn.Module):
    """Masked autoencoder for windows of EEG; its encoder sees only the visible tokens, its decoder predicts all tokens.

    Parameters
    ----------
    config : MaskedAutoencoderConfig
        Architecture and objective of the model.

    Notes
    -----
    The seed, the epoch and the sample determine which tokens are hidden; the number of processes has no influence.
    `prepare` draws the masks on the CPU. Pass the result of `prepare` to `forward` as keyword arguments.
    """

    def __init__(self, config: MaskedAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = self._build_parts(config)
        apply_options(config, (self.encoder.blocks, self.decoder.blocks))

    def _build_parts(self, config: MaskedAutoencoderConfig) -> tuple[Any, Any]:
        return SignalEncoder(config.encoder), SignalDecoder(config.decoder, config.encoder)

    def windows(self, batch: Samples, spec: PreprocessSpec, device: torch.device) -> Tensor:
        """Pad and scale the windows of a batch, as the model needs them.

        Parameters
        ----------
        batch : Samples
            The samples of a batch.
        spec : PreprocessSpec
            Preprocessing of the samples' dataset; it defines how the signal is scaled.
        device : torch.device
            Device of the result.

        Returns
        -------
        Tensor, [B, C, T], float32
            Scaled and padded signal.
        """
        return spec.scale_for_model(batch.padded(device, torch.float32), self.channels_for_scale(batch))

    def channels_for_scale(self, batch: Samples) -> list[int] | None:
        """Return how many rows (channels) of each window are used to compute the window's scale.

        Parameters
        ----------
        batch : Samples
            The samples of a batch.

        Returns
        -------
        list of int, [B], or None
            The value for the argument `channels` of `data_sharding.processing.preprocess.PreprocessSpec.divisor`. None
            means that all rows of the padded window are used to compute the scale.
        """
        return self.encoder.channels_for_scale(batch.channels)

    def prepare(self, batch: Samples, seed: int, *, training: bool = True) -> dict[str, Tensor]:
        """Draw a random mask for each sample of a batch; the model's weights are not used.

        Parameters
        ----------
        batch : Samples
            The samples of a batch.
        seed : int
            Seed for the masks.
        training : bool
            If True, channels are dropped with the probability `channel_dropout` of the config; if False, no channel is
            dropped.

        Returns
        -------
        dict of str to Tensor, [B, ...]
            Keyword arguments for `forward`; the tensors are on the CPU.
        """
        config = self.config
        inputs = {
            "keep_BK": keep_indices(
                seed,
                batch.epochs,
                batch.numbers,
                config.encoder.tokens,
                config.mask_ratio,
                block=config.mask_block,
            )
        }
        if training and config.channel_dropout:
            counts = [meta["n"] for meta in batch.metas]
            inputs["dropped_BC"] = dropped_channels(
                seed, batch.epochs, batch.numbers, counts, config.channel_dropout, config.encoder.channels
            )
        return inputs

    def hidden(self, keep_BK: Tensor, **inputs: Tensor) -> Tensor:
        """Mark the hidden tokens.

        Parameters
        ----------
        keep_BK : Tensor, [B, K], int64
            Indices of the visible tokens.
        **inputs : Tensor
            The other results of `prepare`.

        Returns
        -------
        Tensor, [B, N], bool
            True for the hidden tokens; the loss is computed on these tokens.
        """
        table_BN = torch.ones(len(keep_BK), self.config.encoder.tokens, dtype=torch.bool, device=keep_BK.device)
        return table_BN.scatter(1, keep_BK, False)

    def hidden_signal(self, **inputs: Tensor) -> Tensor:
        """Mark the part of the signal that is hidden from the encoder, to draw it in figures.

        Parameters
        ----------
        **inputs : Tensor
            The results of `prepare`.

        Returns
        -------
        Tensor, [B, C, T], bool
            True for the signal of hidden tokens.
        """
        shape = self.config.encoder
        hidden_BN = self.hidden(**inputs)
        return self.untokenize(hidden_BN.unsqueeze(-1).expand(-1, -1, shape.channels * shape.patch))

    def power(self, x_BCT: Tensor, **inputs: Tensor) -> Tensor:
        """Compute the loss that a model would have if it predicted zero everywhere, as a baseline.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Scaled signal.
        **inputs : Tensor
            The results of `prepare`.

        Returns
        -------
        Tensor, [B]
            Mean of the squared target values of the hidden tokens.
        """
        return _mean_where(self.targets(x_BCT, **inputs).square().mean(dim=-1), self.hidden(**inputs))

    def tokenize(self, x_BCT: Tensor) -> Tensor:
        """Divide windows into tokens and return the values of each token.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            EEG signal.

        Returns
        -------
        Tensor, [B, N, P]
            Values of each token, ordered by channel, then time.
        """
        B, C, T = x_BCT.shape
        patch = self.config.encoder.patch
        return x_BCT.reshape(B, C, T // patch, patch).permute(0, 2, 1, 3).reshape(B, T // patch, C * patch)

    def untokenize(self, y_BNP: Tensor) -> Tensor:
        """Join the values of tokens into windows (the inverse of `tokenize`).

        Parameters
        ----------
        y_BNP : Tensor, [B, N, P]
            Signal values of each token.

        Returns
        -------
        Tensor, [B, C, T]
            EEG signal.
        """
        B, N, P = y_BNP.shape
        patch = self.config.encoder.patch
        return y_BNP.reshape(B, N, P // patch, patch).permute(0, 2, 1, 3).reshape(B, P // patch, N * patch)

    def targets(self, x_BCT: Tensor, **inputs: Tensor) -> Tensor:
        """Compute the values that the decoder must predict.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Scaled signal.
        **inputs : Tensor
            The results of `prepare`; this method does not use them.

        Returns
        -------
        Tensor, [B, N, P], float32 or float64
            Target values of each token. If ``normalize_targets`` is set, the values of each token are scaled to mean 0
            and variance 1.
        """
        target_BNP = self.tokenize(full_precision(x_BCT))
        if self.config.normalize_targets:
            mean_BN1 = target_BNP.mean(dim=-1, keepdim=True)
            var_BN1 = target_BNP.var(dim=-1, keepdim=True)
            target_BNP = (target_BNP - mean_BN1) / (var_BN1 + 1e-6).sqrt()
        return target_BNP

    def reconstruct(self, x_BCT: Tensor, keep_BK: Tensor, **inputs: Tensor) -> Tensor:
        """Predict the signal of all tokens from the visible tokens.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Scaled signal.
        keep_BK : Tensor, [B, K], int64
            Indices of the visible tokens.
        **inputs : Tensor
            The other results of `prepare`. ``dropped_BC`` (bool) marks the dropped channels; their signal is set to
            zero for the encoder.

        Returns
        -------
        Tensor, [B, N, P]
            Predicted values of each token.
        """
        if "dropped_BC" in inputs:
            x_BCT = x_BCT.masked_fill(inputs["dropped_BC"].unsqueeze(-1), 0.0)
        return self.decoder(self.encoder(x_BCT, keep_BK), keep_BK)

    def forward(self, x_BCT: Tensor, keep_BK: Tensor, **inputs: Tensor) -> Tensor:
        """Compute the loss of each sample on its hidden tokens.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Scaled signal.
        keep_BK : Tensor, [B, K], int64
            Indices of the visible tokens. Every sample has the same number of visible tokens.
        **inputs : Tensor
            The other results of `prepare`.

        Returns
        -------
        Tensor, [B], float32 or float64
            Mean squared error over the values of the hidden tokens.
        """
        predicted_BNP = self.reconstruct(x_BCT, keep_BK, **inputs)
        error_BNP = full_precision(predicted_BNP) - self.targets(x_BCT, keep_BK=keep_BK, **inputs)
        return _mean_where(error_BNP.square().mean(dim=-1), self.hidden(keep_BK, **inputs))


def full_precision(x: Tensor) -> Tensor:
    """Convert a half-precision tensor to float32, because losses need this precision; float64 is not changed."""
    return x if x.dtype == torch.float64 else x.float()


def _mean_where(value_BN: Tensor, chosen_BN: Tensor) -> Tensor:
    return (value_BN * chosen_BN).sum(dim=1) / chosen_BN.sum(dim=1)
