import copy
from pathlib import Path

import pytest
import torch

from data_sharding.common.errors import RequestError
from finetune.clip_head import ClipHead, ClipHeadConfig
from finetune.stable_diffusion.conditioner import Conditioner, ConditionerConfig
from finetune.stable_diffusion.model import open_time_path
from finetune.stable_diffusion.resampler import Resampler, ResamplerLayer


def test_sizes_of_dream_diffusion() -> None:
    config = ConditionerConfig(tokens=128, dim=1024, length=77, width=768, time_dim=1280)
    states, time, pooled, sizes = Conditioner(config)(torch.randn(2, 128, 1024))
    assert pooled is None and sizes is None
    assert states.shape == (2, 77, 768)
    # The conditioner's output for the time embedding is zero at first, so that training starts from the base model.
    assert time is not None and time.shape == (2, 1280) and not time.any()
    head = ClipHead(ClipHeadConfig(tokens=128, dim=1024, projection=768))
    assert head(torch.randn(2, 128, 1024)).shape == (2, 768)


def test_dropped_trials_get_the_null_condition_and_no_gradient() -> None:
    conditioner = Conditioner(
        ConditionerConfig(tokens=4, dim=6, length=3, width=5, time_dim=7, pooled_dim=9, image_size=64)
    )
    for parameter in (conditioner.null_LW, conditioner.null_P, conditioner.time_mapper.weight):
        torch.nn.init.normal_(parameter)
    tokens = torch.randn(2, 4, 6, requires_grad=True)
    # The pooled embedding starts at the null embedding.
    assert torch.equal(conditioner(tokens)[2], conditioner.null(2)[2])
    torch.nn.init.normal_(conditioner.pooled_mapper.weight)
    own, null = conditioner(tokens, torch.tensor([True, False])), conditioner.null(1)
    assert all(torch.equal(a[1:], b) and (a[0] != a[1]).any() for a, b in zip(own[:3], null[:3], strict=True))
    # The sizes of the original image, of the upper left corner and of the image are known.
    assert own[3].tolist() == [[64, 64, 0, 0, 64, 64]] * 2 and torch.equal(own[3][:1], null[3])
    sum(part.sum() for part in own[:3]).backward()
    assert tokens.grad[0].any() and not tokens.grad[1].any()
    assert conditioner.null_LW.grad.any() and conditioner.null_P.grad.any()


def test_a_saved_conditioner_is_loaded_unchanged(tmp_path: Path) -> None:
    conditioner = Conditioner(ConditionerConfig(tokens=4, dim=6, length=3, width=5))
    conditioner.save_pretrained(tmp_path)
    tokens = torch.randn(2, 4, 6)
    again = Conditioner.from_pretrained(tmp_path)
    assert torch.equal(again(tokens)[0], conditioner(tokens)[0]) and again(tokens)[1] is None
    with pytest.raises(RequestError, match="not a 'clip_head'"):
        ClipHead.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(RequestError, match=r"model\.safetensors: damaged"):
        Conditioner.from_pretrained(tmp_path)


def test_the_condition_is_the_formula_of_the_released_code() -> None:
    """DreamDiffusion's code: two convolutions over tokens, then a linear map; the sum enters the time embedding."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=10,
        attention_head_dim=4,
    ).eval()
    plain = copy.deepcopy(unet)
    config = ConditionerConfig(tokens=6, dim=7, length=9, width=10, hidden=3, time_dim=open_time_path(unet))
    conditioner = Conditioner(config)
    for parameter in conditioner.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    weights = dict(conditioner.named_parameters())
    tokens = torch.randn(2, 6, 7)

    def convolve(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("on,bnd->bod", weights[f"{name}.weight"][..., 0], x) + weights[f"{name}.bias"][:, None]

    with torch.no_grad():
        states, time, *_ = conditioner(tokens)
        mapped = convolve("token_mapper.1", convolve("token_mapper.0", tokens))
        expected = mapped @ weights["dim_mapper.weight"].T + weights["dim_mapper.bias"]
        torch.testing.assert_close(states, expected)
        # From 9 tokens to 4 (9 // 2), to 1, and then from the width of the states to that of the time embedding.
        assert weights["time_tokens.0.weight"].shape == (4, 9, 1) and weights["time_tokens.1.weight"].shape == (1, 4, 1)
        one = convolve("time_tokens.1", convolve("time_tokens.0", expected))[:, 0]
        added = one @ weights["time_mapper.weight"].T + weights["time_mapper.bias"]
        torch.testing.assert_close(time, added)
        # The vector is added to the output of the network that embeds the time, before any block of the U-Net.
        x, steps = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
        plain.time_embedding.register_forward_hook(lambda module, args, out: out + added)
        torch.testing.assert_close(
            unet(x, steps, states, class_labels=time).sample, plain(x, steps, states).sample, rtol=1e-4, atol=1e-5
        )


def test_a_layer_of_the_resampler_is_attention_over_tokens_and_queries() -> None:
    torch.manual_seed(0)
    layer = ResamplerLayer(8, 2)
    queries, tokens = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    with torch.no_grad():
        read = torch.cat([layer.norm_tokens(tokens), layer.norm_queries(queries)], 1)[0]
        q = layer.norm_queries(queries)[0] @ layer.to_q.weight.T
        k, v = (read @ weight.T for weight in layer.to_kv.weight.chunk(2))
        heads = [(q[:, head] @ k[:, head].T / 2).softmax(-1) @ v[:, head] for head in (slice(0, 4), slice(4, 8))]
        x = queries + torch.cat(heads, -1) @ layer.to_out.weight.T
        torch.testing.assert_close(layer(queries, tokens), x + layer.mlp(x))


def test_the_resampler_reads_the_order_of_the_tokens_and_every_trial_alone(tmp_path: Path) -> None:
    sizes = {"tokens": 6, "dim": 7, "length": 9, "width": 16}
    config = ConditionerConfig(**sizes, projector="resampler", resampler_depth=2, resampler_heads=4, time_dim=5)
    conditioner = Conditioner(config)
    tokens = torch.randn(2, 6, 7)
    states, time, *_ = conditioner(tokens)
    assert states.shape == (2, 9, 16) and time is not None and time.shape == (2, 5)
    assert not any(name.startswith(("token_mapper", "dim_mapper")) for name in conditioner.state_dict())
    torch.testing.assert_close(conditioner(tokens[1:])[0], states[1:])
    assert not torch.allclose(conditioner(tokens.flip(1))[0], states, atol=1e-3)
    (states.sum() + time.sum()).backward()
    conditioner.save_pretrained(tmp_path)
    torch.testing.assert_close(Conditioner.from_pretrained(tmp_path)(tokens)[0], states)
    with pytest.raises(ValueError, match="not divisible by 3"):
        Resampler(**sizes, depth=1, heads=3)
