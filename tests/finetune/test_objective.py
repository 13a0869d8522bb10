"""Tests of the diffusion objective: targets, weights of the noise steps, offset noise, and the schedule without signal
in its last step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from data_sharding.common.errors import RequestError, run_main
from finetune.base_models.load import load_base
from finetune.diffusion import choose_sampling, make_generators, make_scheduler, sample
from finetune.dm_re2i.config import EGDDPMStage
from finetune.foreign_models import check_noise_schedule
from finetune.generators import load_generator
from finetune.objective import ObjectiveConfig, add_offset, compute_target, denoising_errors, make_noising, weigh_steps
from finetune.stable_diffusion.train import StableDiffusionConfig, main
from finetune.training.step_random import StepRandom

SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


def noising_of(prediction: Any, base: dict[str, Any] = SD, **options: Any) -> DDPMScheduler:
    return make_noising(base, ObjectiveConfig(**options), prediction)


def batch(b: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    clean, noise = torch.randn(2, b, 4, 5, 5, generator=generator)
    return clean, noise, torch.tensor([0, 1, 100, 500, 900, 998])[:b]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("base", [SD, COSINE])
def test_min_snr_weights_are_right_for_each_prediction(prediction: str, base: dict[str, Any]) -> None:
    noising, gamma, time = noising_of(prediction, base, min_snr=5.0), 5.0, torch.arange(0, 1000, 7)
    weight = weigh_steps(noising, time, gamma)
    snr = compute_snr(noising, time)
    least = torch.minimum(snr, torch.tensor(gamma))
    closed = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[prediction]
    torch.testing.assert_close(weight, closed, rtol=1e-3, atol=1e-6)
    assert torch.equal(weigh_steps(noising, time, 0.0), torch.ones(len(time)))


def test_with_min_snr_the_loss_is_that_of_the_image_for_every_prediction() -> None:
    """The same error of the predicted image gives the same weighted loss, in whatever form the image is predicted."""
    clean, noise, time = batch()
    guess = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
    losses = {}
    for prediction in ("epsilon", "v_prediction", "sample"):
        noising = noising_of(prediction)
        noisy = noising.add_noise(clean, noise, time)
        a = noising.alphas_cumprod[time].double()[:, None, None, None]
        implied = (noisy - a.sqrt() * guess) / (1 - a).sqrt()
        out = {"epsilon": implied, "v_prediction": a.sqrt() * implied - (1 - a).sqrt() * guess, "sample": guess}
        errors = denoising_errors(lambda *_, o=out[prediction]: o, noising, clean, noise, time, ())
        losses[prediction] = errors * weigh_steps(noising, time, 5.0)
    torch.testing.assert_close(losses["epsilon"], losses["sample"], rtol=2e-2, atol=1e-6)
    torch.testing.assert_close(losses["v_prediction"], losses["sample"], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++", "euler", "lcm", "plms"])
@pytest.mark.parametrize(
    ("prediction", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("sample", False), ("v_prediction", True), ("sample", True)],
)
def test_a_network_that_predicts_its_target_samples_the_image(prediction: str, zero_snr: bool, sampler: Any) -> None:
    noising = noising_of(prediction, zero_snr=zero_snr)
    given = {"steps": 20, "guidance_scale": 1.0, "dropped": False, "has_null": False}
    if sampler == "plms" and (zero_snr or prediction == "sample"):
        with pytest.raises(ValueError, match="plms"):
            choose_sampling(noising.config, sampler=sampler, **given)
        return
    scheduler = make_scheduler(sampler, noising.config, clip_sample=False)
    clean, noise, _ = batch(2)

    def perfect(x: torch.Tensor, time: torch.Tensor, _: Any) -> torch.Tensor:
        time = time.long().expand(len(x))
        signal = noising.alphas_cumprod[time][:, None, None, None]
        implied = (x - signal.sqrt() * clean) / (1 - signal).sqrt()
        return compute_target(noising, clean, implied, time)

    steps = choose_sampling(noising.config, sampler=sampler, **given).steps
    made = sample(
        perfect, scheduler, noise, (), None, steps=steps, guidance_scale=1.0, generators=make_generators([1, 2])
    )
    assert made.isfinite().all()
    assert (made - clean).abs().max() < 0.1
    if zero_snr:
        assert int(scheduler.timesteps[0]) == 999


def test_with_zero_snr_the_last_step_contains_only_noise() -> None:
    noising = noising_of("v_prediction", zero_snr=True)
    clean, noise, _ = batch(2)
    last = torch.tensor([999, 999])
    assert torch.equal(noising.add_noise(clean, noise, last), noise)
    assert torch.equal(compute_target(noising, clean, noise, last), -clean)
    assert noising.config.timestep_spacing == "trailing"
    assert float(noising_of("v_prediction").alphas_cumprod[-1]) > 1e-3


def test_offset_noise_is_one_value_for_each_channel_of_an_image() -> None:
    noise = torch.randn(4, 3, 6, 6)
    offset = add_offset(noise, 0.1, StepRandom(0, 5)) - noise
    assert torch.allclose(offset, offset[..., :1, :1].expand_as(offset), atol=1e-6)
    assert len(offset[..., 0, 0].flatten().unique()) == 12
    halves = [add_offset(noise[rank::2], 0.1, StepRandom(0, 5, rank=rank, world_size=2)) for rank in (0, 1)]
    torch.testing.assert_close(halves[1], (noise + offset)[1::2])
    # Without offset noise, the random numbers that are drawn later stay the same.
    random = StepRandom(0, 5)
    assert add_offset(noise, 0.0, random) is noise
    assert torch.equal(random.normal(2, 2), StepRandom(0, 5).normal(2, 2))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zero_snr": True}, "ddpm.zero_snr needs"),
        ({"zero_snr": True, "prediction": "v_prediction", "min_snr": 5.0}, "cannot be used together"),
        ({"min_snr": -1.0}, "at least 0"),
        ({"offset_noise": float("nan")}, "at least 0"),
        ({"min_snr": 5.0, "loss": "l1"}, "squared errors"),
    ],
)
def test_options_that_do_not_fit_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EGDDPMStage(**keys)


def test_an_unknown_kind_of_prediction_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({**SD, "prediction_type": "flow_prediction"}))
    with pytest.raises(RequestError, match="flow_prediction"):
        check_noise_schedule(path)
    with pytest.raises(ValueError, match="flow_prediction"):
        make_noising({**SD, "prediction_type": "flow_prediction"}, ObjectiveConfig())
    path.write_text(json.dumps({**SD, "prediction_type": "sample"}))
    check_noise_schedule(path)


def test_stable_diffusion_trains_and_samples_with_the_objective_of_its_config(
    paired_dataset: Path, encoder_package: Path, miniature: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = miniature / "stable-diffusion"
    args = ["--dataset", paired_dataset, "--encoder", encoder_package, "--base", base, "--output", tmp_path / "run"]
    args += ["--tracker.kind", "none", "--training.steps", 2, "--training.batch_size", 8, "--device", "cpu"]
    words = [str(word) for word in args]
    config = StableDiffusionConfig(dataset="", encoder="", base=str(base), output="")
    assert config.prediction is None and load_base(base).scheduler.config.prediction_type == "epsilon"
    assert run_main(main, [*words, "--zero_snr", "true"]) == 2
    assert "zero_snr needs prediction" in capsys.readouterr().err
    more = ["--zero_snr", "true", "--prediction", "v_prediction", "--offset_noise", "0.1"]
    assert run_main(main, [*words, *more]) == 0
    stored = json.loads((tmp_path / "run" / "model" / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert stored["rescale_betas_zero_snr"] and stored["timestep_spacing"] == "trailing"
    assert stored["prediction_type"] == "v_prediction" and not stored["clip_sample"]
    generator = load_generator(tmp_path / "run")
    eeg = torch.zeros(1, 128, 128)
    images = generator.generate(eeg, seeds=[1], steps=2, guidance_scale=1.0)
    assert images.shape == (1, 32, 32, 3)
