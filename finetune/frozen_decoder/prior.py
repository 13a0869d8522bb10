"""Diffusion prior: sample an image embedding, given the embedding that was predicted from EEG.

A regression predicts the mean of all embeddings that fit the EEG, but the decoder needs one of these embeddings. The
prior is a small diffusion model of embeddings, as in DALL-E 2 (Ramesh et al., 2022).

Tensor shapes: B trials, P width of the embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.diffusion import Condition, draw_noise, make_scheduler, sample
from finetune.frozen_decoder.embeddings import EmbeddingScale
from finetune.linear.model import Floats
from finetune.objective import denoising_errors
from finetune.training.module_files import load_module, save_module

TIME = 128
"""Width of the embedding of the noise level."""


@dataclass(frozen=True, kw_only=True)
class PriorNetworkConfig:
    """Sizes of the network."""

    embedding: int
    """Width of the embeddings, P."""
    width: int
    """Width of the layers."""
    depth: int
    """Number of residual blocks."""


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.context = nn.LayerNorm(width), nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.layers(self.norm(x) + self.context(context))


class EmbeddingPrior(nn.Module):
    """Diffusion model of image embeddings, conditioned on predicted embeddings.

    All embeddings are scaled by `scale_target` and `scale_predicted`, so that their values have a variance of about 1.

    Parameters
    ----------
    config : PriorNetworkConfig
        Sizes of the network.
    """

    def __init__(self, config: PriorNetworkConfig) -> None:
        from diffusers import DDPMScheduler

        super().__init__()
        self.config = config
        self.noising = DDPMScheduler(
            num_train_timesteps=1000,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            clip_sample=False,
        )
        self.read_x = nn.Linear(config.embedding, config.width)
        self.read_condition = nn.Linear(config.embedding, config.width)
        self.read_time = nn.Sequential(nn.Linear(TIME, config.width), nn.SiLU(), nn.Linear(config.width, config.width))
        self.null_P = nn.Parameter(torch.zeros(config.embedding))
        self.blocks = nn.ModuleList([_Block(config.width) for _ in range(config.depth)])
        self.write = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.embedding))

    @property
    def noise_steps(self) -> int:
        """Number of steps of the forward process."""
        return int(self.noising.config["num_train_timesteps"])

    def denoise(self, x_BP: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Run the network on noisy embeddings."""
        from diffusers.models.embeddings import get_timestep_embedding

        (given_BP,) = condition
        time_B = time.to(x_BP.device).expand(len(x_BP))
        context = self.read_condition(given_BP) + self.read_time(get_timestep_embedding(time_B, TIME))
        x = self.read_x(x_BP)
        for block in self.blocks:
            x = block(x, context)
        return self.write(x)

    def features(self, eeg: Tensor) -> Tensor:
        """Return predicted embeddings without a change."""
        return eeg

    def errors(
        self, features: Tensor, clean: Tensor, noise: Tensor, time: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Compute the squared error of the network for each trial.

        Parameters
        ----------
        features : Tensor, [B, P]
            Predicted embeddings.
        clean, noise : Tensor, [B, P]
            Embeddings of the images, and the noise that is added to them.
        time : Tensor of int, [B]
            Step of the forward process for each trial.
        keep : Tensor of bool, [B], optional
            False for trials whose predicted embedding is dropped.

        Returns
        -------
        Tensor, [B]
            Mean squared error of each trial.
        """
        if keep is not None:
            features = torch.where(keep[:, None], features, self.null_P)
        return denoising_errors(self.denoise, self.noising, clean, noise, time, (features,))

    def forward(self, given: Tensor, clean: Tensor, noise: Tensor, time: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """Compute the training loss of a batch; the arguments are those of `errors`."""
        loss = self.errors(given, clean, noise, time, keep).mean()
        return {"loss": loss, "denoise": loss.detach()}

    @torch.no_grad()
    def sample(
        self, given_BP: Tensor, generators: list[torch.Generator], *, steps: int, guidance_scale: float
    ) -> Tensor:
        """Sample embeddings [B, P], given predicted embeddings."""
        return sample(
            self.denoise,
            make_scheduler("ddim", self.noising.config),
            draw_noise((self.config.embedding,), generators, given_BP.device),
            (given_BP,),
            (self.null_P.expand(len(given_BP), -1),),
            steps=steps,
            guidance_scale=guidance_scale,
            generators=generators,
        )

    def save_pretrained(self, folder: Path) -> None:
        """Write the prior to config.json and model.safetensors."""
        save_module(self, self.config, folder, "prior")

    @classmethod
    def from_pretrained(cls, folder: Path) -> EmbeddingPrior:
        """Read a prior that `save_pretrained` wrote, in evaluation mode."""
        return load_module(cls, PriorNetworkConfig, folder, "prior")


def scale_target(scale: EmbeddingScale, target_MP: Floats) -> Tensor:
    """Scale embeddings of images for the prior."""
    unit = scale.radius / math.sqrt(target_MP.shape[1])
    return torch.from_numpy((target_MP - scale.mean_P) / max(unit, 1e-12)).float()


def unscale_target(scale: EmbeddingScale, scaled_BP: Tensor) -> Floats:
    """Undo `scale_target`."""
    unit = scale.radius / math.sqrt(scaled_BP.shape[1])
    return np.asarray(scaled_BP.float().cpu().numpy() * unit + scale.mean_P, np.float32)


def scale_predicted(scale: EmbeddingScale, predicted_BP: Floats) -> Tensor:
    """Scale predicted embeddings for the prior."""
    return torch.from_numpy(scale.center(predicted_BP) * math.sqrt(predicted_BP.shape[1])).float()


def sample_embeddings(
    prior: EmbeddingPrior,
    scale: EmbeddingScale,
    predicted_BP: Floats,
    generators: list[torch.Generator],
    settings: Any,
) -> Floats:
    """Sample an image embedding for each predicted embedding, with the norm of CLIP's embeddings.

    Parameters
    ----------
    prior : EmbeddingPrior
        The prior.
    scale : EmbeddingScale
        Scale of the embeddings.
    predicted_BP : ndarray, shape (B, P)
        Predicted embeddings.
    generators : list of torch.Generator
        Generator of each trial.
    settings : PriorConfig
        Number of steps and guidance.
    """
    given_BP = scale_predicted(scale, predicted_BP).to(prior.null_P.device)
    found_BP = prior.sample(given_BP, generators, steps=settings.steps, guidance_scale=settings.guidance_scale)
    return scale.place(unscale_target(scale, found_BP))
