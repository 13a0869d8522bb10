"""A folder of generated images, as `dreamscale generate` writes it.

Shapes: B trials, H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json
from finetune.images import decode_image

Images = NDArray[np.uint8]


@dataclass(kw_only=True)
class GeneratedSet:
    """What `dreamscale generate` wrote."""

    path: Path
    """The directory."""
    about: dict[str, Any]
    """generated.json."""
    images_BHW3: Images
    """Generated images."""
    real_BHW3: Images
    """What was seen."""

    @property
    def trials(self) -> list[dict[str, Any]]:
        """One dictionary a trial."""
        return self.about["trials"]

    @property
    def labels_B(self) -> NDArray[np.int64]:
        """Label of each trial."""
        return np.array([trial["label"] for trial in self.trials])


def read_generated(path: str | Path) -> GeneratedSet:
    """Read a directory of generated images, and check that it is whole.

    Parameters
    ----------
    path : str or Path
        The directory.

    Returns
    -------
    GeneratedSet
        Its images.

    Raises
    ------
    RequestError
        If generated.json or an image is missing or damaged, or sizes differ.
    """
    path = Path(path)
    if not (path / "generated.json").is_file():
        raise RequestError(f"{path}: no generated.json, so 'dreamscale generate' did not finish there; run it first")
    about = read_json(path / "generated.json")
    needed = {"dataset", "dataset_id", "split", "control", "labels", "trials"}
    if not isinstance(about, dict) or needed - about.keys() or not about["trials"]:
        raise RequestError(f"{path / 'generated.json'}: lacks what 'dreamscale generate' writes; generate again")
    found: dict[str, Images] = {}
    for name in ("file", "real_file"):
        images = []
        for trial in about["trials"]:
            try:
                file = path / trial[name]
                images.append(decode_image(file.read_bytes(), name=str(file)))
                known = isinstance(trial["label"], int) and 0 <= trial["label"] < len(about["labels"])
            except KeyError as error:
                raise RequestError(f"{path / 'generated.json'}: a trial has no {error}; generate again") from None
            except OSError as error:
                raise RequestError(f"{path / trial[name]}: {error.strerror or error}; generate again") from None
            if not known:
                raise RequestError(f"{path / 'generated.json'}: trial {trial.get('key')} has no valid label")
        if len({image.shape for image in images}) > 1:
            raise RequestError(f"{path}: images of different sizes; generate again")
        found[name] = np.stack(images)
    if found["file"].shape != found["real_file"].shape:
        raise RequestError(f"{path}: generated and real images are not of one size; generate again")
    return GeneratedSet(path=path, about=about, images_BHW3=found["file"], real_BHW3=found["real_file"])
