"""Tests of the encoder package: writing, reading with strict checks, running its program, and encoding recordings."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import mne
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.samples import pad_channels
from data_sharding.processing.preprocess import PreprocessSpec
from pretrain.encode import main as encode_main
from pretrain.encoder.encoder import EEGEncoder
from pretrain.export import main as export_main
from pretrain.model.autoencoder import SignalEncoder
from pretrain.model.config import EncoderConfig
from pretrain.model.weights import WEIGHTS

from ..conftest import environment, saved_weights

NAMES = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2", "F7", "F8", "T7", "T8", "P7", "P8", "Fz", "Cz"]


def recording(seconds: float = 6.3, sfreq: float = 500.0) -> mne.io.RawArray:
    """Simulate an EEG recording in volts, with an offset, mains interference and a stimulus channel."""
    rng = np.random.default_rng(0)
    t = np.arange(int(seconds * sfreq)) / sfreq
    x = 2e-5 * np.sin(2 * np.pi * 10 * t + rng.uniform(0, 6, (len(NAMES), 1))) + 5e-6 * rng.normal(
        size=(len(NAMES), t.size)
    )
    x += 1e-5 * np.sin(2 * np.pi * 50 * t) + 0.02
    info = mne.create_info([*NAMES, "STI"], sfreq, ["eeg"] * len(NAMES) + ["stim"])
    return mne.io.RawArray(np.vstack([x, np.zeros(t.size)]), info, verbose="ERROR")


class TestPackage:
    def test_holds_the_trained_weights(self, trained_run: Path, encoder_package: Path) -> None:
        encoder = EEGEncoder.from_pretrained(encoder_package)
        weights = saved_weights(trained_run, 240)
        found = {k.removeprefix("backbone."): v for k, v in encoder.state_dict().items()}
        expected = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_card_names_data_and_training(self, encoder_package: Path, unpaired_dataset: Path) -> None:
        card = (encoder_package / "model_card.md").read_text()
        name = EEGDataset(unpaired_dataset).manifest.dataset_id
        assert f"- Dataset id `{name}`, version 1\n" in card
        config = json.loads((encoder_package / "config.json").read_text())
        assert config["extra"]["dataset_versions"] == {name: 1}
        assert "96 windows" in card
        assert "3 subjects" in card
        assert "240 steps" in card
        assert "divided by the window's standard deviation over its 128 padded rows, then limited to 20 in" in card

    def test_licence_that_is_not_known_is_refused(self, trained_run: Path, tmp_path: Path, capsys) -> None:
        words = [str(trained_run), str(tmp_path / "encoder"), "--allowed_licenses", "[CC0*]"]
        assert export_main(words) == 2 and not (tmp_path / "encoder").exists()
        assert "licences of the training data are not known" in capsys.readouterr().err

    def test_program_runs_without_this_package(self, encoder_package: Path, tmp_path: Path) -> None:
        encoder = EEGEncoder.from_pretrained(encoder_package)
        x = torch.randn(5, 128, 128)
        np.save(tmp_path / "x.npy", x.numpy())
        script = (
            "import sys, numpy, torch\n"
            f"program = torch.export.load({str(encoder_package / 'encoder.pt2')!r}).module()\n"
            "x = torch.from_numpy(numpy.load('x.npy'))\n"
            "numpy.save('y.npy', torch.cat([program(x[:4]), program(x[4:])]).detach().numpy())\n"
            "assert not any(name.startswith(('pretrain', 'data_sharding')) for name in sys.modules)\n"
        )
        away = environment() | {"PYTHONPATH": ""}
        subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, env=away, check=True, timeout=120)
        with torch.no_grad():
            np.testing.assert_allclose(np.load(tmp_path / "y.npy"), encoder(x).numpy(), atol=1e-4)

    def test_others_may_read_the_files(self, encoder_package: Path) -> None:
        modes = {p.name: p.stat().st_mode & 0o777 for p in encoder_package.iterdir()}
        assert modes["model.safetensors"] == modes["config.json"]

    @pytest.mark.parametrize(
        ("damage", "says"),
        [
            (lambda p: (p / "model.safetensors").write_bytes(b"abc"), "model.safetensors"),
            (lambda p: (p / "model.safetensors").unlink(), "model.safetensors"),
            (lambda p: (p / "example.npz").unlink(), "example.npz"),
            (lambda p: (p / "preprocess.json").write_text('{"sfreq": 1'), "preprocess.json"),
            (lambda p: (p / "config.json").write_text("{}"), "not the config of a"),
            (lambda p: (p / "config.json").unlink(), "dreamscale export"),
            (lambda p: _edit(p, lambda w: w.pop("backbone.norm.bias")), "missing backbone.norm.bias"),
            (lambda p: _edit(p, lambda w: w.update(extra=torch.zeros(1))), "unknown extra"),
            (lambda p: _edit(p, lambda w: w["backbone.norm.weight"].mul_(1.1)), "differs"),
            (lambda p: (p / "example.npz").write_bytes(b""), "example.npz: damaged"),
            (lambda p: (p / "example.npz").write_bytes((p / "example.npz").read_bytes()[:5000]), "example.npz: dama"),
            (lambda p: _flip(p / "example.npz"), "example.npz: damaged"),
            (lambda p: _set(p, n_outputs=-1), "config.json: .*n_outputs is .-1"),
            (lambda p: _set(p, positions="abc"), "config.json: .*positions is not a list"),
            (lambda p: _set(p, positions=[[1.0, 2.0]]), "config.json: .*position of an electrode is not three"),
            (lambda p: _set(p, positions=5), "config.json: damaged"),
            (lambda p: _set(p, encoder={"mlp_ratio": float("inf")}), "config.json: not valid JSON .*damaged"),
            (lambda p: _set(p, encoder={"samples": 128, "dim": 2**40, "heads": 1}), "config.json: .*damaged"),
        ],
    )
    def test_damage_is_refused(self, damage: Any, says: str, encoder_package: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(encoder_package, copy)
        damage(copy)
        with pytest.raises(RequestError, match=says):
            EEGEncoder.from_pretrained(copy)

    def test_packages_of_earlier_versions_are_read(self, tmp_path: Path) -> None:
        """Write every file of a package as Dreamscale 0.1.0 wrote it, without calling `save_pretrained`."""
        torch.manual_seed(0)
        shape = {"samples": 32, "patch": 4, "dim": 8, "depth": 1, "heads": 2, "mlp_ratio": 1.0}
        spec = PreprocessSpec(sfreq=128.0, lowpass=50.0, window=32, stride=32)
        backbone = SignalEncoder(EncoderConfig(**shape)).eval()
        x = torch.randn(1, 128, 32)
        with torch.no_grad():
            y = backbone(x)[:, 1:]
        save_file({f"backbone.{name}": value for name, value in backbone.state_dict().items()}, tmp_path / WEIGHTS)
        full = {"tokenizer": "temporal", "channels": 128, "class_token": True, "learned_positions": False}
        config = {
            "kind": "dreamscale_eeg_encoder",
            "schema": 1,
            "encoder": full | shape,
            "n_chans": 128,
            "n_outputs": None,
            "positions": None,
            "parameters": 4592,
            "versions": {"torch": "2.11.0", "dreamscale": "0.1.0"},
            "extra": {},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "preprocess.json").write_text(json.dumps(spec.to_dict()))
        np.savez(tmp_path / "example.npz", x=x.numpy(), y=y.numpy(), tolerance=np.float64(2e-3))
        (tmp_path / "model_card.md").write_text("# EEG encoder\n")
        encoder = EEGEncoder.from_pretrained(tmp_path)
        assert encoder.spec == spec and encoder.n_outputs is None and encoder.positions_C3 is None
        with torch.no_grad():
            torch.testing.assert_close(encoder(x), y)
        # A package that the current version of Dreamscale writes has the same files, and the same keys in config.json.
        encoder.save_pretrained(tmp_path / "now")
        assert {path.name for path in (tmp_path / "now").iterdir()} == {p.name for p in tmp_path.iterdir()} - {"now"}
        now = json.loads((tmp_path / "now" / "config.json").read_text())
        assert now.keys() == config.keys() and now["encoder"] == config["encoder"]
        assert now["parameters"] == config["parameters"]

    def test_an_encoder_with_infinite_output_is_not_written(self, tmp_path: Path) -> None:
        encoder = EEGEncoder(n_times=16, dim=8, depth=1, heads=1)
        encoder.save_pretrained(tmp_path / "encoder")
        # Each weight is finite, but the sum of two such weights is infinite.
        torch.nn.init.constant_(encoder.backbone.patch_embed.weight, 3e38)
        with pytest.raises(RequestError, match="not written"):
            encoder.save_pretrained(tmp_path / "encoder")
        EEGEncoder.from_pretrained(tmp_path / "encoder")

    def test_export_refuses_a_folder_without_a_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert export_main([str(tmp_path), str(tmp_path / "out")]) == 2
        assert "config.yaml" in capsys.readouterr().err

    def test_export_overwrites_nothing_but_packages(self, trained_run: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("precious")
        assert export_main([str(trained_run), str(tmp_path)]) == 2
        assert (tmp_path / "thesis.txt").read_text() == "precious"


def _edit(package: Path, change: Any) -> None:
    weights = load_file(package / "model.safetensors")
    change(weights)
    save_file(weights, package / "model.safetensors")


def _set(package: Path, **values: Any) -> None:
    path = package / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


class TestModule:
    def test_trains_and_returns_tokens_without_the_class_token(self, encoder_package: Path) -> None:
        encoder = EEGEncoder.from_pretrained(encoder_package).train()
        tokens = encoder(torch.randn(3, 128, 128))
        assert tokens.shape == (3, encoder.n_tokens, encoder.dim) == (3, 32, 32)
        tokens.square().mean().backward()
        assert all(p.grad is not None for p in encoder.parameters())

    def test_pads_fewer_channels_by_replication(self, encoder_package: Path) -> None:
        encoder = EEGEncoder.from_pretrained(encoder_package)
        x = torch.randn(2, 19, 128)
        torch.testing.assert_close(encoder(x), encoder(pad_channels(x)))

    def test_takes_the_arguments_of_braindecode(self, tmp_path: Path) -> None:
        chs_info = mne.create_info(NAMES, 128.0, "eeg")["chs"]
        model = EEGEncoder(chs_info=chs_info, n_times=256, sfreq=128.0, n_outputs=4, dim=32, depth=1, heads=2)
        assert (model.n_chans, model.n_times, model.sfreq, model.n_outputs) == (18, 256, 128.0, 4)
        model.eval()
        x = torch.randn(3, 18, 256)
        assert model(x).shape == (3, 4)
        model.save_pretrained(tmp_path / "classifier")
        again = EEGEncoder.from_pretrained(tmp_path / "classifier")
        torch.testing.assert_close(again(x), model(x))
        assert EEGEncoder.from_pretrained(tmp_path / "classifier", n_outputs=7)(x).shape == (3, 7)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"n_chans": 129},
            {"n_times": 256, "input_window_seconds": 1.0, "sfreq": 128.0},
            {"n_times": 130, "dim": 32, "heads": 2},
            {"n_outputs": -1, "dim": 32, "depth": 1, "heads": 2},
        ],
    )
    def test_contradictions_are_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError):
            EEGEncoder(**wrong)


class TestEncode:
    def test_array_and_raw_agree_in_any_unit(self, encoder_package: Path) -> None:
        encoder = EEGEncoder.from_pretrained(encoder_package)
        raw = recording()
        found = encoder.encode(raw)
        assert found.tokens.shape == (6, 32, 32)
        np.testing.assert_allclose(found.pooled, found.tokens.mean(axis=1), rtol=1e-6)
        np.testing.assert_allclose(found.times, np.arange(6.0))
        assert found.report.channels_used == NAMES
        assert found.report.channels_left_out == {"STI": "stim"}
        assert found.report.line_freq == 50.0
        assert found.report.sfreq_in == 500.0
        assert 0.25 < sum(found.report.seconds_left_out.values()) < 0.35
        x = raw.get_data()[: len(NAMES)]
        for unit, factor in (("V", 1.0), ("mV", 1e3), ("uV", 1e6)):
            again = encoder.encode((x * factor, NAMES, 500.0, unit))
            np.testing.assert_allclose(again.tokens, found.tokens, atol=1e-4)

    def test_an_array_in_a_wrong_unit_is_refused_with_its_amplitude(self, encoder_package: Path) -> None:
        encoder = EEGEncoder.from_pretrained(encoder_package)
        x = recording().get_data()[: len(NAMES)]
        with pytest.raises(RequestError, match=r"unit unknown.*e-05 microvolts.*unit_factor"):
            encoder.encode((x, NAMES, 500.0, "uV"))
        with pytest.raises(RequestError, match=r"unit unknown.*e\+0\d microvolts"):
            encoder.encode((x * 1e6, NAMES, 500.0, "V"))
        encoder.encode((x, NAMES, 500.0, "uV"), unit_factor=1e6)

    def test_encodes_the_windows_that_sharding_writes(self, encoder_package: Path) -> None:
        """The encoder prepares windows with the same steps as sharding: preprocessing, padding and scaling."""
        from data_sharding.processing.preprocess import preprocess

        encoder = EEGEncoder.from_pretrained(encoder_package)
        raw = recording()
        clean = preprocess(raw.get_data()[: len(NAMES)] * 1e6, 500.0, encoder.spec, line_freq=50.0)
        stored = pad_channels(clean[:, 256:384].astype(np.float16))
        with torch.no_grad():
            expected = encoder(encoder.spec.scale_for_model(torch.from_numpy(stored)[None].float()))[0].numpy()
        np.testing.assert_allclose(encoder.encode(raw).tokens[2], expected, atol=1e-4)

    def test_no_window_reaches_over_a_gap(self, encoder_package: Path) -> None:
        import mne

        encoder = EEGEncoder.from_pretrained(encoder_package)
        raw = recording()
        raw.set_annotations(mne.Annotations([2.4], [0.3], ["BAD_ACQ_SKIP"]))
        found = encoder.encode(raw)
        np.testing.assert_allclose(found.times, [0, 1, 2.7, 3.7, 4.7], atol=1e-9)
        after = encoder.encode(recording().crop(2.7))
        np.testing.assert_allclose(found.tokens[2:], after.tokens[: len(found.tokens) - 2], atol=2e-2)

    @pytest.mark.parametrize(
        ("bad", "says"),
        [
            (lambda: (np.zeros((3, 4000)), NAMES[:2], 500.0, "uV"), "channel names"),
            (lambda: (np.ones((2, 4000)), NAMES[:2], 500.0, "furlong"), "unit"),
            (lambda: (np.full((2, 4000), np.nan), NAMES[:2], 500.0, "uV"), "NaN"),
            (lambda: (np.zeros((2, 4000)), NAMES[:2], 500.0, "uV"), "flat"),
            (lambda: recording(seconds=0.5), "too short"),
            (lambda: recording().pick("stim"), "no EEG channel"),
            (lambda: mne.io.RawArray(np.zeros((0, 4000)), mne.create_info([], 500.0), verbose="ERROR"), "no channel;"),
            (lambda: (np.zeros((0, 4000)), [], 500.0, "uV"), "no channel;"),
            (lambda: (np.ones((2, 4000)), NAMES[:2], "500", "uV"), "sfreq must be a number of Hz above 0, got '500'"),
            (lambda: (np.ones((2, 4000)), NAMES[:2], np.nan, "uV"), "sfreq must be a number of Hz above 0, got nan"),
            (lambda: "file.edf", "cannot encode a str"),
        ],
    )
    def test_bad_recordings_are_refused(self, bad: Any, says: str, encoder_package: Path) -> None:
        with pytest.raises(RequestError, match=says):
            EEGEncoder.from_pretrained(encoder_package).encode(bad())

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("line_freq", value) for value in (np.nan, -50.0, 0.0, 1e-3, 500.0)),
            *(("unit_factor", value) for value in (np.nan, -1.0, 0.0, np.inf)),
            *(("batch_size", value) for value in (0, -1)),
        ],
    )
    def test_impossible_numbers_are_refused(self, name: str, value: float, encoder_package: Path) -> None:
        encoder: Any = EEGEncoder.from_pretrained(encoder_package)
        with pytest.raises(RequestError, match=f"{name} is {value}"):
            encoder.encode((np.ones((2, 4000)), NAMES[:2], 500.0, "uV"), **{name: value})

    def test_more_channels_than_the_encoder_takes(self) -> None:
        encoder = EEGEncoder(EncoderConfig(channels=8, samples=128, dim=8, depth=1, heads=1))
        raw = recording()
        with pytest.raises(RequestError, match=r"18 EEG channels .* at most 8; pick"):
            encoder.encode(raw)
        assert encoder.encode(raw.pick(NAMES[:8])).tokens.shape[2] == 8

    def test_tokens_are_held_once(self, encoder_package: Path) -> None:
        class Counting(EEGEncoder):
            given: ClassVar[list[StorageWeakRef]] = []
            alive = 0

            def tokens(self, *inputs: Any) -> torch.Tensor:
                found = super().tokens(*inputs)
                self.given.append(StorageWeakRef(found.untyped_storage()))
                self.alive = max(self.alive, sum(not storage.expired() for storage in self.given))
                return found

        encoder = Counting.from_pretrained(encoder_package)
        raw = recording()
        raw.set_annotations(mne.Annotations([2.4], [0.3], ["BAD_chewing"]))
        whole, found = encoder.encode(recording(), batch_size=1), encoder.encode(raw, batch_size=1)
        # At most two batches of tokens exist as tensors at a time: the current batch and the batch before it.
        assert len(encoder.given) >= 6 + 5 and encoder.alive <= 2
        # The result has no row for the window that was left out.
        np.testing.assert_array_equal(found.tokens, np.delete(whole.tokens, 2, axis=0))
        assert found.pooled.shape == (5, 32)

    def test_command(self, encoder_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        recording().save(tmp_path / "x_raw.fif", verbose="ERROR")
        out = tmp_path / "out" / "x.npz"
        assert encode_main([str(encoder_package), str(tmp_path / "x_raw.fif"), "-o", str(out)]) == 0
        with np.load(out) as found:
            assert found["tokens"].shape == (6, 32, 32)
            assert json.loads(str(found["report"]))["windows"] == 6
        assert [p.name for p in out.parent.iterdir()] == ["x.npz"]
        assert encode_main([str(encoder_package), str(tmp_path / "no.edf"), "-o", str(out)]) == 2
        (tmp_path / "broken.edf").write_bytes(b"0       " + b"?" * 300)
        assert encode_main([str(encoder_package), str(tmp_path / "broken.edf"), "-o", str(out)]) == 2
        assert "broken.edf" in capsys.readouterr().err
        # The command refuses `--line_freq 0` before it notices that the recording does not exist.
        assert encode_main([str(encoder_package), "no.edf", "-o", str(out), "--line_freq", "0"]) == 2
        assert "line_freq is 0" in capsys.readouterr().err


class TestShorterWindows:
    def test_a_shortened_encoder_reads_the_beginning_of_a_window(
        self, unpaired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Tokens attend to each other, so compare with an encoder of depth 1 whose later tokens are hidden."""
        spec = dataclasses.replace(EEGDataset(unpaired_dataset).spec, window=256, scaling="constant", clip=0.0)
        for learned in (False, True):
            torch.manual_seed(0)
            config = EncoderConfig(samples=256, dim=32, depth=1, heads=2, mlp_ratio=2.0, learned_positions=learned)
            encoder = EEGEncoder(config, spec).eval()
            data = EEGDataset(unpaired_dataset)
            short = encoder.fit_to(data, "encoder e")
            assert "encoder e: reads the 1 s of a trial with 32 of the 64 tokens" in capsys.readouterr().out
            assert (short.n_times, short.spec.window, short.spec.scaling, short.training) == (
                128,
                128,
                "constant",
                False,
            )
            x_BCT = torch.randn(2, 128, 256)
            seen_BK = torch.arange(32).expand(2, -1)
            with torch.no_grad():
                expected = encoder.backbone(x_BCT, seen_BK)[:, 1:]
                torch.testing.assert_close(short(x_BCT[..., :128]), expected)
            short.save_pretrained(tmp_path / "short")
            assert EEGEncoder.from_pretrained(tmp_path / "short").fit_to(data, "e").n_times == 128

    def test_windows_that_do_not_fit_are_refused(self, unpaired_dataset: Path) -> None:
        data = EEGDataset(unpaired_dataset)
        spec = dataclasses.replace(data.spec, window=64)
        with pytest.raises(RequestError, match=r"reads 64 time points, and .* has 128; set eeg\.tmax to 0\.5 s"):
            EEGEncoder(EncoderConfig(samples=64, dim=32, depth=1, heads=2), spec).fit_to(data, "encoder e")
        with pytest.raises(RequestError, match=r"preprocess\.highpass 2\.0 against 0\.5"):
            EEGEncoder(
                EncoderConfig(samples=128, dim=32, depth=1, heads=2), dataclasses.replace(data.spec, highpass=2.0)
            ).fit_to(data, "encoder e")
