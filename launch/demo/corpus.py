"""The demo's corpus: recordings of five makes with a known truth, as heterogeneous as a real collection.

Two parts. ``unpaired/`` holds one resting recording of each of twelve subjects, spread over five file formats, five
electrode layouts (19 to 128 channels) and four sampling rates. ``paired/`` holds eight of the subjects watching
pictures under one 64-channel cap. ``truth.json`` says what was put in.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, run_main
from data_sharding.common.files import atomic_directory
from launch.demo.brains import COMPONENTS, Head
from launch.demo.pictures import CATEGORIES, SPLIT_SIZES, Picture, draw, make_pictures

LINE_HZ = 50.0
TENTWENTY = [
    "Fp1",
    "Fp2",
    "F7",
    "F3",
    "Fz",
    "F4",
    "F8",
    "T7",
    "C3",
    "Cz",
    "C4",
    "T8",
    "P7",
    "P3",
    "Pz",
    "P4",
    "P8",
    "O1",
    "O2",
]
SUBJECTS = tuple(f"sub-{index:02d}" for index in range(1, 13))
PAIRED_SUBJECTS = {"train": SUBJECTS[:5], "val": SUBJECTS[5:6], "test": SUBJECTS[6:8]}
"""Subjects of the pictures; those of val and test are held out of pretraining, too."""
DEAD_CHANNELS = {"unpaired": {"sub-02": "Pz", "sub-03": "C3", "sub-09": "E40"}, "paired": {"sub-03": "FT7"}}
REFERENCES = {"M1": (-0.85, -0.35, -0.45), "nose": (0.0, 0.95, -0.55), "CMS": (-0.15, -0.15, 0.97)}
"""Directions of the reference electrodes, none of which is a channel."""
UNPAIRED_S = (100.0, 120.0)
PAIRED_SFREQ = 250.0
SPACING_S = 1.2
"""Seconds from one picture to the next."""


@dataclass(frozen=True)
class Site:
    """A laboratory: what its amplifier and its files are like."""

    format: str
    suffix: str
    montage: str
    sfreq: float
    reference: str
    """One of `REFERENCES`, or ``average``."""
    n: int


SITES = (
    Site("EDF", ".edf", "10-20", 200.0, "M1", 19),
    Site("BDF", ".bdf", "biosemi32", 512.0, "CMS", 32),
    Site("BrainVision", ".vhdr", "biosemi64", 500.0, "nose", 64),
    Site("EEGLAB", ".set", "GSN-HydroCel-128", 250.0, "average", 128),
    Site("FIF", "_raw.fif", "10-05", 500.0, "M1", 96),
)
CAP = Site("BrainVision", ".vhdr", "biosemi64", PAIRED_SFREQ, "nose", 64)


@dataclass(kw_only=True)
class CorpusRequest:
    """Write the demo's corpus."""

    out: str
    """Folder to make."""
    seed: int = 0
    """Everything follows from it."""


def _standard_positions(montage: str) -> dict[str, NDArray[np.float64]]:
    import mne

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer MNE renames standard_1005, older ones lack the new name
        return mne.channels.make_standard_montage(montage).get_positions()["ch_pos"]


