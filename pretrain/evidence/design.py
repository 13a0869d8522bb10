"""The design of a dataset: whether the categories were shown in random order or in blocks."""

from __future__ import annotations

from typing import Any

from data_sharding.common.errors import RequestError, show
from data_sharding.common.untrusted import check_group, check_list, check_text
from data_sharding.dataset.manifest import Manifest
from pretrain.evidence.rules import DESIGNS, Design

LONGEST = 2000
"""Largest number of characters of the evidence of one corpus; longer evidence is shortened."""


def describe_design(manifest: Manifest, declared: str = "", *, where: str = "manifest.json") -> tuple[Design, str]:
    """Combine the designs of the dataset's corpora to one design; return this design and a sentence with the evidence.

    Parameters
    ----------
    manifest : Manifest
        Manifest of the dataset. ``dreamscale shard`` measured the design of each corpus from the order of the corpus's
        trials.
    declared : str
        Published evidence of a random order, for corpora whose files have lost the order of the trials. If the measured
        design is unknown, the published evidence makes the design random. The published evidence does not change a
        measured block design.
    where : str
        Path of the manifest, for error messages.

    Returns
    -------
    design : str
        Block if a corpus has a block design; otherwise unknown if the design of a corpus is unknown; otherwise random.
    evidence : str
        What was measured or published about the order of the trials.

    Raises
    ------
    RequestError
        If the manifest does not describe the corpora in the form that ``dreamscale shard`` writes.
    """
    entries = [_check_entry(entry, where) for entry in _list_corpora(manifest, where)]
    found = {design for _, design, _ in entries}
    text = "; ".join(f"{name}: {evidence}" for name, _, evidence in entries)
    if "block" in found:
        return "block", text
    if found != {"random"}:
        if declared.strip():
            return "random", f"declared in the config: {declared.strip()} (measured: {text or 'nothing'})"
        return "unknown", text or "the manifest does not name the design"
    return "random", text


def _list_corpora(manifest: Manifest, where: str) -> list[Any]:
    corpora = manifest.extra.get("corpora", [])
    if isinstance(corpora, dict):
        # Old manifests store a mapping from the name of each corpus to its entry, in place of a list of entries.
        return [{"name": name, **check_group(entry, where, "a corpus")} for name, entry in corpora.items()]
    return check_list(corpora, where, "extra.corpora")


def _check_entry(entry: Any, where: str) -> tuple[str, Design, str]:
    """Return a corpus's name, its design, and the evidence for the design, as texts without control characters."""
    values = check_group(entry, where, "a corpus")
    name, given, evidence = (
        check_text(values.get(key, ""), where, f"the {key} of a corpus") for key in ("name", "design", "evidence")
    )
    designs: dict[str, Design] = {design: design for design in DESIGNS}
    design = designs.get(given or "unknown")
    if design is None:
        raise RequestError(
            f"{where}: the design of the corpus '{show(name)}' is '{show(given)}', not one of {', '.join(DESIGNS)}; "
            "get the file again from its source, or make the dataset again"
        )
    return show(name), design, show(evidence, LONGEST) or "the order of the trials was not measured"
