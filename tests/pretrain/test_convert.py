"""Tests of the conversion of DreamDiffusion's checkpoints.

The conversion runs no code from a checkpoint, and the converted model gives the same output as the original model.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.convert import DECODER, convert_weights, main, read_checkpoint
from pretrain.encoder.encoder import EEGEncoder
from pretrain.model.autoencoder import SignalDecoder, SignalEncoder
from pretrain.model.transformer import sincos_positions

CHANNELS, PATCH, TOKENS, WIDTH, NARROW, HEADS, NARROW_HEADS = 128, 4, 16, 32, 24, 4, 3


class Layer(nn.Module):
    """A transformer block with DreamDiffusion's names of weights; its code writes out each step of attention."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        width = x.shape[-1] // self.heads
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        for h in range(self.heads):
            s = slice(h * width, (h + 1) * width)
            parts.append(torch.softmax(q[..., s] @ k[..., s].transpose(-1, -2) / width**0.5, dim=-1) @ v[..., s])
        x = x + self.attn["proj"](torch.cat(parts, dim=-1))
        hidden = self.mlp["fc1"](self.norm2(x))
        return x + self.mlp["fc2"](hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))


def table(width: int) -> nn.Parameter:
    return nn.Parameter(torch.cat([torch.zeros(1, width), sincos_positions(TOKENS, width)])[None], requires_grad=False)


