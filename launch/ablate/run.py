"""The command ``dreamscale ablate``: train variants of a model, generate and judge their images, and compare them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from data_sharding.common.config import to_yaml
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, RequestError, run_main
from data_sharding.common.files import atomic_write_text
from launch.ablate.config import Ablation, read_ablation
from launch.ablate.plan import Row, check_dataset, plan_rows
from launch.ablate.table import NAME, write_results
from launch.chain import Chain, StepFailedError, say


def _prepare_folder(out: Path, ablation: Ablation) -> None:
    """Make the output folder. If the folder exists and has files, check that an ablation made them."""
    if out.exists() and not out.is_dir():
        raise RequestError(f"output {out}: this is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.yaml").is_file():
        raise RequestError(f"output {out}: the folder is not empty and is not an ablation; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out / "config.yaml", to_yaml(ablation.config))
    except OSError as error:
        raise RequestError(
            f"output {out}: the folder cannot be written ({error.strerror}); choose another folder"
        ) from None


def _collect(ablation: Ablation, rows: list[Row], states: dict[str, str], seconds: dict[str, float]) -> dict[str, Any]:
    """Return the content of ``ablation.json``; rows that are not complete have no metrics yet."""
    from finetune.evaluation.per_trial import compare_models, read_trials_file

    config = ablation.config
    models = {row.name: read_trials_file(row.images) for row in rows if states.get(row.name) == "done"}
    found = compare_models(models, config.base, resamples=config.resamples, seed=config.seed)
    return {
        "stages": config.stages,
        "base": config.base,
        "split": config.split,
        "dataset": rows[0].dataset,
        "rows": {
            row.name: {
                "changes": row.changes,
                "state": states.get(row.name, "not run yet"),
                "seconds": sum(seconds.get(step.name, 0.0) for step in row.steps) if row.name in states else None,
                "metrics": found.get(row.name),
            }
            for row in rows
        },
    }


def ablate(ablation: Ablation) -> int:
    """Run all rows of an ablation and write its tables.

    Parameters
    ----------
    ablation : Ablation
        The ablation, from `read_ablation`.

    Returns
    -------
    int
        0 if all rows are complete; 1 if a row failed. If the base row failed: the exit code of the step that failed.

    Raises
    ------
    RequestError
        If the config of a row is wrong, or the output folder or the dataset cannot be used.
    StopRequested
        If a signal asked the command to stop. The same command resumes the ablation.
    """
    config, out = ablation.config, Path(ablation.config.output)
    rows = plan_rows(ablation)
    check_dataset(rows[0].dataset, config.split)
    _prepare_folder(out, ablation)
    chain, states = Chain(out, say), dict[str, str]()
    total, number, complete = sum(len(row.steps) for row in rows), 0, set[str]()
    with chain.forward_signals():
        for row in rows:
            first = number
            number += len(row.steps)
            try:
                for place, step in enumerate(row.steps, first + 1):
                    # A row may need a run of an earlier row with an equal config, and that run may have failed.
                    if missing := [name for name in step.needs if name not in complete]:
                        states[row.name] = f"failed: needs step '{missing[0]}', which failed"
                        print(f"dreamscale: row '{row.name}': {states[row.name]}", file=sys.stderr)
                        break
                    chain.run(step, f"[{place:2d}/{total}]")
                    complete.add(step.name)
                else:
                    states[row.name] = "done"
            except StepFailedError as error:
                chain.print_tail(error.step)
                log = chain.log(error.step)
                print(f"dreamscale: row '{row.name}': {error}; the log of this step is {log}", file=sys.stderr)
                if row.name == config.base:
                    return error.code if error.code > 0 else EXIT_FAILED
                states[row.name] = f"failed: {error}, see {log.relative_to(out)}"
            write_results(out, _collect(ablation, rows, states, chain.seconds))
    print(out / f"{NAME}.md", flush=True)
    return EXIT_DONE if set(states.values()) == {"done"} else EXIT_FAILED


def main(argv: list[str] | None = None) -> int:
    """Run ``dreamscale ablate``; returns its exit code."""
    return run_main(lambda words: ablate(read_ablation(words)), argv)


if __name__ == "__main__":
    sys.exit(main())
