"""The autoencoder against a plain implementation written apart from it, its sizes, and its masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pretrain.masking import keep_indices, visible_tokens
from pretrain.model import (
    DecoderConfig,
    EncoderConfig,
    MaskedAutoencoder,
    MaskedAutoencoderConfig,
    count_parameters,
    sincos_positions,
)
from pretrain.presets import PRESETS

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
SMALL = MaskedAutoencoderConfig(
    encoder=EncoderConfig(channels=6, samples=24, patch=4, dim=12, depth=2, heads=3, mlp_ratio=2.0),
    decoder=DecoderConfig(dim=8, depth=1, heads=2, mlp_ratio=1.5),
    mask_ratio=0.5,
)


def plain_loss(
    weights: dict[str, torch.Tensor], x: torch.Tensor, keep: list[list[int]], normalize: bool
) -> torch.Tensor:
    """The same loss, sample by sample and token by token, in float64, with none of the model's code."""

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
        return torch.tensor([np.sin(a) for a in angles] + [np.cos(a) for a in angles], dtype=torch.float64)

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


@pytest.mark.parametrize("normalize", [False, True])
def test_loss_and_gradients_match_a_plain_implementation(normalize: bool) -> None:
    torch.manual_seed(0)
    config = MaskedAutoencoderConfig(
        encoder=SMALL.encoder, decoder=SMALL.decoder, mask_ratio=0.5, normalize_targets=normalize
    )
    model = MaskedAutoencoder(config).double()
    # Biases and norms away from where they start, so that none of them is tested at 0 or 1 alone.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    # The targets are in float32 by design.
    x = torch.randn(3, 6, 24).double()
    keep = [[0, 2, 5], [1, 3, 4], [0, 1, 2]]
    loss = model(x, torch.tensor(keep))
    reference_weights = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    reference = plain_loss(reference_weights, x, keep, normalize)
    # Positions are stored in float32, so agreement ends near 1e-6.
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    loss.double().mean().backward()
    reference.mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, reference_weights[name].grad, rtol=1e-4, atol=1e-6, msg=name)


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
    # An error on a visible token's target costs nothing.
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


def test_sizes_of_the_published_shapes() -> None:
    with torch.device("meta"):
        released, paper = MaskedAutoencoder(PRESETS["released"]), MaskedAutoencoder(PRESETS["paper"])
    assert round(count_parameters(released.encoder) / 1e6, 1) == 151.8
    assert round(count_parameters(released.decoder) / 1e6, 1) == 13.4
    assert round(count_parameters(paper.encoder) / 1e6, 1) == 302.8
    assert PRESETS["released"].encoder.tokens == 128


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_shipped_configs_spell_out_the_presets(name: str) -> None:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    spelled = MaskedAutoencoderConfig(
        encoder=EncoderConfig(**values["encoder"]),
        decoder=DecoderConfig(**values["decoder"]),
        mask_ratio=values["mask_ratio"],
        mimetic=values.get("mimetic", 0.0),
    )
    assert spelled == PRESETS[name]


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


def test_masks_are_uniform_distinct_and_independent_of_company() -> None:
    n = 4000
    keep = keep_indices(7, [0] * n, list(range(n)), 32, 0.75)
    assert keep.shape == (n, 8)
    assert (keep.diff(dim=1) > 0).all()
    share = torch.bincount(keep.flatten(), minlength=32) / n
    # Five standard errors around a quarter.
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / n) ** 0.5
    assert len({tuple(row) for row in keep.tolist()}) > 0.99 * n
    # The same sample draws the same mask alone, and another one in the next epoch or with another seed.
    torch.testing.assert_close(keep_indices(7, [0], [1234], 32, 0.75)[0], keep[1234])
    assert not torch.equal(keep_indices(7, [1], [1234], 32, 0.75)[0], keep[1234])
    assert not torch.equal(keep_indices(8, [0], [1234], 32, 0.75)[0], keep[1234])


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: EncoderConfig(samples=130), "samples"),
        (lambda: EncoderConfig(dim=30, heads=4), "dim"),
        (lambda: DecoderConfig(depth=0), "depth"),
        (lambda: MaskedAutoencoderConfig(mask_ratio=1.0), "mask_ratio"),
        (lambda: MaskedAutoencoderConfig(mask_ratio=0.0), "mask_ratio"),
    ],
)
def test_impossible_shapes_name_the_key(build, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        build()
