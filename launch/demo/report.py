"""Write the demo's results (report.json, report.html and overview.png) from the output files of the steps."""

from __future__ import annotations

from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from data_sharding.common.files import atomic_write_text, read_json, write_json
from data_sharding.common.html.render import Picture, Table, embed_png, render_page
from finetune.evaluation.classifier import ImageClassifier
from finetune.evaluation.verdict import explain_comparisons, make_comparison_table
from launch.chain import Step
from launch.demo import figures
from launch.demo.scores import MEASURES, Scores, compare, score_folder
from launch.demo.steps import CONTROLS, MODELS, name_images

TEMPLATE = Path(__file__).with_name("report.html.j2")
EXAMPLES = 3
"""Number of example trials that the report shows of each category."""
TITLES = {"stable_diffusion": "Stable Diffusion", "eg_ddpm": "EG-DDPM"}
LINEAR = "linear map, training picture"
"""Title of the linear baseline in the report."""
EEG = {
    "none": "own",
    "shuffle": "shuffled",
    "shuffle_within": "shuffled among neighbours in time",
    "no_eeg": "none (floor)",
    "class": "true category (ceiling)",
}
"""For each control, what the tables of the report say in the column "EEG"."""
LIBRARIES = ("dreamscale", "torch", "deepspeed", "accelerate", "diffusers", "transformers", "ray", "mne", "numpy")
JUDGE = "dataset-classifier"
"""Name in metrics.json of the classifier that predicts the categories of pictures."""
_ACCURACY = ("accuracy", "chance", "n", "images", "p_value", "interval")


def score_pictures(out: Path, seed: int) -> dict[str, Any]:
    """Score all generated pictures of the demo.

    Parameters
    ----------
    out : Path
        The demo's folder.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    dict
        For each generator: the scores of its pictures for each control, the difference between the scores from the
        right EEG and from shuffled EEG, and the scores for each person. For the linear baseline: the scores of its
        pictures, and the scores for each person.
    """
    pictures = {picture["image_id"]: picture for picture in read_json(out / "corpus" / "truth.json")["pictures"]}
    judge, _ = ImageClassifier.load(out / "generated" / next(iter(MODELS)) / "classifier.safetensors")
    found: dict[str, Any] = {}
    for kind in MODELS:
        scores = {
            control: score_folder(out / "generated" / name_images(kind, control), pictures, judge)
            for control in CONTROLS
        }
        own = scores["none"]
        found[kind] = {
            "scores": {control: of_control.summarise(seed) for control, of_control in scores.items()},
            "own_minus_shuffled": compare(own, scores["shuffle"], seed),
            **_divide(own, seed),
        }
    linear = score_folder(out / "generated" / "linear", pictures, judge)
    found["linear"] = {"scores": {"none": linear.summarise(seed)}, **_divide(linear, seed)}
    return found


def _divide(scores: Scores, seed: int) -> dict[str, Any]:
    """Return the scores separately for new and known combinations of category and colour, and for each person."""
    return {
        "new_combinations": scores.select(scores.new_B).summarise(seed),
        "known_combinations": scores.select(~scores.new_B).summarise(seed),
        "people": scores.by_person(),
    }


def read_scores(folder: Path) -> dict[str, Any]:
    """Read the results of `dreamscale evaluate` for one generator and for its control.

    Parameters
    ----------
    folder : Path
        Folder with the results of the generator.

    Returns
    -------
    dict
        The accuracy with its interval, chance level, p-value and numbers of trials and pictures; the image metrics;
        under the key ``shuffled``, the same values of the control; and the accuracy of the classifier on real pictures.
    """
    found = read_json(folder / "metrics.json")

    def select(measured: dict[str, Any]) -> dict[str, Any]:
        accuracy = measured[f"accuracy[{JUDGE}]"]
        # In metrics.json, every metric of images is a number, and every accuracy is a dictionary of numbers.
        metrics = {key: value for key, value in measured.items() if isinstance(value, int | float)}
        return {key: accuracy[key] for key in _ACCURACY} | {"image_metrics": metrics}

    shuffled = select(found["shuffled"])
    donor = found["shuffled"].get(f"accuracy_of_eeg[{JUDGE}]")
    if donor is not None:
        shuffled["of_the_eeg"] = {key: donor[key] for key in _ACCURACY}
    return {
        **select(found["generated"]),
        "shuffled": shuffled,
        "random_pairs": found["random_pairs"],
        "memorisation": found["memorisation"],
        "judge": {key: found["classifier"]["held_out"][key] for key in ("accuracy", "n")},
        "verdict": found["verdict"],
    }


