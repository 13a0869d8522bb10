"""Tests that each command accepts the files in configs/ that were written for this command."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

from data_sharding.common.config import parse_config, to_yaml

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = {  # Config class for each name pattern of config files.
    "data_sharding/*": "data_sharding.job.request:ShardConfig",
    "demo/shard_*": "data_sharding.job.request:ShardConfig",
    "pretrain/*": "pretrain.training.config:PretrainConfig",
    "demo/pretrain*": "pretrain.training.config:PretrainConfig",
    "demo/miniature": "finetune.stable_diffusion.miniature:MiniatureConfig",
    "*/align*": "finetune.align:AlignConfig",
    "*/stable_diffusion*": "finetune.stable_diffusion.train:StableDiffusionConfig",
    "*/dm_re2i*": "finetune.dm_re2i.config:DMRE2IConfig",
    "*/linear": "finetune.linear.train:LinearConfig",
    "*/frozen_decoder*": "finetune.frozen_decoder.config:FrozenDecoderConfig",
    "presets/*": "launch.preset:PresetConfig",
    "finetune/evaluate": "finetune.evaluation.evaluate:EvaluateConfig",
}
FILES = sorted(p for p in CONFIGS.rglob("*.yaml") if not {"accelerate", "cluster", "ablations"} & {*p.parts})
# Config files that hold options for several commands.
SEVERAL = {"demo/images", "demo/smoke", "presets/smoke"}


def _name(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


@pytest.mark.parametrize("path", [p for p in FILES if _name(p) not in SEVERAL], ids=_name)
def test_config_loads_and_round_trips(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    where = [target for pattern, target in STAGES.items() if Path(_name(path)).match(pattern)]
    assert len(where) == 1, f"{path}: its config class is missing in STAGES of this test"
    module, _, name = where[0].partition(":")
    cls = getattr(importlib.import_module(module), name)
    config = parse_config(cls, [str(path)], prog="dreamscale", positionals=("config",))
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert parse_config(cls, [str(again)], prog="dreamscale", positionals=("config",)) == config


@pytest.mark.parametrize("profile", ["full", "smoke"])
def test_commands_accept_the_configs_of_the_demo(profile: str, tmp_path: Path) -> None:
    from launch.demo.steps import make_steps

    steps = make_steps(tmp_path / "demo", 3, profile)  # type: ignore[arg-type]
    configs = {step.name: step.config for step in steps if step.config is not None}
    assert configs["pretrain"]["seed"] == 3 and str(tmp_path) in configs["pretrain"]["dataset"]
    for name, values in configs.items():
        target = next(t for pattern, t in STAGES.items() if Path(f"demo/{name}").match(pattern))
        module, _, cls = target.partition(":")
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        parse_config(
            getattr(importlib.import_module(module), cls), [str(path)], prog="dreamscale", positionals=("config",)
        )


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_its_config_files(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]


@pytest.mark.parametrize("folder", sorted(CONFIGS.glob("*/ablations/*")), ids=lambda path: path.name)
def test_every_row_of_the_ablations_loads(folder: Path) -> None:
    from launch.ablate.config import read_ablation
    from launch.ablate.plan import plan_rows

    rows = plan_rows(read_ablation([str(folder)]))
    assert {row.name for row in rows} == {"base", *(path.stem for path in folder.glob("*.yaml"))} - {"ablation"}
    assert all(row.changes for row in rows[1:])


def test_every_preset_has_a_config() -> None:
    from pretrain.model.presets import PRESETS

    names = {path.stem for path in (CONFIGS / "pretrain").glob("*.yaml")}
    assert PRESETS.keys() <= names, "docs/pretraining.md says that each preset has a config"
