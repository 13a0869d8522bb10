"""The masked autoencoder with the montage tokenizer: each token holds a few time samples of one channel.

Each token is the sum of three embeddings: of its time samples, of its electrode's position on the head, and of its
position in time. The model identifies a channel only by the position of its electrode, so the results do not depend on
the order of the channels. The results do not depend on the number of padding rows, because attention ignores padding
tokens and the loss does not include them.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.

References
----------
.. [1] Tancik et al., "Fourier features let networks learn high frequency functions in low dimensional domains",
   NeurIPS 2020.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data_sharding.common.errors import RequestError
from pretrain.model.autoencoder import MaskedAutoencoder, Samples
from pretrain.model.config import DecoderConfig, EncoderConfig, MaskedAutoencoderConfig
from pretrain.model.masking import dropped_channels, keep_indices
from pretrain.model.transformer import Blocks, initialise, sincos_positions

if TYPE_CHECKING:
    from data_sharding.dataset.dataset import EEGDataset

# Longest and shortest wavelength, in metres, of the sines and cosines that encode an electrode's position. The longest
# is twice the width of a head; the shortest is the distance between neighbours in a montage of 128 electrodes.
_WAVELENGTHS = (0.4, 0.02)
_BANDS = 8


def electrode_positions(metas: list[dict[str, Any]], most: int) -> tuple[Tensor, Tensor]:
    """Return the electrode positions of samples as tensors.

    Parameters
    ----------
    metas : list of dict, [B]
        Metadata of samples: ``n`` recorded channels and their ``positions`` in metres, None for an unknown position.
    most : int
        Largest number of channels of a sample; further channels are ignored.

    Returns
    -------
    positions_BC3 : Tensor, [B, C, 3], float32
        Electrode positions in metres, NaN for an unknown position. C is the largest value in `count_B`.
    count_B : Tensor, [B], int64
        Number of recorded channels of each sample, at most `most`.
    """
    counts = [min(int(meta["n"]), most) for meta in metas]
    positions_BC3 = np.full((len(metas), max(counts), 3), np.nan, np.float32)
    for row, meta, count in zip(positions_BC3, metas, counts, strict=True):
        for channel, place in enumerate((meta.get("positions") or [])[:count]):
            if place is not None:
                row[channel] = place
    return torch.from_numpy(positions_BC3), torch.tensor(counts)


def common_positions(dataset: EEGDataset) -> Tensor:
    """Return the electrode positions of a dataset that was recorded with one montage.

    Parameters
    ----------
    dataset : EEGDataset
        A split of the dataset.

    Returns
    -------
    Tensor, [C, 3], float32
        Electrode positions in metres, NaN for an unknown position.

    Raises
    ------
    RequestError
        If the samples have different montages.
    """
    first = dataset.meta(0)
    n, positions = dataset.trials.numbers("n"), dataset.trials.codes("positions")
    differ = (n != n[0]) | (positions != positions[0])
    if differ.any():
        raise RequestError(
            f"{dataset.path} ({dataset.split}): sample {dataset.key(int(differ.argmax()))} has other electrodes than "
            f"{dataset.key(0)}; this stage needs a dataset with one montage, or an encoder with the temporal "
            "tokenizer"
        )
    positions_BC3, _ = electrode_positions([first], first["n"])
    return positions_BC3[0]


class ElectrodePlace(nn.Module):
    """Embedding of the position of an electrode.

    The electrode's position is encoded by sines and cosines of several wavelengths along x, y and z (Fourier features
    [1]_). A linear layer maps the sines and cosines to the embedding. All electrodes with an unknown position share one
    learned embedding.

    Parameters
    ----------
    dim : int
        Width of the embedding.
    """

    waves_F: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(6 * _BANDS, dim)
        self.unknown = nn.Parameter(torch.zeros(dim))
        low, high = (math.log(2 * math.pi / metres) for metres in _WAVELENGTHS)
        waves_F = torch.linspace(low, high, _BANDS, dtype=torch.float64, device="cpu").exp().float()
        self.register_buffer("waves_F", waves_F, persistent=False)
        nn.init.normal_(self.unknown, std=0.02)

    def forward(self, positions_BC3: Tensor) -> Tensor:
        """Compute the embeddings of electrode positions.

        Parameters
        ----------
        positions_BC3 : Tensor, [B, C, 3], float32
            Positions in metres, in the head's coordinate system; NaN for an unknown position.

        Returns
        -------
        Tensor, [B, C, D]
            Embeddings.
        """
        known_BC1 = positions_BC3.isfinite().all(dim=-1, keepdim=True)
        # Replace NaN in the electrode positions before the sines are computed. If NaN were replaced only at the end,
        # the gradient would still be NaN.
        places_BC3 = torch.where(known_BC1, positions_BC3, 0.0).to(self.waves_F.dtype)
        angles_BCW = (places_BC3.unsqueeze(-1) * self.waves_F).flatten(-2)
        waves_BCW = torch.cat([angles_BCW.sin(), angles_BCW.cos()], dim=-1)
        return torch.where(known_BC1, self.project(waves_BCW.to(self.project.weight.dtype)), self.unknown)


class MontageEncoder(nn.Module):
    """Encoder with the montage tokenizer: it turns a window of EEG, recorded with any montage, into tokens.

    Parameters
    ----------
    config : EncoderConfig
        Architecture of the encoder. The field `channels` only limits the number of channels of a window; the shapes of
        the weights do not depend on `channels`.
    """

    positions_ND: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.patch, config.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim)) if config.class_token else None
        self.place = ElectrodePlace(config.dim)
        self.blocks = Blocks(config)
        self.norm = nn.LayerNorm(config.dim)
        self.register_buffer("positions_ND", sincos_positions(config.tokens, config.dim), persistent=False)
        initialise(self)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def forward(
        self,
        x_BCT: Tensor,
        positions_BC3: Tensor,
        count_B: Tensor | None = None,
        keep_BK: Tensor | None = None,
        seen_BK: Tensor | None = None,
    ) -> Tensor:
        """Encode windows.

        Parameters
        ----------
        x_BCT : Tensor, [B, C or more, T]
            Scaled signal. Rows after the first C rows are padding, and are ignored.
        positions_BC3 : Tensor, [B, C, 3]
            Electrode positions in metres, NaN for an unknown position.
        count_B : Tensor, [B], int64, optional
            Number of recorded channels of each sample; by default, all C rows are recorded channels.
        keep_BK : Tensor, [B, K], int64, optional
            Indices of the visible tokens; by default, all tokens are visible.
        seen_BK : Tensor, [B, K], bool, optional
            False for padding in `keep_BK`. `keep_BK` has padding if samples have different numbers of visible tokens.

        Returns
        -------
        Tensor, [B, 1 + K or 1 + M, D]
            The class token if the encoder has one, then the tokens, channel by channel. The values of padding tokens
            have no meaning.
        """
        shape, channels = self.config, positions_BC3.shape[1]
        dtype = self.patch_embed.weight.dtype
        patches_BCNP = x_BCT[:, :channels].to(dtype).unflatten(-1, (shape.tokens, shape.patch))
        where_BCND = self.positions_ND.to(dtype) + self.place(positions_BC3).unsqueeze(2)
        x_BMD = (self.patch_embed(patches_BCNP) + where_BCND).flatten(1, 2)
        real_BM = real_tokens(count_B, channels, shape.tokens)
        if keep_BK is not None:
            at_BKD = keep_BK.clamp(max=x_BMD.shape[1] - 1).unsqueeze(-1).expand(-1, -1, x_BMD.shape[-1])
            x_BMD, real_BM = x_BMD.gather(1, at_BKD), seen_BK
        if self.cls_token is not None:
            x_BMD = torch.cat([self.cls_token.expand(x_BMD.shape[0], -1, -1), x_BMD], dim=1)
            real_BM = with_class_token(real_BM)
        return self.norm(self.blocks(x_BMD, real_BM))

    def over_time(self, x_BCT: Tensor, positions_BC3: Tensor | None = None, count_B: Tensor | None = None) -> Tensor:
        """Encode windows and average the tokens over the channels, so that every montage gives equally many tokens.

        Parameters
        ----------
        x_BCT, positions_BC3, count_B : Tensor
            See `forward`.

        Returns
        -------
        Tensor, [B, N, D]
            Tokens in the order of time, without the class token.

        Raises
        ------
        RequestError
            If no positions are given.
        """
        if positions_BC3 is None:
            raise RequestError(
                "this encoder's montage tokenizer needs the positions of the electrodes: give positions [channels, 3] "
                "in metres, NaN for an unknown position (for samples of a dataset, inputs_of returns them), or build "
                "the encoder with chs_info"
            )
        if positions_BC3.shape[1] > x_BCT.shape[1]:
            raise ValueError(
                f"got positions of {positions_BC3.shape[1]} channels for windows of {x_BCT.shape[1]} channels"
            )
        x_BMD = self(x_BCT, positions_BC3, count_B)[:, int(self.cls_token is not None) :]
        x_BCND = x_BMD.unflatten(1, (positions_BC3.shape[1], self.config.tokens))
        if count_B is None:
            return x_BCND.mean(dim=1)
        real_BC = real_tokens(count_B, positions_BC3.shape[1], 1)
        assert real_BC is not None
        weight_BC = real_BC.to(x_BCND.dtype) / count_B.to(x_BCND.dtype).unsqueeze(1)
        return (x_BCND * weight_BC[..., None, None]).sum(dim=1)

    def electrode_inputs(self, metas: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the electrode positions of samples as arguments of `EEGEncoder.tokens`."""
        positions_BC3, count_B = electrode_positions(metas, self.config.channels)
        return {"positions": positions_BC3, "count_B": count_B}

    def common_positions(self, dataset: EEGDataset) -> Tensor | None:
        """Return the electrode positions of a dataset with one montage; see the function `common_positions`."""
        return common_positions(dataset)

    def channels_for_scale(self, channels: Any, positions_C3: Tensor | None = None) -> Any:
        """Return how many channels of each window were recorded; the scale of a window is computed over these channels.

        The scale does not include the copies of channels in a padded window. Otherwise, channels with more copies would
        have a larger weight, and the scale would depend on the order of the channels.
        """
        return len(positions_C3) if channels is None and positions_C3 is not None else channels


