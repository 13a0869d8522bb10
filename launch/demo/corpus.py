"""Simulate the demo's recordings: as different from each other as in a real collection, but with a known true signal.

The corpus has two parts. ``unpaired/`` holds one resting recording of each of twelve subjects, in five file formats,
five electrode layouts (19 to 128 channels) and four sampling rates. ``paired/`` holds recordings of sixteen subjects,
who look at pictures and wear a cap of 64 channels. Twelve subjects are in both parts of the corpus. ``truth.json``
holds the parameters of the simulation.
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

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE
from data_sharding.common.files import atomic_directory
from launch.demo.brains import COMPONENTS, Head
from launch.demo.pictures import CATEGORIES, SPLIT_SIZES, Picture, encode_picture, make_pictures
from launch.demo.writers import write_recording

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
SUBJECTS = tuple(f"sub-{index:02d}" for index in range(1, 17))
PAIRED_SUBJECTS = {"train": SUBJECTS[:8], "val": SUBJECTS[8:10], "test": SUBJECTS[10:]}
"""The subjects who look at pictures, for each split. Pretraining does not use the subjects of val and test."""
N_RESTING = 12
"""Number of subjects with a resting recording, counted from the start of `SUBJECTS`."""
OTHER_PICTURES = 24
"""Each subject also sees this many pictures that belong to another split than the subject. Trials with these pictures
must not be used in any split."""
DEAD_CHANNELS = {"unpaired": {"sub-02": "Pz", "sub-03": "C3", "sub-09": "E40"}, "paired": {"sub-03": "FT7"}}
REFERENCES = {"M1": (-0.85, -0.35, -0.45), "nose": (0.0, 0.95, -0.55), "CMS": (-0.15, -0.15, 0.97)}
"""Direction of each reference electrode, seen from the middle of the head. Reference electrodes are not channels."""
UNPAIRED_S = (100.0, 120.0)
PAIRED_SFREQ = 250.0
SPACING_S = 1.2
"""Seconds from the onset of one picture to the onset of the next picture."""


@dataclass(frozen=True)
class Site:
    """A laboratory: the properties of its amplifier and of its files."""

    format: str
    """File format of the recordings."""
    suffix: str
    """File extension of the recordings."""
    montage: str
    """Electrode layout of the cap."""
    sfreq: float
    """Sampling rate, Hz."""
    reference: str
    """Reference electrode (a key of `REFERENCES`), or ``average``."""
    n: int
    """Number of channels."""


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
    """Simulate the recordings of the demo."""

    out: str
    """Folder to write. An existing folder is replaced."""
    seed: int = 0
    """Seed of the simulation. The same seed gives the same bytes in all files."""


def _standard_positions(montage: str) -> dict[str, NDArray[np.float64]]:
    import mne

    with warnings.catch_warnings():
        # Use the old name standard_1005 of a montage and hide MNE's warning about it, because older versions of MNE do
        # not know the new name.
        warnings.simplefilter("ignore", FutureWarning)
        return mne.channels.make_standard_montage(montage).get_positions()["ch_pos"]


def locate_electrodes(montage: str) -> dict[str, NDArray[np.float64]]:
    """Return the positions of the electrodes of a layout.

    Parameters
    ----------
    montage : str
        Name of the electrode layout, as in `SITES`.

    Returns
    -------
    dict of str to ndarray, shape (3,)
        Position of each channel on the head in metres, in the order of the amplifier's channels.
    """
    if montage not in ("10-20", "10-05"):
        return _standard_positions(montage)
    dense = _standard_positions("standard_1005")
    if montage == "10-20":
        return {name: dense[name] for name in TENTWENTY}
    # Choose 96 electrodes: the positions of a common cap (10-10 system), and some positions between them (10-05
    # system).
    base = [name for name in _standard_positions("biosemi64") if name in dense]
    half = [name for name in dense if name.endswith("h")]
    extra = half[:: len(half) // (96 - len(base))][: 96 - len(base)]
    return {name: dense[name] for name in [*base, *extra]}


def _fit_directions(positions: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Fit a sphere to the electrodes, and return the unit vectors from its middle to the electrodes."""
    points = np.stack(list(positions.values()))
    system = np.c_[2 * points, np.ones(len(points))]
    solution = np.linalg.lstsq(system, (points**2).sum(axis=1), rcond=None)[0]
    vectors = points - solution[:3]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _compute_directions(positions: dict[str, NDArray[np.float64]], reference: str) -> NDArray[np.float64]:
    """Return the unit vectors to the electrodes; the last row is for the reference electrode, if there is one."""
    directions = _fit_directions(positions)
    if reference == "average":
        return directions
    place = np.array(REFERENCES[reference])
    return np.vstack([directions, place / np.linalg.norm(place)])


def _record(data_nT: NDArray[np.float32], names: list[str], site: Site, dead: str | None) -> NDArray[np.float32]:
    """Simulate the amplifier: subtract the reference, and set the dead channel to zero.

    If the reference is ``average``, it is the mean over all rows of the EEG. Otherwise, the last row is the signal of
    the reference electrode; this row is subtracted from the other rows and removed.
    """
    out = data_nT - data_nT.mean(axis=0) if site.reference == "average" else data_nT[:-1] - data_nT[-1]
    if dead is not None:
        out[names.index(dead)] = 0.0
    return out


