from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from data_sharding.common.config import parse_config
from finetune.diffusion import Sampling, choose_sampling
from finetune.dm_re2i.backbones import build_unet, load_unet
from finetune.dm_re2i.config import DMRE2IConfig, EGDDPMStage
from finetune.dm_re2i.eg_ddpm import EGDDPM, ChannelNorm, ResidualAttention
from finetune.dm_re2i.evrnet import EVRNet, EVRNetConfig
from finetune.dm_re2i.portable.pipeline import sample_images
from finetune.dm_re2i.unet2d import GuidedUNet2D
from finetune.portable.eeg import count_true_channels

NOISING = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


def ddim(steps: int, guidance_scale: float = 1.0) -> Sampling:
    return Sampling(sampler="ddim", steps=steps, guidance_scale=guidance_scale)


def small(**changes: Any) -> EGDDPM:
    torch.manual_seed(0)
    options = {"sample_size": 8, "condition_dim": 6, "base_channels": 4, "multipliers": (1, 2), "head_dim": 4}
    return EGDDPM(**{**options, **changes}).eval()


def test_published_network_has_the_published_size_and_layout() -> None:
    with torch.device("meta"):
        net = EGDDPM(null_condition=False)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 57.7
    seen = []
    for name in ("down.0", "down.1", "down.2", "down.3", "middle_second", "up.0", "up.1", "up.2", "last"):
        net.get_submodule(name).register_forward_hook(
            lambda _, inputs, out, name=name: seen.append((name, inputs[0].shape[1], *out.shape[1:3]))
        )
    out = net(torch.empty(1, 3, 64, 64, device="meta"), 0, torch.empty(1, 512, device="meta"))
    assert out.shape == (1, 3, 64, 64)
    assert seen == [
        ("down.0", 3, 64, 64),
        ("down.1", 64, 128, 32),
        ("down.2", 128, 256, 16),
        ("down.3", 256, 512, 8),
        ("middle_second", 512, 512, 8),
        ("up.0", 1024, 256, 8),
        ("up.1", 512, 128, 16),
        ("up.2", 256, 64, 32),
        ("last", 64, 64, 64),
    ]


def preset(name: str) -> DMRE2IConfig:
    path = Path(__file__).parents[3] / "configs" / "finetune" / f"{name}.yaml"
    return parse_config(DMRE2IConfig, [str(path)], prog="dreamscale ddpm", positionals=("config",))


def test_the_preset_of_the_paper_has_the_settings_of_the_paper() -> None:
    config = preset("dm_re2i_paper")
    stage = config.ddpm
    with torch.device("meta"):
        net, evrnet = build_unet(stage, config.evrnet.widths[-1]), EVRNet(EVRNetConfig(widths=config.evrnet.widths))
    assert isinstance(net, EGDDPM) and net.null is None
    assert sum(p.numel() for p in net.parameters()) == 57_693_986
    assert sum(p.numel() for p in evrnet.parameters()) == 3_700_040
    assert (stage.image_size, stage.noise_steps, stage.prediction, stage.sampler) == (64, 1000, "epsilon", "ddpm")
    assert (stage.drop, stage.standardise, stage.condition_noise) == (0.0, False, 0.0)
    assert (stage.scale_shift, stage.patch, stage.join_first) == (False, 1, False)
    assert (config.evrnet.skip, config.evrnet.mkrb) == ("input", True)
    noising = {"num_train_timesteps": stage.noise_steps}
    given = {"steps": None, "guidance_scale": None, "dropped": stage.drop > 0, "has_null": net.null is not None}
    chosen = choose_sampling(noising, sampler=stage.sampler, **given)
    assert chosen == Sampling(sampler="ddpm", steps=1000, guidance_scale=1.0)


