"""Small copies of EEG-ImageNet and THINGS-EEG2 in the file formats of the published datasets, from files to images."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

SYNSETS = ["n02106662", "n02124075", "n02281787", "n02389026"]
LENGTHS = [500, 450, 459, 460, 600, 512, 555]
"""Lengths of the trials, one after another. The published work uses trials of 450 to 600 samples."""
TRAINING_CONCEPTS = 40
TEST_CONCEPTS = ["aircraft_carrier", "antelope", "backscratcher", "balance_beam", "banana", "basil"]
CAPS = {
    "sub-01": ["Pz", "P3", "P7", "O1", "Oz", "O2", "P4", "P8"],
    "sub-02": ["Oz", "O1", "O2", "POz", "PO3", "PO4"],
}
"""Channels of each person. People have different channels, in different orders."""
POSTERIOR = "Pz P3 P7 O1 Oz O2 P4 P8 P1 P5 PO7 PO3 POz PO4 PO8 P6 P2"
"""The 17 channels of the preprocessed THINGS-EEG2."""
WHOLE = POSTERIOR + (
    " Fp1 F3 F7 FT9 FC5 FC1 C3 T7 TP9 CP5 CP1 TP10 CP6 CP2 Cz C4 T8 FT10 FC6 FC2 F4 F8 Fp2 AF7 AF3 AFz F1 F5 FT7 FC3 "
    "C1 C5 TP7 CP3 CPz CP4 TP8 C6 C2 FC4 FT8 F6 F2 AF4 AF8 FCz"
)
"""The 63 channels of the raw THINGS-EEG2."""


def draw_jpeg(number: int, size: int = 40) -> bytes:
    """Return a photo-like JPEG whose colours depend on the number."""
    from PIL import Image

    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((size, size + 8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_eeg_imagenet(root: Path, images: int = 6) -> dict[str, str]:
    """Write EEG-ImageNet: two subjects see images of four categories in blocks, in trials of many lengths.

    Parameters
    ----------
    root : Path
        Folder for the files.
    images : int
        Images of each category; the last image is for testing, and the one before it for validation.

    Returns
    -------
    dict
        Environment variables with which ``configs/data_sharding/eeg_imagenet.yaml`` finds the files.
    """
    import torch

    rng, names, dataset = np.random.default_rng(0), [], []
    for synset in SYNSETS:
        for number in range(images):
            name = f"{synset}_{100 + number}"
            path = root / "images" / synset / f"{name}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(draw_jpeg(len(names)))
            names.append(name)
    for subject in (1, 4):
        for image, name in enumerate(names):
            label = SYNSETS.index(name.split("_")[0])
            length = LENGTHS[len(dataset) % len(LENGTHS)]
            times = np.arange(length) / 1000
            wave = np.sin(2 * np.pi * (8 + 6 * label) * times)
            eeg = torch.from_numpy((rng.normal(size=(128, length)) + 2 * wave).astype(np.float32))
            dataset.append({"eeg": eeg, "image": image, "label": label, "subject": subject})
    place = {number: number % images - images for number in range(len(dataset))}
    folds = {
        "train": [number for number, at in place.items() if at < -2],
        "val": [number for number, at in place.items() if at == -2],
        "test": [number for number, at in place.items() if at == -1],
    }
    torch.save({"dataset": dataset, "labels": SYNSETS, "images": names}, root / "eeg_5_95_std.pth")
    torch.save({"splits": [folds]}, root / "block_splits_by_image_all.pth")
    return {"EEG_IMAGENET": str(root), "IMAGENET": str(root / "images")}


def write_things_eeg2(
    root: Path, repetitions: int = 2, test_repetitions: int = 4, caps: Mapping[str, list[str]] = CAPS
) -> dict[str, str]:
    """Write the preprocessed THINGS-EEG2: epochs from -0.2 to 0.8 s, and test concepts that are not in training.

    Parameters
    ----------
    root : Path
        Folder for the files.
    repetitions, test_repetitions : int
        Presentations of each training image and of each test image.
    caps : mapping
        Channels of each person.

    Returns
    -------
    dict
        Environment variables with which ``configs/data_sharding/things_eeg2.yaml`` finds the files.
    """
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lists = {
        "train": [f"{i:05d}_concept{i}" for i in range(1, TRAINING_CONCEPTS + 1)],
        "test": [f"{i:05d}_{name}" for i, name in enumerate(TEST_CONCEPTS, 1)],
    }
    table: dict[str, list[str]] = {}
    for word, folder in (("train", "training_images"), ("test", "test_images")):
        table[f"{word}_img_concepts"] = lists[word]
        table[f"{word}_img_files"] = [f"{concept[6:]}_01b.jpg" for concept in lists[word]]
        for number, (concept, file) in enumerate(zip(lists[word], table[f"{word}_img_files"], strict=True)):
            path = root / "images" / folder / concept / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(draw_jpeg(number + (1000 if word == "test" else 0)))
    np.save(root / "image_metadata.npy", table)  # type: ignore[arg-type]
    times = np.round(np.arange(-20, 80) / 100, 2)
    for subject, names in caps.items():
        for partition, images, reps in (
            ("training", TRAINING_CONCEPTS, repetitions),
            ("test", len(TEST_CONCEPTS), test_repetitions),
        ):
            response = rng.normal(size=(images, 1, len(names), 1)) * np.exp(-((times - 0.15) ** 2) / 0.002)
            x = rng.normal(size=(images, reps, len(names), len(times))) + 3 * response
            (root / subject).mkdir(exist_ok=True)
            data = {"preprocessed_eeg_data": x, "ch_names": names, "times": times}
            np.save(root / subject / f"preprocessed_eeg_{partition}.npy", data)  # type: ignore[arg-type]
    return {"THINGS_EEG2": str(root), "THINGS_IMAGES": str(root / "images")}