def electrodes(montage: str) -> dict[str, NDArray[np.float64]]:
    """Positions of a layout's electrodes.

    Parameters
    ----------
    montage : str
        A layout named by one of the sites.

    Returns
    -------
    dict of str to ndarray, shape (3,)
        Channel name to head position in metres, in the order of the amplifier.
    """
    if montage not in ("10-20", "10-05"):
        return _standard_positions(montage)
    dense = _standard_positions("standard_1005")
    if montage == "10-20":
        return {name: dense[name] for name in TENTWENTY}
    # The 10-10 electrodes of a common cap, filled up to 96 with evenly spread half-steps of the 10-05 system.
    base = [name for name in _standard_positions("biosemi64") if name in dense]
    half = [name for name in dense if name.endswith("h")]
    extra = half[:: len(half) // (96 - len(base))][: 96 - len(base)]
    return {name: dense[name] for name in [*base, *extra]}


def _directions(positions: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Unit vectors from the middle of the best sphere through the electrodes."""
    points = np.stack(list(positions.values()))
    system = np.c_[2 * points, np.ones(len(points))]
    solution = np.linalg.lstsq(system, (points**2).sum(axis=1), rcond=None)[0]
    vectors = points - solution[:3]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _directions_with_reference(positions: dict[str, NDArray[np.float64]], reference: str) -> NDArray[np.float64]:
    directions = _directions(positions)
    if reference == "average":
        return directions
    place = np.array(REFERENCES[reference])
    return np.vstack([directions, place / np.linalg.norm(place)])


def _record(data_nT: NDArray[np.float32], names: list[str], site: Site, dead: str | None) -> NDArray[np.float32]:
    """Measure against the site's reference, which is the last row unless it is the average, and kill a channel."""
    out = data_nT - data_nT.mean(axis=0) if site.reference == "average" else data_nT[:-1] - data_nT[-1]
    if dead is not None:
        out[names.index(dead)] = 0.0
    return out


def _make_unpaired(folder: Path, seed: int, index: int) -> dict[str, Any]:
    subject, site = SUBJECTS[index], SITES[index % len(SITES)]
    rng = np.random.default_rng([seed, 3, index])
    positions = electrodes(site.montage)
    names = list(positions)
    seconds = float(np.round(rng.uniform(*UNPAIRED_S)))
    head = Head(seed, subject)
    data = head.background(_directions_with_reference(positions, site.reference), site.sfreq, seconds, rng, LINE_HZ)
    dead = DEAD_CHANNELS["unpaired"].get(subject)
    data = _record(data, names, site, dead)
    path = folder / subject / f"{subject}_task-rest{site.suffix}"
    path.parent.mkdir(parents=True)
    from launch.demo import writers

    writers.write(path, data, positions, site.sfreq, site.format, rng)
    return {
        "path": f"unpaired/{subject}/{path.name}",
        "subject": subject,
        "format": site.format,
        "montage": site.montage,
        "channels": site.n,
        "sfreq": site.sfreq,
        "reference": site.reference,
        "seconds": seconds,
        "line_hz": LINE_HZ,
        "dead_channel": dead,
    }


def _make_paired(folder: Path, seed: int, index: int, pictures: list[Picture]) -> dict[str, Any]:
    subject = SUBJECTS[index]
    rng = np.random.default_rng([seed, 4, index])
    positions = electrodes(CAP.montage)
    names, directions = list(positions), _directions_with_reference(positions, CAP.reference)
    order = rng.permutation(len(pictures))
    onsets = 2.0 + SPACING_S * np.arange(len(pictures)) + rng.uniform(0, 0.08, len(pictures))
    onsets = np.round(onsets * PAIRED_SFREQ) / PAIRED_SFREQ
    seconds = float(np.ceil(onsets[-1] + 3))
    shown = [pictures[i] for i in order]
    head = Head(seed, subject)
    data = head.background(directions, PAIRED_SFREQ, seconds, rng, LINE_HZ)
    data += head.responses(directions, PAIRED_SFREQ, data.shape[1], onsets, shown, rng)
    dead = DEAD_CHANNELS["paired"].get(subject)
    data = _record(data, names, CAP, dead)
    stem = f"{subject}_task-pictures"
    path = folder / subject / f"{stem}.vhdr"
    path.parent.mkdir(parents=True)
    from launch.demo import writers

    markers = [
        {"onset": round(onset * PAIRED_SFREQ), "duration": 1, "description": picture.category + 1}
        for onset, picture in zip(onsets, shown, strict=True)
    ]
    writers.write(path, data, positions, PAIRED_SFREQ, CAP.format, rng, markers)
    lines = ["onset\tduration\timage\tlabel_name\tcaption\timage_id\tsplit"]
    for onset, p in zip(onsets, shown, strict=True):
        fields = (
            f"{onset:.3f}",
            "0.5",
            f"images/{p.image_id}.png",
            CATEGORIES[p.category],
            p.caption,
            p.image_id,
            p.split,
        )
        lines.append("\t".join(fields))
    (path.parent / f"{stem}_events.tsv").write_text("\n".join(lines) + "\n")
    return {
        "path": f"paired/{subject}/{path.name}",
        "subject": subject,
        "split": next(split for split, members in PAIRED_SUBJECTS.items() if subject in members),
        "seconds": seconds,
        "trials": len(shown),
        "dead_channel": dead,
    }


def _make_images(folder: Path, pictures: list[Picture]) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for picture in pictures:
        Image.fromarray(draw(picture)).save(folder / f"{picture.image_id}.png")


def make_corpus(out: Path, seed: int) -> None:
    """Write the whole corpus, or nothing.

    Parameters
    ----------
    out : Path
        Folder to make; one that exists is replaced when the new one is complete.
    seed : int
        Everything follows from it: the same seed writes the same bytes.
    """
    import mne

    pictures = make_pictures(seed)
    paired = [SUBJECTS.index(subject) for members in PAIRED_SUBJECTS.values() for subject in members]
    with atomic_directory(out) as folder, mne.utils.use_log_level("error"):
        _make_images(folder / "paired" / "images", pictures)
        with contextlib.ExitStack() as stack:
            # Threads: most of the work is transforms, products and writing, which let the interpreter go.
            pool = stack.enter_context(ThreadPoolExecutor(2))
            stack.callback(pool.shutdown, cancel_futures=True)
            watched = [pool.submit(_make_paired, folder / "paired", seed, index, pictures) for index in paired]
            rested = [pool.submit(_make_unpaired, folder / "unpaired", seed, index) for index in range(len(SUBJECTS))]
            truth = {
                "seed": seed,
                "categories": list(CATEGORIES),
                "pictures_per_category": dict(SPLIT_SIZES),
                "paired_subjects": {split: list(members) for split, members in PAIRED_SUBJECTS.items()},
                "unpaired": [future.result() for future in rested],
                "paired": [future.result() for future in watched],
                "subjects": {subject: Head(seed, subject).facts() for subject in SUBJECTS},
                "pictures": [picture.to_dict() for picture in pictures],
                "components": [
                    {"name": c.name, "latency_s": c.latency, "uv": c.gain, "driven_by": c.feature} for c in COMPONENTS
                ],
            }
        (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run ``python -m launch.demo.corpus OUT [--seed N]``.

    Parameters
    ----------
    argv : list of str, optional
        Arguments.

    Returns
    -------
    int
        Exit code.
    """
    config = parse_config(CorpusRequest, argv, prog="python -m launch.demo.corpus", positionals=("out",))
    make_corpus(Path(config.out), config.seed)
    watched = sum(len(members) for members in PAIRED_SUBJECTS.values())
    print(f"{config.out}: {len(SUBJECTS)} resting recordings, {watched} recordings with pictures")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_main(main))
