"""Read a folder of generated images that `dreamscale generate` wrote.

Array shapes: B trials, H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json
from data_sharding.common.untrusted import MAX_IMAGE, check_count, check_group, check_path, check_text, read_limited
from finetune.images import decode_image

Images = NDArray[np.uint8]


@dataclass(kw_only=True)
class GeneratedSet:
    """Content of a folder that `dreamscale generate` wrote."""

    path: Path
    """Path of the folder."""
    about: dict[str, Any]
    """Content of generated.json."""
    images_BHW3: Images
    """Pixels of the generated images."""
    real_BHW3: Images
    """Pixels of the images that the person saw."""

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Entry of each trial in generated.json."""
        return self.about["trials"]

    @property
    def repeats_B(self) -> NDArray[np.int64]:
        """Number of presentations whose EEG was averaged for each trial; 1 in folders of older versions."""
        return np.array([int(trial.get("repeats", 1)) for trial in self.trials])

    def describe_repeats(self) -> str:
        """Say in one sentence how many presentations of an image were averaged to a trial."""
        least, most = int(self.repeats_B.min()), int(self.repeats_B.max())
        pairs = {(trial["subject"], trial["image_id"]) for trial in self.trials}
        text = "The EEG of each trial is one presentation of its image."
        if most > 1:
            count = f"{most}" if least == most else f"{least} to {most}"
            text = f"The EEG of each trial is the mean over {count} presentations of its image to one subject."
        if len(pairs) < len(self.trials):
            text += (
                f" {len(self.trials)} trials show {len(pairs)} pairs of subject and image, so some pairs count several "
                "times, and the confidence intervals are too narrow."
            )
        return text

    @property
    def labels_B(self) -> NDArray[np.int64]:
        """Label of each trial."""
        return np.array([trial["label"] for trial in self.trials])


def read_generated(path: str | Path) -> GeneratedSet:
    """Read a folder of generated images, and check that the folder is complete.

    Parameters
    ----------
    path : str or Path
        Folder of generated images.

    Returns
    -------
    GeneratedSet
        Generated and real images, and the content of generated.json.

    Raises
    ------
    RequestError
        If generated.json or an image is missing or damaged, or if the images have different sizes.
    """
    path = Path(path)
    record = path / "generated.json"
    again = "generate the images again"
    if not record.is_file():
        raise RequestError(f"{path}: has no generated.json; make the folder with 'dreamscale generate'")
    about = read_json(record)
    needed = {"dataset", "dataset_id", "split", "control", "labels", "trials"}
    lists = isinstance(about, dict) and all(isinstance(about.get(name), list) for name in ("labels", "trials"))
    if not lists or needed - about.keys() or not about["trials"]:
        raise RequestError(f"{record}: an entry that 'dreamscale generate' writes is missing; {again}")
    for name in ("dataset", "dataset_id", "split"):
        check_text(about[name], str(record), name)
    for label in about["labels"]:
        check_text(label, str(record), "a label")
    for trial in about["trials"]:
        check_group(trial, str(record), "a trial")
        check_count(trial.get("repeats", 1), str(record), "repeats of a trial", least=1, most=2**31)
        for name in ("key", "image_id", "subject"):
            check_text(trial.get(name), str(record), f"{name} of a trial")
        check_text(trial.get("eeg_key", ""), str(record), "eeg_key of a trial")
    found: dict[str, Images] = {}
    for name in ("file", "real_file"):
        images = []
        for trial in about["trials"]:
            try:
                file = path / check_path(check_group(trial, str(record), "a trial")[name], str(record))
                images.append(decode_image(read_limited(file, MAX_IMAGE), name=str(file)))
                known = type(trial["label"]) is int and 0 <= trial["label"] < len(about["labels"])
            except KeyError as error:
                raise RequestError(f"{record}: a trial has no {error}; {again}") from None
            except OSError as error:
                raise RequestError(f"{path / trial[name]}: {error.strerror or error}; {again}") from None
            if not known:
                raise RequestError(f"{record}: trial {trial.get('key')} has no valid label; {again}")
        if len({image.shape for image in images}) > 1:
            raise RequestError(f"{path}: the images have different sizes; {again}")
        found[name] = np.stack(images)
    if found["file"].shape != found["real_file"].shape:
        raise RequestError(f"{path}: generated and real images have different sizes; {again}")
    return GeneratedSet(path=path, about=about, images_BHW3=found["file"], real_BHW3=found["real_file"])
