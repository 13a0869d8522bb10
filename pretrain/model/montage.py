"""A tokenizer that knows the montage: patches of single channels, with the electrode's place and the moment.

Nothing depends on the order of the channels or on how many rows a window was padded to: a channel is known by its
electrode's position alone, and rows beyond the true channels are neither attended to nor scored.

Letters in names: B samples, C channels, T time samples, N tokens along a window, M = C x N tokens of a sample (token
``c N + i`` is moment i of channel c), K visible tokens, D width, P time samples of a token.

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

# Metres: from twice the head's width to the distance of neighbours in a montage of 128 electrodes.
_WAVELENGTHS = (0.4, 0.02)
_BANDS = 8


def electrode_positions(metas: list[dict[str, Any]], most: int) -> tuple[Tensor, Tensor]:
    """Electrodes of some samples as tensors.

    Parameters
    ----------
    metas : list of dict, [B]
        Metadata of samples: ``n`` true channels and ``positions`` in metres, null where not known.
    most : int
        Channels of a padded window.

    Returns
    -------
    positions_BC3 : Tensor, [B, C, 3], float32
        Metres, NaN where not known; C is the largest number of true channels among the samples.
    count_B : Tensor, [B], int64
        True channels of each sample.
    """
    counts = [min(int(meta["n"]), most) for meta in metas]
    positions_BC3 = np.full((len(metas), max(counts), 3), np.nan, np.float32)
    for row, meta, count in zip(positions_BC3, metas, counts, strict=True):
        for channel, place in enumerate((meta.get("positions") or [])[:count]):
            if place is not None:
                row[channel] = place
    return torch.from_numpy(positions_BC3), torch.tensor(counts)


def common_positions(dataset: EEGDataset) -> Tensor:
    """Electrodes of a dataset that was recorded with one montage, as EEG-image datasets are.

    Parameters
    ----------
    dataset : EEGDataset
        The split.

    Returns
    -------
    Tensor, [C, 3], float32
        Metres, NaN where not known. As ``positions_C3`` of an encoder they allow calls with windows alone.

    Raises
    ------
    RequestError
        If its samples have several montages.
    """
    first = dataset.meta(0)
    for number in range(1, len(dataset)):
        meta = dataset.meta(number)
        if meta["n"] != first["n"] or meta.get("positions") != first.get("positions"):
            raise RequestError(
                f"{dataset.path} ({dataset.split}): sample {dataset.key(number)} has other electrodes than "
                f"{dataset.key(0)}; this stage takes one montage, or an encoder with the temporal tokenizer"
            )
    positions_BC3, _ = electrode_positions([first], first["n"])
    return positions_BC3[0]


class ElectrodePlace(nn.Module):
    """Where an electrode sits on the head, as a vector.

    Parameters
    ----------
    dim : int
        Width of the vector.
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
        """Describe places.

        Parameters
        ----------
        positions_BC3 : Tensor, [B, C, 3], float32
            Metres in the head's frame; NaN where a position is not known.

        Returns
        -------
        Tensor, [B, C, D]
            Vectors; one and the same for all electrodes whose position is not known.
        """
        known_BC1 = positions_BC3.isfinite().all(dim=-1, keepdim=True)
        # Zeroed first: a NaN that `where` leaves out would still reach the gradient.
        places_BC3 = torch.where(known_BC1, positions_BC3, 0.0).to(self.waves_F.dtype)
        angles_BCW = (places_BC3.unsqueeze(-1) * self.waves_F).flatten(-2)
        waves_BCW = torch.cat([angles_BCW.sin(), angles_BCW.cos()], dim=-1)
        return torch.where(known_BC1, self.project(waves_BCW.to(self.project.weight.dtype)), self.unknown)


