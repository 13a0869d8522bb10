"""Input layers of people: a linear map of the channels for each person, before the encoder.

People differ in the shape of the head, in the folds of the cortex and in the place of the cap. A layer for each person
can undo a part of these differences, while the encoder is the same for all people.

Tensor shapes: B trials, C channels (128 after padding), T time points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.samples import N_PADDED
from finetune.training.module_files import load_module, save_module
from pretrain.evidence.trials import tabulate_trials


@dataclass(frozen=True, kw_only=True)
class PersonLayersConfig:
    """People that have a layer."""

    people: tuple[str, ...] = ()
    """Corpus and person of each layer, such as ``things/sub-01``."""


class PersonLayers(nn.Module):
    """A linear map of the channels for each person. A new map, and the map of an unknown person, change nothing.

    Parameters
    ----------
    config : PersonLayersConfig
        The people.
    """

    def __init__(self, config: PersonLayersConfig) -> None:
        super().__init__()
        self.config = config
        # One parameter for each person, so that the layers of some people can be trained and the others are fixed.
        self.changes = nn.ParameterList([torch.zeros(N_PADDED, N_PADDED) for _ in config.people])

    def find(self, names: Iterable[str]) -> Tensor:
        """Return the number of each person's layer, -1 for unknown people."""
        numbers = {name: number for number, name in enumerate(self.config.people)}
        return torch.tensor([numbers.get(name, -1) for name in names], dtype=torch.long)

    def forward(self, x_BCT: Tensor, person_B: Tensor) -> Tensor:
        """Apply the layer of each trial's person.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Scaled EEG, padded to 128 channels.
        person_B : Tensor of int, [B]
            Numbers from `find`.

        Returns
        -------
        Tensor, [B, C, T]
            EEG after the map of the person.
        """
        if not len(self.changes):
            return x_BCT
        known_B11 = (person_B >= 0).to(x_BCT.dtype)[:, None, None]
        change_BCC = torch.stack(list(self.changes))[person_B.clamp_min(0)] * known_B11
        return x_BCT + change_BCC @ x_BCT

    def add(self, names: Sequence[str]) -> PersonLayers:
        """Return layers with further people. Only the layers of the further people can be trained."""
        found = PersonLayers(PersonLayersConfig(people=(*self.config.people, *names)))
        with torch.no_grad():
            for number, change in enumerate(self.changes):
                found.changes[number].copy_(change)
                found.changes[number].requires_grad_(False)
        return found

    def save_pretrained(self, folder: Path) -> None:
        """Write the layers to config.json and model.safetensors."""
        save_module(self, self.config, folder, "people")

    @classmethod
    def from_pretrained(cls, folder: Path) -> PersonLayers:
        """Read layers that `save_pretrained` wrote, in evaluation mode."""
        return load_module(cls, PersonLayersConfig, folder, "people")


def list_people(dataset: EEGDataset) -> list[str]:
    """Return corpus and person of each trial of a split."""
    return tabulate_trials(dataset).subjects_n.tolist()


def name_person(meta: Mapping[str, Any]) -> str:
    """Return corpus and person of a trial from its metadata."""
    return f"{meta.get('corpus') or ''}/{meta.get('subject') or ''}"
