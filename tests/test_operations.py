"""Tests of docs/operations.md: its commands, its links, and its list of environment variables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.stages import STAGES

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "operations.md"
PACKAGES = ("data_sharding", "pretrain", "finetune", "launch")
NOT_OURS = {
    *(
        "PATH",
        "NETRC",
        "DS_ACCELERATOR",
        "DEEPSPEED_LOG_LEVEL",
        "OMP_WAIT_POLICY",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    ),
    *("PET_SHUTDOWN_TIMEOUT", "PET_SIGNALS_TO_HANDLE", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_TRAIN_V2_ENABLED"),
    *("RAY_USAGE_STATS_ENABLED", "PYTHONPATH", "FSDP_AUTO_WRAP_POLICY", "FSDP_VERSION"),
}
"""Variables that Dreamscale sets or reads for libraries, and that no user has to know."""


def test_every_environment_variable_is_listed():
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            found |= set(re.findall(r"environ(?:\.\w+)?[\[(]\s*\"([A-Z][A-Z0-9_]+)\"", text))
            found |= set(re.findall(r"\"(DREAMSCALE_[A-Z_]+)\"", text))
    assert "DREAMSCALE_SCRATCH" in found
    missing = {name for name in found - NOT_OURS if f"`{name}`" not in GUIDE.read_text()}
    assert not missing


def test_every_command_exists():
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    words = {word for block in blocks for word in re.findall(r"\bdreamscale ([a-z]+)\b", block)}
    assert {"shard", "plan", "submit"} <= words <= set(STAGES)


def heading_anchor(text: str) -> str:
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_of_the_docs_lead_to_files_and_headings(page: Path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in [heading_anchor(text) for text in headings], f"{target}#{anchor}"
