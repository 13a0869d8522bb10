"""Compare the images of two models, trial by trial.

The command is ``dreamscale compare A B``. A and B are folders of generated images that `dreamscale evaluate` has
evaluated.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError, show
from data_sharding.common.files import read_json, write_json
from data_sharding.common.storage import describe
from data_sharding.common.untrusted import check_group
from finetune.evaluation.per_trial import TrialValues, compare_models, read_trials_file
from pretrain.evidence.statistics import holm


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare the generated images of two models on the same trials."""

    a: str
    """Folder of the images of the first model, evaluated with `dreamscale evaluate`."""
    b: str
    """Folder of the images of the second model, evaluated with `dreamscale evaluate`. All differences are second model
    minus first model (B minus A)."""
    output: str | None = None
    """File for the result in JSON. Empty: the result is only printed."""
    resamples: int = 10_000
    """Number of bootstrap resamples for the confidence intervals, and number of permutations for the p-values."""
    seed: int = 0
    """Seed of the resamples."""

    def __post_init__(self) -> None:
        if not 99 <= self.resamples <= 1_000_000:
            raise ValueError(f"resamples must be from 99 to 1,000,000, got {self.resamples}")


SAME = ("dataset_id", "split", "labels")
"""Entries of metrics.json that must be equal in both folders."""


def _check(config: CompareConfig) -> list[str]:
    """Check that the two evaluations can be compared; return remarks to print below the table of differences."""
    found = []
    for folder in (config.a, config.b):
        path = Path(folder) / "metrics.json"
        if not path.is_file():
            raise RequestError(f"{path}: no such file; run 'dreamscale evaluate {folder}' first")
        found.append(check_group(read_json(path), str(path)))
    for key in SAME:
        if found[0].get(key) != found[1].get(key):
            raise RequestError(f"{key} differs between {config.a} and {config.b}; compare images of the same trials")
    judges = [
        check_group(about.get("classifier"), str(Path(folder) / "metrics.json"), "classifier").get("sha256")
        for about, folder in zip(found, (config.a, config.b), strict=True)
    ]
    if judges[0] != judges[1]:
        raise RequestError(
            f"{config.a} and {config.b} were judged by different classifiers, so their accuracies cannot be compared; "
            f"evaluate one folder again with --classifier {Path(config.a) / 'classifier.safetensors'}"
        )
    return (
        [] if judges[0] else ["The results do not say which classifier judged the images; evaluate both folders again."]
    )


def compare(config: CompareConfig) -> int:
    """Compare two evaluated folders, and print the paired differences.

    Parameters
    ----------
    config : CompareConfig
        Config of the command.

    Returns
    -------
    int
        Exit code of the command.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    notes = _check(config)
    values = {name: read_trials_file(folder) for name, folder in (("a", config.a), ("b", config.b))}
    shared = len(set(values["a"].keys) & set(values["b"].keys))
    if not shared:
        raise RequestError(
            f"{config.a} and {config.b} have no trial in common; generate the images of both for the same trials"
        )
    _check_trials(config, values["a"], values["b"])
    found = compare_models(values, "a", resamples=config.resamples, seed=config.seed)
    rows = {name: entry for name, entry in found["b"].items() if entry["difference"] is not None}
    if not rows:
        raise RequestError(
            f"{config.a} and {config.b} have no metric in common; evaluate both folders with the same version of "
            "Dreamscale"
        )
    # Several metrics are tested, so the p-values are corrected for multiple comparisons.
    corrected = {
        over: dict(zip(tested, holm([rows[name]["difference"][f"p_{over}"] for name in tested]), strict=True))
        for over in ("images", "people")
        if (tested := [name for name in rows if rows[name]["difference"][f"p_{over}"] is not None])
    }
    table = Table(title=f"B minus A on {shared} shared trials")
    for head in ("metric", "A", "B", "B - A, over images", "p", "B - A, over people", "p"):
        table.add_column(head, justify="left" if head == "metric" else "right")
    for name, entry in rows.items():
        cells = [escape(name), _number(found["a"][name]["own"]["mean"]), _number(entry["own"]["mean"])]
        for over in ("images", "people"):
            entry["difference"][f"p_{over}_corrected"] = p = corrected.get(over, {}).get(name)
            cells += [_difference(entry["difference"], over), "-" if p is None else f"{p:.2g}"]
        table.add_row(*cells)
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    console.print(table)
    for note in [*notes, _explain(rows)]:
        console.print(note, markup=False)
    if config.output is not None:
        result = {"schema": 1, "a": config.a, "b": config.b, "trials": shared, "metrics": rows}
        try:
            write_json(Path(config.output), result)
        except OSError as error:
            raise RequestError(
                f"output {config.output}: cannot be written ({describe(error)}); choose another output"
            ) from None
        print(f"-> {config.output}")
    return EXIT_DONE


def _check_trials(config: CompareConfig, a: TrialValues, b: TrialValues) -> None:
    """For each trial that is in both folders, check that the person and the image that the person saw are the same."""
    facts = [
        dict(zip(x.keys, zip(x.subjects_B.tolist(), x.images_B.tolist(), strict=True), strict=True)) for x in (a, b)
    ]
    if differ := [key for key in facts[0].keys() & facts[1].keys() if facts[0][key] != facts[1][key]]:
        raise RequestError(
            f"trial {show(min(differ))} has another person or image in {config.b} than in {config.a}; generate and "
            "evaluate both folders again"
        )


def _explain(rows: dict[str, Any]) -> str:
    first = next(iter(rows.values()))["difference"]
    return (
        f"Differences are paired by trial ({first['images']} images, {first['people']} people). The intervals are 95 % "
        "bootstrap intervals that draw whole images, or whole people. The p-values are from tests that flip the signs "
        f"of whole images or people, and are corrected for {len(rows)} metrics (Holm)."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _difference(found: dict[str, Any], over: str) -> str:
    interval = found[f"over_{over}"]
    return "-" if interval is None else f"{found['mean']:+.3g} ({interval[0]:+.3g} to {interval[1]:+.3g})"


main = command(CompareConfig, compare, prog="dreamscale compare", positionals=("a", "b"), aliases={"-o": "output"})

if __name__ == "__main__":
    sys.exit(main())