class MontageEncoder(nn.Module):
    """A window of EEG of any montage to tokens.

    Parameters
    ----------
    config : EncoderConfig
        Shape; `channels` is the most there may be and sizes nothing.
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
            Scaled signal; rows beyond those of `positions_BC3` are copies and left out.
        positions_BC3 : Tensor, [B, C, 3]
            Electrodes in metres, NaN where not known.
        count_B : Tensor, [B], int64, optional
            True channels of each sample; C by default.
        keep_BK : Tensor, [B, K], int64, optional
            Tokens that may be seen; all of them by default.
        seen_BK : Tensor, [B, K], bool, optional
            False where `keep_BK` only fills the batch.

        Returns
        -------
        Tensor, [B, 1 + K or 1 + M, D]
            The class token where there is one, then the tokens, channel by channel. What comes of tokens that only
            fill the batch means nothing.
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
        """Encode windows and average the tokens over the channels, so that every montage gives as many tokens.

        Parameters
        ----------
        x_BCT, positions_BC3, count_B : Tensor
            As for `forward`.

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
                "this encoder's montage tokenizer needs to know where the electrodes sit: give positions [channels, 3] "
                "in metres, NaN where not known (inputs_of has them for a dataset's samples), or build it with chs_info"
            )
        if positions_BC3.shape[1] > x_BCT.shape[1]:
            raise ValueError(f"got positions of {positions_BC3.shape[1]} channels for windows of {x_BCT.shape[1]}")
        x_BMD = self(x_BCT, positions_BC3, count_B)[:, int(self.cls_token is not None) :]
        x_BCND = x_BMD.unflatten(1, (positions_BC3.shape[1], self.config.tokens))
        if count_B is None:
            return x_BCND.mean(dim=1)
        real_BC = real_tokens(count_B, positions_BC3.shape[1], 1)
        assert real_BC is not None
        weight_BC = real_BC.to(x_BCND.dtype) / count_B.to(x_BCND.dtype).unsqueeze(1)
        return (x_BCND * weight_BC[..., None, None]).sum(dim=1)

    def electrode_inputs(self, metas: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the electrodes of samples as arguments of `EEGEncoder.tokens`."""
        positions_BC3, count_B = electrode_positions(metas, self.config.channels)
        return {"positions": positions_BC3, "count_B": count_B}

    def common_positions(self, dataset: EEGDataset) -> Tensor | None:
        """Return the electrodes that are to be kept with the encoder for a dataset; see `common_positions`."""
        return common_positions(dataset)

    def channels_for_scale(self, channels: Any, positions_C3: Tensor | None = None) -> Any:
        """Return the true channels over which a window's scale is computed.

        Copies in a padded window must not count: some channels would weigh more than others, depending on their order.
        """
        return len(positions_C3) if channels is None and positions_C3 is not None else channels


class MontageDecoder(nn.Module):
    """Visible tokens to the signal of every token.

    Parameters
    ----------
    config : DecoderConfig
        Shape of the decoder.
    encoder : EncoderConfig
        Shape of the encoder that it follows.
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
        """Predict the signal.

        Parameters
        ----------
        x_BKD : Tensor, [B, 1 + K, D]
            The encoder's output: class token, then visible tokens.
        keep_BK : Tensor, [B, K], int64
            Which tokens these are; M for what only fills the batch.
        positions_BC3 : Tensor, [B, C, 3]
            Electrodes in metres, NaN where not known.
        count_B : Tensor, [B], int64, optional
            True channels of each sample.

        Returns
        -------
        Tensor, [B, M, P]
            Values of every token, visible or not.
        """
        x_BKD = self.embed(x_BKD)
        B, _, D = x_BKD.shape
        N, C = self.positions_ND.shape[0], positions_BC3.shape[1]
        # One place too many, which takes what only fills the batch.
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
    """Which tokens belong to true channels.

    Parameters
    ----------
    count_B : Tensor, [B], int64, or None
        True channels of each sample.
    channels, tokens : int
        Rows of a window and tokens along it.

    Returns
    -------
    Tensor, [B, M], bool, or None
        None where all do.
    """
    if count_B is None:
        return None
    real_BC = torch.arange(channels, device=count_B.device) < count_B.unsqueeze(1)
    return real_BC.unsqueeze(-1).expand(-1, -1, tokens).flatten(1)


def with_class_token(real_BM: Tensor | None) -> Tensor | None:
    """Put the class token, which is always real, before a table of tokens.

    Parameters
    ----------
    real_BM : Tensor, [B, M], bool, or None
        The table.

    Returns
    -------
    Tensor, [B, 1 + M], bool, or None
        None stays None.
    """
    return None if real_BM is None else torch.cat([torch.ones_like(real_BM[:, :1]), real_BM], dim=1)


class MontageAutoencoder(MaskedAutoencoder):
    """Asymmetric masked autoencoder over the tokens of single channels.

    Parameters
    ----------
    config : MaskedAutoencoderConfig
        Shape and objective.

    Notes
    -----
    The mask is drawn for true channels; their copies in a padded window are never tokens, so a hidden channel cannot be
    read from its copy. A dropped channel is one with no visible token.
    """

    def _parts(self, config: MaskedAutoencoderConfig) -> tuple[Any, Any]:
        return MontageEncoder(config.encoder), MontageDecoder(config.decoder, config.encoder)

    def prepare(self, batch: Samples, seed: int, *, training: bool = True) -> dict[str, Tensor]:
        """Say what the model is to see of some samples; looks at no weights.

        Parameters
        ----------
        batch : Samples
            The samples; of their metadata it reads ``n`` and ``positions``.
        seed : int
            Of the masks.
        training : bool
            False leaves all channels in.

        Returns
        -------
        dict of str to Tensor, [B, ...]
            Keyword arguments of `forward`, on the processor; every tensor's first dimension is the sample.
        """
        config, shape = self.config, self.config.encoder
        positions_BC3, count_B = electrode_positions(batch.metas, shape.channels)
        B, C, _ = positions_BC3.shape
        each = config.mask_each_channel
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
        # Visible tokens to the front, and no longer than the sample that has most of them.
        order_BK = seen_BK.int().argsort(dim=1, descending=True, stable=True)[:, : int(seen_BK.sum(dim=1).max())]
        seen_BK = seen_BK.gather(1, order_BK)
        keep_BK = keep_BCK.flatten(1).gather(1, order_BK).masked_fill(~seen_BK, C * shape.tokens)
        inputs = {"keep_BK": keep_BK, "positions_BC3": positions_BC3}
        # Tables that are true throughout are left out: attention without a mask is faster.
        if not bool(seen_BK.all()):
            inputs["seen_BK"] = seen_BK
        if int(count_B.min()) < C:
            inputs["count_B"] = count_B
        return inputs

    def hidden(self, keep_BK: Tensor, **inputs: Tensor) -> Tensor:
        """Which tokens are hidden, as a table.

        Parameters
        ----------
        keep_BK : Tensor, [B, K], int64
            Visible tokens.
        **inputs : Tensor
            What else `prepare` gave.

        Returns
        -------
        Tensor, [B, M], bool
            True for hidden tokens of true channels, which are those that count.
        """
        channels, tokens = inputs["positions_BC3"].shape[1], self.config.encoder.tokens
        table_BM = torch.ones(len(keep_BK), channels * tokens + 1, dtype=torch.bool, device=keep_BK.device)
        table_BM = table_BM.scatter(1, keep_BK, False)[:, :-1]
        real_BM = real_tokens(inputs.get("count_B"), channels, tokens)
        return table_BM if real_BM is None else table_BM & real_BM

    def hidden_signal(self, **inputs: Tensor) -> Tensor:
        """Which part of the signal is hidden, e.g. for figures.

        Parameters
        ----------
        **inputs : Tensor
            What `prepare` gave.

        Returns
        -------
        Tensor, [B, C, T], bool
            True where a token that counts covers the signal; C is the largest number of true channels.
        """
        return self.untokenize(self.hidden(**inputs).unsqueeze(-1).expand(-1, -1, self.config.encoder.patch))

    def tokenize(self, x_BCT: Tensor) -> Tensor:
        """Cut windows into the values of their tokens.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Signal.

        Returns
        -------
        Tensor, [B, M, P]
            Values by token.
        """
        shape = self.config.encoder
        return x_BCT.unflatten(-1, (shape.tokens, shape.patch)).flatten(1, 2)

    def untokenize(self, y_BNP: Tensor) -> Tensor:
        """Join the values of tokens to windows; the inverse of `tokenize`.

        Parameters
        ----------
        y_BNP : Tensor, [B, M, P]
            Values by token.

        Returns
        -------
        Tensor, [B, C, T]
            Signal.
        """
        return y_BNP.unflatten(1, (-1, self.config.encoder.tokens)).flatten(-2)

    def targets(self, x_BCT: Tensor, **inputs: Tensor) -> Tensor:
        """What the decoder is asked for.

        Parameters
        ----------
        x_BCT : Tensor, [B, C or more, T]
            Scaled signal.
        **inputs : Tensor
            What `prepare` gave.

        Returns
        -------
        Tensor, [B, M, P], float32 or float64
            Values by token; each token standardised where the config says so.
        """
        return super().targets(x_BCT[:, : inputs["positions_BC3"].shape[1]])

    def reconstruct(self, x_BCT: Tensor, keep_BK: Tensor, **inputs: Tensor) -> Tensor:
        """Predict every token from the visible ones.

        Parameters
        ----------
        x_BCT : Tensor, [B, C or more, T]
            Scaled signal.
        keep_BK : Tensor, [B, K], int64
            Visible tokens.
        **inputs : Tensor
            What else `prepare` gave.

        Returns
        -------
        Tensor, [B, M, P]
            Predicted values by token.
        """
        positions_BC3, count_B = inputs["positions_BC3"], inputs.get("count_B")
        x_BKD = self.encoder(x_BCT, positions_BC3, count_B, keep_BK, inputs.get("seen_BK"))
        return self.decoder(x_BKD, keep_BK, positions_BC3, count_B)
