"""DreamDiffusion: Stable Diffusion fine-tuned on EEG (arXiv 2306.16934)."""

from finetune.papers import Paper

PAPER = Paper(
    command="finetune",
    help="fine-tune Stable Diffusion on EEG",
    module="finetune.stable_diffusion.train",
    kind="stable_diffusion",
    generator="finetune.stable_diffusion.model:StableDiffusionGenerator",
)
