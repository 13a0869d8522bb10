from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data_sharding.common.errors import RequestError
from finetune.dm_re2i.classifier import whitening_matrix
from finetune.dm_re2i.evrnet import MKRB, EVRNet, EVRNetConfig
from finetune.dm_re2i.train_evrnet import average_within_category, calibrate_batch_norm
from finetune.training.step_random import StepRandom

SMALL = EVRNetConfig(n_classes=3, n_channels=16, widths=(4, 4, 8, 8, 12))


def test_published_network_has_the_published_size_and_shapes() -> None:
    net = EVRNet().eval()
    assert sum(p.numel() for p in net.parameters()) == 3_700_040
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("temporal.0", "temporal", "temporal_mkrb", "spatial.0", "spatial", "spatial_mkrb", "ts"):
        net.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: shapes.__setitem__(name, tuple(out.shape[1:]))
        )
    with torch.no_grad():
        e, logits = net(torch.randn(1, 1, 128, 440))
    assert e.shape == (1, 512) and logits.shape == (1, 40)
    assert shapes == {
        "temporal.0": (32, 128, 220),
        "temporal": (64, 128, 110),
        "temporal_mkrb": (64, 128, 110),
        "spatial.0": (128, 64, 110),
        "spatial": (256, 32, 110),
        "spatial_mkrb": (256, 32, 110),
        "ts": (512, 16, 55),
    }