def test_the_extended_preset_has_guidance_and_the_size_that_it_names() -> None:
    stage = preset("dm_re2i").ddpm
    with torch.device("meta"):
        net = build_unet(stage, 512)
    assert stage.drop > 0 and net.null is not None and stage.standardise and stage.prediction == "v_prediction"
    text = (Path(__file__).parents[3] / "configs" / "finetune" / "dm_re2i.yaml").read_text()
    assert f"EG-DDPM has {sum(p.numel() for p in net.parameters()) / 1e6:.1f}M" in text


@pytest.mark.parametrize("patch", [1, 2])
def test_unet2d_of_diffusers_gets_the_condition_through_the_embedding_of_the_step(patch: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"sample_size": 8, "condition_dim": 6, "base_channels": 4, "multipliers": (1, 2)}
    net = GuidedUNet2D(**options, head_dim=4, patch=patch).eval()
    net.set_condition_statistics(torch.randn(6), torch.rand(6) + 0.5)
    x, e, step = torch.randn(2, 3, 8, 8), torch.randn(2, 6), torch.tensor([10, 700])
    with torch.no_grad():
        out = net(x, step, e)
        assert out.shape == x.shape and not torch.allclose(out, net(x, step, e.flip(0)), atol=1e-4)
        # Compare with the plain network of diffusers, to whose step embedding the condition is added.
        plain = UNet2DModel.from_config(net.unet.config, class_embed_type=None).eval()
        plain.load_state_dict(net.unet.state_dict())
        vector = net.condition((e - net.condition_mean) / net.condition_std)
        plain.time_embedding.register_forward_hook(lambda _, inputs, out: out + vector)
        folded = F.pixel_unshuffle(x, patch)
        torch.testing.assert_close(out, F.pixel_shuffle(plain(folded, step).sample, patch), atol=1e-6, rtol=1e-5)
        dropped = net(x, step, e, torch.tensor([False, True]))
        other = net(x, step, e + 1, torch.tensor([False, True]))
        torch.testing.assert_close(dropped[0], other[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(dropped[1], out[1], atol=1e-5, rtol=1e-4)
        net.save_pretrained(tmp_path)
        torch.testing.assert_close(load_unet(tmp_path)(x, step, e), out, atol=1e-5, rtol=1e-4)
    assert isinstance(load_unet(tmp_path), GuidedUNet2D)


def test_condition_is_added_to_the_time_embedding_and_reaches_all_blocks_but_the_last() -> None:
    net, x, e = small(), torch.randn(2, 3, 8, 8), torch.randn(2, 6)
    step = torch.tensor([10, 700])
    with torch.no_grad():
        plain = net(x, step, e)
        assert not torch.allclose(plain, net(x, step, e.flip(0)), atol=1e-4)
        # If the condition of the first trial is moved into the bias of the time embedding, this trial's output must not
        # change.
        net.time[-1].bias += net.condition(e[:1])[0]
        net.condition.weight.zero_()
        net.condition.bias.zero_()
        torch.testing.assert_close(net(x, step, e)[:1], plain[:1], atol=1e-5, rtol=1e-4)
    blocks = [m for m in net.modules() if type(m).__name__ == "ConvNeXtBlock"]
    assert [block.mlp is None for block in blocks] == [False] * (len(blocks) - 1) + [True]


@pytest.mark.parametrize("linear", [True, False])
def test_attention_against_plain_loops(linear: bool) -> None:
    torch.manual_seed(0)
    block, x = ResidualAttention(6, 2, 3, linear=linear), torch.randn(1, 6, 2, 3)
    normal = F.layer_norm(x.permute(0, 2, 3, 1), (6,)).reshape(6, 6)  # [N, F]
    q, k, v = (normal @ block.qkv.weight.reshape(3, 6, 6)[i].T for i in range(3))
    parts = []
    for head in range(2):
        qh, kh, vh = (t[:, 3 * head : 3 * head + 3] for t in (q, k, v))
        if linear:
            parts.append((qh.softmax(1) / 3**0.5) @ (kh.softmax(0).T @ vh))
        else:
            parts.append((qh @ kh.T / 3**0.5).softmax(1) @ vh)
    out = torch.cat(parts, 1) @ block.out.weight.reshape(6, 6).T + block.out.bias
    torch.testing.assert_close(block(x), x + out.T.reshape(1, 6, 2, 3), atol=1e-5, rtol=1e-4)


def test_channel_norm_is_layer_norm_over_the_maps_of_each_pixel() -> None:
    norm, x = ChannelNorm(5), torch.randn(2, 5, 3, 4) * 3 + 1
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    scaled = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = scaled * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-4)
    channels_last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(norm(channels_last), expected, atol=1e-5, rtol=1e-4)
    assert norm(channels_last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{}, {"scale_shift": True, "patch": 2, "join_first": True}])
