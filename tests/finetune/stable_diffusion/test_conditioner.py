from pathlib import Path

import pytest
import torch

from data_sharding.common.errors import RequestError
from finetune.clip_head import ClipHead, ClipHeadConfig
from finetune.stable_diffusion.conditioner import Conditioner, ConditionerConfig


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
