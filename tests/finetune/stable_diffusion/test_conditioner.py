from pathlib import Path

import pytest
import torch

from data_sharding.common.errors import RequestError
from finetune.clip_head import ClipHead, ClipHeadConfig
from finetune.stable_diffusion.conditioner import Conditioner, ConditionerConfig


def test_sizes_of_dream_diffusion() -> None:
    config = ConditionerConfig(tokens=128, dim=1024, length=77, width=768, time_dim=1280)
    states, time = Conditioner(config)(torch.randn(2, 128, 1024))
    assert states.shape == (2, 77, 768)
    # The conditioner's output for the time embedding is zero at first, so that training starts from the base model.
    assert time is not None and time.shape == (2, 1280) and not time.any()
    head = ClipHead(ClipHeadConfig(tokens=128, dim=1024, projection=768))
    assert head(torch.randn(2, 128, 1024)).shape == (2, 768)


def test_dropped_trials_get_the_null_condition_and_no_gradient() -> None:
    conditioner = Conditioner(ConditionerConfig(tokens=4, dim=6, length=3, width=5, time_dim=7))
    torch.nn.init.normal_(conditioner.null_LW)
    torch.nn.init.normal_(conditioner.time_mapper.weight)
    tokens = torch.randn(2, 4, 6, requires_grad=True)
    states, time = conditioner(tokens, torch.tensor([True, False]))
    null_states, null_time = conditioner.null(1)
    assert torch.equal(states[1:], null_states) and torch.equal(time[1:], null_time)
    (states.sum() + time.sum()).backward()
    assert tokens.grad[0].any() and not tokens.grad[1].any()
    assert conditioner.null_LW.grad.any()


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
