"""Make the images of trials in several processes, and store each image as soon as it is finished.

Array shapes: B trials, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.errors import RankError, RequestError, StopRequested
from data_sharding.common.progress import progress
from data_sharding.dataset.dataset import EEGDataset
from finetune.generation.partial import PartialFolder
from finetune.generation.trials import Trial
from finetune.images import decode_image
from pretrain.runs.distributed import World
from pretrain.runs.stop import StopSignal

MakeImages = Callable[[Sequence[Trial], int], NDArray[np.uint8]]
"""Function that makes the images [B, H, W, 3] of a batch of trials. The second argument is 0 for the first image of
each trial, 1 for the second image, and so on."""
DescribeImage = Callable[[Trial, int], Mapping[str, object]]
"""Function that returns the metadata of one image of a trial."""


def generate_images(
    make: MakeImages,
    dataset: EEGDataset,
    trials: Sequence[Trial],
    folder: PartialFolder,
    *,
    texts: Mapping[str, object],
    batch_size: int,
    samples: int = 1,
    describe: DescribeImage | None = None,
    finished: set[str] | None = None,
    world: World | None = None,
) -> None:
    """Make and store all images that are not finished yet. Of n processes, each makes every n-th batch.

    A batch always has the same trials, for any number of processes, and even if some of its images are finished
    already. Therefore, a stopped and repeated command gives exactly the same images as a command without a stop.

    Parameters
    ----------
    make : callable
        Function that makes the images of a batch.
    dataset : EEGDataset
        Trials of the split, with the images that the person saw.
    trials : sequence of Trial
        All trials for which images are made.
    folder : PartialFolder
        Folder in which the images are stored.
    texts : mapping
        Keywords and values that are stored as metadata in the file of each generated image.
    batch_size : int
        Number of trials in a batch.
    samples : int
        Number of images for each trial.
    describe : callable, optional
        Function that returns further metadata of an image.
    finished : set of str, optional
        Keys of the trials whose images are finished. The set must be the same on every process.
    world : World, optional
        The processes that share the work; by default, this process works alone.

    Raises
    ------
    RequestError
        If an image that the person saw cannot be decoded, or if `make` refuses the trials.
    StopRequested
        If a stop of the command was requested. Every process finishes its current batch before the error is raised.
    """
    world, finished = world or World(), finished or set()
    describe = describe or (lambda trial, number: {})
    batches = [trials[start : start + batch_size] for start in range(0, len(trials), batch_size)]
    batches = [batch for batch in batches if any(trial.key not in finished for trial in batch)]
    own = batches[world.rank :: world.size]
    name = f"images ({texts['control']} control)" + (f", process 1 of {world.size}" if world.size > 1 else "")
    stopped = False
    with StopSignal() as stop, progress(name, sum(map(len, own)), enabled=world.first) as advance:
        try:
            for batch in own:
                stopped = stop.requested
                if stopped:
                    break
                made = [make(batch, number) for number in range(samples)]
                for row, trial in enumerate(batch):
                    if trial.key not in finished:
                        own_texts = [{**texts, "trial": trial.key, **describe(trial, n)} for n in range(samples)]
                        real = _read_real(dataset, trial, made[0].shape[1])
                        folder.add(trial.key, [images[row] for images in made], real, own_texts)
                advance(len(batch))
        except RequestError as error:
            # The error may occur only in this process, so a process other than rank 0 must print the error itself.
            raise error if world.first else RankError(str(error)) from None
        # Wait until every process has stored its images, because rank 0 completes the result after this function.
        if world.any(stopped):
            raise StopRequested(
                f"the finished images are kept in {folder.path}; run the same command again for the other images"
            )


def _read_real(dataset: EEGDataset, trial: Trial, size: int) -> NDArray[np.uint8]:
    """Return the image that the person saw, with `size` rows and columns."""
    return decode_image(dataset.image(trial.numbers[0]), size, name=f"{dataset.path}: sample {trial.key}")