def summarise(out: Path, seconds: dict[str, float], *, seed: int, profile: str) -> dict[str, Any]:
    """Collect the numbers of all steps of the demo.

    Parameters
    ----------
    out : Path
        The demo's folder.
    seconds : dict
        Duration of each step in seconds.
    seed : int
        Seed of the demo.
    profile : str
        full or smoke.

    Returns
    -------
    dict
        The content of report.json.
    """
    held_out = [
        (line["step"], line["val_loss"])
        for line in figures.read_metrics(out / "pretrain" / "metrics.jsonl")
        if line.get("val_loss") is not None
    ]
    models = {kind: read_scores(out / "generated" / kind) for kind in MODELS}
    pictures = score_pictures(out, seed)
    corpus = {}
    for part in ("unpaired", "paired"):
        manifest = read_json(out / part / "manifest.json")
        samples = {name: sum(s["samples"] for s in shards) for name, shards in manifest["splits"].items()}
        corpus[part] = {"counts": manifest["counts"], "hours": manifest["hours"], "samples": samples}
    summary: dict[str, Any] = {
        "seed": seed,
        "profile": profile,
        "models": models,
        "pictures": pictures,
        "pretrain": {
            "held_out_loss_first": held_out[0][1],
            "held_out_loss_last": held_out[-1][1],
            "steps": held_out[-1][0],
        },
        "corpus": corpus,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
        "versions": {name: metadata.version(name) for name in LIBRARIES},
    }
    verdicts = {kind: found["verdict"] for kind, found in models.items()}
    return summary | conclude({kind: pictures[kind] for kind in MODELS}, verdicts)


