"""The samplers of diffusion models, which all papers in this project share.

A denoiser is a function ``(x_t, t, condition)`` that runs the network: ``x_t`` are noisy images, and ``t`` are steps of
the forward process (the process that adds noise). The noise scheduler's ``prediction_type`` says whether the network
predicts the noise in ``x_t`` or the velocity. The condition is a tuple of tensors; the first axis of each tensor is the
batch. An entry of the tuple is None if the model does not use this entry.

Tensor shapes: B trials; x is [B, channels, rows, columns] and contains latents or pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Condition = tuple[Tensor | None, ...]
Denoiser = Callable[[Tensor, Tensor, Any], Tensor]
SamplerName = Literal["ddpm", "ddim", "dpmsolver++", "plms", "euler", "lcm"]
DEFAULT_STEPS = {"ddim": 25, "dpmsolver++": 25, "plms": 250, "euler": 4, "lcm": 4}
"""Default number of denoising steps of each sampler. The default of the sampler ddpm is the number of steps of the
forward process."""
FEW_STEP = ("euler", "lcm")
"""Samplers for base models that were distilled to a few steps; such models are used without guidance."""
LCM_STEPS = 50
"""Largest number of steps of the sampler lcm, as in the training of latent consistency models."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled: the sampler, its number of denoising steps, and the guidance."""

    sampler: SamplerName
    """ddpm: the ancestral sampler of Ho et al. (2020), which adds noise at every step. ddim: the deterministic sampler
    of Song et al. (2021), which needs few steps. dpmsolver++: a deterministic solver of second order. plms: the pseudo
    linear multistep method of Liu et al. (2022), with which DreamDiffusion samples. euler: Euler's method that starts
    at the last step of the forward process, for base models that were distilled to 1 to 4 steps. lcm: the sampler of
    latent consistency models (Luo et al., 2023), which adds noise at every step but the last."""
    steps: int
    """Number of denoising steps."""
    guidance_scale: float
    """Scale of the classifier-free guidance; 1 switches guidance off."""


def choose_sampling(
    noising_config: Any,
    *,
    sampler: SamplerName,
    steps: int | None,
    guidance_scale: float | None,
    dropped: bool,
    has_null: bool,
) -> Sampling:
    """Fill in the sampling settings that were not given, and refuse settings that do not fit the model.

    Parameters
    ----------
    noising_config : dict
        Config of the noise scheduler that was used in training.
    sampler : str
        Name of the sampler.
    steps : int or None
        Number of denoising steps. None: for the sampler ddpm, the number of steps of the forward process; for the other
        samplers, see `DEFAULT_STEPS`.
    guidance_scale : float or None
        Scale of the classifier-free guidance. None: the scale is 2 if the model was trained with dropped conditions and
        the sampler is not one of `FEW_STEP`, otherwise 1.
    dropped : bool
        Whether conditions were dropped in the training.
    has_null : bool
        Whether the model has a null condition, which guidance needs.

    Returns
    -------
    Sampling
        Complete settings.

    Raises
    ------
    ValueError
        If the sampler is unknown or cannot use the noise schedule, if `steps` is below 1 or larger than the number of
        steps of the forward process, or if guidance is used without a null condition.
    """
    if sampler not in (known := ("ddpm", *DEFAULT_STEPS)):
        raise ValueError(f"the sampler '{sampler}' is unknown; use one of {', '.join(known)}")
    if sampler == "plms" and (
        noising_config.get("rescale_betas_zero_snr") or noising_config.get("prediction_type") == "sample"
    ):
        raise ValueError(
            "the sampler plms cannot be used with a model that was trained with zero_snr or with prediction 'sample'; "
            "use ddim or dpmsolver++"
        )
    most = int(noising_config["num_train_timesteps"])
    if steps is None:
        steps = most if sampler == "ddpm" else min(DEFAULT_STEPS[sampler], most)
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    if sampler == "lcm" and steps > LCM_STEPS:
        raise ValueError(f"steps is {steps}; it must not be above {LCM_STEPS} for the sampler lcm")
    if steps > most:
        raise ValueError(
            f"steps is {steps}; it must not be above {most}, the number of noise steps with which the model was trained"
        )
    if guidance_scale is None:
        guidance_scale = 2.0 if dropped and sampler not in FEW_STEP else 1.0
    if guidance_scale != 1 and not has_null:
        raise ValueError(
            "this model was trained with drop 0 (no dropped conditions), so it cannot use guidance; set "
            "guidance_scale to 1"
        )
    return Sampling(sampler=sampler, steps=steps, guidance_scale=guidance_scale)


