"""Write the files with which diffusers can load a DM-RE2I model from its package folder without this project.

Three Python files are added to the package folder. `finetune.portable.standalone` makes these files from this project's
source text: the pipeline, the backbone (U-Net) and the guide. Dreamscale itself never runs the three files, because
`finetune.dm_re2i.model` loads the model with its own classes.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from data_sharding.common.files import atomic_write_text
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.dm_re2i.classification.baselines import EncoderClassifier
from finetune.dm_re2i.guide import FOLDERS, EEGGuide
from finetune.dm_re2i.guided import GuidedUNet
from finetune.portable.files import HEAD, make_card, say_loading, write_eeg_file, write_index
from finetune.portable.standalone import write_standalone

UNET_FILE, GUIDE_FILE, PIPELINE_FILE = "eg_ddpm_unet", "eeg_guide", "pipeline"
_WITHOUT: dict[str, Collection[str]] = {"EEGClassifier": ("save_pretrained", "from_pretrained", "scaling")}
"""Methods of classes that are left out of the written files, because they need the rest of the project."""
_ABOUT = """This model generates images from EEG, with the method of DM-RE2I (doi 10.1016/j.bspc.2023.105125). A network
turns a trial of EEG into a vector, and the vector guides a diffusion model of pixels."""


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
    loading = "This package has no code of its own, so it cannot be loaded without Dreamscale."
    if alone:
        loading = say_loading(guide.n_channels, "torch, diffusers, safetensors and numpy")
    card = {"title": "EG-DDPM: images from EEG", "about": _ABOUT, "loading": loading, **card}
    atomic_write_text(folder / "README.md", make_card(spec, **card))


def _write_code(folder: Path, guide: EEGGuide, unet: GuidedUNet, spec: PreprocessSpec, sampler: str) -> None:
    network, backbone = type(guide.network), type(unet)
    where, name = FOLDERS[guide.kind], "PortableGuide"
    roots, foot = [(network.__module__, network.__name__)], f"PortableGuide.NETWORK = {network.__name__}"
    if guide.kind == "encoder":
        name, roots, foot = "PortableEncoderGuide", [], ""
    files = {
        folder / "unet" / f"{UNET_FILE}.py": write_standalone(
            [(backbone.__module__, backbone.__name__)],
            HEAD.format(about="The U-Net of EG-DDPM, which predicts the noise in images and is guided by EEG."),
        ),
        folder / where / f"{GUIDE_FILE}.py": write_standalone(
            [*roots, ("finetune.dm_re2i.portable.guide", name)],
            HEAD.format(about="The network that computes, from EEG, the vector which guides EG-DDPM."),
            without=_WITHOUT,
            foot=foot,
        ),
        folder / f"{PIPELINE_FILE}.py": write_standalone(
            [("finetune.dm_re2i.portable.pipeline", "EEGToImagePipeline")],
            HEAD.format(about="The diffusers pipeline that generates images from EEG with EG-DDPM."),
        ),
    }
    for path, text in files.items():
        atomic_write_text(path, text)
    write_eeg_file(folder / where, spec, guide.n_channels, guide=guide.kind)
    parts: dict[str, Any] = {
        **{name: [None, None] for name in FOLDERS.values()},
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": [UNET_FILE, backbone.__name__],
        where: [GUIDE_FILE, name],
        "sampler": sampler,
    }
    write_index(folder, (PIPELINE_FILE, "EEGToImagePipeline"), parts)