def _make_unpaired(folder: Path, seed: int, index: int) -> dict[str, Any]:
    subject, site = SUBJECTS[index], SITES[index % len(SITES)]
    rng = np.random.default_rng([seed, 3, index])
    positions = locate_electrodes(site.montage)
    names = list(positions)
    seconds = float(np.round(rng.uniform(*UNPAIRED_S)))
    head = Head(seed, subject)
    data = head.simulate_background(_compute_directions(positions, site.reference), site.sfreq, seconds, rng, LINE_HZ)
    dead = DEAD_CHANNELS["unpaired"].get(subject)
    data = _record(data, names, site, dead)
    path = folder / subject / f"{subject}_task-rest{site.suffix}"
    path.parent.mkdir(parents=True)

    write_recording(path, data, positions, site.sfreq, site.format, rng)
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
    positions = locate_electrodes(CAP.montage)
    names, directions = list(positions), _compute_directions(positions, CAP.reference)
    split = next(split for split, members in PAIRED_SUBJECTS.items() if subject in members)
    others = [picture for picture in pictures if picture.split != split]
    chosen = [picture for picture in pictures if picture.split == split]
    chosen += [others[i] for i in rng.permutation(len(others))[:OTHER_PICTURES]]
    shown = [chosen[i] for i in rng.permutation(len(chosen))]
    onsets = 2.0 + SPACING_S * np.arange(len(shown)) + rng.uniform(0, 0.08, len(shown))
    onsets = np.round(onsets * PAIRED_SFREQ) / PAIRED_SFREQ
    seconds = float(np.ceil(onsets[-1] + 3))
    head = Head(seed, subject)
    data = head.simulate_background(directions, PAIRED_SFREQ, seconds, rng, LINE_HZ)
    data += head.simulate_responses(directions, PAIRED_SFREQ, data.shape[1], onsets, shown, rng)
    dead = DEAD_CHANNELS["paired"].get(subject)
    data = _record(data, names, CAP, dead)
    stem = f"{subject}_task-pictures"
    path = folder / subject / f"{stem}.vhdr"
    path.parent.mkdir(parents=True)

    markers = [
        {"onset": round(onset * PAIRED_SFREQ), "duration": 1, "description": picture.category + 1}
        for onset, picture in zip(onsets, shown, strict=True)
    ]
    write_recording(path, data, positions, PAIRED_SFREQ, CAP.format, rng, markers)
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
        "split": split,
        "seconds": seconds,
        "trials": len(shown),
        "dead_channel": dead,
    }


def _make_images(folder: Path, pictures: list[Picture]) -> None:
    folder.mkdir(parents=True)
    for picture in pictures:
        (folder / f"{picture.image_id}.png").write_bytes(encode_picture(picture))


def make_corpus(out: Path, seed: int) -> None:
    """Write the corpus. If an error occurs, no incomplete corpus is left on disk.

    Parameters
    ----------
    out : Path
        Folder to write. An existing folder is replaced when the new corpus is complete.
    seed : int
        Seed of the simulation. The same seed gives the same bytes in all files.
    """
    import mne

    pictures = make_pictures(seed)
    paired_indices = [SUBJECTS.index(subject) for members in PAIRED_SUBJECTS.values() for subject in members]
    with atomic_directory(out) as folder, mne.utils.use_log_level("error"):
        _make_images(folder / "paired" / "images", pictures)
        with contextlib.ExitStack() as stack:
            # Threads can run in parallel here, because FFTs, matrix products and file writes release Python's global
            # lock (GIL).
            pool = stack.enter_context(ThreadPoolExecutor(2))
            stack.callback(pool.shutdown, cancel_futures=True)
            paired_futures = [
                pool.submit(_make_paired, folder / "paired", seed, index, pictures) for index in paired_indices
            ]
            unpaired_futures = [
                pool.submit(_make_unpaired, folder / "unpaired", seed, index) for index in range(N_RESTING)
            ]
            truth = {
                "seed": seed,
                "categories": list(CATEGORIES),
                "pictures_per_category": dict(SPLIT_SIZES),
                "paired_subjects": {split: list(members) for split, members in PAIRED_SUBJECTS.items()},
                "unpaired": [future.result() for future in unpaired_futures],
                "paired": [future.result() for future in paired_futures],
                "subjects": {subject: Head(seed, subject).describe() for subject in SUBJECTS},
                "pictures": [picture.to_dict() for picture in pictures],
                "components": [
                    {"name": c.name, "latency_s": c.latency, "uv": c.gain, "driven_by": c.feature} for c in COMPONENTS
                ],
            }
        (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")


def write_corpus(config: CorpusRequest) -> int:
    """Write the corpus, print the number of recordings, and return the exit code."""
    make_corpus(Path(config.out), config.seed)
    paired = sum(len(members) for members in PAIRED_SUBJECTS.values())
    print(f"{config.out}: {N_RESTING} resting recordings, {paired} recordings with pictures")
    return EXIT_DONE


main = command(CorpusRequest, write_corpus, prog="python -m launch.demo.corpus", positionals=("out",))

if __name__ == "__main__":
    sys.exit(main())
