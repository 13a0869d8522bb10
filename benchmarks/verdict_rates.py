"""Count the verdicts of Dreamscale on constructed sets of trials, and write the table of docs/evaluation.md.

``python benchmarks/verdict_rates.py --seeds 20 --null_seeds 400``

`verdict_sets.py` makes every constructed set of trials with several seeds. A null set is simulated without any response
to the category, and is made with more seeds. The counts go to ``benchmarks/results/verdict_rates.json``. ``--only
NAME`` measures one set again, and ``--seeds 0`` only writes the table again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from machine import describe_run
from verdict_sets import SETS, make_evidence

from pretrain.evidence.rules import judge

RESULTS = Path(__file__).with_name("results") / "verdict_rates.json"
PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"
BEGIN, END = "<!-- rates: begin -->", "<!-- rates: end -->"


def count_words(name: str, seeds: int, resamples: int) -> dict[str, Any]:
    """Count how often each verdict occurs in the simulations of a set.

    Parameters
    ----------
    name : str
        Name of the set in `verdict_sets.SETS`.
    seeds : int
        Number of seeds; the seeds are 0, 1, 2 and so on.
    resamples : int
        Number of bootstrap resamples of each verdict.

    Returns
    -------
    dict
        Settings, true verdict, and counts of all verdicts. Also, averaged over the seeds: the model's score with the
        trials' own EEG (``own``), and the chance level of this score.
    """
    design, truth = SETS[name]
    words: Counter[str] = Counter()
    scores, trials, begin = [], 0, time.perf_counter()
    for seed in range(seeds):
        evidence = make_evidence(design, seed)
        words[judge(evidence, resamples=resamples, seed=seed).word] += 1
        scores.append([float(evidence.hits_n.mean()), evidence.chance])
        trials = len(evidence.trials)
    own, chance = (sum(column) / seeds for column in zip(*scores, strict=True))
    return {
        "truth": truth,
        "settings": vars(design),
        "words": dict(words.most_common()),
        "seeds": seeds,
        "resamples": resamples,
        "test_trials": trials,
        "own": round(own, 3),
        "chance": round(chance, 3),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def render(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    machines = sorted({f"{found['machine']}, {found['date']}" for found in results.values()})
    lines = [
        f"Measured on: {'; '.join(machines)}.",
        "",
        "| set | true verdict | test trials | own score (chance) | verdicts |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in SETS:
        if found := results.get(name):
            words = ", ".join(f"{word} {count} of {found['seeds']}" for word, count in found["words"].items())
            score = f"{found['own']:.0%} ({found['chance']:.0%})"
            lines.append(f"| {name} | {found['truth']} | {found['test_trials']} | {score} | {words} |")
    return "\n".join(lines)


def main() -> int:
    """Count the verdicts, and write the results and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="number of seeds of each set")
    parser.add_argument("--null_seeds", type=int, default=400, help="number of seeds of each null set")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--only", choices=list(SETS), help="measure only this set")
    words = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in [words.only] if words.only else SETS:
        seeds = words.null_seeds if name.startswith("null") else words.seeds
        if words.seeds:
            run = describe_run()
            results[name] = count_words(name, seeds, words.resamples) | run
            print(f"{name}: {results[name]['words']}, {results[name]['seconds']} s", flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if PAGE.is_file():
        page = PAGE.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{render(results)}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
