"""The folder in which finished images are kept until all images of a result are complete."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.common.errors import RequestError
from data_sharding.common.files import atomic_write_bytes, digest_of, read_json, replace_directory, write_json
from data_sharding.common.untrusted import check_group
from pretrain.runs.lock import hold_lock

FOLDERS = ("images", "real")
"""Names of the folders in a result: generated images, and the images that the person saw."""
SAMPLES = "samples"
"""Name of the folder with the second and further images of the trials."""
_STATE, _LOCK = "partial.json", "lock"


def name_sample(key: str, number: int) -> str:
    """Return the path, in a result, of the image `number` (1 or more) of a trial."""
    return f"{SAMPLES}/{number}/{key}.png"


def encode_png(pixels_HW3: np.ndarray, texts: Mapping[str, object] | None = None) -> bytes:
    """Encode an image as PNG.

    Parameters
    ----------
    pixels_HW3 : ndarray of uint8, shape (H, W, 3)
        Image in RGB.
    texts : mapping, optional
        Keywords and values that are stored in the file (chunks of type tEXt).

    Returns
    -------
    bytes
        Content of the PNG file.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    for name, value in (texts or {}).items():
        info.add_text(name, str(value))
    Image.fromarray(pixels_HW3).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


class PartialFolder:
    """Images of an unfinished result, in the folder ``OUTPUT.partial`` next to the output.

    Several processes may call `add`. All methods except `add` are called only by rank 0.

    Parameters
    ----------
    output : Path
        Folder of the complete result.
    settings : dict
        JSON values on which the images depend, such as the digest of the model and the sampler.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.output, self.settings = output, settings
        self.path = output.with_name(f"{output.name}.partial")

    def is_complete(self, about: dict[str, Any]) -> bool:
        """Return whether the output folder already holds all images of this result.

        Parameters
        ----------
        about : dict
            Content that generated.json has when this result is complete, including the list of trials.
        """
        try:
            same = read_json(self.output / "generated.json") == about
        except RequestError:
            return False
        trials = about["trials"] if same else []
        files = [trial[name] for trial in trials for name in ("file", "real_file")]
        files += [file for trial in trials for file in trial.get("sample_files", [])]
        return same and all((self.output / file).is_file() for file in files)

    def open(self) -> set[str]:
        """Lock the folder, and read which images are finished.

        If the folder holds images that were made with other settings, these images are deleted and a message says so.

        Returns
        -------
        set of str
            Keys of the trials whose images are finished.

        Raises
        ------
        RequestError
            If the folder holds anything except the images of an unfinished result, or if another command uses the
            folder.
        """
        found = self._names()
        if (self.path.exists() and not self.path.is_dir()) or (found - {_LOCK} and _STATE not in found):
            raise RequestError(
                f"{self.path} already exists and is not the output of an interrupted generation; move it or "
                "choose another output"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = hold_lock(self.path / _LOCK)
        if _STATE in found and (differ := self._find_differences()):
            print(
                f"{self.path}: the unfinished images were made with other settings ({', '.join(differ)}), so they are "
                "deleted and all images are generated again"
            )
            for name in (*FOLDERS, SAMPLES):
                shutil.rmtree(self.path / name, ignore_errors=True)
        write_json(self.path / _STATE, {"digest": digest_of(self.settings), "settings": self.settings})
        for name in FOLDERS:
            (self.path / name).mkdir(exist_ok=True)
        for path in self.path.rglob(".*.png.*.tmp"):
            path.unlink()
        return self.finished()

    def _names(self) -> set[str]:
        if not self.path.is_dir():
            return set()
        return {path.name for path in self.path.iterdir() if not path.name.startswith(".")}

    def _find_differences(self) -> list[str]:
        """Return the names of the settings that differ between the unfinished images and this result."""
        file = self.path / _STATE
        old = check_group(read_json(file), str(file))
        settings = check_group(old.get("settings"), str(file), "settings")
        if old.get("digest") == digest_of(self.settings) == digest_of(settings):
            return []
        return sorted(n for n in {*settings, *self.settings} if settings.get(n) != self.settings.get(n)) or ["digest"]

    def finished(self) -> set[str]:
        """Return the keys of the trials whose images are finished."""
        images, real = ({path.stem for path in (self.path / name).glob("*.png")} for name in FOLDERS)
        return images & real

    def add(
        self, key: str, images: Sequence[np.ndarray], real_HW3: np.ndarray, texts: Sequence[Mapping[str, object]]
    ) -> None:
        """Store the images of a trial, so that a later stop of the command cannot lose the images.

        Parameters
        ----------
        key : str
            Key of the trial, which is a valid file name.
        images : sequence of ndarray of uint8, shape (H, W, 3)
            Generated images of the trial.
        real_HW3 : ndarray of uint8, shape (H, W, 3)
            Image that the person saw.
        texts : sequence of mapping
            For each generated image, the keywords and values that are stored as metadata in its file.
        """
        # The first image is written last: if it exists, all images of the trial exist.
        atomic_write_bytes(self.path / "real" / f"{key}.png", encode_png(real_HW3))
        for number in reversed(range(len(images))):
            path = self.path / (name_sample(key, number) if number else f"images/{key}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path, encode_png(images[number], texts[number]))

    def complete(self, about: dict[str, Any]) -> None:
        """Write generated.json, and rename the folder to the output. An older output is deleted.

        Parameters
        ----------
        about : dict
            Content of generated.json.
        """
        write_json(self.path / "generated.json", about)
        replace_directory(self.path, self.output)
        for name in (_STATE, _LOCK):
            (self.output / name).unlink()

    def close(self, *, discard: bool) -> None:
        """Release the lock. With `discard`, delete the folder if no image is finished."""
        if discard and not self.finished():
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
