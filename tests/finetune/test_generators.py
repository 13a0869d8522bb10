import json
from pathlib import Path

import pytest

from data_sharding.common.errors import RequestError
from finetune.generators import load_generator


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"kind": "stable_diffusion", "schema": 0}, "train it again with 'dreamscale finetune CONFIG'"),
        ({"kind": "eg_ddpm", "schema": 0}, "train it again with 'dreamscale ddpm CONFIG'"),
        ({"kind": "gan", "schema": 1}, "the kind 'gan' is unknown to this version"),
    ],
)
def test_a_model_of_another_version_is_refused_with_the_way_out(about: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "dreamscale.json").write_text(json.dumps(about))
    with pytest.raises(RequestError, match=message) as error:
        load_generator(tmp_path)
    assert "\n" not in str(error.value)
