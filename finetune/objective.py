"""The training objective of diffusion models, which all papers in this project share, and its evaluation.

Tensor shapes: B trials; x is [B, channels, rows, columns] and contains latents or pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from finetune.diffusion import Condition, Denoiser
from finetune.foreign_models import PREDICTION_TYPES
from finetune.training.step_random import StepRandom
from pretrain.runs.distributed import World

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

Prediction = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Options of the diffusion objective."""

    min_snr: float = 0.0
    """Gamma of min-SNR weighting (Hang et al. 2023), usually 5. The loss of a trial is weighted by the signal-to-noise
    ratio (SNR) of its noise step, up to gamma, as if the network predicted the image; the weight is adapted to the
    quantity that the network predicts. 0 switches the weighting off."""
    offset_noise: float = 0.0
    """Strength of offset noise, usually 0.05 to 0.1: in training, a random value is added to the noise of each channel
    of an image, so that the model can learn very dark and very bright images. 0 adds nothing."""
    zero_snr: bool = False
    """True: rescale the noise schedule, so that the last step contains no signal (Lin et al. 2023). Sampling then
    starts at the last step. This needs a network that predicts the velocity or the image, not the noise."""


def check_objective(config: ObjectiveConfig, prediction: str | None, prefix: str = "") -> None:
    """Raise `ValueError` if options of the objective are invalid, or do not fit each other.

    Parameters
    ----------
    config : ObjectiveConfig
        Options of the objective.
    prediction : str or None
        Quantity that the network predicts; None if it is not yet known.
    prefix : str
        Text in front of the names of the keys, e.g. ``ddpm.``.
    """
    if not (config.min_snr >= 0 and config.offset_noise >= 0):
        raise ValueError(
            f"{prefix}min_snr and {prefix}offset_noise must be at least 0, got {config.min_snr} and "
            f"{config.offset_noise}"
        )
    if not config.zero_snr:
        return
    if prediction == "epsilon":
        raise ValueError(
            f"{prefix}zero_snr needs {prefix}prediction 'v_prediction' or 'sample', because the last step contains "
            "only noise, and the noise alone does not say what the image is"
        )
    if config.min_snr:
        raise ValueError(
            f"{prefix}min_snr and {prefix}zero_snr cannot be used together, because min_snr gives the last step, from "
            "which sampling starts, the weight 0; set one of the two keys to its default"
        )


def make_noising(noising_config: Any, config: ObjectiveConfig, prediction: Prediction | None = None) -> DDPMScheduler:
    """Make the scheduler that adds the noise in training.

    Parameters
    ----------
    noising_config : dict
        Config of a noise scheduler, e.g. that of a base model.
    config : ObjectiveConfig
        Options of the objective.
    prediction : str, optional
        Quantity that the network learns to predict; by default, that of `noising_config`.

    Returns
    -------
    DDPMScheduler
        The scheduler.

    Raises
    ------
    ValueError
        If the options do not fit the quantity that the network predicts.
    """
    from diffusers import DDPMScheduler

    changes: dict[str, Any] = {} if prediction is None else {"prediction_type": prediction}
    if config.zero_snr:
        # With "trailing", sampling starts at the last step of the forward process.
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    noising: Any = DDPMScheduler.from_config(noising_config, **changes)
    kind = noising.config.prediction_type
    if kind not in PREDICTION_TYPES:
        raise ValueError(
            f"the prediction_type '{kind}' is unknown; use a model with one of {', '.join(PREDICTION_TYPES)}"
        )
    check_objective(config, kind)
    if config.min_snr and noising.config.rescale_betas_zero_snr:
        raise ValueError(
            "the last step of the base model's noise schedule contains no signal (rescale_betas_zero_snr), and min_snr "
            "would give this step the weight 0; set min_snr to 0"
        )
    return noising


def compute_target(noising: Any, clean: Tensor, noise: Tensor, time_B: Tensor) -> Tensor:
    """Compute what the network should predict: the noise, the velocity or the image.

    Parameters
    ----------
    noising : DDPMScheduler
        Noise scheduler of the training; its ``prediction_type`` names the quantity.
    clean, noise : Tensor, shape (B, ...)
        Latents or pixels of the images, and the noise that is added to them.
    time_B : Tensor of int, shape (B,)
        Step of the forward process for each trial.

    Returns
    -------
    Tensor, shape (B, ...)
        Target of the network.
    """
    kind = noising.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return noising.get_velocity(clean, noise, time_B)
    if kind == "sample":
        return clean
    raise ValueError(f"the prediction_type '{kind}' is unknown; use one of {', '.join(PREDICTION_TYPES)}")


def weigh_steps(noising: Any, time_B: Tensor, gamma: float) -> Tensor:
    """Compute the min-SNR weight of each trial's error.

    The weight of an error of the predicted image is the smaller of the SNR and gamma. An error of the image is 1 / SNR
    times the same error of the noise, and 1 / (SNR + 1) times the same error of the velocity.

    Parameters
    ----------
    noising : DDPMScheduler
        Noise scheduler of the training.
    time_B : Tensor of int, shape (B,)
        Step of the forward process for each trial.
    gamma : float
        Largest weight of an error of the image; 0 gives every trial the weight 1.

    Returns
    -------
    Tensor, shape (B,)
        Weights.
    """
    if not gamma:
        return torch.ones(len(time_B), device=time_B.device)
    signal_B = noising.alphas_cumprod.to(time_B.device)[time_B].float()
    snr_B = signal_B / (1 - signal_B)
    divisor_B = {"epsilon": snr_B, "v_prediction": snr_B + 1, "sample": torch.ones_like(snr_B)}
    return snr_B.clamp_max(gamma) / divisor_B[noising.config.prediction_type]


