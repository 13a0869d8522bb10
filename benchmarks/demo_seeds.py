"""Run the demo with several seeds and write its results into docs/demo.md.

``python benchmarks/demo_seeds.py --seeds 0 1 2 3 4 --out runs/seeds``

Results of earlier runs stay in ``benchmarks/results/demo_seeds.json``, unless a run with the same seed on the same kind
of machine replaces them. ``--seeds`` without numbers only writes the tables again. With ``--busy``, the tables do not
show how long the demos took, because other programs ran on the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import describe_run

RESULTS = Path(__file__).with_name("results") / "demo_seeds.json"
PAGE = Path(__file__).parents[1] / "docs" / "demo.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
TITLES = {"stable_diffusion": "Stable Diffusion", "eg_ddpm": "EG-DDPM", "linear": "linear map, training picture"}
EEG = {
    "none": "own",
    "shuffle": "shuffled",
    "shuffle_within": "shuffled among neighbours",
    "no_eeg": "none",
    "class": "true category",
}
MEASURES = ("category", "colour", "identification")


def run_seed(out: Path, seed: int) -> dict[str, Any]:
    """Run the demo with one seed, and return the numbers of its report.

    Parameters
    ----------
    out : Path
        Folder of the demo.
    seed : int
        Seed of the demo.

    Returns
    -------
    dict
        Scores of each model, the conclusion of the report, and the total seconds of all steps.
    """
    command = [sys.executable, "-m", "launch", "demo", "--out", str(out), "--seed", str(seed)]
    code = subprocess.run(command, check=False).returncode
    report = json.loads((out / "report.json").read_text())
    if code not in (0, 1):
        raise SystemExit(f"the demo with seed {seed} ended with exit code {code}; see {out / 'logs'}")
    pretraining = report["pretrain"]
    return {
        "seed": seed,
        "passed": report["passed"],
        "verdicts": {kind: found["verdict"]["word"] for kind, found in report["models"].items()},
        "pictures": {
            kind: {"scores": found["scores"], "own_minus_shuffled": found.get("own_minus_shuffled")}
            for kind, found in report["pictures"].items()
        },
        "held_out_loss": [pretraining["held_out_loss_first"], pretraining["held_out_loss_last"]],
        "minutes": report["seconds"]["total"] / 60,
        "versions": report["versions"],
    }


def render(results: list[dict[str, Any]]) -> str:
    """Return the tables of all results as Markdown, one section for each machine."""
    parts = []
    for machine in sorted({result["machine"] for result in results}):
        own = sorted((r for r in results if r["machine"] == machine), key=lambda r: r["seed"])
        versions = own[-1]["versions"]
        lines = [
            f"### {machine}",
            "",
            f"Measured {min(r['date'] for r in own)} to {max(r['date'] for r in own)}, torch {versions['torch']}, "
            "no GPU.",
            "",
            "| seed | model | EEG | " + " | ".join(MEASURES) + " | own minus shuffled, category |",
            "| " + " | ".join(["---"] * (len(MEASURES) + 4)) + " |",
        ]
        for result in own:
            for kind, found in result["pictures"].items():
                for eeg, scores in found["scores"].items():
                    cells = [f"{scores[name]['mean']:.0%}" for name in MEASURES]
                    difference = ""
                    if eeg == "none" and found["own_minus_shuffled"]:
                        values = found["own_minus_shuffled"]["category"]
                        low, high = values["interval"]
                        difference = f"{values['mean']:+.0%} ({low:+.0%} to {high:+.0%})"
                    name = EEG[eeg]
                    lines.append(
                        f"| {result['seed']} | {TITLES[kind]} | {name} | " + " | ".join(cells) + f" | {difference} |"
                    )
        lines += [
            "",
            "| seed | conclusion | verdicts | held-out loss, first | last | minutes |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for result in own:
            first, last = result["held_out_loss"]
            verdict = "shown" if result["passed"] else "not shown"
            words = "; ".join(f"{TITLES[kind]}: {word}" for kind, word in result["verdicts"].items())
            minutes = "not measured" if result["minutes"] is None else f"{result['minutes']:.1f}"
            lines.append(f"| {result['seed']} | {verdict} | {words} | {first:.3f} | {last:.3f} | {minutes} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> int:
    """Run the demos and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"), help="folder for the demos, one for each seed")
    parser.add_argument("--busy", action="store_true", help="other programs run too: leave out the minutes")
    words = parser.parse_args()
    results: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for seed in words.seeds:
        run = describe_run()
        found = run_seed(words.out / f"seed-{seed}", seed) | run
        minutes = found["minutes"]
        if words.busy:
            found |= {"minutes": None, "load": None}
        results = [r for r in results if (r["machine"], r["seed"]) != (run["machine"], seed)] + [found]
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"seed {seed}: {'shown' if found['passed'] else 'not shown'}, {minutes:.1f} minutes", flush=True)
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{render(results)}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
