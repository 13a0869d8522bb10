"""Tests that compare the autoencoder with a plain implementation, and tests of the masks.

The plain implementation shares no code with the autoencoder.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.model.autoencoder import MaskedAutoencoder
from pretrain.model.config import ComputeConfig, DecoderConfig, EncoderConfig, MaskedAutoencoderConfig
from pretrain.model.masking import dropped_channels, keep_indices, visible_tokens
from pretrain.model.transformer import Attention, sincos_positions

FIXED_MASKS = [[1, 2, 5, 9], [2, 5, 8, 15]]
SMALL = MaskedAutoencoderConfig(
    encoder=EncoderConfig(channels=6, samples=24, patch=4, dim=12, depth=2, heads=3, mlp_ratio=2.0),
    decoder=DecoderConfig(dim=8, depth=1, heads=2, mlp_ratio=1.5),
    mask_ratio=0.5,
)


def plain_loss(
    weights: dict[str, torch.Tensor], x: torch.Tensor, keep: list[list[int]], normalize: bool
) -> torch.Tensor:
    """Compute the autoencoder's loss sample by sample and token by token, in float64, without the model's code."""

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        centred = value - value.mean(-1, keepdim=True)
        spread = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def block(name: str, value: torch.Tensor, heads: int) -> torch.Tensor:
        width = value.shape[-1] // heads
        q, k, v = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", value)).chunk(3, dim=-1)
        parts = []
        for h in range(heads):
            s = slice(h * width, (h + 1) * width)
            parts.append(torch.softmax(q[:, s] @ k[:, s].T / width**0.5, dim=-1) @ v[:, s])
        value = value + linear(f"{name}.attn.proj", torch.cat(parts, dim=-1))
        hidden = linear(f"{name}.fc1", norm(f"{name}.norm2", value))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        return value + linear(f"{name}.fc2", hidden)

    def position(index: int, dim: int) -> torch.Tensor:
        angles = [index / 10000 ** (i / (dim // 2)) for i in range(dim // 2)]
        # Round positions to float32, because the model keeps them in float32. All other values in this test are
        # float64.
        return torch.tensor([np.sin(a) for a in angles] + [np.cos(a) for a in angles]).float().double()

    losses = []
    for signal, seen in zip(x, keep, strict=True):
        patches = [signal[:, 4 * i : 4 * i + 4] for i in range(6)]
        tokens = [weights["encoder.cls_token"][0, 0]]
        for i in seen:
            kernel = weights["encoder.patch_embed.weight"]
            token = (kernel * patches[i]).sum(dim=(1, 2)) + weights["encoder.patch_embed.bias"]
            tokens.append(token + position(i, 12))
        value = torch.stack(tokens)
        for b in range(2):
            value = block(f"encoder.blocks.{b}", value, 3)
        value = linear("decoder.embed", norm("encoder.norm", value))
        row = {i: value[1 + n] for n, i in enumerate(seen)}
        whole = [value[0]]
        whole += [row.get(i, weights["decoder.mask_token"][0, 0]) + position(i, 8) for i in range(6)]
        value = block("decoder.blocks.0", torch.stack(whole), 2)
        made = linear("decoder.predict", norm("decoder.norm", value))[1:]
        errors = []
        for i in range(6):
            if i not in seen:
                target = patches[i].flatten()
                if normalize:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                errors.append((made[i] - target).pow(2).mean())
        losses.append(torch.stack(errors).mean())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("normalize", "compute"),
    [
        (False, ComputeConfig()),
        (True, ComputeConfig()),
        (False, ComputeConfig(attention="plain")),
        (False, ComputeConfig(attention="sdpa", checkpointing=True)),
    ],
    ids=["raw", "normalised", "plain attention", "checkpointing"],
)
def test_loss_and_gradients_match_a_plain_implementation(normalize: bool, compute: ComputeConfig) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, normalize_targets=normalize, compute=compute)
    model = MaskedAutoencoder(config).double()
    # Change all parameters, because the initial values of biases (0) and of norms (1) would hide many errors.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(3, 6, 24).double()
    keep = [[0, 2, 5], [1, 3, 4], [0, 1, 2]]
    loss = model(x, torch.tensor(keep))
    reference_weights = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    reference = plain_loss(reference_weights, x, keep, normalize)
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-12)
    loss.mean().backward()
    reference.mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, reference_weights[name].grad, rtol=1e-9, atol=1e-12, msg=name)


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    kept = {}
    x, keep = torch.randn(8, 6, 24), torch.tensor([[0, 2, 5]] * 8)
    for checkpointing in (False, True):
        model = MaskedAutoencoder(dataclasses.replace(SMALL, compute=ComputeConfig(checkpointing=checkpointing)))
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor, seen: dict[int, int] = storages) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(x, keep).mean()
        kept[checkpointing] = sum(storages.values())
        loss.backward()
    assert kept[True] < 0.6 * kept[False]


def test_bf16_on_a_cpu_takes_plain_attention_and_gives_the_same() -> None:
    torch.manual_seed(0)
    attention = Attention(64, 2).bfloat16()
    x, real = torch.randn(2, 10, 64).bfloat16(), torch.arange(10) < torch.tensor([[10], [4]])
    with torch.no_grad():
        auto = attention(x, real)
        attention.kind = "plain"
        assert torch.equal(attention(x, real), auto)
        attention.kind = "sdpa"
        torch.testing.assert_close(attention(x, real), auto, atol=2e-2, rtol=2e-2)


def test_blocks_compile_in_place_one_by_one() -> None:
    model = MaskedAutoencoder(dataclasses.replace(SMALL, compute=ComputeConfig(compile=True)))
    plain = MaskedAutoencoder(SMALL)
    # Compilation does not change the names of weights, so compiled and plain models read the same checkpoints.
    plain.load_state_dict(model.state_dict())
    compiled = [block for block in (*model.encoder.blocks, *model.decoder.blocks) if block._compiled_call_impl]
    assert len(compiled) == 3
    # Torch's default compiler would need most of a minute here, so run the blocks with a fast backend.
    for block in compiled:
        block.compile(backend="eager")
    x, keep = torch.randn(2, 6, 24), torch.tensor([[0, 2, 5], [1, 2, 3]])
    torch.testing.assert_close(model(x, keep), plain(x, keep))


def test_only_hidden_tokens_count_and_hidden_signal_is_not_seen() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(SMALL)
    x = torch.randn(1, 6, 24)
    keep = torch.tensor([[0, 2, 5]])
    made = model.reconstruct(x, keep)
    changed = x.clone()
    changed[:, :, 4:8] += 5.0
    torch.testing.assert_close(model.reconstruct(changed, keep), made)
    assert model(changed, keep) != model(x, keep)
    # The loss does not contain the errors on visible tokens.
    target = model.targets(x)
    hidden = [1, 3, 4]
    expected = (made - target)[:, hidden].square().mean()
    torch.testing.assert_close(model(x, keep)[0], expected)


def test_tokenize_and_back() -> None:
    model = MaskedAutoencoder(SMALL)
    x = torch.randn(2, 6, 24)
    tokens = model.tokenize(x)
    torch.testing.assert_close(model.untokenize(tokens), x)
    torch.testing.assert_close(tokens[1, 3], x[1, :, 12:16].flatten())


def test_mimetic_start_makes_neighbours_attend_to_each_other() -> None:
    torch.manual_seed(0)
    config = MaskedAutoencoderConfig(encoder=EncoderConfig(samples=128, dim=64, depth=1, heads=2), mimetic=3.0)
    attention = MaskedAutoencoder(config).encoder.blocks[0].attn
    q, k, _ = attention.qkv(torch.nn.functional.layer_norm(sincos_positions(32, 64), (64,))).chunk(3, dim=-1)
    attended = torch.softmax(q @ k.T / 32**0.5, dim=-1)
    assert (attended.argmax(dim=1) - torch.arange(32)).abs().max() <= 1
    assert attended.diagonal(1).mean() > 10 * attended.diagonal(10).mean()


def test_positions_do_not_depend_on_the_device_they_are_built_on() -> None:
    with torch.device("meta"):
        model = MaskedAutoencoder(SMALL)
    torch.testing.assert_close(model.encoder.positions_ND, sincos_positions(6, 12))


@pytest.mark.parametrize(
    ("ratio", "tokens", "visible"), [(0.75, 128, 32), (0.1, 128, 115), (0.9, 10, 1), (0.5, 32, 16)]
)
def test_visible_tokens(ratio: float, tokens: int, visible: int) -> None:
    assert visible_tokens(tokens, ratio) == visible


def test_masks_are_uniform_and_do_not_depend_on_other_samples() -> None:
    n = 4000
    keep = keep_indices(7, [0] * n, list(range(n)), 32, 0.75)
    assert keep.shape == (n, 8)
    assert (keep.diff(dim=1) > 0).all()
    share = torch.bincount(keep.flatten(), minlength=32) / n
    # Each token must be visible in a quarter of the samples, within five standard errors.
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / n) ** 0.5
    assert len({tuple(row) for row in keep.tolist()}) > 0.99 * n
    # A sample has the same mask alone and in a batch. The mask changes with the epoch and with the seed.
    torch.testing.assert_close(keep_indices(7, [0], [1234], 32, 0.75)[0], keep[1234])
    assert not torch.equal(keep_indices(7, [1], [1234], 32, 0.75)[0], keep[1234])
    assert not torch.equal(keep_indices(8, [0], [1234], 32, 0.75)[0], keep[1234])


def test_masks_are_the_same_in_every_version() -> None:
    """Check that no version of Dreamscale changes the masks, because it must resume runs of earlier versions."""
    assert keep_indices(7, [0, 3], [1234, 5], 16, 0.75).tolist() == FIXED_MASKS


def test_blocks_of_hidden_tokens_are_spans() -> None:
    n, tokens, span = 3000, 32, 5
    keep = keep_indices(7, [0] * n, list(range(n)), tokens, 0.5, block=span)
    assert keep.shape == (n, 16) and (keep.diff(dim=1) > 0).all()
    hidden = torch.ones(n, tokens, dtype=torch.bool).scatter(1, keep, False)
    assert (hidden.sum(dim=1) == 16).all()
    for row in hidden[:200].tolist():
        runs = [len(run) for run in "".join(".#"[h] for h in row).split(".") if run]
        # Of 16 hidden tokens, 15 tokens are in three spans of 5 tokens, and one token is alone. Spans of hidden tokens
        # may touch each other.
        assert all(run % span in (0, 1) for run in runs) and sum(run % span for run in runs) == 1
    # All tokens are hidden about equally often, except that tokens near the ends of the window are hidden less often,
    # because fewer spans reach the ends.
    share = hidden.double().mean(dim=0)
    assert share[8:24].min() > 0.45 and share[8:24].max() < 0.58 and share[0] < share[8]
    torch.testing.assert_close(share, share.flip(0), atol=5 * 0.5 / n**0.5 * 1.5, rtol=0)
    torch.testing.assert_close(keep_indices(7, [0], [1234], tokens, 0.5, block=span)[0], keep[1234])


def test_channels_drop_with_all_their_copies_and_never_all_of_them() -> None:
    n = 2000
    dropped = dropped_channels(7, [0] * n, list(range(n)), [9] * n, 0.3, 128)
    assert torch.equal(dropped, dropped[:, torch.arange(128) % 9])
    assert not dropped[:, :9].all(dim=1).any()
    share = dropped[:, :9].double().mean(dim=0)
    assert (share - 0.3).abs().max() < 5 * (0.3 * 0.7 / n) ** 0.5 + 0.001
    assert not dropped_channels(7, [0] * 50, list(range(50)), [1] * 50, 0.99, 128).any()
    alone = dropped_channels(7, [0], [1234], [9], 0.3, 128)
    assert torch.equal(alone[0], dropped[1234])
    assert not torch.equal(dropped_channels(7, [1] * 9, list(range(9)), [9] * 9, 0.3, 128), dropped[:9])


def test_a_dropped_channel_reaches_no_token_and_stays_a_target() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(dataclasses.replace(SMALL, channel_dropout=0.5)).double()
    # Each sample has three recorded channels; copies of these channels pad the sample to six channels.
    samples: Any = SimpleNamespace(numbers=[1, 2, 3], epochs=[0, 0, 0], metas=[{"n": 3}] * 3)
    inputs = model.prepare(samples, seed=4)
    dropped = inputs["dropped_BC"]
    assert dropped.any() and torch.equal(dropped[:, :3], dropped[:, 3:])
    x = torch.randn(3, 6, 24, dtype=torch.float64, requires_grad=True)
    model.reconstruct(x, **inputs).sum().backward()
    assert x.grad is not None and torch.equal(x.grad.abs().sum(dim=-1) == 0, dropped)
    hidden = model.hidden_signal(**inputs)
    expected = (model.untokenize(model.reconstruct(x, **inputs)) - x).square()
    torch.testing.assert_close(
        model(x, **inputs), torch.stack([e[h].mean() for e, h in zip(expected, hidden, strict=True)])
    )
    assert "dropped_BC" not in model.prepare(samples, seed=4, training=False)


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: EncoderConfig(samples=130), "samples"),
        (lambda: EncoderConfig(dim=30, heads=4), "dim"),
        (lambda: DecoderConfig(depth=0), "depth"),
        (lambda: MaskedAutoencoderConfig(mask_ratio=1.0), "mask_ratio"),
        (lambda: MaskedAutoencoderConfig(mask_ratio=0.0), "mask_ratio"),
        (lambda: MaskedAutoencoderConfig(mask_block=97), "mask_block"),
        (lambda: MaskedAutoencoderConfig(channel_dropout=1.0), "channel_dropout"),
        (lambda: MaskedAutoencoderConfig(mask_each_channel=True), "montage"),
        (lambda: MaskedAutoencoderConfig(encoder=EncoderConfig(class_token=False)), "class_token"),
    ],
)
def test_impossible_shapes_name_the_key(build, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        build()