class Pretrained(nn.Module):
    """DreamDiffusion's masked autoencoder, with the original names of weights and the original order of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv1d(CHANNELS, WIDTH, PATCH, stride=PATCH)})
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, WIDTH)), table(WIDTH)
        self.blocks = nn.ModuleList(Layer(WIDTH, HEADS, 25) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.decoder_embed = nn.Linear(WIDTH, NARROW)
        self.mask_token, self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1, NARROW)), table(NARROW)
        self.decoder_blocks = nn.ModuleList([Layer(NARROW, NARROW_HEADS, 19)])
        self.decoder_norm = nn.LayerNorm(NARROW)
        self.decoder_pred = nn.Linear(NARROW, CHANNELS * PATCH)

    def encode(self, x: Tensor, keep: list[int]) -> Tensor:
        tokens = self.patch_embed["proj"](x).transpose(1, 2) + self.pos_embed[:, 1:]
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), tokens[:, keep]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, x: Tensor, keep: list[int]) -> Tensor:
        x = self.decoder_embed(x)
        whole = self.mask_token.repeat(len(x), TOKENS, 1)
        whole[:, keep] = x[:, 1:]
        x = torch.cat([x[:, :1], whole], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


class FineTuned(nn.Module):
    """DreamDiffusion's encoder in fine-tuning: its tokens contain no class token, and its positions are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv1d(CHANNELS, WIDTH, PATCH, stride=PATCH)})
        self.cls_token, self.mask_token = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(table(WIDTH) + 0.01 * torch.randn(1, TOKENS + 1, WIDTH))
        self.blocks = nn.ModuleList(Layer(WIDTH, HEADS, WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).transpose(1, 2) + self.pos_embed[:, 1:]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def perturb(model: nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def foreign_config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a config object of a class in a module that no longer exists when the checkpoint is read."""
    module = types.ModuleType("config")
    cls = type("Config_MBM_EEG", (), {"__module__": "config"})
    module.Config_MBM_EEG = cls  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "config", module)
    config = cls()
    config.__dict__ |= {"num_heads": HEADS, "decoder_num_heads": NARROW_HEADS, "mask_ratio": 0.1, "focus_range": None}
    # JSON cannot store infinity, so the conversion must leave `best_loss` out of the package's config.json.
    config.best_loss = float("inf")
    return config


@pytest.fixture
def pretrained(tmp_path: Path, foreign_config: Any) -> tuple[Pretrained, Path]:
    model = perturb(Pretrained())
    saved = {
        "model": model.state_dict(),
        "optimizer": {"state": {0: torch.zeros(2)}},
        "epoch": 3,
        "config": foreign_config,
    }
    torch.save(saved, tmp_path / "checkpoint.pth")
    del sys.modules["config"]
    return model, tmp_path / "checkpoint.pth"


def test_converted_model_computes_the_same(pretrained: tuple[Pretrained, Path]) -> None:
    foreign, path = pretrained
    weights, settings = read_checkpoint(path)
    assert settings["mask_ratio"] == 0.1
    found = convert_weights(weights, heads=settings["num_heads"], decoder_heads=settings["decoder_num_heads"])
    assert found.decoder is not None and found.encoder.class_token and not found.encoder.learned_positions
    encoder, decoder = SignalEncoder(found.encoder), SignalDecoder(found.decoder, found.encoder)
    encoder.load_state_dict(found.encoder_weights)
    decoder.load_state_dict(found.decoder_weights)
    x, keep = torch.randn(3, CHANNELS, TOKENS * PATCH), [0, 3, 4, 9, 15]
    keep_BK = torch.tensor([keep] * 3)
    with torch.no_grad():
        expected = foreign.encode(x, keep)
        torch.testing.assert_close(encoder(x, keep_BK), expected, rtol=0, atol=1e-5)
        made = decoder(encoder(x, keep_BK), keep_BK)
        # DreamDiffusion orders the values of a token first by time and then by channel: [token, time, channel].
        rebuilt = foreign.decode(expected, keep).view(3, TOKENS, PATCH, CHANNELS).transpose(2, 3).flatten(2)
        torch.testing.assert_close(made, rebuilt, rtol=0, atol=1e-5)


def test_command_writes_a_package(pretrained: tuple[Pretrained, Path], tmp_path: Path) -> None:
    foreign, path = pretrained
    out = tmp_path / "encoder"
    assert main([str(path), str(out), "--program", "false"]) == 0
    encoder = EEGEncoder.from_pretrained(out)
    assert (encoder.spec.scaling, encoder.spec.scale_uv, encoder.spec.window) == ("constant", 10.0, TOKENS * PATCH)
    x = torch.randn(2, CHANNELS, TOKENS * PATCH)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), foreign.encode(x, list(range(TOKENS)))[:, 1:], rtol=0, atol=1e-5)
    assert load_file(out / DECODER)["mask_token"].shape == (1, 1, NARROW)
    # The encoder package can encode a recording.
    signal = np.random.default_rng(0).normal(scale=20.0, size=(4, 1000))
    assert encoder.encode((signal, ["Fz", "Cz", "Pz", "Oz"], 250.0, "uV")).pooled.shape[1] == WIDTH


def test_fine_tuned_encoder_runs_without_its_class_token(tmp_path: Path, foreign_config: Any) -> None:
    foreign = perturb(FineTuned())
    inside = {f"cond_stage_model.mae.{k}": v for k, v in foreign.state_dict().items()}
    rest = {"model.diffusion_model.out.weight": torch.zeros(3), "cond_stage_model.mapping.fc.weight": torch.zeros(2, 2)}
    del foreign_config.decoder_num_heads
    saved = {"model_state_dict": inside | rest, "config": foreign_config, "state": torch.random.get_rng_state()}
    torch.save(saved, tmp_path / "model.pth")
    del sys.modules["config"]
    assert main([str(tmp_path / "model.pth"), str(tmp_path / "encoder"), "--scale_uv", "1", "--program", "true"]) == 0
    encoder = EEGEncoder.from_pretrained(tmp_path / "encoder")
    assert encoder.config.learned_positions and not encoder.config.class_token
    x = torch.randn(2, CHANNELS, TOKENS * PATCH)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), foreign(x), rtol=0, atol=1e-5)
    program = torch.export.load(tmp_path / "encoder" / "encoder.pt2").module()
    torch.testing.assert_close(program(x), encoder(x), rtol=0, atol=1e-5)


def reshape(name: str, *shape: int) -> Any:
    return lambda weights: weights.update({name: torch.ones(shape)})


class TestRefusals:
    def refuse(self, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
        assert main([str(path), str(tmp_path / "out"), *words]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    def test_code_in_a_checkpoint_is_not_run(self, tmp_path: Path, capsys: Any) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.system, (f"touch {tmp_path / 'sprung'}",)

        torch.save({"model": {"patch_embed.proj.weight": torch.zeros(1)}, "config": Trap()}, tmp_path / "evil.pth")
        assert "system" in self.refuse(tmp_path / "evil.pth", tmp_path, capsys)
        assert not (tmp_path / "sprung").exists()

    def test_old_format_and_damage(self, tmp_path: Path, capsys: Any) -> None:
        torch.save({"model": {}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        assert "PyTorch 1.6" in self.refuse(tmp_path / "old.pth", tmp_path, capsys)
        torch.save({"model": {"x": torch.zeros(1000)}}, tmp_path / "cut.pth")
        (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-600])
        assert "damaged" in self.refuse(tmp_path / "cut.pth", tmp_path, capsys)
        assert "no such checkpoint" in self.refuse(tmp_path / "none.pth", tmp_path, capsys)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda w: w.pop("blocks.1.attn.qkv.bias"), "missing: blocks.1.attn.qkv.bias"),
            (lambda w: w.pop("patch_embed.proj.weight"), "no encoder of DreamDiffusion"),
            (lambda w: w.update(extra=torch.zeros(1)), "no part of the model takes: extra"),
            (lambda w: w["decoder_pos_embed"].add_(0.1), "decoder_pos_embed"),
            (reshape("patch_embed.proj.weight", WIDTH, 512), "patch_embed.proj.weight has the shape [32, 512]"),
            (reshape("patch_embed.proj.weight"), "patch_embed.proj.weight has the shape []"),
            (reshape("pos_embed", 0, TOKENS + 1, WIDTH), "pos_embed has the shape [0, 17, 32]"),
            (reshape("pos_embed", 1, 1, WIDTH), "pos_embed has the shape [1, 1, 32]"),
            (reshape("blocks.0.mlp.fc1.weight"), "fc1.weight has the shape []"),
            (reshape("blocks.0.attn.qkv.weight", WIDTH, WIDTH), "the other weights need [96, 32]"),
            (reshape("norm.weight", 5), "norm.weight has the shape [5]"),
            (reshape("decoder_pred.weight", 512), "decoder_pred.weight has the shape [512]"),
            (reshape("decoder_pred.weight", 100, NARROW), "decoder_pred.weight has the shape [100, 24]"),
            (reshape("decoder_pred.bias", 2000), "decoder_pred.bias has the shape [2000]"),
            (reshape("decoder_norm.weight", 3), "decoder_norm.weight has the shape [3]"),
            (lambda w: w.update({"norm.weight": w["norm.weight"].to_sparse()}), "norm.weight is not a plain tensor"),
            (lambda w: w.update({"norm.weight": w["norm.weight"].to("meta")}), "norm.weight is not a plain tensor"),
            (lambda w: w.update({"norm.weight": w["norm.weight"] + 1j}), "norm.weight is not a plain tensor"),
            (lambda w: w.update({"norm.weight": w["norm.weight"].int()}), "norm.weight is not a plain tensor"),
            (
                lambda w: w.update({"norm.weight": torch.zeros(1).expand(10**12)}),
                "norm.weight claims 1000000000000 numbers",
            ),
            (lambda w: w.update({"pos_embed": torch.zeros(1).expand(1, 10**6, 10**6)}), "pos_embed claims 10"),
            (lambda w: w["decoder_norm.bias"].fill_(torch.inf), "decoder_norm.bias holds NaN or infinite"),
        ],
    )
    def test_weights_that_do_not_fit(self, change: Any, says: str, tmp_path: Path, capsys: Any) -> None:
        weights = perturb(Pretrained()).state_dict()
        change(weights)
        torch.save({"model": weights}, tmp_path / "c.pth")
        heads = ("--heads", str(HEADS), "--decoder_heads", str(NARROW_HEADS))
        assert says in self.refuse(tmp_path / "c.pth", tmp_path, capsys, *heads)

    @pytest.mark.parametrize("heads", ["4", 4.0, 0, -4, 5])
    def test_impossible_heads_of_a_checkpoint_are_refused(self, heads: Any, tmp_path: Path, capsys: Any) -> None:
        config = {"num_heads": heads, "decoder_num_heads": NARROW_HEADS}
        torch.save({"model": perturb(Pretrained()).state_dict(), "config": config}, tmp_path / "c.pth")
        assert f"heads is {heads!r}; give --heads" in self.refuse(tmp_path / "c.pth", tmp_path, capsys)
        # Numbers of heads on the command line replace the numbers in the checkpoint, and are checked too.
        words = ("--heads", str(HEADS), "--decoder_heads", "-3")
        assert "decoder_heads is -3" in self.refuse(tmp_path / "c.pth", tmp_path, capsys, *words)

    def test_an_odd_width_is_refused(self, tmp_path: Path, capsys: Any) -> None:
        weights = perturb(Pretrained()).state_dict()
        weights["patch_embed.proj.weight"] = torch.zeros(WIDTH - 1, CHANNELS, PATCH)
        torch.save({"model": weights, "config": {"num_heads": 1}}, tmp_path / "c.pth")
        assert "the width of blocks is 31" in self.refuse(tmp_path / "c.pth", tmp_path, capsys)

    def test_weights_of_a_failed_training_do_not_replace_a_package(
        self, pretrained: tuple[Pretrained, Path], tmp_path: Path, capsys: Any
    ) -> None:
        words = [str(tmp_path / "out"), "--program", "false"]
        assert main([str(pretrained[1]), *words]) == 0
        before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
        weights = pretrained[0].state_dict()
        weights["norm.weight"][3] = torch.nan
        config = {"num_heads": HEADS, "decoder_num_heads": NARROW_HEADS}
        torch.save({"model": weights, "config": config}, tmp_path / "nan.pth")
        assert main([str(tmp_path / "nan.pth"), *words]) == 2
        assert "norm.weight holds NaN" in capsys.readouterr().err
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before

    def test_heads_must_be_known(self, tmp_path: Path, capsys: Any) -> None:
        torch.save({"model": perturb(Pretrained()).state_dict()}, tmp_path / "c.pth")
        assert "--heads" in self.refuse(tmp_path / "c.pth", tmp_path, capsys)