def conclude(models: dict[str, dict[str, Any]], verdicts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Say whether the generated pictures show what people saw.

    Parameters
    ----------
    models : dict
        For each generator, the scores of `score_pictures`.
    verdicts : dict
        For each generator, the verdict of `dreamscale evaluate`.

    Returns
    -------
    dict
        ``passed`` is true if the verdict of every generator is "signal". ``conclusion`` says in words whether the
        pictures show what people saw.
    """
    parts, passed = [], True
    for kind, found in models.items():
        own, shuffled = (found["scores"][control]["category"] for control in ("none", "shuffle"))
        difference = found["own_minus_shuffled"]["category"]
        low, high = difference["interval"]
        verdict = verdicts[kind]
        passed &= verdict["word"] == "signal"
        also = [name for name in ("colour", "identification") if found["own_minus_shuffled"][name]["interval"][0] > 0]
        parts.append(
            f"{TITLES[kind]}: verdict {verdict['word']}; {own['mean']:.0%} of {own['n']} generated pictures show the "
            "category seen (chance 25%), "
            f"with shuffled EEG {shuffled['mean']:.0%}; difference {difference['mean']:+.0%} ({low:+.0%} to "
            f"{high:+.0%}); also above shuffled EEG: {', '.join(also) or 'nothing else'}."
            + ("" if verdict["word"] == "signal" else f" {verdict['why'][0]}")
        )
    result = (
        "The generated pictures show what people saw, and the controls do not."
        if passed
        else "Not shown: the verdict of at least one generator is not 'signal'."
    )
    return {"passed": bool(passed), "conclusion": f"{result} {' '.join(parts)}"}


def choose_examples(trials: list[dict[str, Any]], labels: list[str]) -> list[dict[str, Any]]:
    """Choose the example trials that the report shows, without regard to the quality of their pictures.

    Parameters
    ----------
    trials : list of dict
        Trials from generated.json.
    labels : list of str
        Names of the categories.

    Returns
    -------
    list of dict
        At most `EXAMPLES` trials of each category, with different seen pictures. Trials of people who were chosen less
        often so far are preferred, and then trials with a smaller key.
    """
    chosen: list[dict[str, Any]] = []
    times: Counter[str] = Counter()
    for label in range(len(labels)):
        left = [trial for trial in trials if trial["label"] == label]
        for _ in range(EXAMPLES):
            if not left:
                break
            trial = min(left, key=lambda t: (times[t["subject"]], t["key"]))
            times[trial["subject"]] += 1
            chosen.append(trial)
            left = [other for other in left if other["image_id"] != trial["image_id"]]
    return chosen


def _list_columns(out: Path, keys: list[str]) -> list[tuple[str, list[Path]]]:
    """List the picture files of some trials: the seen pictures, those of each generator, those of the baseline."""
    sources = [
        (f"{TITLES[kind]}{suffix}", name_images(kind, control))
        for kind in MODELS
        for control, suffix in (("none", ""), ("shuffle", ", shuffled EEG"))
    ]
    columns: list[tuple[str, list[Path]]] = []
    for title, name in [*sources, (LINEAR, "linear")]:
        folder = out / "generated" / name
        trials = {trial["key"]: trial for trial in read_json(folder / "generated.json")["trials"]}
        if not columns:
            columns.append(("seen", [folder / trials[key]["real_file"] for key in keys]))
        columns.append((title, [folder / trials[key]["file"] for key in keys]))
    return columns


def write_report(
    out: Path, steps: list[Step], seconds: dict[str, float], *, seed: int, profile: str
) -> tuple[str, bool]:
    """Write report.json, overview.png and, last, report.html.

    Parameters
    ----------
    out : Path
        The demo's folder, after all steps are complete.
    steps : list of Step
        All steps of the demo.
    seconds : dict
        Duration of each step in seconds.
    seed : int
        Seed of the demo.
    profile : str
        full or smoke.

    Returns
    -------
    conclusion : str
        The conclusion of the demo in words: whether the pictures show what people saw.
    passed : bool
        Whether the pictures show what people saw.
    """
    summary = summarise(out, seconds, seed=seed, profile=profile)
    generated = read_json(out / "generated" / next(iter(MODELS)) / "generated.json")
    examples = choose_examples(generated["trials"], generated["labels"])
    columns = _list_columns(out, [trial["key"] for trial in examples])
    reconstruction = out / "pretrain" / "plots" / "reconstruction.png"
    curves = figures.draw_curves([out / name for name in ("pretrain", "align", *MODELS.values())], out / "plots")
    figures.draw_overview(
        [(name.replace(", ", ",\n"), paths) for name, paths in columns],
        reconstruction,
        out / "overview.png",
        title="Pictures seen, and pictures generated from the EEG of people outside the training data",
        footer="Below: the pretrained autoencoder rebuilds hidden EEG of a person outside the training data",
    )
    write_json(out / "report.json", summary)
    row_labels = [f"{generated['labels'][trial['label']]}, {trial['subject']}" for trial in examples]
    page = render_page(
        TEMPLATE,
        **summary,
        **_describe_corpus(read_json(out / "corpus" / "truth.json"), summary),
        **_make_score_tables(summary),
        verdicts=[
            (
                TITLES[kind],
                found["verdict"],
                make_comparison_table(found["verdict"]),
                explain_comparisons(found["verdict"]),
            )
            for kind, found in summary["models"].items()
        ],
        columns=[
            (name, [_embed(path, f"{name}, {label}") for path, label in zip(paths, row_labels, strict=True)])
            for name, paths in columns
        ],
        row_labels=row_labels,
        reconstruction=_embed(reconstruction, "EEG that the model rebuilt, next to the true EEG"),
        curves=[_embed(path, f"loss curves of {name}", name) for name, path in curves.items()],
        times=Table(
            head=["step", "what", "seconds"],
            rows=[[step.name, step.title, summary["seconds"][step.name]] for step in steps],
            total=["all steps", None, summary["seconds"]["total"]],
        ),
        commands="\n".join(step.command for step in steps),
        packages=Table(head=["package", "version"], rows=list(summary["versions"].items())),
    )
    atomic_write_text(out / "report.html", page)
    return summary["conclusion"], summary["passed"]


def _embed(path: Path, text: str, caption: str = "") -> Picture:
    return Picture(url=embed_png(path.read_bytes()), text=text, caption=caption)


def _describe_corpus(truth: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of the report's template about the simulated people and the status of their recordings."""
    electrodes = [recording["channels"] for recording in truth["unpaired"]]
    samples = summary["corpus"]["paired"]["samples"]
    counts: list[list[Any]] = []
    for part, found in summary["corpus"].items():
        counts += [[part, key, value, found["hours"].get(key)] for key, value in found["counts"].items()]
        counts.append([part, "samples written", sum(found["samples"].values()), found["hours"]["written"]])
    columns = {
        "person": "subject",
        "format": "format",
        "electrodes": "channels",
        "Hz": "sfreq",
        "reference": "reference",
        "seconds": "seconds",
        "dead electrode": "dead_channel",
    }
    return {
        "n_people": len(truth["subjects"]),
        "n_resting": len(truth["unpaired"]),
        "formats": sorted({recording["format"] for recording in truth["unpaired"]}),
        "fewest_electrodes": min(electrodes),
        "most_electrodes": max(electrodes),
        "n_watchers": len(truth["paired"]),
        "n_train": samples["train"],
        "n_train_people": len(truth["paired_subjects"]["train"]),
        "n_test": samples["test"],
        "n_test_people": len(truth["paired_subjects"]["test"]),
        "counts": Table(head=["dataset", "what", "number", "hours"], rows=counts),
        "recordings": Table(
            head=list(columns), rows=[[recording[key] for key in columns.values()] for recording in truth["unpaired"]]
        ),
    }


def _make_score_tables(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of the report's template about the accuracy and the similarity of the pictures."""
    similarity: list[list[Any]] = []
    donors = []
    for kind, found in summary["models"].items():
        title, shuffled = TITLES[kind], found["shuffled"]
        for eeg, values in (("own", found), ("shuffled", shuffled)):
            similarity += [[title, eeg, metric, value] for metric, value in values["image_metrics"].items()]
        pairs = {metric: value for metric, value in found["random_pairs"].items() if not isinstance(value, str)}
        similarity += [[title, "own, picture of another trial", metric, value] for metric, value in pairs.items()]
        copied = found["memorisation"]
        for pictures, values in (("own, median", "generated"), ("median of the real pictures", "real")):
            similarity.append([title, pictures, copied["measure"], copied[values]["median"]])
        if donor := shuffled.get("of_the_eeg"):
            donors.append(f"{title} {donor['accuracy']:.0%} (p = {donor['p_value']:.2g})")
    return {
        **_make_picture_tables(summary["pictures"]),
        "similarity": Table(head=["model", "EEG", "metric", "value"], rows=similarity),
        "donors": "; ".join(donors),
        "judge": next(iter(summary["models"].values()))["judge"],
    }


def _make_picture_tables(pictures: dict[str, Any]) -> dict[str, Table]:
    """Return three tables of scores: by model and control, by combination of category and colour, and by person."""

    def cells(scores: dict[str, Any]) -> list[str]:
        found = [scores[name] for name in MEASURES]
        return [f"{x['mean']:.0%} ({x['interval'][0]:.0%} to {x['interval'][1]:.0%})" for x in found]

    titles = {**TITLES, "linear": LINEAR}
    scores: list[list[Any]] = []
    combinations: list[list[Any]] = []
    for kind, found in pictures.items():
        for control, of_control in found["scores"].items():
            scores.append([titles[kind], EEG[control], *cells(of_control), of_control["category"]["n"]])
        if kind in MODELS:
            differences = found["own_minus_shuffled"]
            parts = [differences[name] for name in MEASURES]
            words = [f"{x['mean']:+.0%} ({x['interval'][0]:+.0%} to {x['interval'][1]:+.0%})" for x in parts]
            scores.append([titles[kind], "own minus shuffled", *words, found["scores"]["none"]["category"]["n"]])
        for name in ("known_combinations", "new_combinations"):
            combinations.append([titles[kind], name.split("_")[0], *cells(found[name]), found[name]["category"]["n"]])
    scores.append(["chance", "", *[f"{chance:.0%}" for chance in MEASURES.values()], None])
    people = [
        [person, *[f"{pictures[kind]['people'][person]['category']:.0%}" for kind in titles]]
        for person in pictures[next(iter(MODELS))]["people"]
    ]
    return {
        "scores": Table(head=["model", "EEG", *MEASURES, "trials"], rows=scores),
        "combinations": Table(head=["model", "combination", *MEASURES, "trials"], rows=combinations),
        "people": Table(head=["person", *titles.values()], rows=people),
    }
