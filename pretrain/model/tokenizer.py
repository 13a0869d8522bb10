"""What must be known about each tokenizer before a model is built: numbers of tokens, and texts for the model card.

A tokenizer turns a window of EEG into tokens. Only `pretrain.model.build` chooses classes by the name of the tokenizer.
All other code calls methods of the encoder, or (through `pretrain.model.config.EncoderConfig`) the methods in this
file. To add a tokenizer, write one class in this file, one encoder and one autoencoder, and add one line to
`pretrain.model.build`.
"""

from __future__ import annotations

from typing import ClassVar


class TemporalTokenizer:
    """The temporal tokenizer: each token holds a few time samples of all channels, as in DreamDiffusion."""

    by_channel: ClassVar[bool] = False
    """True if each token holds the signal of one channel only; False if it holds the signal of all channels."""
    about: ClassVar[str] = "A token holds a few neighbouring time samples of all channels."
    """Sentence for the model card that says what a token contains."""

    def token_rows(self, channels: int) -> int:
        """Return how many rows of tokens a window gives; a row has one token for each `patch` time samples."""
        return 1

    def signal_rows(self, channels: int, padded: int) -> int:
        """Return how many rows (channels) of a window the model reads.

        A window has `channels` recorded channels, and is padded to `padded` rows.
        """
        return padded

    def scale_rows(self, padded: int) -> str:
        """Return a text for the model card: the rows (channels) over which the scale of a window is computed."""
        return f"its {padded} padded rows"

    def program_usage(self, padded: int, samples: int) -> str:
        """Return a text for the model card that explains how to call the exported program."""
        return (
            f'`torch.export.load("encoder.pt2").module()(x)` with x `[windows, {padded}, {samples}]`, preprocessed as '
            "described below, padded by repeating channels in turn, and scaled."
        )


class MontageTokenizer:
    """The montage tokenizer: a token holds a few time samples of one channel and its electrode's position."""

    by_channel: ClassVar[bool] = True
    """True if each token holds the signal of one channel only; False if it holds the signal of all channels."""
    about: ClassVar[str] = (
        "The encoder identifies a channel by the position of its electrode, so the encoder takes any montage, with the "
        "channels in any order."
    )
    """Sentence for the model card that says how the encoder identifies channels."""

    def token_rows(self, channels: int) -> int:
        """Return how many rows of tokens a window gives; a row has one token for each `patch` time samples."""
        return channels

    def signal_rows(self, channels: int, padded: int) -> int:
        """Return how many rows of a window the model reads: the recorded channels."""
        return channels

    def scale_rows(self, padded: int) -> str:
        """Return a text for the model card: the rows (channels) over which the scale of a window is computed."""
        return "its recorded channels"

    def program_usage(self, padded: int, samples: int) -> str:
        """Return a text for the model card that explains how to call the exported program."""
        return (
            '`torch.export.load("encoder.pt2").module()(x, positions, count)` with x `[windows, channels, '
            f"{samples}]`, preprocessed and scaled as described below, positions `[windows, channels, 3]` in metres "
            "(NaN for an unknown position), and `count` `[windows]`, the number of recorded channels, as int64."
        )


TOKENIZERS: dict[str, TemporalTokenizer | MontageTokenizer] = {
    "temporal": TemporalTokenizer(),
    "montage": MontageTokenizer(),
}
"""The tokenizer for each name that a config can have."""
