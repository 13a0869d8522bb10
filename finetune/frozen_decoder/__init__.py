"""Frozen decoder: an image embedding predicted from EEG goes into a pretrained image generator that is not trained."""

from finetune.papers import Paper

PAPER = Paper(
    command="decode",
    help="predict image embeddings from EEG for a frozen image generator (IP-Adapter, unCLIP)",
    module="finetune.frozen_decoder.train",
    kind="frozen_decoder",
    generator="finetune.frozen_decoder.model:FrozenDecoderGenerator",
    launcher=None,
)
