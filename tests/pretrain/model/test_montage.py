"""Tests of the montage tokenizer, from training to export.

The results must not depend on the order of channels, or on padding.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mne
import numpy as np
import pytest
import torch

from data_sharding.common.errors import RequestError
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.samples import pad_channels
from data_sharding.processing.preprocess import PreprocessSpec
from pretrain.encoder.encoder import EEGEncoder
from pretrain.model.config import DecoderConfig, EncoderConfig, MaskedAutoencoderConfig
from pretrain.model.montage import MontageAutoencoder, MontageEncoder, common_positions, electrode_positions

from ..conftest import environment, losses, run_jobs, write_config

SHAPE = EncoderConfig(tokenizer="montage", samples=32, patch=8, dim=24, depth=2, heads=2, mlp_ratio=2.0)
SMALL = MaskedAutoencoderConfig(
    encoder=SHAPE, decoder=DecoderConfig(dim=16, depth=1, heads=2, mlp_ratio=2.0), mask_ratio=0.5
)
SPEC = PreprocessSpec(sfreq=128.0, lowpass=50.0, window=32, stride=32)


def metas(*counts: int) -> list[dict[str, Any]]:
    """Return metadata of samples. Electrodes have random positions on a sphere; that of the third electrode is
    unknown."""
    out = []
    for count in counts:
        places = np.random.default_rng(count).normal(size=(count, 3))
        places = (0.095 * places / np.linalg.norm(places, axis=1, keepdims=True)).tolist()
        out.append({"n": count, "positions": [None if i == 2 else place for i, place in enumerate(places)]})
    return out


def batch(*counts: int) -> Any:
    return SimpleNamespace(metas=metas(*counts), numbers=list(range(len(counts))), epochs=[0] * len(counts))


@pytest.fixture
def encoder() -> MontageEncoder:
    torch.manual_seed(0)
    model = MontageEncoder(SHAPE).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def autoencoder() -> MontageAutoencoder:
    torch.manual_seed(0)
    return MontageAutoencoder(SMALL).double()


class TestEmbedding:
    def test_does_not_change_with_the_order_of_channels(self, encoder: MontageEncoder) -> None:
        x = torch.randn(2, 20, 32, dtype=torch.float64)
        places, _ = electrode_positions(metas(20, 20), 128)
        order = torch.randperm(20)
        expected = encoder.over_time(x, places)
        torch.testing.assert_close(encoder.over_time(x[:, order], places[:, order]), expected, rtol=0, atol=1e-12)
        # The same signals at other electrode positions give another embedding, so the encoder uses the positions.
        assert (encoder.over_time(x[:, order], places) - expected).abs().max() > 1e-3

    @pytest.mark.parametrize("width", [32, 64, 128])
    def test_does_not_change_with_padding(self, width: int, encoder: MontageEncoder) -> None:
        x = torch.randn(1, 20, 32, dtype=torch.float64)
        places, count = electrode_positions(metas(20), 128)
        expected = encoder.over_time(x, places)
        padded = pad_channels(x, width)
        torch.testing.assert_close(encoder.over_time(padded, places), expected)
        # If another sample of the batch has more channels, the positions of this sample are padded, too.
        wide = torch.full((1, width, 3), float("nan"))
        wide[:, :20] = places
        torch.testing.assert_close(encoder.over_time(padded, wide, count), expected, rtol=0, atol=1e-12)

    def test_does_not_depend_on_other_samples_of_the_batch(self, encoder: MontageEncoder) -> None:
        x = torch.randn(3, 128, 32, dtype=torch.float64)
        places, count = electrode_positions(metas(5, 64, 19), 128)
        together = encoder.over_time(x, places, count)
        for i, n in enumerate((5, 64, 19)):
            alone, _ = electrode_positions(metas(n), 128)
            torch.testing.assert_close(encoder.over_time(x[i : i + 1, :n], alone)[0], together[i], rtol=0, atol=1e-12)

    def test_electrodes_of_unknown_position_are_exchangeable(self, encoder: MontageEncoder) -> None:
        x = torch.randn(1, 6, 32, dtype=torch.float64)
        nowhere = torch.full((1, 6, 3), float("nan"))
        expected = encoder.over_time(x, nowhere)
        assert expected.isfinite().all()
        torch.testing.assert_close(encoder.over_time(x.flip(1), nowhere), expected, rtol=0, atol=1e-12)


class TestAutoencoder:
    @pytest.mark.parametrize("scaling", ["window", "constant"])
    def test_the_windows_of_a_batch_do_not_change_with_the_order_of_channels(
        self, scaling: Any, autoencoder: MontageAutoencoder
    ) -> None:
        spec = dataclasses.replace(SPEC, scaling=scaling)
        rng = np.random.default_rng(0)
        signals = [rng.normal(size=(n, 32)) * np.geomspace(1, 40, n)[:, None] for n in (5, 64, 19)]

        def windows(orders: list[np.ndarray]) -> list[Any]:
            samples: Any = SimpleNamespace(
                channels=[len(order) for order in orders],
                padded=lambda *_: torch.stack(
                    [pad_channels(torch.from_numpy(x[order])) for x, order in zip(signals, orders, strict=True)]
                ),
            )
            x_BCT = autoencoder.windows(samples, spec, torch.device("cpu"))
            assert torch.equal(x_BCT[0, :5], x_BCT[0, 5:10])
            return [x_CT[np.argsort(order)].numpy() for x_CT, order in zip(x_BCT, orders, strict=True)]

        straight = windows([np.arange(len(x)) for x in signals])
        shuffled = windows([rng.permutation(len(x)) for x in signals])
        for found, expected, x in zip(shuffled, straight, signals, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12)
            divisor = x.std() if scaling == "window" else spec.scale_uv
            np.testing.assert_allclose(expected, x / divisor, rtol=1e-12)

    def test_no_gradient_from_padding_and_finite_ones_from_unknown_places(
        self, autoencoder: MontageAutoencoder
    ) -> None:
        x = torch.randn(2, 128, 32, dtype=torch.float64, requires_grad=True)
        inputs = autoencoder.prepare(batch(4, 7), seed=1)
        autoencoder(x, **inputs).sum().backward()
        assert x.grad is not None
        assert x.grad[0, 4:].abs().max() == 0 and x.grad[1, 7:].abs().max() == 0
        assert (x.grad[0, :4].abs().sum(dim=1) > 0).all() and (x.grad[1, :7].abs().sum(dim=1) > 0).all()
        for name, parameter in autoencoder.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    def test_a_sample_has_the_same_loss_alone_and_in_a_batch(self, autoencoder: MontageAutoencoder) -> None:
        x = torch.randn(2, 128, 32, dtype=torch.float64)
        both = batch(4, 7)
        loss = autoencoder(x, **autoencoder.prepare(both, seed=1))
        for i in range(2):
            alone: Any = SimpleNamespace(metas=both.metas[i : i + 1], numbers=[i], epochs=[0])
            inputs = autoencoder.prepare(alone, seed=1)
            assert "count_B" not in inputs and "seen_BK" not in inputs
            torch.testing.assert_close(autoencoder(x[i : i + 1], **inputs)[0], loss[i], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("each", [False, True])
    def test_a_hidden_channel_cannot_be_read_from_its_copies(self, each: bool) -> None:
        torch.manual_seed(0)
        model = MontageAutoencoder(dataclasses.replace(SMALL, mask_each_channel=each)).double()
        x = torch.randn(1, 5, 32, dtype=torch.float64)
        inputs = model.prepare(batch(5), seed=3)
        made = model.reconstruct(pad_channels(x), **inputs)
        hidden = model.hidden_signal(**inputs)
        assert hidden.shape == x.shape and hidden.double().mean() == 0.5
        assert each == bool((hidden != hidden[:, :1]).any())
        changed = torch.where(hidden, x + 5.0, x)
        torch.testing.assert_close(model.reconstruct(pad_channels(changed), **inputs), made, rtol=0, atol=1e-12)
        shown = torch.where(hidden, x, x + 5.0)
        assert (model.reconstruct(pad_channels(shown), **inputs) - made).abs().max() > 1e-3

    def test_loss_is_the_mean_over_hidden_values_of_true_channels(self, autoencoder: MontageAutoencoder) -> None:
        x = torch.randn(2, 128, 32, dtype=torch.float64)
        inputs = autoencoder.prepare(batch(3, 6), seed=5)
        made = autoencoder.untokenize(autoencoder.reconstruct(x, **inputs))
        hidden = autoencoder.hidden_signal(**inputs)
        expected = [((made - x[:, :6])[i].square()[hidden[i]]).mean() for i in range(2)]
        torch.testing.assert_close(autoencoder(x, **inputs), torch.stack(expected))
        power = [x[i, :6].square()[hidden[i]].mean() for i in range(2)]
        torch.testing.assert_close(autoencoder.power(x, **inputs), torch.stack(power))
        assert not hidden[0, 3:].any()

    def test_a_dropped_channel_is_hidden_and_stays_a_target(self) -> None:
        model = MontageAutoencoder(dataclasses.replace(SMALL, channel_dropout=0.6)).double()
        inputs = model.prepare(batch(8, 8, 8), seed=2)
        hidden = model.hidden_signal(**inputs).all(dim=-1)
        assert 6 < hidden.sum() < 22 and (~hidden).any(dim=1).all()
        x = torch.randn(3, 8, 32, dtype=torch.float64, requires_grad=True)
        model.reconstruct(x, **inputs).sum().backward()
        assert x.grad is not None and torch.equal(x.grad.abs().sum(dim=-1) == 0, hidden)
        assert not model.hidden_signal(**model.prepare(batch(8), seed=2, training=False)).all(dim=-1).any()


class TestPackage:
    @pytest.fixture(scope="class")
    def package(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("montage") / "encoder"
        EEGEncoder(SHAPE, SPEC).save_pretrained(folder, program=True)
        return folder

    def test_program_runs_without_this_package(self, package: Path, tmp_path: Path) -> None:
        encoder = EEGEncoder.from_pretrained(package)
        x = torch.randn(3, 21, 32)
        places, count = electrode_positions(metas(21, 8, 3), 128)
        np.savez(tmp_path / "in.npz", x=x.numpy(), places=places.numpy(), count=count.numpy())
        script = (
            "import sys, numpy, torch\n"
            f"program = torch.export.load({str(package / 'encoder.pt2')!r}).module()\n"
            "x, places, count = (torch.from_numpy(v) for v in numpy.load('in.npz').values())\n"
            "one = program(x[1:2, :8], places[1:2, :8], count[1:2])\n"
            "numpy.savez('out.npz', all=program(x, places, count).detach(), one=one.detach())\n"
            "assert not any(name.startswith(('pretrain', 'data_sharding')) for name in sys.modules)\n"
        )
        away = environment() | {"PYTHONPATH": ""}
        subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, env=away, check=True, timeout=120)
        with torch.no_grad():
            expected = encoder(x, places, count).numpy()
        with np.load(tmp_path / "out.npz") as found:
            np.testing.assert_allclose(found["all"], expected, atol=1e-4)
            np.testing.assert_allclose(found["one"][0], expected[1], atol=1e-4)

    def test_asks_for_positions_and_takes_those_of_mne(self, package: Path, tmp_path: Path) -> None:
        x = torch.randn(2, 3, 32)
        with pytest.raises(RequestError, match="positions"):
            EEGEncoder.from_pretrained(package)(x)
        montage = mne.channels.make_standard_montage("standard_1020")
        info = mne.create_info(["Cz", "O1", "X9"], 128.0, "eeg")
        info.set_montage(montage, on_missing="ignore")
        torch.manual_seed(1)
        model = EEGEncoder(SHAPE, SPEC, chs_info=info["chs"], n_outputs=4).eval()
        assert model(x).shape == (2, 4)
        assert model.positions_C3 is not None and model.positions_C3.isfinite().all(dim=1).tolist() == [
            True,
            True,
            False,
        ]
        model.save_pretrained(tmp_path / "classifier")
        again = EEGEncoder.from_pretrained(tmp_path / "classifier")
        torch.testing.assert_close(again(x), model(x))
        assert again.positions_C3 is not None
        torch.testing.assert_close(again(x[:, [1, 0, 2]], again.positions_C3[[1, 0, 2]]), model(x))

    # Before encoding, copies of the channels pad a window to 128 rows. With 8 channels, each channel fills 16 rows.
    # With 7 channels, 2 of them fill one row more than the others.
    @pytest.mark.parametrize("count", [8, 7])
    def test_encodes_a_recording_whatever_the_order_of_its_channels(self, count: int, package: Path) -> None:
        names = ["Fp1", "Fp2", "C3", "C4", "O1", "O2", "T7", "T8"][:count]
        rng = np.random.default_rng(0)
        time = np.arange(1000) / 250
        x = 20 * np.sin(2 * np.pi * 9 * time + rng.uniform(0, 6, (count, 1))) + 5 * rng.normal(size=(count, 1000))
        # Give the channels different amplitudes, so that additional copies of a strong channel would change the scale.
        x *= np.geomspace(0.3, 3, count)[:, None]
        encoder = EEGEncoder.from_pretrained(package)
        found = encoder.encode((x, names, 250.0, "uV"))
        assert found.tokens.shape[1:] == (4, 24)
        other = rng.permutation(count)
        again = encoder.encode((x[other], [names[i] for i in other], 250.0, "uV"))
        np.testing.assert_allclose(again.tokens, found.tokens, atol=1e-3)
        elsewhere = encoder.encode((x[other], names, 250.0, "uV"))
        assert np.abs(elsewhere.tokens - found.tokens).max() > 1e-2


def test_a_dataset_of_one_montage_needs_no_positions_beside_its_windows(
    paired_dataset: Path, unpaired_dataset: Path
) -> None:
    torch.manual_seed(0)
    shape = dataclasses.replace(SHAPE, samples=128)
    encoder = EEGEncoder(shape).eval()
    dataset = EEGDataset(paired_dataset, "val")
    batch = collate(dataset, [0, 5])
    expected = encoder(batch.eeg.float(), **encoder.inputs_of(batch.metas))
    encoder.positions_C3 = common_positions(dataset)
    torch.testing.assert_close(encoder(batch.eeg.float()), expected, rtol=0, atol=1e-5)
    with pytest.raises(RequestError, match="other electrodes"):
        common_positions(EEGDataset(unpaired_dataset, "val"))


def test_trains_and_exports_the_same_on_one_and_two_processes(unpaired_dataset: Path, tmp_path: Path) -> None:
    from pretrain.export import main as export
    from pretrain.train import main as pretrain

    config = write_config(
        tmp_path / "config.yaml",
        dataset=str(unpaired_dataset),
        output=str(tmp_path / "one"),
        model={
            "encoder": {"tokenizer": "montage", "patch": 16, "dim": 24},
            "decoder": {"dim": 16},
            "mask_block": 2,
            "channel_dropout": 0.2,
            "compute": {"checkpointing": True},
        },
        micro_batch_size=8,
        zero_stage=0,
        steps=4,
    )
    assert pretrain([str(config)]) == 0
    assert (tmp_path / "one" / "plots" / "reconstruction.png").is_file()
    assert export([str(tmp_path / "one"), str(tmp_path / "encoder"), "--program", "false"]) == 0
    card = (tmp_path / "encoder" / "model_card.md").read_text()
    assert "any montage" in card and "standard deviation over its recorded channels" in card
    # The samples have 19 to 64 channels. Two processes form other batches of them than one process, but the losses stay
    # the same.
    variants = [("1", "bf16"), ("3", "fp32")]
    jobs = []
    for stage, precision in variants:
        words = ["--output", str(tmp_path / f"{stage} {precision}"), "--zero_stage", stage, "--precision", precision]
        jobs.append({"words": [str(config), *words]})
    run_jobs(tmp_path, 2, jobs)
    reference = losses(tmp_path / "one")
    assert len(reference) == 4
    for stage, precision in variants:
        found = losses(tmp_path / f"{stage} {precision}")
        tolerance = 1e-4 if precision == "fp32" else 2e-2
        np.testing.assert_allclose(found, reference, atol=tolerance, err_msg=f"{stage} {precision}")
