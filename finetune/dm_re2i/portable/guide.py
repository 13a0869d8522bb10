"""The part of a DM-RE2I model that turns EEG into the guiding vector, in a form that runs without this project.

`finetune.dm_re2i.portable.write` copies the classes of this module, with all code that they need, into the package
folders of models. There, these classes read the same files as the classes of `finetune.dm_re2i.model`.

Tensor shapes: B trials, T time points, D width of the vector.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from torch import Tensor

from finetune.portable.eeg import PortableEncoder, PortableNetwork


class PortableGuide(PortableNetwork):
    """Compute the vector that guides EG-DDPM with a classifier of EEG, which returns features and class scores.

    The arguments are those of `PortableNetwork`. The entry ``guide`` of `about` says which of the two is the vector.
    """

    NETWORK: ClassVar[Any] = None
    """Class of the network that the guide runs; the last line of the Python file in a model's package sets this
    class."""

    def embed(self, x_BCT: Tensor) -> Tensor:
        """Compute the vectors [B, D] of padded and scaled trials [B, 128, T]."""
        e_BD, logits_BK = self.network(x_BCT[:, None, : self.about["n_channels"]])
        return logits_BK if self.about["guide"] == "logits" else e_BD

    @classmethod
    def build(cls, values: dict[str, Any], about: dict[str, Any]) -> Self:
        """Build the guide with new weights, from the contents of the network's config.json and of eeg.json."""
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name != "kind"}
        return cls(cls.NETWORK(cls.NETWORK.CONFIG(**options)), about)


class PortableEncoderGuide(PortableEncoder):
    """Guide whose vector is the mean token of a pretrained encoder. The arguments are those of `PortableNetwork`."""

    def embed(self, x_BCT: Tensor) -> Tensor:
        """Compute the mean token [B, D] of padded and scaled trials [B, 128, T]."""
        return super().embed(x_BCT).mean(dim=1)
