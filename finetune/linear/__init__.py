"""Linear baseline: ridge regression from time courses to image features, which chooses a training image to show."""

from finetune.papers import Paper

PAPER = Paper(
    command="linear",
    help="train the linear baseline, which shows a training image for each trial",
    module="finetune.linear.train",
    kind="linear",
    generator="finetune.linear.model:LinearGenerator",
    launcher=None,
)
