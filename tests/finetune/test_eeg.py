from __future__ import annotations

import weakref
from pathlib import Path

import torch

from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from finetune.eeg import (
    AugmentConfig,
    ImageAugmentConfig,
    augment_eeg,
    compute_for_trials,
    group_repeats,
    prepare_eeg,
    read_trials,
    scale_eeg,
)
from finetune.images import ImageTable
from finetune.training.accelerate import make_accelerator
from finetune.training.step_random import StepRandom


def test_augmentation_treats_copies_of_a_channel_alike(paired_dataset: Path) -> None:
    data = EEGDataset(paired_dataset)
    table, batch = ImageTable(data), collate(data, [0, 1, 2])
    y = prepare_eeg(
        batch, data, table, ImageAugmentConfig(shift=5, noise=0.5, drop_channels=0.5), StepRandom(0, 0), data.spec
    )
    assert torch.equal(y[:, :16], y[:, 16:32])
    silent = (y[:, :16] == 0).all(-1)
    assert silent.any() and not silent.all(1).any()
    untouched = prepare_eeg(batch, data, table, ImageAugmentConfig(), StepRandom(0, 0), data.spec)
    assert torch.equal(untouched, scale_eeg(batch.eeg, data.spec))


def test_only_trials_of_the_same_image_are_averaged(paired_dataset: Path, tmp_path: Path) -> None:
    data = EEGDataset(paired_dataset)
    samples = [data[number] for number in range(4)]
    for sample, image in zip(samples, ("a", "b", "a", "c"), strict=True):
        sample.meta["image_id"] = image
    write_dataset(tmp_path / "d", {"train": samples}, data.spec, labels=data.labels)
    data = EEGDataset(tmp_path / "d")
    table = ImageTable(data)
    assert [table.companions(n) for n in range(4)] == [[2], [], [0], []]
    batch = collate(data, [0, 1])
    mean = (batch.eeg[:1].float() + collate(data, [2]).eeg.float()) / 2
    seen = []
    for step in range(20):
        x = prepare_eeg(
            collate(data, [0, 1]), data, table, ImageAugmentConfig(average=3), StepRandom(0, step), data.spec
        )
        assert torch.equal(x[1:], scale_eeg(batch.eeg[1:], data.spec))
        seen.append(torch.allclose(x[:1], scale_eeg(mean, data.spec), atol=1e-5))
    assert 0 < sum(seen) < 20


def test_changes_treat_copies_of_a_channel_alike() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, 50)[:, torch.arange(10) % 4]
    config = AugmentConfig(shift=3, noise=0.5, drop_channels=0.9)
    out = augment_eeg(x, [4] * 6, config, StepRandom(0, 1))
    torch.testing.assert_close(out[:, 4:8], out[:, :4], atol=0, rtol=0)
    silent = (out == 0).all(dim=2)
    assert silent.any() and not silent.all() and not torch.equal(out, x)
    torch.testing.assert_close(out, augment_eeg(x, [4] * 6, config, StepRandom(0, 1)), atol=0, rtol=0)
    assert augment_eeg(x, [4] * 6, AugmentConfig(), StepRandom(0, 1)) is x
    moved = augment_eeg(x, [4] * 6, AugmentConfig(shift=3), StepRandom(0, 1))
    assert all(
        any(torch.equal(m[:, 3:-3], o[:, 3 + d : 47 + d]) for d in range(-3, 4)) for m, o in zip(moved, x, strict=True)
    )


def test_features_are_computed_part_by_part_with_the_same_result(paired_dataset: Path) -> None:
    data, accelerator = EEGDataset(paired_dataset), make_accelerator(num_processes=1, device="cpu")
    alive: list[weakref.ref[torch.Tensor]] = []
    sizes = []

    def compute(x_BCT: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x_BCT))
        # Of all parts that were read earlier, at most one may still be in memory.
        assert sum(part() is not None for part in alive) <= 1
        alive.append(weakref.ref(x_BCT))
        return x_BCT.mean(dim=2)

    found = compute_for_trials(data, data.spec, compute, accelerator, part=24)
    assert sizes == [24, 24, 16] and found.shape == (64, 128)
    whole = read_trials(data, group_repeats(data, 1), data.spec)
    assert torch.equal(found, whole.mean(dim=2))
    assert torch.equal(found, compute_for_trials(data, data.spec, lambda x_BCT: x_BCT.mean(dim=2), accelerator))