def make_scheduler(sampler: SamplerName, noising_config: Any, **changes: Any) -> Any:
    """Make the diffusers scheduler of a sampler.

    Parameters
    ----------
    sampler : str
        Name of the sampler.
    noising_config : dict
        Config of the noise scheduler that was used in training.
    **changes : Any
        Entries that replace entries of `noising_config`.

    Returns
    -------
    diffusers scheduler
        Scheduler that computes the denoising steps.
    """
    import diffusers

    extra: dict[str, Any] = {}
    if sampler == "dpmsolver++":
        extra = {"algorithm_type": "dpmsolver++"}
    elif sampler == "plms":
        extra = {"skip_prk_steps": True}
    elif sampler == "euler":
        # A distilled model denoises from the last step of the forward process, so the first step must be that step.
        extra = {"timestep_spacing": "trailing"}
    elif sampler == "lcm":
        extra = {"original_inference_steps": min(LCM_STEPS, int(noising_config["num_train_timesteps"]))}
    kinds = {
        "ddpm": diffusers.DDPMScheduler,
        "ddim": diffusers.DDIMScheduler,
        "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
        "plms": diffusers.PNDMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "lcm": diffusers.LCMScheduler,
    }
    return kinds[sampler].from_config(noising_config, **{**extra, **changes})


def make_generators(seeds: list[int]) -> list[torch.Generator]:
    """Make one random generator on the CPU for each trial, so that the noise of a trial depends only on its seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(shape: tuple[int, ...], generators: list[torch.Generator], device: Any) -> Tensor:
    """Draw the noise from which the sampler starts for each trial.

    Parameters
    ----------
    shape : tuple of int
        Shape of one trial's noise.
    generators : list of torch.Generator
        Generators that `make_generators` returned.
    device : torch.device
        Device of the result. The noise is drawn on the CPU, so that the noise is equal on every device.

    Returns
    -------
    Tensor of float32, shape (B, ...)
        Standard normal noise.
    """
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


def count_steps(steps: int, strength: float) -> int:
    """Return how many of the denoising steps are done if the denoising starts from an image with noise."""
    return min(int(steps * strength), steps)


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: Any,
    noise: Tensor,
    condition: Condition,
    null_condition: Condition | None,
    *,
    steps: int,
    guidance_scale: float,
    generators: list[torch.Generator],
    start: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Turn noise into images with a denoiser, step by step.

    Parameters
    ----------
    denoise : callable
        Denoiser network in evaluation mode.
    scheduler : diffusers scheduler
        Scheduler that computes each denoising step, from `make_scheduler`.
    noise : Tensor, shape (B, ...)
        Noise that `draw_noise` returned.
    condition : tuple of Tensor
        Condition that the denoiser gets for the trials.
    null_condition : tuple of Tensor, optional
        Condition without EEG, with the same shapes as `condition`; only needed for guidance.
    steps : int
        Number of denoising steps.
    guidance_scale : float
        Scale s of the classifier-free guidance. The sampler uses the prediction ``null + s * (own - null)``, where own
        is the prediction with the condition, and null is the prediction with the null condition. With s = 1, only own
        is computed.
    generators : list of torch.Generator
        Generator of each trial. With the samplers ddpm and lcm, the noise of each step is drawn from the trial's own
        generator, so a trial's image does not depend on the other trials of the batch.
    start : Tensor, shape (B, ...), optional
        Latents or pixels from which the denoising starts, after noise was added to them; by default, the denoising
        starts from noise alone.
    strength : float
        Share of the steps that are done if `start` is given: the last ones. `count_steps` says how many these are.

    Returns
    -------
    Tensor, shape (B, ...)
        Latents or pixels of the generated images.
    """
    guided = guidance_scale != 1
    if guided:
        assert null_condition is not None
        # Compute both predictions in one batch of 2 B trials: B trials with EEG, then the same trials without EEG.
        condition = tuple(
            None if own is None or null is None else torch.cat([own, null])
            for own, null in zip(condition, null_condition, strict=True)
        )
    scheduler.set_timesteps(steps, device=noise.device)
    # The scheduler of the sampler plms draws no noise, so it takes no generators.
    draws = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x, times = noise * scheduler.init_noise_sigma, scheduler.timesteps
    if start is not None:
        first = (steps - count_steps(steps, strength)) * scheduler.order
        times = times[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        x = scheduler.add_noise(start, noise, times[:1].repeat(len(start)))
    for time in times:
        x_in = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, time)
        guess = denoise(x_in, time, condition)
        if guided:
            own, null = guess.chunk(2)
            guess = null + guidance_scale * (own - null)
        x = scheduler.step(guess, time, x, **draws).prev_sample
    return x
