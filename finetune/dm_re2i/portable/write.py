"""Write the files with which diffusers can load a DM-RE2I model from its package folder without this project.

Three Python files are added to the package folder. `finetune.standalone` makes these files from this project's source
text: the pipeline, the backbone (U-Net) and the guide. Dreamscale itself never runs the three files, because
`finetune.dm_re2i.model` loads the model with its own classes.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers

from data_sharding.common.files import atomic_write_text, write_json
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.dm_re2i.classification.baselines import EncoderClassifier
from finetune.dm_re2i.guide import FOLDERS, EEGGuide
from finetune.dm_re2i.guided import GuidedUNet
from finetune.standalone import write_standalone

UNET_FILE, GUIDE_FILE, PIPELINE_FILE = "eg_ddpm_unet", "eeg_guide", "pipeline"
_HEAD = """{about}

Dreamscale wrote this file from its own source text when it trained the model. Licence of this file: Apache-2.0."""
_WITHOUT: dict[str, Collection[str]] = {"EEGClassifier": ("save_pretrained", "from_pretrained", "scaling")}
"""Methods of classes that are left out of the written files, because they need the rest of the project."""


def can_run_alone(guide: EEGGuide) -> bool:
    """Return whether a model with a given guide can run without this project.

    A pretrained encoder with a linear head cannot run without this project, because it is stored in two parts: the
    head, and the package of the encoder in a subfolder.
    """
    return not isinstance(guide.network, EncoderClassifier)


def write_portable_files(
    folder: Path, guide: EEGGuide, unet: GuidedUNet, spec: PreprocessSpec, *, sampler: str, card: dict[str, Any]
) -> None:
    """Add to the package of a model the code with which diffusers loads the package, and the model card.

    Parameters
    ----------
    folder : Path
        Package of the model, with the folders of the U-Net, the guide and the scheduler.
    guide : EEGGuide
        Network that computes the guiding vectors.
    unet : GuidedUNet
        Backbone.
    spec : PreprocessSpec
        Preprocessing of the EEG.
    sampler : str
        Default sampler.
    card : dict
        Values for the model card: ``license``, ``data``, ``settings`` and ``results``.
    """
    alone = can_run_alone(guide)
    if alone:
        _write_code(folder, guide, unet, spec, sampler)
    atomic_write_text(folder / "README.md", make_card(spec, alone=alone, n_channels=guide.n_channels, **card))


def _write_code(folder: Path, guide: EEGGuide, unet: GuidedUNet, spec: PreprocessSpec, sampler: str) -> None:
    network, backbone = type(guide.network), type(unet)
    where, name = FOLDERS[guide.kind], "PortableGuide"
    roots, foot = [(network.__module__, network.__name__)], f"PortableGuide.NETWORK = {network.__name__}"
    if guide.kind == "encoder":
        name, roots, foot = "PortableEncoderGuide", [], ""
    files = {
        folder / "unet" / f"{UNET_FILE}.py": write_standalone(
            [(backbone.__module__, backbone.__name__)],
            _HEAD.format(about="The U-Net of EG-DDPM, which predicts the noise in images and is guided by EEG."),
        ),
        folder / where / f"{GUIDE_FILE}.py": write_standalone(
            [*roots, ("finetune.dm_re2i.portable.guide", name)],
            _HEAD.format(about="The network that computes, from EEG, the vector which guides EG-DDPM."),
            without=_WITHOUT,
            foot=foot,
        ),
        folder / f"{PIPELINE_FILE}.py": write_standalone(
            [("finetune.dm_re2i.portable.pipeline", "EEGToImagePipeline")],
            _HEAD.format(about="The diffusers pipeline that generates images from EEG with EG-DDPM."),
        ),
    }
    for path, text in files.items():
        atomic_write_text(path, text)
    scaling = {"scaling": spec.scaling, "scale_uv": spec.scale_uv, "clip": spec.clip}
    write_json(folder / where / "guide.json", {"guide": guide.kind, "n_channels": guide.n_channels, "scaling": scaling})
    parts: dict[str, Any] = {
        "_class_name": [PIPELINE_FILE, "EEGToImagePipeline"],
        "_diffusers_version": diffusers.__version__,
        **{name: [None, None] for name in FOLDERS.values()},
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": [UNET_FILE, backbone.__name__],
        where: [GUIDE_FILE, name],
        "sampler": sampler,
    }
    write_json(folder / "model_index.json", parts)


def make_card(
    spec: PreprocessSpec,
    *,
    alone: bool,
    n_channels: int,
    license: str,
    data: dict[str, Any],
    settings: dict[str, Any],
    results: dict[str, Any],
) -> str:
    """Return the text of the model card, README.md.

    Parameters
    ----------
    spec : PreprocessSpec
        Preprocessing of the EEG.
    alone : bool
        Whether the package runs without this project.
    n_channels : int
        Largest number of channels of a trial.
    license : str
        Identifier of the licence of the weights.
    data, settings, results : dict
        Rows of the tables in the model card.

    Returns
    -------
    str
        Text in Markdown.
    """
    load = f"""The array `eeg` holds trials in microvolts, preprocessed as the table below says. The array has the shape
[trials, channels, samples], with up to {n_channels} channels in the order of the training data. Loading runs the Python
files of this package (`*.py`), so read them first.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH OF THIS FOLDER", trust_remote_code=True)
pipeline(eeg, seeds=[0]).images[0].save("image.png")
```

The pipeline needs the packages torch, diffusers, safetensors and numpy."""
    if not alone:
        load = "This package has no code of its own, so it cannot be loaded without Dreamscale."
    return f"""---
license: {license}
library_name: diffusers
tags:
- eeg
- diffusion
---

# EG-DDPM: images from EEG

This model generates images from EEG, with the method of DM-RE2I (doi 10.1016/j.bspc.2023.105125). A network turns a
trial of EEG into a vector, and the vector guides a diffusion model of pixels. A generated image is what the model
computes from the EEG, and not a picture of what the person saw. The model has not been checked for medical use.

## Loading

{load}

With Dreamscale: `dreamscale generate FOLDER DATASET -o OUTPUT`.

## Data

{_table(data)}

## Preprocessing of the EEG

{_table(spec.to_dict())}

## Settings

{_table(settings)}

## Results on the val split

{_table(results)}
"""


def _table(values: dict[str, Any]) -> str:
    rows = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in _flatten(values).items()]
    return "\n".join(["| key | value |", "|---|---|", *rows])


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
