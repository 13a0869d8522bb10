"""Losses between the embeddings of trials and their targets.

Tensor shapes: G trials of all processes, P width of the embeddings. All embeddings have unit length.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def infonce(embeds_GP: Tensor, target_GP: Tensor, row_G: Tensor, temperature: float) -> Tensor:
    """Compute the contrastive loss: in the batch, find the target of each trial, and the trial of each target.

    Parameters
    ----------
    embeds_GP, target_GP : Tensor, [G, P]
        Embeddings of the trials and their targets.
    row_G : Tensor of int, [G]
        Number of each trial's target. Two trials with the same number have the same target, so the first trial and the
        target of the second trial are not treated as a negative pair.
    temperature : float
        Temperature, by which the cosine similarities are divided.

    Returns
    -------
    Tensor, scalar
        Mean of the cross-entropies of the two directions (trial to target, and target to trial).
    """
    same_GG = row_G[:, None] == row_G[None]
    return _contrast(embeds_GP, target_GP, same_GG.float() / same_GG.sum(1, keepdim=True), temperature)


def soft_contrast(embeds_GP: Tensor, target_GP: Tensor, temperature: float, soft_temperature: float) -> Tensor:
    """Compute the contrastive loss with soft targets: similar targets share the probability.

    A trial whose target is similar to another target in the batch should be similar to this other target, too. The
    probability with which trial i belongs to target j is softmax_j(t_i . t_j / soft_temperature).

    Parameters
    ----------
    embeds_GP, target_GP : Tensor, [G, P]
        Embeddings of the trials and their targets.
    temperature : float
        Temperature, by which the similarities of trials and targets are divided.
    soft_temperature : float
        Temperature, by which the similarities of targets are divided. As it approaches 0, only equal targets share the
        probability, as in `infonce`.

    Returns
    -------
    Tensor, scalar
        Mean of the cross-entropies of the two directions (trial to target, and target to trial).
    """
    probability_GG = (target_GP @ target_GP.T / soft_temperature).softmax(dim=1)
    return _contrast(embeds_GP, target_GP, probability_GG, temperature)


def _contrast(embeds_GP: Tensor, target_GP: Tensor, probability_GG: Tensor, temperature: float) -> Tensor:
    logits_GG = embeds_GP @ target_GP.T / temperature
    return (F.cross_entropy(logits_GG, probability_GG) + F.cross_entropy(logits_GG.T, probability_GG)) / 2
