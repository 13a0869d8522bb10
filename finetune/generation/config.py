"""Config of ``dreamscale generate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

Control = Literal[
    "none", "shuffle", "shuffle_within", "noise", "no_eeg", "class", "time", "baseline", "eyes", "nearest"
]
"""What the images are made from; see `GenerateConfig.control`."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generate images from the EEG trials of one split of an EEG-image dataset."""

    RENAMED: ClassVar[dict[str, str]] = {"batch": "batch_size"}

    model: str
    """Run directory of a fine-tuned model, or the folder `model` in this run directory."""
    dataset: str
    """Path of the EEG-image dataset, which must have the same preprocessing as the model's training data."""
    output: str
    """Output directory for images/, real/ and generated.json. If this directory holds an earlier result of other
    settings, the new result replaces it when all new images are finished. Until then, finished images are in the folder
    OUTPUT.partial. After a stop, the same command keeps the finished images and generates the remaining images."""
    split: str = "test"
    """Name of the split from which the trials are taken."""
    control: Control = "none"
    """none: use the EEG of each trial. shuffle: use the EEG of a random other trial. shuffle_within: use the EEG of a
    nearby trial of the same recording that shows another image. noise: use noise with the spectrum of the trial's EEG.
    no_eeg: use no EEG, as a lower limit (floor). class: use the true category in place of the EEG, as an upper limit
    (ceiling): EG-DDPM gets the mean feature of the category's train trials; Stable Diffusion and a frozen decoder get
    the caption of the image. time, baseline, eyes: show a training image of a category that is predicted without a
    brain response, from the time of the trial, from the EEG before the image, or from eye and face channels. nearest:
    show the training image with the most similar EEG. If a control cannot be made from the data, the result says why
    and has no images."""
    controls: list[Control] = field(default_factory=list)
    """Controls that the command generates after the images of `control`, with the same loaded model. The images of a
    control NAME are written to the folder OUTPUT-NAME, where `dreamscale evaluate OUTPUT` finds them. After a stop, the
    same command keeps the finished results."""
    sampler: Literal["ddpm", "ddim", "dpmsolver++", "plms", "euler", "lcm"] | None = None
    """Sampler. ddpm: the ancestral sampler, which adds noise at every step. ddim: a deterministic sampler that needs
    few steps. dpmsolver++: a deterministic solver of second order. plms: the sampler of DreamDiffusion. euler, lcm: for
    base models that were distilled to 1 to 4 steps, such as SD-Turbo (euler) and latent consistency models (lcm).
    Empty: use the default sampler of the model. An EG-DDPM can use ddpm and ddim."""
    steps: int | None = None
    """Number of denoising steps for each image. Empty: for the sampler ddpm, the number of steps of the model's forward
    process (the process that adds noise); for ddim and dpmsolver++, 25; for plms, 250; for euler and lcm, 4."""
    guidance_scale: float | None = None
    """Scale of the classifier-free guidance; 1 switches guidance off. Empty: the scale is 2, or 1 for the samplers
    euler and lcm and for a model that was trained without dropped conditions (drop 0). A scale other than 1 needs a
    model that was trained with dropped conditions."""
    samples: int = 1
    """Number of images for each trial, each from other noise. The first image of each trial, in images/, does not
    depend on this number, and `dreamscale evaluate` scores only the first image. The other images are in samples/1,
    samples/2 and so on. The controls that show training images have one image for each trial."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format in which the denoising network of Stable Diffusion computes. With bf16, the network needs half the
    memory, and is faster on a GPU. Encoder, projector and VAE always compute in fp32."""
    average_repeats: int = 0
    """Largest number of presentations of the same image to the same subject that are averaged to one trial. 0: average
    all presentations, as papers do with test images. 1: average nothing."""
    limit: int = 0
    """Largest number of trials; the trials are spread evenly over the split. 0 uses all trials."""
    batch_size: int = 32
    """Number of trials in one forward pass. The batch size does not change the noise from which an image starts."""
    seed: int = 0
    """Seed for the noise, for shuffling the trials' EEG, and for choosing training images."""
    num_processes: int = 1
    """Number of processes among which the batches are divided. The number of processes does not change the images."""
    restarts: int = 0
    """How many times 'dreamscale generate' restarts its processes after one of them was killed. Finished images are
    kept."""
    device: str = "auto"
    """Device of the computation: auto, cpu or cuda."""

    def __post_init__(self) -> None:
        for name in ("steps", "samples", "batch_size", "num_processes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.restarts < 0:
            raise ValueError(f"restarts must be 0 or more, got {self.restarts}")
        repeated = {name for name in self.controls if [self.control, *self.controls].count(name) > 1}
        if repeated:
            raise ValueError(
                f"'controls' repeats a control, or the control of the key 'control': {', '.join(repeated)}; name each "
                "control once"
            )
        if self.average_repeats < 0:
            raise ValueError(f"average_repeats must be 0 (all) or more, got {self.average_repeats}")
        if self.limit < 0:
            raise ValueError(f"limit must be 0 (all trials) or more, got {self.limit}")
