"""What the demo found: report.json, report.html and overview.png, all of it computed from the steps' own files."""

from __future__ import annotations

from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from data_sharding.common.files import atomic_write_text, read_json, write_json
from launch.demo import figures, page
from launch.demo.steps import MODELS, Step

ALPHA = 0.01
"""Largest p that counts as more than luck."""
EXAMPLES = 3
"""Trials a category that are shown."""
TITLES = {"stable_diffusion": "Stable Diffusion", "eg_ddpm": "EG-DDPM"}
LIBRARIES = ("dreamscale", "torch", "deepspeed", "accelerate", "diffusers", "transformers", "ray", "mne", "numpy")
JUDGE = "dataset-classifier"
"""Name, in metrics.json, of the network that names the categories."""
_ACCURACY = ("accuracy", "chance", "n", "images", "p_value", "interval")
_LIKENESS = ("psnr", "ssim", "frechet_distance", "kernel_distance")


def scores(folder: Path) -> dict[str, Any]:
    """Read what 'evaluate' found for one generator and for its control.

    Parameters
    ----------
    folder : Path
        The generator's folder.

    Returns
    -------
    dict
        Accuracy, chance, n and p; the same below ``shuffled``; image metrics; the judge's own accuracy.
    """
    found = read_json(folder / "metrics.json")

    def chosen(measured: dict[str, Any]) -> dict[str, Any]:
        accuracy = measured[f"accuracy[{JUDGE}]"]
        likeness = {
            key: value
            for key, value in measured.items()
            if isinstance(value, int | float) and key.split("[")[0] in _LIKENESS
        }
        return {key: accuracy[key] for key in _ACCURACY} | {"image_metrics": likeness}

    shuffled = chosen(found["shuffled"])
    giver = found["shuffled"].get(f"accuracy_of_eeg[{JUDGE}]")
    if giver is not None:
        shuffled["of_the_eeg"] = {key: giver[key] for key in _ACCURACY}
    return {
        **chosen(found["generated"]),
        "shuffled": shuffled,
        "random_pairs": found["random_pairs"],
        "memorisation": found["memorisation"],
        "judge": {key: found["classifier"]["held_out"][key] for key in ("accuracy", "n")},
    }


def summarise(out: Path, seconds: dict[str, float], *, seed: int, profile: str) -> dict[str, Any]:
    """Collect the numbers of all steps.

    Parameters
    ----------
    out : Path
        The demo's folder.
    seconds : dict
        Step to the time it took.
    seed : int
        The demo's.
    profile : str
        full or smoke.

    Returns
    -------
    dict
        What report.json holds.
    """
    held_out = [
        (line["step"], line["val_loss"])
        for line in figures.read_metrics(out / "pretrain" / "metrics.jsonl")
        if line.get("val_loss") is not None
    ]
    models = {kind: scores(out / "generated" / kind) for kind in MODELS}
    corpus = {}
    for part in ("unpaired", "paired"):
        manifest = read_json(out / part / "manifest.json")
        samples = {name: sum(s["samples"] for s in shards) for name, shards in manifest["splits"].items()}
        corpus[part] = {"counts": manifest["counts"], "hours": manifest["hours"], "samples": samples}
    summary: dict[str, Any] = {
        "seed": seed,
        "profile": profile,
        "models": models,
        "pretrain": {
            "held_out_loss_first": held_out[0][1],
            "held_out_loss_last": held_out[-1][1],
            "steps": held_out[-1][0],
        },
        "corpus": corpus,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
        "versions": {name: metadata.version(name) for name in LIBRARIES},
    }
    return summary | conclude(models)


