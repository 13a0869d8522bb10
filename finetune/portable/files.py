"""Write files that the packages of all papers have: the model card, the index of the pipeline, the scaling of EEG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_sharding.common.files import write_json
from data_sharding.processing.preprocess import PreprocessSpec

HEAD = """{about}

Dreamscale wrote this file from its own source text when it trained the model. Licence of this file: Apache-2.0."""
"""Docstring of each Python file in a package."""


def write_eeg_file(folder: Path, spec: PreprocessSpec, n_channels: int, **entries: Any) -> None:
    """Write the file eeg.json, which `finetune.portable.eeg.PortableNetwork` reads.

    Parameters
    ----------
    folder : Path
        Folder of the network in the package.
    spec : PreprocessSpec
        Preprocessing of the EEG, which includes its scaling.
    n_channels : int
        Largest number of channels of a trial.
    **entries : Any
        Further entries of the file.
    """
    scaling = {"scaling": spec.scaling, "scale_uv": spec.scale_uv, "clip": spec.clip}
    write_json(folder / "eeg.json", {**entries, "n_channels": n_channels, "scaling": scaling})


def write_index(folder: Path, pipeline: tuple[str, str], entries: dict[str, Any]) -> None:
    """Write model_index.json, from which diffusers learns the parts of a pipeline.

    Parameters
    ----------
    folder : Path
        Package of the model.
    pipeline : tuple of str
        File of the pipeline, without the suffix, and its class.
    entries : dict
        For each part, its library or file and its class; and the settings of the pipeline.
    """
    import diffusers

    index = {"_class_name": [*pipeline], "_diffusers_version": diffusers.__version__, **entries}
    write_json(folder / "model_index.json", index)


def make_card(
    spec: PreprocessSpec,
    *,
    title: str,
    about: str,
    loading: str,
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
    title : str
        Title of the model card.
    about : str
        What the model is and does.
    loading : str
        How the model is loaded without this project.
    license : str
        Identifier of the licence of the weights.
    data, settings, results : dict
        Rows of the tables in the model card.

    Returns
    -------
    str
        Text in Markdown.
    """
    return f"""---
license: {license}
library_name: diffusers
tags:
- eeg
- diffusion
---

# {title}

{about} A generated image is what the model
computes from the EEG, and not a picture of what the person saw. The model has not been checked for medical use.

## Loading

{loading}

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


def say_loading(n_channels: int, packages: str) -> str:
    """Return the text of the model card that explains how diffusers loads the package.

    Parameters
    ----------
    n_channels : int
        Largest number of channels of a trial.
    packages : str
        Python packages that the pipeline needs.
    """
    return f"""The array `eeg` holds trials in microvolts, preprocessed as the table below says. The array has the shape
[trials, channels, samples], with up to {n_channels} channels in the order of the training data. Loading runs the Python
files of this package (`*.py`), so read them first.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH OF THIS FOLDER", trust_remote_code=True)
pipeline(eeg, seeds=[0]).images[0].save("image.png")
```

The pipeline needs the packages {packages}."""


def _table(values: dict[str, Any]) -> str:
    rows = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in _flatten(values).items()]
    return "\n".join(["| key | value |", "|---|---|", *rows])


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