def test_saving_and_loading_keeps_every_output(options: dict, tmp_path: Path) -> None:
    net = small(**options)
    net.set_condition_statistics(torch.randn(6), torch.rand(6) + 0.5)
    net.save_pretrained(tmp_path)
    again = EGDDPM.from_pretrained(tmp_path)
    assert again.config.patch == net.config.patch and again.config.join_first == net.config.join_first
    x, e, keep = torch.randn(2, 3, 8, 8), torch.randn(2, 6), torch.tensor([False, True])
    with torch.no_grad():
        torch.testing.assert_close(net(x, 5, e, keep), again(x, 5, e, keep), atol=0, rtol=0)


def test_dropped_conditions_do_not_see_the_eeg_and_train_the_null_vector() -> None:
    net, x, e = small(), torch.randn(3, 3, 8, 8), torch.randn(3, 6)
    keep = torch.tensor([False, True, False])
    a, b = net(x, 5, e, keep), net(x, 5, e + 1, keep)
    torch.testing.assert_close(a[[0, 2]], b[[0, 2]], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(a[1], b[1], atol=1e-4)
    a.square().sum().backward()
    assert net.null is not None and net.null.grad is not None and net.null.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="null vector"):
        small(null_condition=False)(x, 5, e, keep)


def test_features_are_standardised_by_what_the_model_stores() -> None:
    net, e = small(), torch.randn(100, 6) * torch.tensor([1, 2, 3, 4, 5, 0.0]) + 7
    net.set_condition_statistics(e.mean(0), e.std(0))
    standard = net.encode_condition(e)
    torch.testing.assert_close(standard.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(0)[:5], torch.ones(5), atol=1e-4, rtol=0)
    assert standard[:, 5].abs().max() < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_size": 9}, "multiple of 2"),
        ({"sample_size": 10, "patch": 2}, "multiple of 4"),
        ({"multipliers": (1,)}, "two levels"),
        ({"base_channels": 5}, "even"),
    ],
)
def test_impossible_sizes_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 2}, "ddpm.heads is a key for ddpm.backbone 'paper'"),
        ({"join_first": True}, "ddpm.join_first is a key for ddpm.backbone 'paper'"),
        ({"base_channels": 20}, r"must be a multiple of ddpm.head_dim \(32\)"),
    ],
)
def test_settings_that_do_not_fit_unet2d_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EGDDPMStage(backbone="unet2d", **options)


@pytest.mark.parametrize("sampling", [ddim(3, 2.0), Sampling(sampler="ddpm", steps=20, guidance_scale=2.0)])
def test_a_trials_image_does_not_depend_on_its_batch(sampling: Sampling) -> None:
    net, e = small(), torch.randn(3, 6)
    together = sample_images(net, NOISING, e, sampling, [5, 6, 7])
    alone = sample_images(net, NOISING, e[1:2], sampling, [6])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)
    other = sample_images(net, NOISING, e[1:2], sampling, [8])
    assert not torch.allclose(alone, other, atol=1e-3)


