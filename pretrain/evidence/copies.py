"""Find copies of one image under different names: equal files, and files with the image encoded or resized again.

A test image that is a copy of a training image is not new, whatever its name and its label. A model that remembers the
training image then seems to find the test image in the EEG.
"""

from __future__ import annotations

import hashlib

import numpy as np

from data_sharding.audit.fingerprints import ImageFingerprint, find_similar_images, fingerprint_image
from data_sharding.common.progress import progress
from data_sharding.dataset.dataset import EEGDataset


def find_copies(*splits: EEGDataset) -> list[tuple[str, str]]:
    """Find images that are copies of each other, in one split or in different splits.

    Parameters
    ----------
    *splits : EEGDataset
        Splits. Trials without an image, or without a name of the image, are left out.

    Returns
    -------
    list of (str, str)
        Sorted list for `pretrain.evidence.trials.merge_copies`; each pair contains two names of the same image.

    Notes
    -----
    Two images are the same if their files are equal, or if `data_sharding.audit.fingerprints.find_similar_images` finds
    that their pixels are similar, as in ``dreamscale verify``. Crops, mirror images, rotations and changes of colour
    are not found.
    """
    names: list[str] = []
    fingerprints: list[ImageFingerprint] = []
    known: dict[str, ImageFingerprint] = {}
    pairs: set[tuple[str, str]] = set()
    first: dict[str, str] = {}
    for split in splits:
        ids = split.trials.values("image_id")
        codes, numbers = np.unique(split.trials.codes("image_id"), return_index=True)
        shown = [(ids[code], number) for code, number in zip(codes.tolist(), numbers.tolist(), strict=True)]
        with progress("fingerprints of the images", len(shown), enabled=len(shown) >= 1000) as advance:
            for name, number in shown:
                advance(1)
                if not name or not split.locations([number])[0].image:
                    continue
                data = split.image(number)
                sha256 = hashlib.sha256(data).hexdigest()
                if sha256 not in known:
                    known[sha256] = fingerprint_image(data, sha256)
                    names.append(name)
                    fingerprints.append(known[sha256])
                if (other := first.setdefault(sha256, name)) != name:
                    pairs.add((other, name))
    for i, j in find_similar_images(fingerprints, fingerprints):
        if i < j and names[i] != names[j]:
            pairs.add((names[i], names[j]))
    return sorted(pairs)
