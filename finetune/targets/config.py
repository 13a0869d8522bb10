"""Keys that choose what the embedding of a trial learns to match."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """What the embedding of a trial learns to match: the embedding of its image, of a text, or both."""

    model: str = ""
    """Frozen model: a directory, or a hub id such as openai/clip-vit-large-patch14. Images can be embedded by CLIP,
    SigLIP, DINOv2 (with or without registers) and ViT, texts by CLIP."""
    layer: int | None = None
    """Hidden layer of the image model that is the embedding of an image. 0 is the input of the first layer, and -1 is
    the output of the last layer. Empty: the final embedding."""
    image_weight: float = 1.0
    """Weight of the loss between the EEG and the image. 0: images are not embedded."""
    text_weight: float = 0.0
    """Weight of the loss between the EEG and the text of the image. 0: texts are not embedded."""
    text: Literal["captions", "labels"] = "captions"
    """Text of an image. captions: its caption, or the name of its category if it has no caption. labels: the name of
    its category."""

    def __post_init__(self) -> None:
        if self.image_weight < 0 or self.text_weight < 0 or self.image_weight + self.text_weight == 0:
            raise ValueError(
                "'target.image_weight' and 'target.text_weight' must be at least 0, and one of them above 0, got "
                f"{self.image_weight} and {self.text_weight}"
            )
        if self.text_weight and self.layer is not None:
            raise ValueError(
                "'target.layer' and 'target.text_weight' cannot be used together, because a hidden layer of an image "
                "model is not the space of texts; leave one of them out"
            )
