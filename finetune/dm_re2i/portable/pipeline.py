"""Sampling of images with EG-DDPM, and the diffusers pipeline in the package of every model.

Tensor shapes: B trials, C channels, T time points, D width of the vector, H rows, W columns.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from finetune.diffusion import (
    SamplerName,
    Sampling,
    choose_sampling,
    draw_noise,
    make_generators,
    make_scheduler,
    sample,
)
from finetune.images import to_pixels


@torch.no_grad()
def sample_images(
    unet: Any,
    noising_config: Any,
    e_BD: Tensor,
    sampling: Sampling,
    seeds: list[int],
    *,
    keep: bool = True,
) -> Tensor:
    """Generate images from EEG features.

    Parameters
    ----------
    unet : GuidedUNet
        The network in evaluation mode.
    noising_config : dict
        Config of the noise scheduler that was used in training.
    e_BD : Tensor, shape (B, D)
        EEG features, on the network's device.
    sampling : Sampling
        Sampler, number of steps and guidance.
    seeds : list of int
        One seed for each trial. A trial's noise depends only on the trial's seed.
    keep : bool
        False: use the null condition in place of the features.

    Returns
    -------
    Tensor, shape (B, 3, H, W)
        Images with values from about -1 to 1.
    """
    size, device, generators = unet.config.sample_size, e_BD.device, make_generators(seeds)
    guidance_scale = sampling.guidance_scale if keep else 1.0
    kept_B = torch.full((len(seeds),), keep, dtype=torch.bool, device=device)
    return sample(
        lambda x, time, condition: unet(x, time, *condition),
        # With "trailing", the first denoising step is the noisiest training step, which fits the start from pure noise.
        make_scheduler(sampling.sampler, noising_config, timestep_spacing="trailing"),
        draw_noise((unet.config.in_channels, size, size), generators, device).to(e_BD.dtype),
        (e_BD, kept_B) if guidance_scale != 1 or not keep else (e_BD, None),
        (e_BD, ~kept_B),
        steps=sampling.steps,
        guidance_scale=guidance_scale,
        generators=generators,
    )


class EEGToImagePipeline(DiffusionPipeline):
    """Generate images from EEG with EG-DDPM.

    Parameters
    ----------
    unet : Module
        Backbone that predicts the noise.
    scheduler : DDPMScheduler
        Noise scheduler of the training.
    evrnet, encoder : Module, optional
        Network that computes the guiding vector from EEG. A package has either `evrnet` or `encoder`.
    sampler : str
        Sampler that is used by default: ddpm or ddim.

    Examples
    --------
    >>> pipeline = DiffusionPipeline.from_pretrained("run/model", trust_remote_code=True)  # doctest: +SKIP
    >>> pipeline(eeg_BCT, seeds=[0, 1]).images[0].save("image.png")  # doctest: +SKIP
    """

    _optional_components: ClassVar[list[str]] = ["evrnet", "encoder"]

    def __init__(self, unet: Any, scheduler: Any, evrnet: Any = None, encoder: Any = None, sampler: str = "ddim"):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, evrnet=evrnet, encoder=encoder)
        self.register_to_config(sampler=sampler)

    @torch.no_grad()
    def __call__(
        self,
        eeg: Any,
        seeds: list[int] | None = None,
        *,
        sampler: SamplerName | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Generate one image for each trial.

        Parameters
        ----------
        eeg : ndarray or Tensor, shape (B, C, T)
            EEG in microvolts, with up to 128 channels, preprocessed as the file ``preprocess.json`` of the package
            says.
        seeds : list of int, optional
            One seed for each trial; by default 0 to B - 1. The noise of a trial depends only on the trial's seed.
        sampler : str, optional
            Name of the sampler, ddpm or ddim; by default the sampler of the model.
        num_inference_steps : int, optional
            Number of denoising steps; by default all steps of the training for ddpm, and 25 for ddim.
        guidance_scale : float, optional
            Scale of the classifier-free guidance; by default 2, or 1 for a model without a null condition.
        output_type : str
            pil: images of Pillow. np: an array of uint8, shape (B, H, W, 3).

        Returns
        -------
        ImagePipelineOutput
            The images.

        Raises
        ------
        ValueError
            If the settings do not fit the model, the number of seeds is not the number of trials, or a trial has too
            many channels.
        """
        if sampler not in (None, "ddpm", "ddim") or output_type not in ("pil", "np"):
            raise ValueError("use the sampler ddpm or ddim, and the output_type pil or np")
        eeg_BCT = torch.as_tensor(np.asarray(eeg) if not isinstance(eeg, Tensor) else eeg).to(self.unet.device)
        seeds = list(range(len(eeg_BCT))) if seeds is None else seeds
        if len(seeds) != len(eeg_BCT):
            raise ValueError(
                f"the list of seeds has {len(seeds)} entries; give one seed for each of the {len(eeg_BCT)} trials"
            )
        has_null = self.unet.null is not None
        sampling = choose_sampling(
            self.scheduler.config,
            sampler=sampler or self.config.sampler,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            dropped=has_null,
            has_null=has_null,
        )
        guide = self.evrnet if self.evrnet is not None else self.encoder
        images = to_pixels(sample_images(self.unet, self.scheduler.config, guide(eeg_BCT), sampling, seeds))
        return ImagePipelineOutput(images=images if output_type == "np" else self.numpy_to_pil(images / 255.0))
