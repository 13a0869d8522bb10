"""Read a folder of generated images that `dreamscale generate` wrote.

Array shapes: B trials, H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.errors import RequestError, show
from data_sharding.common.files import read_json
from data_sharding.common.untrusted import (
    MAX_IMAGE,
    check_count,
    check_group,
    check_list,
    check_path,
    check_text,
    read_limited,
)
from finetune.evaluation.pixel_metrics import ImageSource
from finetune.images import decode_image

Images = NDArray[np.uint8]
IN_MEMORY = 2**26
"""A set of images is kept in memory if its pixels have at most this number of bytes. The images of a larger set are
decoded each time they are read."""


class ImageFiles:
    """Images of equal size in files; an image is decoded each time it is read.

    Parameters
    ----------
    files : list of Path
        File of each image.
    size : tuple of int
        Height and width of the images in pixels, and the number of colour channels.
    """

    def __init__(self, files: list[Path], size: tuple[int, ...]) -> None:
        self.files, self.size = files, size

    @property
    def shape(self) -> tuple[int, ...]:
        """The numbers B, H, W and 3."""
        return len(self.files), *self.size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: Any, /) -> Images:
        """Return one image for a number, and several images for a slice.

        Raises
        ------
        RequestError
            If a file is missing or damaged, or if the size of an image has changed.
        """
        if isinstance(rows, slice):
            chosen = range(len(self))[rows]
            return np.stack([self[row] for row in chosen]) if chosen else np.empty((0, *self.size), np.uint8)
        return self._read(self.files[rows])

    def _read(self, file: Path) -> Images:
        try:
            image = decode_image(read_limited(file, MAX_IMAGE), name=str(file))
        except OSError as error:
            raise RequestError(f"{file}: {error.strerror or error}; generate the images again") from None
        if image.shape != self.size:
            raise RequestError(f"{file}: the image was changed during the evaluation; evaluate again")
        return image


@dataclass(kw_only=True)
class GeneratedSet:
    """Content of a folder that `dreamscale generate` wrote."""

    path: Path
    """Path of the folder."""
    about: dict[str, Any]
    """Content of generated.json."""
    images_BHW3: ImageSource
    """Pixels of the generated images."""
    real_BHW3: ImageSource
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
    if reason := _find_reason(about):
        raise RequestError(f"{path}: holds no images, because this control cannot be made from the data ({reason})")
    needed = {"dataset", "dataset_id", "split", "control", "labels", "trials"}
    lists = isinstance(about, dict) and all(isinstance(about.get(name), list) for name in ("labels", "trials"))
    if not lists or needed - about.keys() or not about["trials"]:
        raise RequestError(f"{record}: an entry that 'dreamscale generate' writes is missing; {again}")
    for name in ("dataset", "dataset_id", "split"):
        check_text(about[name], str(record), name)
    for name in ("kind", "model_digest"):
        if about.get(name) is not None:
            check_text(about[name], str(record), name)
    check_group(about.get("eeg") or {}, str(record), "eeg")
    if about.get("average_repeats") is not None:
        check_count(about["average_repeats"], str(record), "average_repeats", most=2**31)
    check_text(about["control"], str(record), "control")
    for label in about["labels"]:
        check_text(label, str(record), "a label")
    for trial in about["trials"]:
        _check_trial(trial, str(record))
    _check_trials_together(about["trials"], record)
    found: dict[str, ImageSource] = {}
    for name in ("file", "real_file"):
        images, files, shapes = [], [], set()
        for trial in about["trials"]:
            try:
                files.append(path / check_path(check_group(trial, str(record), "a trial")[name], str(record)))
                image = decode_image(read_limited(files[-1], MAX_IMAGE), name=str(files[-1]))
                shapes.add(image.shape)
                if image.nbytes * len(about["trials"]) <= IN_MEMORY:
                    images.append(image)
                known = type(trial["label"]) is int and 0 <= trial["label"] < len(about["labels"])
            except KeyError as error:
                raise RequestError(f"{record}: a trial lacks the key {error}; {again}") from None
            except OSError as error:
                raise RequestError(f"{path / trial[name]}: {error.strerror or error}; {again}") from None
            if not known:
                raise RequestError(f"{record}: trial {trial.get('key')} has no valid label; {again}")
        if len(shapes) > 1:
            raise RequestError(f"{path}: the images have different sizes; {again}")
        found[name] = np.stack(images) if images else ImageFiles(files, shapes.pop())
    if found["file"].shape != found["real_file"].shape:
        raise RequestError(f"{path}: generated and real images have different sizes; {again}")
    return GeneratedSet(path=path, about=about, images_BHW3=found["file"], real_BHW3=found["real_file"])


def _check_trial(trial: Any, record: str) -> None:
    check_group(trial, record, "a trial")
    check_count(trial.get("repeats", 1), record, "repeats of a trial", least=1, most=2**31)
    for name in ("key", "image_id", "subject"):
        check_text(trial.get(name), record, f"{name} of a trial")
    keys = check_list(trial.get("eeg_keys") or [], record, "eeg_keys of a trial")
    for key in (trial.get("eeg_key") or "", *keys):
        check_text(key, record, "eeg_key of a trial")


def _check_trials_together(trials: list[dict[str, Any]], record: Path) -> None:
    """Check that no trial occurs twice, and that all trials of an image have the same label."""
    keys: set[str] = set()
    label_of: dict[str, Any] = {}
    for trial in trials:
        if trial["key"] in keys:
            raise RequestError(f"{record}: trial {show(trial['key'])} occurs twice; generate the images again")
        keys.add(trial["key"])
        if label_of.setdefault(trial["image_id"], trial.get("label")) != trial.get("label"):
            raise RequestError(
                f"{record}: image {show(trial['image_id'])} has two labels; give each label its own image_id in the "
                "dataset, and generate the images again"
            )


def _find_reason(about: Any) -> str:
    """Return why a control cannot be made from the data, as generated.json says; empty if the control has images."""
    reason = about.get("not_applicable") if isinstance(about, dict) else None
    return show(reason, longest=1000) if reason else ""


def read_not_applicable(path: str | Path) -> str:
    """Read the reason why a control cannot be made from the data; the control's folder contains this reason.

    Parameters
    ----------
    path : str or Path
        Folder that ``dreamscale generate --control NAME`` wrote.

    Returns
    -------
    str
        The reason, or an empty text if the folder holds images.

    Raises
    ------
    RequestError
        If the folder has no generated.json, or if the file is damaged.
    """
    return _find_reason(read_json(Path(path) / "generated.json"))


SAME = (
    *("model_digest", "kind", "dataset_id", "dataset_version", "split", "seed", "sampler", "steps", "guidance_scale"),
    *("average_repeats", "eeg", "labels", "precision"),
)
"""Entries of generated.json that must be equal in a folder of images and in a folder of control images."""
_OLDER = {"precision": "fp32"}
"""Values of entries that generated.json does not have if an older version wrote the file."""


def check_control(own: GeneratedSet, control: GeneratedSet) -> None:
    """Check that control images belong to a folder of generated images.

    Parameters
    ----------
    own : GeneratedSet
        Images that were generated from the EEG of their own trials.
    control : GeneratedSet
        Images of a control.

    Raises
    ------
    RequestError
        If the control images come from another model, dataset, seed, sampler or list of trials, or from EEG that does
        not belong to the control, such as the trial's own EEG for ``shuffle``. The message says what differs.
    """
    name = control.about["control"]
    if name == "none":
        raise RequestError(
            f"{control.path}: this folder does not hold control images; generate control images, for example with "
            "--control shuffle"
        )
    if own.about["control"] != "none":
        raise RequestError(f"{own.path}: this folder holds control images; give this folder in the key 'controls'")
    check_settings(own, control.about, control.path)
    keys, own_keys = [trial["key"] for trial in control.trials], [trial["key"] for trial in own.trials]
    # The controls no_eeg and class may lack images of some trials, because the comparison with a control leaves out the
    # trials without a control image.
    if keys != own_keys and not (name in ("no_eeg", "class") and set(keys) <= set(own_keys)):
        raise RequestError(
            f"{control.path}: the images belong to other trials than the images in {own.path}; "
            "generate both folders for the same trials"
        )
    trial_of = {trial["key"]: trial for trial in own.trials}
    for trial in control.trials:
        if differ := [n for n in ("image_id", "label", "subject") if trial[n] != trial_of[trial["key"]][n]]:
            raise RequestError(
                f"{control.path}: trial {show(trial['key'])} has another {differ[0]} than in {own.path}; generate both "
                "folders again"
            )
    _check_eeg(own, control)


def check_settings(own: GeneratedSet, about: dict[str, Any], path: Path) -> None:
    """Check that a control was made with the same model, data and settings as the generated images.

    Parameters
    ----------
    own : GeneratedSet
        The generated images.
    about : dict
        Content of the control's generated.json.
    path : Path
        Folder of the control.

    Raises
    ------
    RequestError
        If an entry of generated.json that `SAME` lists differs, or if a generated.json has no checksum of the model.
    """
    for folder, values in ((own.path, own.about), (path, about)):
        if not values.get("model_digest"):
            raise RequestError(
                f"{folder}: generated.json has no model_digest (checksum of the model); generate the images again"
            )
    for key in SAME:
        values = [content.get(key, _OLDER.get(key)) for content in (about, own.about)]
        if values[0] != values[1]:
            raise RequestError(
                f"{path}: {key} is {show(repr(values[0]))}, but {show(repr(values[1]))} in {own.path}; "
                "generate both folders with the same settings"
            )


def _list_eeg_keys(trial: dict[str, Any]) -> set[str]:
    return {*(trial.get("eeg_keys") or []), *([trial["eeg_key"]] if trial.get("eeg_key") else [])}


def _check_eeg(own: GeneratedSet, control: GeneratedSet) -> None:
    """Check that each control image was made from the EEG, or without EEG, as the name of the control requires."""
    name = control.about["control"]
    trial_of = {trial["key"]: trial for trial in own.trials}
    for other in control.trials:
        mine = trial_of[other["key"]]
        used, expected = _list_eeg_keys(other), _list_eeg_keys(mine)
        if mine["key"] not in expected:
            raise RequestError(
                f"{own.path}: the image of trial {mine['key']} was not generated from the EEG of this trial; generate "
                "the images again"
            )
        fault = ""
        if name in ("shuffle", "shuffle_within"):
            fault = "its own EEG" if used & expected else "" if used else "no EEG"
        elif name == "noise" and other.get("noise") is not True:
            fault = "EEG that is not noise"
        elif name in ("no_eeg", "class", "time") and used:
            fault = "EEG"
        if fault:
            raise RequestError(
                f"{control.path}: the image of trial {mine['key']} was made from {fault}, so the folder is not the "
                f"control '{name}'; generate the images again"
            )
