"""Facts about each tokenizer that are needed before a model is built: its number of tokens and its description.

A tokenizer turns a window of EEG into tokens. Other code never compares the tokenizer's name. Other code calls the
methods below through `pretrain.model.config.EncoderConfig`, or methods of the encoder. To add a tokenizer, write one
class in this file, one encoder and one autoencoder, and add one line to `pretrain.model.build`.
"""

from __future__ import annotations

from typing import ClassVar


class TemporalTokenizer:
    """The temporal tokenizer: each token holds a few time samples of all channels, as in DreamDiffusion."""

    by_channel: ClassVar[bool] = False
    """True if each token belongs to a single channel."""
    about: ClassVar[str] = "A token is a moment of all channels together."
    """Sentence that explains the tokens in the model card."""

    def token_rows(self, channels: int) -> int:
        """Return the number of rows of tokens in a window; each row has one token for each time step."""
        return 1

    def signal_rows(self, channels: int, padded: int) -> int:
        """Return how many rows of signal the model reads, if the padded window has `padded` rows."""
        return padded

    def scale_rows(self, padded: int) -> str:
        """Return a text for the model card that names the rows over which the scale of a window is computed."""
        return f"its {padded} padded rows"

    def program_usage(self, padded: int, samples: int) -> str:
        """Return a text for the model card that explains how to call the exported program."""
        return (
            f'`torch.export.load("encoder.pt2").module()(x)` with x `[windows, {padded}, {samples}]`, preprocessed as '
            "said below, padded by repeating channels in turn, and scaled."
        )


class MontageTokenizer:
    """The montage tokenizer: each token holds a few time samples of one channel, and its electrode's position."""

    by_channel: ClassVar[bool] = True
    """True if each token belongs to a single channel."""
    about: ClassVar[str] = "It knows channels by their electrode's position: any montage, in any order."
    """Sentence that explains the tokens in the model card."""

    def token_rows(self, channels: int) -> int:
        """Return the number of rows of tokens in a window; each row has one token for each time step."""
        return channels

    def signal_rows(self, channels: int, padded: int) -> int:
        """Return how many rows of signal the model reads, if the padded window has `padded` rows."""
        return channels

    def scale_rows(self, padded: int) -> str:
        """Return a text for the model card that names the rows over which the scale of a window is computed."""
        return "its true channels"

    def program_usage(self, padded: int, samples: int) -> str:
        """Return a text for the model card that explains how to call the exported program."""
        return (
            '`torch.export.load("encoder.pt2").module()(x, positions, count)` with x `[windows, channels, '
            f"{samples}]`, preprocessed and scaled as said below, positions `[windows, channels, 3]` in metres (NaN "
            "where not known), and the number of true channels of each window as int64."
        )


TOKENIZERS: dict[str, TemporalTokenizer | MontageTokenizer] = {
    "temporal": TemporalTokenizer(),
    "montage": MontageTokenizer(),
}
"""The tokenizer for each name that a config can give."""
