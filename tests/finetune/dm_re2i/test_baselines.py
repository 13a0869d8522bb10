"""Tests of the baselines of EVRNet: their sizes, their equality with plain implementations, and their packages."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset
from finetune.dm_re2i.classification.baselines import ConvolutionConfig, EEGNetClassifier, EncoderClassifier, TSConv
from finetune.dm_re2i.classifier import EEGClassifier
from finetune.dm_re2i.config import EVRNetStage
from finetune.dm_re2i.networks import build_classifier, load_classifier
from finetune.dm_re2i.train_evrnet import EVRNetTask, calibrate_batch_norm
from pretrain.probe.eegnet import EEGNet

# The shape of the EEG in NICE, the paper that introduced TSConv: 63 channels, 1 s at 250 Hz.
NICE = ConvolutionConfig(n_classes=200, n_channels=63, n_times=250, sfreq=250.0, dropout=0.5)


def test_tsconv_has_the_published_size() -> None:
    """Compare TSConv with its released code: kernels (1, 25), (63, 1), (1, 1); mean over (1, 51) in steps of 5."""
    net = TSConv(NICE).eval()
    assert net.dim == 1440  # `embedding_dim` in the released code of NICE
    convolutions = (25 * 40 + 40) + (63 * 40 * 40 + 40) + (40 * 40 + 40)
    norms = 2 * (40 + 40)
    assert sum(p.numel() for p in net.net.parameters()) == convolutions + norms == 103_680
    e, logits = net(torch.randn(2, 1, 63, 250))
    assert e.shape == (2, 1440) and logits.shape == (2, 200)


def test_tsconv_equals_a_plain_version_forward_and_gradient() -> None:
    torch.manual_seed(0)
    config = ConvolutionConfig(n_classes=3, n_channels=5, n_times=100, sfreq=250.0, dropout=0.0)
    net = TSConv(config).double()
    x = torch.randn(4, 1, 5, 100, dtype=torch.float64, requires_grad=True)
    time, norm, space, norm2, last = (net.net[i] for i in (0, 2, 4, 5, 8))

    def standardise(h: torch.Tensor, bn: torch.nn.BatchNorm2d) -> torch.Tensor:
        centred = h - h.mean(dim=(0, 2), keepdim=True)
        scaled = centred / (centred.square().mean(dim=(0, 2), keepdim=True) + bn.eps).sqrt()
        return scaled * bn.weight[:, None] + bn.bias[:, None]

    # `unfold` divides the channels, [B, 5, 100], into overlapping windows of 25 samples, [B, 5, 76, 25].
    h = torch.einsum("bcwk,fk->bfcw", x[:, 0].unfold(2, 25, 1), time.weight[:, 0, 0]) + time.bias[:, None, None]
    h = torch.stack([h[..., start : start + 51].mean(dim=-1) for start in range(0, 26, 5)], dim=-1)
    h = standardise(h.flatten(2), norm).reshape(h.shape)
    h = torch.where(h > 0, h, h.exp() - 1)
    h = torch.einsum("bfcw,gfc->bgw", h, space.weight[..., 0]) + space.bias[:, None]
    h = standardise(h, norm2)
    h = torch.where(h > 0, h, h.exp() - 1)
    h = torch.einsum("bfw,gf->bwg", h, last.weight[..., 0, 0]) + last.bias
    e = h.reshape(4, 6 * 40)
    expected, found = (e, e @ net.fc.weight.T + net.fc.bias), net(x)
    named = [x, *net.parameters()]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(e.square().sum() + logits.sin().sum(), named) for e, logits in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)


def test_tsconv_keeps_the_duration_of_its_filters_and_refuses_short_trials() -> None:
    net = TSConv(dataclasses.replace(NICE, sfreq=500.0, n_times=500))
    assert (net.net[0].kernel_size[1], net.net[1].kernel_size[1], net.net[1].stride[1]) == (50, 102, 10)
    assert TSConv(dataclasses.replace(NICE, n_times=75)).dim == 40
    with pytest.raises(ValueError, match="needs trials of 75 or more time points at 250 Hz, not 74"):
        TSConv(dataclasses.replace(NICE, n_times=74))


def test_eegnet_is_the_network_of_the_probe_with_its_limits() -> None:
    torch.manual_seed(0)
    net = EEGNetClassifier(dataclasses.replace(NICE, n_times=128, sfreq=128.0, dropout=0.25)).eval()
    assert isinstance(net.net, EEGNet)
    x = torch.randn(3, 1, 63, 128)
    e, logits = net(x)
    assert e.shape == (3, net.dim) == (3, 64) and torch.equal(logits, net.net(x[:, 0]))
    with torch.no_grad():
        net.net.head.weight.mul_(100)
    EVRNetTask(net, 0.0).train()(x[:, 0], torch.ones(3, 200) / 200)  # A training step limits the norms of weights.
    assert net.net.head.weight.norm(dim=1).max() <= 0.25 + 1e-6


def _stages(encoder: Path) -> dict[str, EVRNetStage]:
    return {
        "evrnet": EVRNetStage(channels=16, widths=(4, 4, 8, 8, 12), whiten=0.05),
        "eegnet": EVRNetStage(network="eegnet", channels=16, whiten=0.05),
        "tsconv": EVRNetStage(network="tsconv", channels=16),
        "frozen": EVRNetStage(network="encoder", encoder=str(encoder)),
        "trained": EVRNetStage(network="encoder", encoder=str(encoder), train_encoder=True, dropout=0.1),
    }


@pytest.mark.parametrize("name", ["evrnet", "eegnet", "tsconv", "frozen", "trained"])
def test_every_network_is_saved_and_loaded_with_its_kind(
    name: str, encoder_package: Path, paired_dataset: Path, tmp_path: Path
) -> None:
    data = EEGDataset(paired_dataset)
    stage = _stages(encoder_package)[name]
    net = build_classifier(stage, data)
    x = torch.randn(8, net.config.n_channels, data.n_times)
    calibrate_batch_norm(net, x, batch=4)
    assert not net.training
    net.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.pkl"))
    again = load_classifier(tmp_path / "saved")
    assert type(again) is type(net) and again.config == net.config and again.n_times == net.n_times
    for a, b in zip(net(x[:3, None]), again(x[:3, None]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    e, logits = again(x[:3, None])
    assert e.shape == (3, net.dim) and logits.shape == (3, 2)


def test_only_the_head_of_a_frozen_encoder_learns(encoder_package: Path, paired_dataset: Path) -> None:
    data, stages = EEGDataset(paired_dataset), _stages(encoder_package)
    x, target = torch.randn(6, 128, 128), F.one_hot(torch.arange(6) % 2, 2).float()
    learns = {}
    for name in ("frozen", "trained"):
        net = build_classifier(stages[name], data)
        assert isinstance(net, EncoderClassifier)
        net.train()
        assert net.encoder.training == (name == "trained")
        EVRNetTask(net, 0.0)(x, target)["loss"].backward()
        learns[name] = {key.split(".")[0] for key, p in net.named_parameters() if p.grad is not None}
        mean = net.encoder.eval()(x).mean(dim=1)
        torch.testing.assert_close(net.eval()(x[:, None])[0], mean)
    assert learns == {"frozen": {"fc"}, "trained": {"encoder", "fc"}}


def test_wrong_stages_and_packages_are_refused(encoder_package: Path, paired_dataset: Path, tmp_path: Path) -> None:
    for more, message in (
        ({"network": "encoder"}, r"give evrnet\.encoder"),
        ({"encoder": "somewhere"}, "for no other network"),
        ({"network": "encoder", "encoder": "somewhere", "whiten": 0.05}, "without whitening"),
    ):
        with pytest.raises(ValueError, match=message):
            EVRNetStage(**more)
    with pytest.raises(RequestError, match="not the folder of an EEG classifier"):
        load_classifier(encoder_package)
    short = EEGDataset(paired_dataset, tmin=0.0, tmax=0.25)
    with pytest.raises(RequestError, match="TSConv needs trials of 38 or more time points"):
        build_classifier(EVRNetStage(network="tsconv"), short)
    net: EEGClassifier = build_classifier(_stages(encoder_package)["frozen"], EEGDataset(paired_dataset))
    net.save_pretrained(tmp_path / "a")
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text().replace('"n_times": 128', '"n_times": 64'))
    with pytest.raises(RequestError, match="the sizes of the encoder do not fit its linear head"):
        load_classifier(tmp_path / "a")