class MontageDecoder(nn.Module):
    """Decoder with the montage tokenizer: it predicts the signal of all tokens from the visible tokens.

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
        self.place = ElectrodePlace(config.dim)
        self.blocks = Blocks(config)
        self.norm = nn.LayerNorm(config.dim)
        self.predict = nn.Linear(config.dim, encoder.patch)
        self.register_buffer("positions_ND", sincos_positions(encoder.tokens, config.dim), persistent=False)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x_BKD: Tensor, keep_BK: Tensor, positions_BC3: Tensor, count_B: Tensor | None = None) -> Tensor:
        """Predict the signal of all tokens.

        Parameters
        ----------
        x_BKD : Tensor, [B, 1 + K, D]
            The encoder's output: the class token, then the visible tokens.
        keep_BK : Tensor, [B, K], int64
            Indices of the visible tokens. Padding has the index M, which is one more than the index of the last token.
        positions_BC3 : Tensor, [B, C, 3]
            Electrode positions in metres, NaN for an unknown position.
        count_B : Tensor, [B], int64, optional
            Number of recorded channels of each sample.

        Returns
        -------
        Tensor, [B, M, P]
            Predicted signal of all tokens, visible and hidden.
        """
        x_BKD = self.embed(x_BKD)
        B, _, D = x_BKD.shape
        N, C = self.positions_ND.shape[0], positions_BC3.shape[1]
        # Padding in `keep_BK` has the index M, so `scatter` writes the values of padding tokens into an extra token
        # after the last token. This extra token is then removed.
        x_BMD = (
            self.mask_token.to(x_BKD.dtype)
            .expand(B, C * N + 1, D)
            .scatter(1, keep_BK.unsqueeze(-1).expand(-1, -1, D), x_BKD[:, 1:])[:, :-1]
        )
        where_BCND = self.positions_ND.to(x_BKD.dtype) + self.place(positions_BC3).unsqueeze(2)
        x_BMD = torch.cat([x_BKD[:, :1], x_BMD + where_BCND.flatten(1, 2)], dim=1)
        real_BM = with_class_token(real_tokens(count_B, C, N))
        return self.predict(self.norm(self.blocks(x_BMD, real_BM))[:, 1:])


def real_tokens(count_B: Tensor | None, channels: int, tokens: int) -> Tensor | None:
    """Mark the tokens that belong to recorded channels.

    Parameters
    ----------
    count_B : Tensor, [B], int64, or None
        Number of recorded channels of each sample; None if all rows are recorded channels.
    channels, tokens : int
        Number of rows of a window, and number of tokens in each row.

    Returns
    -------
    Tensor, [B, M], bool, or None
        True for tokens of recorded channels; None if all tokens belong to recorded channels.
    """
    if count_B is None:
        return None
    real_BC = torch.arange(channels, device=count_B.device) < count_B.unsqueeze(1)
    return real_BC.unsqueeze(-1).expand(-1, -1, tokens).flatten(1)


def with_class_token(real_BM: Tensor | None) -> Tensor | None:
    """Insert True for the class token in front of the result of `real_tokens`; a result of None stays None."""
    return None if real_BM is None else torch.cat([torch.ones_like(real_BM[:, :1]), real_BM], dim=1)


class MontageAutoencoder(MaskedAutoencoder):
    """Masked autoencoder with the montage tokenizer.

    Parameters
    ----------
    config : MaskedAutoencoderConfig
        Architecture and objective of the model.

    Notes
    -----
    Only recorded channels become tokens. The copies of channels in a padded window do not become tokens, because the
    model could otherwise read a hidden channel from its copy. If a channel is dropped (`channel_dropout`), all its
    tokens are hidden.
    """

    def _build_parts(self, config: MaskedAutoencoderConfig) -> tuple[Any, Any]:
        return MontageEncoder(config.encoder), MontageDecoder(config.decoder, config.encoder)

    def prepare(self, batch: Samples, seed: int, *, training: bool = True) -> dict[str, Tensor]:
        """Draw random masks for the samples of a batch, and collect their electrode positions.

        Parameters
        ----------
        batch : Samples
            Samples whose metadata contain ``n`` and ``positions``.
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
        config, shape = self.config, self.config.encoder
        positions_BC3, count_B = electrode_positions(batch.metas, shape.channels)
        B, C, _ = positions_BC3.shape
        each = config.mask_each_channel
        # R is the number of masks: one mask for each channel of each sample, or one mask for each sample.
        rows = np.repeat(np.arange(B), C if each else 1)
        keep_RK = keep_indices(
            seed,
            np.asarray(batch.epochs)[rows].tolist(),
            np.asarray(batch.numbers)[rows].tolist(),
            shape.tokens,
            config.mask_ratio,
            block=config.mask_block,
            channels=np.tile(np.arange(C), B).tolist() if each else None,
        )
        keep_BCK = keep_RK.view(B, C if each else 1, -1) + shape.tokens * torch.arange(C).view(1, -1, 1)
        seen_BC = torch.arange(C) < count_B.unsqueeze(1)
        if training and config.channel_dropout:
            seen_BC &= ~dropped_channels(
                seed, batch.epochs, batch.numbers, count_B.tolist(), config.channel_dropout, shape.channels
            )[:, :C]
        seen_BK = seen_BC.unsqueeze(-1).expand_as(keep_BCK).flatten(1)
        # Samples can have different numbers of visible tokens. In each row of `keep_BK`, move the indices of visible
        # tokens to the front, and cut all rows to the largest number of visible tokens. In a shorter row, the rest is
        # padding: it gets the index M in `keep_BK`, and False in `seen_BK`.
        order_BK = seen_BK.int().argsort(dim=1, descending=True, stable=True)[:, : int(seen_BK.sum(dim=1).max())]
        seen_BK = seen_BK.gather(1, order_BK)
        keep_BK = keep_BCK.flatten(1).gather(1, order_BK).masked_fill(~seen_BK, C * shape.tokens)
        inputs = {"keep_BK": keep_BK, "positions_BC3": positions_BC3}
        # If no sample has padding, leave out `seen_BK`, because attention without an attention mask is faster.
        if not bool(seen_BK.all()):
            inputs["seen_BK"] = seen_BK
        if int(count_B.min()) < C:
            inputs["count_B"] = count_B
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
        Tensor, [B, M], bool
            True for the tokens on which the loss is computed: the hidden tokens of recorded channels.
        """
        channels, tokens = inputs["positions_BC3"].shape[1], self.config.encoder.tokens
        table_BM = torch.ones(len(keep_BK), channels * tokens + 1, dtype=torch.bool, device=keep_BK.device)
        table_BM = table_BM.scatter(1, keep_BK, False)[:, :-1]
        real_BM = real_tokens(inputs.get("count_B"), channels, tokens)
        return table_BM if real_BM is None else table_BM & real_BM

    def hidden_signal(self, **inputs: Tensor) -> Tensor:
        """Mark the part of the signal that is hidden from the encoder, to draw it in figures.

        Parameters
        ----------
        **inputs : Tensor
            The results of `prepare`.

        Returns
        -------
        Tensor, [B, C, T], bool
            True for the signal of hidden tokens of recorded channels. C is the largest number of recorded channels
            among the samples.
        """
        return self.untokenize(self.hidden(**inputs).unsqueeze(-1).expand(-1, -1, self.config.encoder.patch))

    def tokenize(self, x_BCT: Tensor) -> Tensor:
        """Divide windows into tokens and return the values of each token.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            EEG signal.

        Returns
        -------
        Tensor, [B, M, P]
            Signal values of each token.
        """
        shape = self.config.encoder
        return x_BCT.unflatten(-1, (shape.tokens, shape.patch)).flatten(1, 2)

    def untokenize(self, y_BNP: Tensor) -> Tensor:
        """Join the values of tokens into windows (the inverse of `tokenize`).

        Parameters
        ----------
        y_BNP : Tensor, [B, M, P]
            Signal values of each token.

        Returns
        -------
        Tensor, [B, C, T]
            EEG signal.
        """
        return y_BNP.unflatten(1, (-1, self.config.encoder.tokens)).flatten(-2)

    def targets(self, x_BCT: Tensor, **inputs: Tensor) -> Tensor:
        """Compute the values that the decoder must predict.

        Parameters
        ----------
        x_BCT : Tensor, [B, C or more, T]
            Scaled signal.
        **inputs : Tensor
            The results of `prepare`.

        Returns
        -------
        Tensor, [B, M, P], float32 or float64
            Target values of each token. If ``normalize_targets`` is set, the values of each token are scaled to mean 0
            and variance 1.
        """
        return super().targets(x_BCT[:, : inputs["positions_BC3"].shape[1]])

    def reconstruct(self, x_BCT: Tensor, keep_BK: Tensor, **inputs: Tensor) -> Tensor:
        """Predict the signal of all tokens from the visible tokens.

        Parameters
        ----------
        x_BCT : Tensor, [B, C or more, T]
            Scaled signal.
        keep_BK : Tensor, [B, K], int64
            Indices of the visible tokens.
        **inputs : Tensor
            The other results of `prepare`.

        Returns
        -------
        Tensor, [B, M, P]
            Predicted values of each token.
        """
        positions_BC3, count_B = inputs["positions_BC3"], inputs.get("count_B")
        x_BKD = self.encoder(x_BCT, positions_BC3, count_B, keep_BK, inputs.get("seen_BK"))
        return self.decoder(x_BKD, keep_BK, positions_BC3, count_B)