def conclude(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Judge whether the pictures carry what was seen.

    Parameters
    ----------
    models : dict
        Generator to its scores.

    Returns
    -------
    dict
        ``passed``: every generator does better than luck with the right EEG and none with shuffled EEG; ``conclusion``:
        the same in words.
    """
    parts, passed = [], True
    for kind, found in models.items():
        own, shuffled = found["p_value"] < ALPHA, found["shuffled"]["p_value"] < ALPHA
        passed &= own and not shuffled
        parts.append(
            f"{TITLES[kind]}: {found['accuracy']:.0%} of {found['n']} generated pictures show the category seen "
            f"(chance {found['chance']:.0%}, p = {found['p_value']:.2g}); with shuffled EEG "
            f"{found['shuffled']['accuracy']:.0%} (p = {found['shuffled']['p_value']:.2g})."
        )
    verdict = (
        "The generated pictures carry what people saw, and shuffling the EEG takes it away."
        if passed
        else "Not shown: for at least one generator the pictures do not beat chance, or shuffled EEG does too."
    )
    return {"passed": bool(passed), "conclusion": f"{verdict} {' '.join(parts)}"}


def choose_examples(trials: list[dict[str, Any]], labels: list[str]) -> list[dict[str, Any]]:
    """Choose trials to show, without looking at their pictures: the first ones by key of each category.

    Parameters
    ----------
    trials : list of dict
        As in generated.json.
    labels : list of str
        Names of the categories.

    Returns
    -------
    list of dict
        At most `EXAMPLES` a category, each one of another picture.
    """
    chosen = []
    for label in range(len(labels)):
        seen: set[str] = set()
        for trial in sorted((t for t in trials if t["label"] == label), key=lambda t: t["key"]):
            if trial["image_id"] not in seen and len(seen) < EXAMPLES:
                seen.add(trial["image_id"])
                chosen.append(trial)
    return chosen


def _columns(out: Path, keys: list[str]) -> list[tuple[str, list[Path]]]:
    """Pictures of some trials: seen, and made by each generator with its control."""
    columns: list[tuple[str, list[Path]]] = []
    for kind in MODELS:
        for ending, suffix in (("", ""), ("-shuffled", ", shuffled EEG")):
            folder = out / "generated" / f"{kind}{ending}"
            trials = {trial["key"]: trial for trial in read_json(folder / "generated.json")["trials"]}
            if not columns:
                columns.append(("seen", [folder / trials[key]["real_file"] for key in keys]))
            columns.append((f"{TITLES[kind]}{suffix}", [folder / trials[key]["file"] for key in keys]))
    return columns


def write_report(out: Path, steps: list[Step], seconds: dict[str, float], *, seed: int, profile: str) -> str:
    """Write report.json, overview.png and, last, report.html.

    Parameters
    ----------
    out : Path
        The demo's folder; every step is complete.
    steps : list of Step
        The chain.
    seconds : dict
        Step to the time it took.
    seed : int
        The demo's.
    profile : str
        full or smoke.

    Returns
    -------
    str
        The conclusion.
    """
    summary = summarise(out, seconds, seed=seed, profile=profile)
    generated = read_json(out / "generated" / next(iter(MODELS)) / "generated.json")
    examples = choose_examples(generated["trials"], generated["labels"])
    columns = _columns(out, [trial["key"] for trial in examples])
    reconstruction = out / "pretrain" / "plots" / "reconstruction.png"
    (out / "plots").mkdir(exist_ok=True)
    figures.draw_curves([out / name for name in ("pretrain", "align", *MODELS.values())], out / "plots" / "losses.png")
    figures.draw_overview(
        [(name.replace(", ", ",\n"), paths) for name, paths in columns],
        reconstruction,
        out / "overview.png",
        title="Pictures seen, and pictures generated from the EEG of people never trained on",
        footer="Below: the pretrained autoencoder rebuilds hidden EEG of a person never trained on",
    )
    write_json(out / "report.json", summary)
    atomic_write_text(out / "report.html", _html(out, summary, steps, columns, examples, generated["labels"]))
    return summary["conclusion"]


def _html(
    out: Path,
    summary: dict[str, Any],
    steps: list[Step],
    columns: list[tuple[str, list[Path]]],
    examples: list[dict[str, Any]],
    labels: list[str],
) -> str:
    reconstruction = out / "pretrain" / "plots" / "reconstruction.png"
    names = [f"{labels[trial['label']]}, {trial['subject']}" for trial in examples]
    parts = [
        "<h1>From EEG to pictures</h1>",
        f'<p class="soft">Dreamscale {summary["versions"]["dreamscale"]}, seed {summary["seed"]}, '
        f"{summary['seconds']['total'] / 60:.1f} minutes of computing</p>",
        f'<p class="verdict{"" if summary["passed"] else " no"}">{escape(summary["conclusion"])}</p>',
    ]
    if summary["profile"] == "smoke":
        parts.append(
            "<p><b>A smoke run:</b> hardly any training. It shows that the steps run; its pictures mean nothing.</p>"
        )
    pretrain = summary["pretrain"]
    parts += [
        _story(out, summary),
        """
<h2>What was seen, and what came out</h2>
<p>Each row is one moment at which a person who was never trained on looked at a picture that was never trained
on. The models saw only the second of EEG that followed. The shuffled columns are the control: the same model
with the same noise, given the EEG of another moment. The first trials of each category are shown, not the best
ones.</p>""",
        page.picture_table(columns, names),
        _models(summary),
        f"""
<h2>Pretraining</h2>
<p>The encoder learned from recordings without any pictures: most of each second is hidden and must be rebuilt
from the rest. The error on a person never trained on went from {pretrain["held_out_loss_first"]:.3f} to
{pretrain["held_out_loss_last"]:.3f} in {pretrain["steps"]:,} steps; 1 is what ignoring the signal gives.</p>""",
        f"<figure>{page.picture(reconstruction, 'EEG rebuilt by the model')}</figure>",
        "<h2>Learning curves</h2>",
        f"<figure>{page.picture(out / 'plots' / 'losses.png', 'loss curves of all stages')}</figure>",
        _corpus(out, summary),
        _machinery(summary, steps),
    ]
    return page.page("From EEG to pictures", "\n".join(parts))


def _story(out: Path, summary: dict[str, Any]) -> str:
    truth = read_json(out / "corpus" / "truth.json")
    people = {split: len(members) for split, members in truth["paired_subjects"].items()}
    formats = sorted({r["format"] for r in truth["unpaired"]})
    counts = sorted({r["channels"] for r in truth["unpaired"]})
    paired = summary["corpus"]["paired"]["samples"]
    return f"""
<h2>What happened</h2>
<ol>
<li>{len(truth["unpaired"])} people were simulated, with rhythms, blinks, mains hum and dead electrodes, and
recorded in {len(formats)} file formats ({", ".join(formats)}) with {counts[0]} to {counts[-1]} electrodes.
{len(truth["paired"])} of them looked at simple shapes; their EEG answers to each picture in a way that depends
on its shape and colour and differs from person to person.</li>
<li>All recordings were sharded on Ray into one format, with an account of every one.</li>
<li>An encoder was pretrained on the recordings without pictures (DeepSpeed ZeRO-2, two processes) and
exported.</li>
<li>With {paired["train"]:,} trials of {people["train"]} people, the encoder was aligned with CLIP, and a Stable
Diffusion was fine-tuned to draw from EEG instead of from text (Accelerate). A second model, EG-DDPM, learned
the same in pixels, without text and without pretraining. CLIP and Stable Diffusion are miniatures of the real
architectures, made on the spot from the training pictures: the demo downloads nothing.</li>
<li>For {paired["test"]:,} trials of {people["test"]} other people and of other pictures, both models drew what
they take to have been seen, once with the right EEG and once with that of another trial.</li>
<li>A separate network, trained on real training pictures only, named the category of every generated
picture.</li>
</ol>"""


def _models(summary: dict[str, Any]) -> str:
    head = ["model", "EEG", "right category", "95 % interval", "chance", "trials", "pictures", "p"]
    rows: list[list[str | float | int]] = []
    more: list[list[str | float | int]] = []
    for kind, found in summary["models"].items():
        for name, values in (("own", found), ("shuffled", found["shuffled"])):
            low, high = values["interval"]
            interval = f"{low:.0%} to {high:.0%}"
            row = [TITLES[kind], name, f"{values['accuracy']:.1%}", interval, f"{values['chance']:.1%}"]
            rows.append([*row, values["n"], values["images"], values["p_value"]])
            more += [[TITLES[kind], name, key, value] for key, value in values["image_metrics"].items()]
        pairs = {key: value for key, value in found["random_pairs"].items() if not isinstance(value, str)}
        more += [[TITLES[kind], "own, picture of another trial", key, value] for key, value in pairs.items()]
        copied = found["memorisation"]
        more += [
            [TITLES[kind], f"own, {which}", copied["measure"], copied[side]["median"]]
            for which, side in (("median", "generated"), ("median of the real pictures", "real"))
        ]
    judge = next(iter(summary["models"].values()))["judge"]
    return (
        f"""
<h2>Is it more than luck?</h2>
<p>p is the share of shufflings of the categories between pictures that would do as well. The judge itself names
{judge["accuracy"]:.1%} of {judge["n"]} real pictures correctly that it was not trained on.</p>"""
        + page.table(head, rows)
        + _giver(summary)
        + "<h2>Likeness of the pictures</h2>"
        + page.table(["model", "EEG", "metric", "value"], more)
    )


def _giver(summary: dict[str, Any]) -> str:
    """Say how often the pictures of shuffled EEG show what the person whose EEG it was saw."""
    said = [
        f"{TITLES[kind]} {given['accuracy']:.0%} (p = {given['p_value']:.2g})"
        for kind, found in summary["models"].items()
        if (given := found["shuffled"].get("of_the_eeg"))
    ]
    if not said:
        return ""
    return (
        "<p>The same pictures of shuffled EEG, judged by what the person whose EEG it was had seen at that moment, are "
        f"right in: {escape('; '.join(said))}.</p>"
    )


def _corpus(out: Path, summary: dict[str, Any]) -> str:
    rows: list[list[str | float | int]] = []
    for part, found in summary["corpus"].items():
        for key, value in found["counts"].items():
            rows.append([part, key, value, found["hours"].get(key, "")])
        rows.append([part, "samples written", sum(found["samples"].values()), found["hours"]["written"]])
    truth = read_json(out / "corpus" / "truth.json")
    made = [
        [r["subject"], r["format"], r["channels"], r["sfreq"], r["reference"], r["seconds"], r["dead_channel"] or ""]
        for r in truth["unpaired"]
    ]
    return (
        "<h2>Where every recording went</h2>"
        + page.table(["dataset", "what", "number", "hours"], rows)
        + "<h2>The recordings without pictures</h2>"
        + page.table(["person", "format", "electrodes", "Hz", "reference", "seconds", "dead electrode"], made)
    )


def _machinery(summary: dict[str, Any], steps: list[Step]) -> str:
    rows = [[step.name, step.title, summary["seconds"][step.name]] for step in steps]
    return (
        "<h2>Time</h2>"
        + page.table(["step", "what", "seconds"], [*rows, ["", "together", summary["seconds"]["total"]]])
        + "<h2>The commands</h2><p>Each step is an ordinary command; its log is in <code>logs/</code>.</p><pre>"
        + escape("\n".join(step.command for step in steps))
        + "</pre><h2>Versions</h2>"
        + page.table(["package", "version"], [[name, version] for name, version in summary["versions"].items()])
    )