def test_sampling_recovers_an_image_from_a_perfect_noise_predictor() -> None:
    """Check that sampling with a perfect noise predictor leads to the image.

    DDIM uses 25 of the 1000 noise steps of training, and DDPM uses all 1000 steps.
    """
    from diffusers import DDPMScheduler

    image = torch.rand(1, 3, 8, 8) * 2 - 1
    alphas = DDPMScheduler(**NOISING).alphas_cumprod
    net = small()

    def perfect(x: torch.Tensor, step: torch.Tensor, e: torch.Tensor, keep: Any = None) -> torch.Tensor:
        a = alphas[int(step)]
        return (x - a.sqrt() * image) / (1 - a).sqrt()

    net.forward = perfect  # type: ignore[method-assign]
    for sampling in (ddim(25), Sampling(sampler="ddpm", steps=1000, guidance_scale=1.0)):
        out = sample_images(net, NOISING, torch.zeros(1, 6), sampling, [0])
        torch.testing.assert_close(out, image, atol=1e-3, rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddpm_sampling_against_a_plain_loop_over_the_formulas(prediction: str) -> None:
    """Compare the ancestral sampler with equations 6, 7 and 15 of Ho et al. (2020), in float64 for two trials."""
    steps, net, e = 40, small(null_condition=False), torch.randn(2, 6)
    noising = {"num_train_timesteps": steps, "beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction}
    chosen = choose_sampling(noising, sampler="ddpm", steps=None, guidance_scale=None, dropped=False, has_null=False)
    assert chosen == Sampling(sampler="ddpm", steps=steps, guidance_scale=1.0)
    images = sample_images(net, noising, e, chosen, [3, 4])

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    beta = [min(1 - alpha_bar((t + 1) / steps) / alpha_bar(t / steps), 0.999) for t in range(steps)]
    bar = [math.prod(1 - b for b in beta[: t + 1]) for t in range(steps)]
    for row, seed in enumerate([3, 4]):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(3, 8, 8, generator=generator).double()
        for t in reversed(range(steps)):
            with torch.no_grad():
                guess = net(x.float()[None], t, e[row : row + 1])[0].double()
            if prediction == "epsilon":
                x0 = (x - math.sqrt(1 - bar[t]) * guess) / math.sqrt(bar[t])
            else:
                x0 = math.sqrt(bar[t]) * x - math.sqrt(1 - bar[t]) * guess
            before = bar[t - 1] if t else 1.0
            mean = math.sqrt(before) * beta[t] / (1 - bar[t]) * x0.clamp(-1, 1)
            mean += math.sqrt(1 - beta[t]) * (1 - before) / (1 - bar[t]) * x
            x = mean
            if t:
                std = math.sqrt((1 - before) / (1 - bar[t]) * beta[t])
                x = mean + std * torch.randn(3, 8, 8, generator=generator).double()
        torch.testing.assert_close(images[row].double(), x, atol=2e-3, rtol=1e-3)


def test_settings_of_the_sampling_have_defaults_that_fit_the_model() -> None:
    def chosen(**given: Any) -> Sampling:
        options = {"sampler": "ddim", "steps": None, "guidance_scale": None, "dropped": True, "has_null": True}
        return choose_sampling(NOISING, **{**options, **given})

    assert chosen() == ddim(25, 2.0)
    assert chosen(dropped=False, has_null=False) == ddim(25, 1.0)
    assert chosen(sampler="ddpm").steps == 1000 and chosen(steps=3).steps == 3
    with pytest.raises(ValueError, match="must not be above 1000"):
        chosen(steps=1001)
    for steps in (0, -3):
        with pytest.raises(ValueError, match=f"steps is {steps}; it must be at least 1"):
            chosen(steps=steps)
    with pytest.raises(ValueError, match="the sampler 'heun' is unknown; use one of ddpm, ddim, "):
        chosen(sampler="heun")
    with pytest.raises(ValueError, match="cannot use guidance"):
        chosen(dropped=False, has_null=False, guidance_scale=2.0)


def test_true_channels_are_counted_without_the_padding() -> None:
    x = torch.randn(5, 7)
    assert count_true_channels(x) == 5
    assert count_true_channels(x[torch.arange(13) % 5]) == 5
    assert count_true_channels(x[:1].expand(4, 7)) == 1
