"""Linear baseline: ridge regression from time courses to images, and the training image that fits best."""

from finetune.papers import Paper

PAPER = Paper(
    command="linear",
    help="train the linear baseline, which shows a training image for each trial",
    module="finetune.linear.train",
    config="finetune.linear.train:LinearConfig",
    kind="linear",
    generator="finetune.linear.model:LinearGenerator",
    launcher=None,
)