def _norm(x: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
    assert bn.running_mean is not None and bn.running_var is not None
    mean, var = bn.running_mean[:, None, None], bn.running_var[:, None, None]
    return (x - mean) / torch.sqrt(var + bn.eps) * bn.weight[:, None, None] + bn.bias[:, None, None]


def test_both_skips_of_a_multi_kernel_block_start_at_its_input() -> None:
    torch.manual_seed(0)
    block, v = MKRB(5).eval(), torch.randn(2, 5, 9, 7)
    for part in (block.small, block.large):
        part[1].running_mean.normal_()
        part[1].running_var.uniform_(0.5, 2)
    # Compute the expected output: each convolution is a sum over unfolded neighbourhoods.
    outputs = []
    for part, size in ((block.small, 3), (block.large, 5)):
        source = v if not outputs else outputs[-1]
        columns = F.unfold(source, size, padding=size // 2)
        convolved = (part[0].weight.reshape(5, -1) @ columns).reshape(v.shape)
        outputs.append(torch.relu(torch.relu(_norm(convolved, part[1])) + v))
    torch.testing.assert_close(block(v), outputs[1], atol=1e-5, rtol=1e-5)
    # A multi-kernel block adds its input `v` a second time at the end. If a multi-kernel block were two residual blocks
    # in sequence, it would add the output of the first residual block.
    assert not torch.allclose(block(v), torch.relu(outputs[1] - v + outputs[0]), atol=1e-3)


def _plain_block(x: torch.Tensor, part: nn.Sequential, stride: tuple[int, int] = (1, 1)) -> torch.Tensor:
    """Compute a convolution block in training mode: a sum over shifted inputs, then batch norm by its definition."""
    weight, norm = part[0].weight, part[1]
    rows, columns = weight.shape[2:]
    padded = F.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2))
    height, width = ((n - 1) // s + 1 for n, s in zip(x.shape[2:], stride, strict=True))
    total = torch.zeros(())
    for i in range(rows):
        for j in range(columns):
            shifted = padded[:, :, i : i + stride[0] * height : stride[0], j : j + stride[1] * width : stride[1]]
            total = total + torch.einsum("bfct,gf->bgct", shifted[:, :, :height, :width], weight[:, :, i, j])
    centred = total - total.mean(dim=(0, 2, 3), keepdim=True)
    scaled = centred / (centred.square().mean(dim=(0, 2, 3), keepdim=True) + norm.eps).sqrt()
    scaled = scaled * norm.weight[:, None, None] + norm.bias[:, None, None]
    return scaled * (scaled > 0)


def _plain_evrnet(net: EVRNet, x: torch.Tensor, *, skip: str, mkrb: bool) -> tuple[torch.Tensor, torch.Tensor]:
    def residual(v: torch.Tensor, block: MKRB) -> torch.Tensor:
        y0 = (_plain_block(v, block.small) + v).clamp_min(0)
        return (_plain_block(y0, block.large) + {"input": v, "y0": y0}[skip]).clamp_min(0)

    h = _plain_block(_plain_block(x, net.temporal[0], (1, 2)), net.temporal[1], (1, 2))
    h = residual(h, net.temporal_mkrb) if mkrb else h
    h = _plain_block(_plain_block(h, net.spatial[0], (2, 1)), net.spatial[1], (2, 1))
    h = residual(h, net.spatial_mkrb) if mkrb else h
    e = _plain_block(h, net.ts, (2, 2)).mean(dim=(2, 3))
    return e, e @ net.fc.weight.T + net.fc.bias


@pytest.mark.parametrize(("skip", "mkrb"), [("input", True), ("y0", True), ("input", False)])
def test_the_network_equals_a_plain_version_forward_and_gradient(skip: str, mkrb: bool) -> None:
    torch.manual_seed(0)
    net = EVRNet(dataclasses.replace(SMALL, skip=skip, mkrb=mkrb)).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    x = torch.randn(5, 1, 16, 32, dtype=torch.float64, requires_grad=True)
    named = [x, *net.parameters()]
    found = []
    for e, logits in (net(x), _plain_evrnet(net, x, skip=skip, mkrb=mkrb)):
        loss = (e.square().sum() + logits.sin().sum()).mean()
        found.append([e, logits, *torch.autograd.grad(loss, named)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
    assert all(grad.abs().max() > 1e-6 for grad in found[0][2:])
    other = EVRNet(dataclasses.replace(SMALL, skip={"input": "y0", "y0": "input"}[skip], mkrb=mkrb)).double()
    other.load_state_dict(net.state_dict())
    # If `mkrb` is false, there are no blocks with skip connections, so the setting `skip` has no effect.
    assert torch.allclose(other(x)[1], found[0][1]) == (not mkrb)


def test_the_blocks_of_an_ablation_change_the_size_as_expected(tmp_path: Path) -> None:
    configs = {"paper": EVRNetConfig(), "y0": EVRNetConfig(skip="y0"), "no blocks": EVRNetConfig(mkrb=False)}
    count = {name: sum(p.numel() for p in EVRNet(config).parameters()) for name, config in configs.items()}
    # Each block has a 3x3 and a 5x5 convolution, and two batch norms with a weight and a bias.
    blocks = sum((9 + 25) * width**2 + 4 * width for width in (64, 256))
    assert count == {"paper": 3_700_040, "y0": 3_700_040, "no blocks": 3_700_040 - blocks}
    net = EVRNet(dataclasses.replace(SMALL, mkrb=False, skip="y0")).eval()
    net.save_pretrained(tmp_path)
    assert EVRNet.from_pretrained(tmp_path).config == net.config
    with pytest.raises(ValueError, match="skip must be input or y0, not y1"):
        EVRNetConfig(skip="y1")


def test_saving_and_loading_keeps_every_output(tmp_path: Path) -> None:
    net = EVRNet(SMALL).eval()
    calibrate_batch_norm(net, torch.randn(8, 16, 32), batch=4)
    net.save_pretrained(tmp_path / "evrnet")
    again, x = EVRNet.from_pretrained(tmp_path / "evrnet"), torch.randn(3, 1, 16, 32)
    assert not again.training and again.config == SMALL
    for a, b in zip(net(x), again(x), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_a_damaged_or_other_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        EVRNet.from_pretrained(tmp_path)
    EVRNet(SMALL).save_pretrained(tmp_path / "a")
    EVRNet(EVRNetConfig(n_classes=2, n_channels=16, widths=(4, 4, 8, 8, 12))).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    with pytest.raises(RequestError, match="the weights do not fit config"):
        EVRNet.from_pretrained(tmp_path / "b")
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(RequestError, match=r"model\.safetensors: damaged"):
        EVRNet.from_pretrained(tmp_path / "a")


def test_batch_norm_statistics_depend_on_the_weights_alone() -> None:
    torch.manual_seed(0)
    net, x = EVRNet(SMALL), 3 * torch.randn(8, 16, 32) + 1
    calibrate_batch_norm(net, x, batch=4)
    first = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    net(100 * torch.randn(4, 1, 16, 32))
    calibrate_batch_norm(net, x, batch=4)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, first[name], atol=0, rtol=0)
    assert all(m.momentum == 0.1 for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    # The mean in the first batch norm is the mean output of the preceding convolution over the given trials.
    by_hand = net.temporal[0][0](x[:, None]).mean(dim=(0, 2, 3))
    torch.testing.assert_close(net.temporal[0][1].running_mean, by_hand, atol=1e-5, rtol=1e-4)


def test_averages_stay_within_a_category() -> None:
    labels = torch.tensor([0, 1, 0, 1, 2, 0])
    pattern = torch.zeros(3, 4, 10)
    for label in range(3):
        pattern[label, label] = torch.linspace(-1, 1, 10)
    x = pattern[labels] + 0.01 * torch.randn(6, 4, 10)
    mean = average_within_category(x, labels, 4, StepRandom(0, 0))
    assert mean.shape == x.shape
    torch.testing.assert_close(mean.std(dim=(1, 2)), x.std(dim=(1, 2)), rtol=1e-4, atol=1e-5)
    energy = mean.square().mean(dim=2)
    assert (energy.argmax(dim=1) == labels).all()
    assert np.isclose(float((energy.sum(1) - energy.max(1).values).max()), 0, atol=1e-3)
    torch.testing.assert_close(mean[4], x[4])  # Trial 4 is the only trial of its category.


def test_noise_normalisation_whitens_the_background_and_is_saved_with_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mixing = torch.eye(16) + 0.1 * torch.randn(16, 16) + 0.5  # noise that all channels have in common
    x = mixing @ torch.randn(40, 16, 200)
    net = EVRNet(dataclasses.replace(SMALL, noise_normalisation=True)).eval()
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in EVRNet(SMALL).parameters())
    assert net.whitening_CC is not None
    net.whitening_CC.copy_(whitening_matrix(x, 1e-6))
    white = net.normalise(x[:, None])[:, 0]
    torch.testing.assert_close(white.std(dim=(1, 2)), torch.ones(40))
    covariance = torch.einsum("bct,bdt->cd", white, white) / (40 * 200)
    torch.testing.assert_close(covariance, torch.eye(16), atol=0.05, rtol=0)
    net.save_pretrained(tmp_path)
    a, b = net(x[:2, None])[0], EVRNet.from_pretrained(tmp_path)(x[:2, None])[0]
    torch.testing.assert_close(a, b, atol=0, rtol=0)
    torch.testing.assert_close(a, net(net.normalise(x[:2, None]), normalised=True)[0], atol=0, rtol=0)
    # After an average reference, the mean over the channels is zero. Whitening must not enlarge the mean over the
    # channels too much.
    flat = x - x.mean(dim=1, keepdim=True)
    gain = (whitening_matrix(flat, 0.05) @ torch.full((16,), 0.25)).norm()
    assert gain == pytest.approx(float((0.05 * flat.var(dim=2).mean()) ** -0.5), rel=0.02)
