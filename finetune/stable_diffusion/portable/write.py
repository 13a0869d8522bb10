"""Write the files with which diffusers can load a fine-tuned Stable Diffusion from its package without this project.

Three Python files are added to the package folder. `finetune.portable.standalone` makes these files from this project's
source text: the pipeline, the encoder and the conditioner. Dreamscale itself never runs the three files, because
`finetune.stable_diffusion.model` loads the model with its own classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_sharding.common.files import atomic_write_text
from finetune.portable.files import HEAD, make_card, say_loading, write_eeg_file, write_index
from finetune.portable.standalone import write_standalone
from pretrain.encoder.encoder import EEGEncoder

ENCODER_FILE, CONDITIONER_FILE, PIPELINE_FILE = "eeg_encoder", "eeg_conditioner", "eeg_pipeline"
_HERE = "finetune.stable_diffusion.portable"
_ABOUT = """This model generates images from EEG, with the method of DreamDiffusion (arXiv 2306.16934). A pretrained
encoder turns a trial of EEG into tokens, and a small network turns the tokens into the condition of Stable Diffusion,
in place of a text."""
_STOCK = """

The folder `pipeline` is an ordinary Stable Diffusion pipeline with the fine-tuned U-Net, without the EEG:

```python
from diffusers import {name}

stock = {name}.from_pretrained("PATH OF THIS FOLDER/pipeline")
```"""


def write_portable_files(
    folder: Path, encoder: EEGEncoder, pipeline: Any, *, drop: float, card: dict[str, Any]
) -> None:
    """Add to the package of a model the code with which diffusers loads the package, and the model card.

    Parameters
    ----------
    folder : Path
        Package of the model, with the folders of the pipeline, the encoder and the conditioner.
    encoder : EEGEncoder
        EEG encoder of the model.
    pipeline : StableDiffusionPipeline or StableDiffusionXLPipeline
        Stock pipeline of the model.
    drop : float
        Fraction of trials whose EEG was dropped in training.
    card : dict
        Values for the model card: ``license``, ``data``, ``settings`` and ``results``.
    """
    files = {
        folder / "encoder" / f"{ENCODER_FILE}.py": write_standalone(
            [("finetune.portable.eeg", "PortableEncoder")],
            HEAD.format(about="The network that computes tokens from EEG."),
        ),
        folder / "conditioner" / f"{CONDITIONER_FILE}.py": write_standalone(
            [(f"{_HERE}.conditioner", "PortableConditioner")],
            HEAD.format(about="The network that computes the condition of Stable Diffusion from tokens of EEG."),
            # These methods need the rest of the project.
            without={"Conditioner": ("save_pretrained", "from_pretrained")},
        ),
        folder / f"{PIPELINE_FILE}.py": write_standalone(
            [(f"{_HERE}.pipeline", "EEGStableDiffusionPipeline")],
            HEAD.format(about="The diffusers pipeline that generates images from EEG with Stable Diffusion."),
        ),
    }
    for path, text in files.items():
        atomic_write_text(path, text)
    n_channels = encoder.config.channels
    write_eeg_file(folder / "encoder", encoder.spec, n_channels)
    parts = {
        "encoder": [ENCODER_FILE, "PortableEncoder"],
        "conditioner": [CONDITIONER_FILE, "PortableConditioner"],
        "pipeline": ["diffusers", type(pipeline).__name__],
        "drop": drop,
    }
    write_index(folder, (PIPELINE_FILE, "EEGStableDiffusionPipeline"), parts)
    loading = say_loading(n_channels, "torch, diffusers, transformers, safetensors and numpy")
    loading += _STOCK.format(name=type(pipeline).__name__)
    card = {"title": "Stable Diffusion on EEG", "about": _ABOUT, "loading": loading, **card}
    atomic_write_text(folder / "README.md", make_card(encoder.spec, **card))
