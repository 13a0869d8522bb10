"""Diffusion that the papers share: the denoising loss, its measurement on held-out trials, and the sampler.

The network is a denoiser ``(x_t, t, condition)``. It predicts the noise in ``x_t`` or the velocity, as the noising
scheduler's ``prediction_type`` says. The condition is a tuple of tensors with the batch first; None stands for a part
that a model does not have.

Shapes: B trials; x is [B, channels, rows, columns], latents or pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Condition = tuple[Tensor | None, ...]
Denoiser = Callable[[Tensor, Tensor, Any], Tensor]


def denoising_errors(
    denoise: Denoiser,
    noising: Any,
    clean: Tensor,
    noise: Tensor,
    time_B: Tensor,
    condition: Condition,
    *,
    norm: str = "l2",
) -> Tensor:
    """Add noise to clean images and measure how well a denoiser finds it.

    Parameters
    ----------
    denoise : callable
        The denoiser.
    noising : DDPMScheduler
        The forward process of training.
    clean, noise : Tensor, shape (B, ...)
        Latents or pixels of the images, and standard normal noise.
    time_B : Tensor of int, shape (B,)
        Step of the forward process of each trial.
    condition : tuple of Tensor
        Condition of the trials.
    norm : str
        l2: squared error; l1: absolute error.

    Returns
    -------
    Tensor, shape (B,)
        Mean error of each trial.
    """
    target = noise
    if noising.config.prediction_type == "v_prediction":
        target = noising.get_velocity(clean, noise, time_B)
    difference = denoise(noising.add_noise(clean, noise, time_B), time_B, condition).float() - target.float()
    errors = difference.abs() if norm == "l1" else difference.square()
    return errors.mean(dim=tuple(range(1, errors.ndim)))


def draw_noise(shape: tuple[int, ...], seeds: list[int], device: Any) -> Tensor:
    """Draw the noise that the images of some trials start from.

    Parameters
    ----------
    shape : tuple of int
        Shape of one trial's noise.
    seeds : list of int
        One seed a trial. A trial's noise depends on its own seed alone.
    device : torch.device
        Device of the result. The numbers are drawn on the CPU, so that they are the same on every device.

    Returns
    -------
    Tensor of float32, shape (B, ...)
        Standard normal noise.
    """
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(parts).to(device)


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
) -> Tensor:
    """Turn noise into images, step by step.

    Parameters
    ----------
    denoise : callable
        The denoiser, in evaluation mode.
    scheduler : diffusers scheduler
        The solver, e.g. DDIM or DPM-Solver++.
    noise : Tensor, shape (B, ...)
        From `draw_noise`.
    condition : tuple of Tensor
        Condition of the trials.
    null_condition : tuple of Tensor, optional
        Condition without EEG, of the same shapes; needed for guidance.
    steps : int
        Denoising steps.
    guidance_scale : float
        1: the prediction under the condition. Above 1: classifier-free guidance, which moves the prediction further
        away from that under the null condition.

    Returns
    -------
    Tensor, shape (B, ...)
        Latents or pixels.
    """
    guided = guidance_scale != 1
    if guided:
        assert null_condition is not None
        # Both predictions come from one batch of twice the size: B trials with their EEG, then B without.
        condition = tuple(
            None if own is None or null is None else torch.cat([own, null])
            for own, null in zip(condition, null_condition, strict=True)
        )
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        x_in = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, time)
        guess = denoise(x_in, time, condition)
        if guided:
            own, null = guess.chunk(2)
            guess = null + guidance_scale * (own - null)
        x = scheduler.step(guess, time, x).prev_sample
    return x


class DenoisingTask(Protocol):
    """A module that trains a denoiser."""

    def features(self, eeg: Tensor) -> Tensor:
        """Return the EEG's tokens or feature, [B, ...]; the condition is computed from them."""
        ...

    def errors(self, features: Tensor, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Return the error of each trial, [B]."""
        ...


class DenoisingWatcher:
    """Denoising loss on held-out trials, under the same noise at every validation.

    The loss is measured twice: with each trial's own EEG and with another trial's. A model that ignores the EEG has
    the same loss in both cases.

    Parameters
    ----------
    eeg : Tensor, shape (B, ...)
        EEG of the trials, as the task's `features` takes it, on the device of the model.
    clean : Tensor, shape (B, ...)
        Latents or pixels of their images.
    noise_steps : int
        Steps of the forward process.
    """

    REPEATS = 4
    BATCH = 64

    def __init__(self, eeg: Tensor, clean: Tensor, noise_steps: int) -> None:
        self.eeg, self.clean = eeg, clean
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(self.REPEATS, *clean.shape, generator=generator)
        # Stratified: each repeat of a trial comes from another quarter of the noise levels.
        quarters = torch.arange(self.REPEATS)[:, None]
        u = (torch.rand(self.REPEATS, len(clean), generator=generator) + quarters) / self.REPEATS
        self.time = (u * noise_steps).long()

    def __call__(self, task: DenoisingTask, pulse: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Measure a model.

        Parameters
        ----------
        task : DenoisingTask
            In evaluation mode.
        pulse : callable
            Called before each batch; `fit` interrupts the evaluation there if a stop was requested.

        Returns
        -------
        dict
            ``loss`` with the trials' own EEG, ``shuffled`` with another trial's.
        """
        n, device = len(self.eeg), self.eeg.device
        features = torch.cat([task.features(part) for part in self.eeg.split(self.BATCH)])
        # Half the split away: trials that follow each other in a recording may show the same category.
        used = {"loss": features, "shuffled": features.roll(max(1, n // 2), 0)}
        totals = dict.fromkeys(used, 0.0)
        for name, given in used.items():
            for noise, time in zip(self.noise, self.time, strict=True):
                for at in torch.arange(n).split(self.BATCH):
                    pulse()
                    parts = (self.clean[at].to(device), noise[at].to(device), time[at].to(device))
                    totals[name] += float(task.errors(given[at.to(device)], *parts).sum())
        return {name: total / (self.REPEATS * n) for name, total in totals.items()}
