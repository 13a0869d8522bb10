"""Results of ``dreamscale align``, which map EEG to the embeddings of a frozen image model.

Tensor shapes: B trials, P width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json
from data_sharding.common.untrusted import check_count, check_group, check_text
from data_sharding.dataset.dataset import EEGDataset
from finetune.clip_head import ClipHead
from finetune.eeg import compute_in_parts, read_encoder_input
from finetune.electrodes import Electrodes
from finetune.generators import read_part
from finetune.linear.model import Floats
from finetune.people import PersonLayers, list_people
from pretrain.encoder.encoder import EEGEncoder

RIDGE = "ridge"
"""Value of the key `model` for the ridge regression, in place of the path of an alignment run."""


@dataclass(frozen=True, kw_only=True)
class AlignmentRun:
    """Results of `dreamscale align`: encoder, head, the frozen model, and id of the training dataset."""

    encoder: EEGEncoder
    head: ClipHead
    people: PersonLayers | None
    """Input layers of people; None for a run without such layers."""
    target: str
    """Path or hub id of the frozen model of the run."""
    layer: int | None
    """Hidden layer of the frozen model that is the embedding of an image; None for its final embedding."""
    part: dict[str, float | None]
    """Part of each trial that the encoder reads (arguments `tmin` and `tmax` of `open_paired`)."""
    dataset_id: str
    """Id of the dataset on which the encoder was aligned."""

    @classmethod
    def load(cls, run: str | Path) -> AlignmentRun:
        """Load a run that `dreamscale align` wrote; raise `RequestError` if the run is not complete."""
        run = Path(run)
        path = run / "align" / "result.json"
        if not path.is_file():
            raise RequestError(
                f"{run}: not a complete alignment run (no align/result.json); give the output of 'dreamscale align', "
                f"or '{RIDGE}'"
            )
        found = check_group(read_json(path), str(path))
        # Older versions of Dreamscale aligned only with the final embedding of CLIP.
        target = check_group(found.get("target", {"model": found.get("clip")}), f"{path}: target")
        layer = target.get("layer")
        return cls(
            encoder=EEGEncoder.from_pretrained(run / "encoder"),
            head=ClipHead.from_pretrained(run / "align"),
            people=PersonLayers.from_pretrained(run / "people") if (run / "people").is_dir() else None,
            target=check_text(target.get("model"), f"{path}: target", "model"),
            layer=None if layer is None else check_count(layer, f"{path}: target", "layer", least=-1000, most=1000),
            part=read_part(found, str(path)),
            dataset_id=check_text(found.get("dataset_id"), str(path), "dataset_id"),
        )

    def embed(self, data: EEGDataset, groups: Sequence[Sequence[int]], device: torch.device) -> Floats:
        """Compute the embeddings [B, P] of groups of presentations; the EEG of a group is averaged."""
        data.require_preprocess(self.encoder.spec, "encoder of the alignment run")
        encoder, head = self.encoder.to(device).eval(), self.head.to(device).eval()
        electrodes, people = Electrodes(encoder, data), None if self.people is None else self.people.to(device).eval()
        person_n = None if people is None else people.find(list_people(data))

        @torch.no_grad()
        def embed(part: Sequence[Sequence[int]]) -> Floats:
            trials = read_encoder_input(data, part, encoder, electrodes, device)
            x_BCT = trials.x
            if people is not None and person_n is not None:
                x_BCT = people(x_BCT, person_n[[group[0] for group in part]].to(device))
            return head(encoder(x_BCT, **trials.places)).float().cpu().numpy()

        return compute_in_parts(embed, groups, "EEG embeddings")