def add_offset(noise: Tensor, strength: float, random: StepRandom) -> Tensor:
    """Add offset noise: one random value for each channel of each image.

    Parameters
    ----------
    noise : Tensor, shape (B, channels, rows, columns)
        Standard normal noise of this process's part of the batch.
    strength : float
        Standard deviation of the random values. With 0, no random numbers are drawn.
    random : StepRandom
        Random numbers of this training step.

    Returns
    -------
    Tensor, shape (B, channels, rows, columns)
        Noise for the training.
    """
    return noise + strength * random.normal(*noise.shape[:2], 1, 1) if strength else noise


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
    """Add noise to clean images, and measure how well a denoiser predicts its target (see `compute_target`).

    Parameters
    ----------
    denoise : callable
        Denoiser network.
    noising : DDPMScheduler
        Noise scheduler of the training, which adds the noise.
    clean, noise : Tensor, shape (B, ...)
        Latents or pixels of the images, and standard normal noise.
    time_B : Tensor of int, shape (B,)
        Step of the forward process (the process that adds noise) for each trial.
    condition : tuple of Tensor
        Condition that the denoiser gets for the trials.
    norm : str
        Norm of the error. l2: squared error; l1: absolute error.

    Returns
    -------
    Tensor, shape (B,)
        Prediction error of each trial, averaged over the values of x.
    """
    target = compute_target(noising, clean, noise, time_B)
    difference = denoise(noising.add_noise(clean, noise, time_B), time_B, condition).float() - target.float()
    errors = difference.abs() if norm == "l1" else difference.square()
    return errors.mean(dim=tuple(range(1, errors.ndim)))


class DenoisingTask(Protocol):
    """Interface of a module that contains a denoiser and computes its error."""

    def features(self, eeg: Any) -> Tensor:
        """Return the tokens or features [B, ...] of the EEG, from which the condition is computed."""
        ...

    def errors(self, features: Tensor, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Return the prediction error [B] of each trial."""
        ...


class DenoisingWatcher:
    """Compute the denoising loss on held-out trials, with the same noise at every evaluation.

    The loss is measured twice: with each trial's own EEG, and with the EEG of another trial. If a model ignores the
    EEG, the two losses are equal.

    Parameters
    ----------
    eeg : Tensor, shape (B, ...), or EncoderInput
        Input of the method `features` of the model's `DenoisingTask`: EEG of the trials, or vectors computed from the
        EEG; on the model's device.
    clean : Tensor, shape (B, ...)
        Latents or pixels of the trials' images.
    noise_steps : int
        Number of steps of the forward process.
    world : World, optional
        Processes that share the work; by default, this process does all the work.
    """

    REPEATS = 4
    BATCH = 64

    def __init__(self, eeg: Any, clean: Tensor, noise_steps: int, world: World | None = None) -> None:
        self.eeg, self.clean, self.world = eeg, clean, world or World()
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(self.REPEATS, *clean.shape, generator=generator)
        # Measure the loss of each trial `REPEATS` (4) times, each time with a noise level from another quarter of all
        # noise levels.
        quarters = torch.arange(self.REPEATS)[:, None]
        u = (torch.rand(self.REPEATS, len(clean), generator=generator) + quarters) / self.REPEATS
        self.time = (u * noise_steps).long()

    def __call__(self, task: DenoisingTask, pulse: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Measure the denoising loss of a model.

        Parameters
        ----------
        task : DenoisingTask
            The model with its loss, in evaluation mode.
        pulse : callable
            Function that is called before each batch. If the run was asked to stop (e.g. by SIGTERM), this function
            raises an error, which ends the evaluation.

        Returns
        -------
        dict
            ``loss``: denoising loss with each trial's own EEG. ``shuffled``: loss with the EEG of other trials.
        """
        n, device = len(self.eeg), self.eeg.device
        features = torch.cat([task.features(part) for part in self.eeg.split(self.BATCH)])
        # For the loss "shuffled", each trial gets the EEG of the trial that is n // 2 places away, because neighbouring
        # trials of a recording may show the same category.
        used = {"loss": features, "shuffled": features.roll(max(1, n // 2), 0)}
        parts = [
            (name, noise, time, at)
            for name in used
            for noise, time in zip(self.noise, self.time, strict=True)
            for at in torch.arange(n).split(self.BATCH)
        ]
        totals = dict.fromkeys(used, 0.0)
        # Every process must call `pulse` equally often, also if it has one part less to compute.
        for start in range(0, len(parts), self.world.size):
            pulse()
            for name, noise, time, at in parts[start + self.world.rank : start + self.world.rank + 1]:
                own = (self.clean[at].to(device), noise[at].to(device), time[at].to(device))
                totals[name] += float(task.errors(used[name][at.to(device)], *own).sum())
        sums = self.world.all_reduce_sum(*totals.values())
        return {name: total / (self.REPEATS * n) for name, total in zip(totals, sums, strict=True)}
