"""Write docs/performance.md from the results of the benchmarks: ``python benchmarks/performance_page.py``.

The page names the command of each benchmark. The results are read from files in ``benchmarks/results``. To renew such a
file, give its path to the benchmark with the option ``--out``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
HEAD = """# Performance

This page compares the speed of Dreamscale with the speed of other programs. `python benchmarks/performance_page.py`
writes this page from the files `benchmarks/results/*.json`. The commands on this page wrote these files, with the
option `--out`. In every comparison, all programs ran on the same machine. No GPU has been measured yet.

If a section gives no date and no machine, its measurements were made on 2026-11-21, on a machine with two cores of an
Intel Xeon with AMX, 24 GB of memory, and no GPU. The versions of the packages were
{versions}.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(found: dict[str, Any]) -> str:
    """Return a text with the date, machine and load of a measurement; an empty text if the result has no date."""
    if "date" not in found:
        return ""
    return f"Measured on {found['date']}, on {found['machine']}.\nThe load average before the run was {found['load']}."


def sharding(found: dict[str, Any]) -> str:
    names = {"ours": "Dreamscale", "mne": "MNE's default path and `wds.TarWriter`"}
    rows = [
        [names[way], f"{r['cpu_s']:.1f}", f"{r['wall_s']:.1f}", f"{r['peak_mb']:,.0f}", f"{r['windows']:.0f}"]
        for way, r in found["ways"].items()
    ]
    return f"""## Sharding a recording

This measurement was made with the command
`python benchmarks/sharding.py --seconds 3600`. Each program used one thread. The input, and the
sampling rate of the windows, are: {found["data"]}. The windows last 2 s.

{table(["program", "CPU time (s)", "wall time (s)", "peak memory (MB)", "windows"], rows)}

MNE's path needs **{found["cpu_ratio"]:.1f} times as much CPU time** as Dreamscale (aim: at least 3 times).
Dreamscale's memory does not grow with the length of the recording (aim: below 1 GB). MNE's path loads the recording,
applies a band-pass filter (FIR), resamples the signal (FFT) and subtracts the average. Dreamscale also removes the
mains frequency, checks units, channels and every window, and hashes the file.
{origin(found)}
"""


def sharding_minute(found: list[dict[str, Any]]) -> str:
    rows = [
        [
            run["machine"],
            str(run["repeats"]),
            *(f"{run['ways'][way]['cpu_s']:.3f}" for way in ("ours", "mne")),
            f"**{run['paired_ratio']:.2f}**",
        ]
        for run in found
    ]
    machines = "\n".join(origin(run) for run in found)
    return f"""### A recording of one minute

This measurement was made with the command
`python benchmarks/sharding.py --seconds 60 --repeats {found[0]["repeats"]}`, on several machines. The two programs ran
alternately. In each pair of runs, Dreamscale's CPU time is divided by MNE's CPU time; the ratio in the table is the
median of all pairs (aim: at most 1).

{table(["machine", "pairs", "Dreamscale, CPU time (s)", "MNE's path, CPU time (s)", "ratio"], rows)}

Dreamscale's process does not return freed memory to the system, like the child processes of a sharding job
(`KEPT_MEMORY` in `data_sharding/job/isolation.py`); MNE's process has the default settings for memory.
{machines}
"""


def sharding_checks(found: dict[str, Any]) -> str:
    return f"""### The cost of the checks

This measurement was made with the command
`python benchmarks/sharding.py --seconds 900 --ways ours unchecked --repeats {found["repeats"]}`. Each recording was
sharded with the checks of every window (flat, clipped, too small, muscle, mains) and without the checks
(`quality.check: false`). The two programs ran alternately. With the checks, Dreamscale needs
**{found["checks_ratio"]:.2f} times** as much CPU time (median of the pairs; aim: at most 1.1) and
{found["ways"]["ours"]["peak_mb"]:.0f} MB of memory; without the checks, {found["ways"]["unchecked"]["peak_mb"]:.0f} MB.
{origin(found)}
"""


def workers(found: dict[str, Any]) -> str:
    job = found["job"]
    rows = [
        [
            name.split()[0],
            f"{r['wall_s']:.1f}",
            f"{r['recordings_per_s']:.2f}",
            f"{job['speed_up'][name.split()[0]]:.2f}",
        ]
        for name, r in job.items()
        if name.endswith("workers")
    ]
    return f"""## The sharding job on one and two workers

This measurement was made with the command
`python benchmarks/sharding.py --seconds 7200 --recordings 24 --ways ours --workers 1 2`. The job reads
{job["data"]}, on Ray with two CPU cores.
{origin(found)}

{table(["workers", "whole job (s)", "recordings/s after the workers have started", "speed-up"], rows)}

The aim is that two workers are 1.8 times as fast as one worker.
"""


def planning(found: dict[str, Any]) -> str:
    rows = [
        [
            f"{r['recordings']:,}",
            *(f"{s:.2f}" for s in r["seconds"].values()),
            f"{r['total_s']:.1f}",
            f"{r['peak_gb']:.2f}",
        ]
        for r in found["results"]
    ]
    names = [f"{name} (s)" for name in found["results"][0]["seconds"]]
    return f"""## Planning many recordings

This measurement was made with the command
`python benchmarks/planning.py --sizes 1000 10000 100000`. The benchmark creates EDF files, finds these
files, recognises (sniffs) their format by the headers, and plans the job. Then it searches for duplicates with
simulated signatures (numbers that are equal in copies of a signal), and assigns the recordings to shards. The column
"identities" gives the time to compute the checksums by which a resumed job recognises finished recordings.

{table(["recordings", *names, "total (s)", "peak memory (GB)"], rows)}

The aim for planning 100,000 recordings is at most 60 s and 2 GB. The planning time grows with the number of recordings
to the power {found["exponent"]:.2f}, so nearly in proportion.
"""


def loading(found: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{r['samples_per_s']:,.0f} ({r['lowest']:,.0f} to {r['highest']:,.0f})",
            f"{r['cpu_us_per_sample']:.0f}",
            f"{r['peak_bytes'] / 1e6:.0f}",
        ]
        for name, r in found["ways"].items()
    ]
    over = found["ours over others in samples_per_s"]
    index = found["index"]
    return f"""## Loading

This measurement was made with the command
`python benchmarks/loading.py --samples 1500 --repeats 3`. The data are
{found["data"]}. Every program makes float32 batches and pads them to 128 channels.
"ours" is the loader of Dreamscale. "memory map" reads the decoded data from a memory-mapped file.

{table(["program", "samples/s (lowest to highest)", "CPU time of a sample (µs)", "peak memory (MB)"], rows)}

Dreamscale's loader is compared with `wds.WebDataset` on the same shards. The loader is
**{over["webdataset, 0 workers"]:.1f} times** as fast as WebDataset without workers, and
**{over["webdataset, 2 workers"]:.1f} times** as fast with two workers (aim: 3). Without workers, the loader reaches
**{over["memory map"]:.2f}** of the speed of the memory map (aim: 0.5). Opening a dataset of
{index["samples"]:,} samples takes {index["open_s"]:.1f} s. The open dataset needs
{index["bytes_per_sample"]:.0f} bytes of memory for each sample.
"""


def pretraining(found: dict[str, Any]) -> str:
    rows, ratios, ours = [], [], {}
    for r in found["results"]:
        mine = r["code"] == "ours"
        case = f"ZeRO {r['zero_stage']}" + ", compiled" * r["compile"] if mine else "eager, autocast, AdamW"
        rows.append(
            [
                r["preset"] if mine else "released model code",
                case,
                r["precision"],
                str(r["batch_per_process"]),
                f"{r['step_s']:.2f}",
                f"{r['samples_per_s']:.2f}",
                f"{r['tflops_per_process']:.2f}",
                f"{r['mfu']:.0%}",
                f"{r['memory_gib']:.1f}",
            ]
        )
        key = (r["precision"], r["batch_per_process"])
        if mine and r["preset"] == "released" and r["zero_stage"] == 1 and not r["compile"]:
            ours[key] = r
        elif not mine and key in ours:
            ratios.append(f"{r['step_s'] / ours[key]['step_s']:.2f} in {key[0]} at batch {key[1]}")
    # Collect the time of each kind of operation at the smallest batch size, for Dreamscale and for the code that the
    # authors of DreamDiffusion released.
    batch = min(number for precision, number in ours if precision == "bf16")
    profiles = {
        r["code"]: r["profile_s"]
        for r in found["results"]
        if r["profile_s"] and (r["precision"], r["batch_per_process"]) == ("bf16", batch) and r["preset"] == "released"
        if r["code"] == "released" or r is ours["bf16", batch]
    }
    kinds = [
        [kind, *(f"{1000 * profiles[code][kind]:.0f}" for code in ("ours", "released"))] for kind in profiles["ours"]
    ]
    best = found["machine"]["matmul_tflops"]
    peak = ", ".join(f"{value['plain']:.1f} in {name}" for name, value in best.items())
    products, released = profiles["ours"]["matrix products"], sum(profiles["released"].values())
    return f"""## A pretraining step

This measurement was made with the command
`python benchmarks/pretraining.py --presets ... --precisions ... --stages ... --compile 0,1 --batch N
--steps 4 --profile --reference PATH`, and it ran on the CPU. PATH is a checkout of the code that the authors of
DreamDiffusion released. The released code was timed in a separate process, with `--presets ''`, because it is slower
if other models ran before in the same process. In the table, `released` is Dreamscale's model with the
sizes of the released code; "released model code" is the released code itself. The utilisation of 100% is the speed of
the fastest matrix product in the same run, in TFLOP/s: {peak}.

{table(["model", "mode", "precision", "batch", "step (s)", "windows/s", "TFLOP/s", "utilisation", "GiB"], rows)}

In windows/s, the speed of Dreamscale divided by the speed of the released code is
{", ".join(ratios)}. The aim of twice as many windows/s as the
released code is not reached.

The next table shows the milliseconds that each kind of operation takes in one step under PyTorch's profiler, at batch
{batch} in bf16:

{table(["", "Dreamscale", "released code"], kinds)}

To process twice as many windows/s, a step of Dreamscale would have to take 50% of the time of a step of the released
code. The matrix products of Dreamscale alone take {products / released:.0%} of the time of a step of the released code.
A third of the matrix products compute gradients of the weights; in these products, the first matrix is transposed. The
machine of this
measurement computes products with a transposed first matrix at {best["bf16"]["first factor transposed"]:.1f} TFLOP/s,
and other matrix products at {best["bf16"]["plain"]:.1f} TFLOP/s.
"""


def ddpm(found: dict[str, Any]) -> str:
    rows = []
    for name, r in found["results"].items():
        for part in ("training", "sampling"):
            one = r[part]
            rows.append(
                [
                    name,
                    f"{r['parameters'] / 1e6:.1f}M",
                    part,
                    f"{one['steps_per_s']:.3f}",
                    f"{one['images_per_s']:.3f}",
                    f"{one['cpu_s_per_step']:.2f}",
                    f"{one['memory_gib']:.2f}",
                ]
            )
    ours, plain = (found["results"][name] for name in ("EG-DDPM, UNet2DModel", "plain loop, UNet2DModel"))
    ratios = [plain[part]["cpu_s_per_step"] / ours[part]["cpu_s_per_step"] for part in ("training", "sampling")]
    settings, command = found["settings"], found["command"].split(" --out")[0]
    size = settings["size"]
    return f"""## EG-DDPM: training and sampling

This measurement was made with the command
`{command}`, and it ran on
one thread of the CPU (OMP_NUM_THREADS=1), in float32, with diffusers {found["versions"]["diffusers"]}. The images have
{size} x {size} pixels, and a step has {settings["batch"]} images. These sizes are small: the preset of the paper has
64 x 64 pixels and 57.7M parameters. The three programs ran alternately, one step at a time. "plain loop" is the
training loop from the tutorial of the library diffusers, with a `UNet2DModel` of the same size. A training step of
EG-DDPM also updates the moving average of the weights. A step of sampling is one evaluation of the network; with the
paper's
preset, an image needs 1000 such steps. The memory in the table is the state (weights, and in training the moments of
AdamW and
the averaged weights) plus the largest growth within a step.

{table(["program", "parameters", "part", "steps/s", "images/s", "CPU time of a step (s)", "GiB"], rows)}

The machine was busy with other programs during this run (load average {found["machine"]["load"]:.0f} on
{found["machine"]["cores"]} cores), so steps/s and images/s are lower than on an idle machine. The CPU time
of a step depends less on the load. With the same `UNet2DModel`, EG-DDPM needs {1 / ratios[0]:.2f} times the CPU time
of the plain loop in training, and {1 / ratios[1]:.2f} times in sampling.
"""


def finetuning(found: dict[str, Any]) -> str:
    rows, names = [], {"alignment": "alignment", "training": "training of Stable Diffusion", "generation": "generation"}
    for part, title in names.items():
        for program, one in found["results"][part].items():
            rows.append(
                [
                    title,
                    program,
                    f"{one['images_per_s']:.2f}",
                    f"{1000 * one['step_s']:,.0f}",
                    f"{one['host_ms']:.1f}" if "host_ms" in one else "-",
                    f"{one['growth_gib']:.2f}",
                    f"{one['synchronisations']:.1f}",
                ]
            )
    head = ["part", "program", "trials/s", "step (ms)", "batch prepared (ms)", "GiB", "synchronisations"]
    settings, millions = found["settings"], {name: n / 1e6 for name, n in found["parameters"].items()}
    speeds = {part: {program: one["images_per_s"] for program, one in found["results"][part].items()} for part in names}
    ratios = {part: speed["Dreamscale"] / speed["plain loop"] for part, speed in speeds.items()}
    where = f"on a GPU ({found['gpu']})" if "gpu" in found else "on the CPU; no GPU was measured"
    side, encoder = settings["latent"], f"an encoder with {millions['encoder']:.1f}M parameters"
    return f"""## Alignment, and training and generation with Stable Diffusion

This measurement was made with the command
`{found["command"].split(" --out")[0]}`, in {settings["precision"]}, {where}.
The networks have random weights and are small: a U-Net of the layout of Stable Diffusion 1.5 with
{millions["U-Net"]:.1f}M parameters, latents of {side} x {side}, {encoder}, and
{settings["batch"]} trials in a step. "plain loop" is a loop like the training script of diffusers on the same networks,
with EEG that is already scaled and in memory, and, for the generation, the stock pipeline of diffusers. The programs
took turns. A step of the generation is one denoising step with guidance. "GiB" is the growth of the memory in a run:
gradients, optimiser and activations. A "synchronisation" is a place where a step asks for the value of a tensor, so
that a program on a GPU waits for the GPU.

{table(head, rows)}

In trials/s, the speed of Dreamscale divided by that of the plain loop is {ratios["alignment"]:.2f} in alignment,
{ratios["training"]:.2f} in the training of Stable Diffusion, and {ratios["generation"]:.2f} in generation.
{origin(found)}
"""


def trials(found: dict[str, Any]) -> str:
    names = {
        "one JSON a trial": "a loop that parses the JSON of every trial",
        "first process": "Dreamscale, first process: makes the table of trials",
        "next process": "Dreamscale, next process: finds the table",
    }
    rows = [[title, f"{found[name]['cpu_s']:.1f}", f"{found[name]['peak_mb']:,.0f}"] for name, title in names.items()]
    rows += [
        [
            f"Dreamscale, one of two processes that start without a table ({i})",
            f"{r['cpu_s']:.1f}",
            f"{r['peak_mb']:,.0f}",
        ]
        for i, r in enumerate(found["two processes, no table"], 1)
    ]
    parts = [
        [how, f"{found[f'features {how}']['cpu_s']:.1f}", f"{found[f'features {how}']['peak_mb']:,.0f}"]
        for how in ("at once", "part by part")
    ]
    return f"""## Opening many trials

This measurement was made with the command
`python benchmarks/trials.py`. The dataset has {found["trials"]:,} trials, as many as THINGS-EEG2.
The windows are shorter than in THINGS-EEG2, so that the dataset fits on a small disk, but the metadata (JSON) of each
trial is as long. Each program opens the train split and groups the trials by image. The memory in the table is the
growth after the imports; it includes the pages of memory-mapped files, which all processes share. The file with the
table of trials has {found["table_mb"]:,.0f} MB.

{table(["program", "CPU time (s)", "peak memory (MB)"], rows)}

The next table is for {found["windows"]:,} trials of 128 x 440 values, the size of EEG-ImageNet. A feature (the mean
over time) is computed for each trial: with the EEG of all trials in memory at once, or part by part as in training.

{table(["trials in memory", "CPU time (s)", "peak memory (MB)"], parts)}

{origin(found)}
"""


def scaling(found: dict[str, Any]) -> str:
    ring, steps = found["all_reduce"], found["steps"]
    rows = [
        [
            str(row["processes"]),
            f"{row['measured_s']:.3f}",
            f"{row['predicted_s']:.3f}",
            f"{100 * row['error']:+.0f} %",
        ]
        for row in steps["rows"]
    ]
    counts = " and ".join(map(str, found["processes"]))
    scale = [
        [
            f"{row['gpus']:,}",
            f"{row['exchange_s'] * 1e3:.1f}",
            f"{row['step_s'] * 1e3:.1f}",
            f"{row['windows_per_s']:,.0f}",
            f"{row['efficiency']:.0%}",
            f"{row['loaders']}",
            f"{row['read_gb_s']:.1f}",
            ", ".join(row["limits"]) or "computation",
        ]
        for row in found["plan"]["scale"]
    ]
    heads = ["GPUs", "communication (ms)", "step (ms)", "windows/s", "efficiency", "loaders a machine", "read (GB/s)"]
    return f"""## How pretraining scales

`dreamscale plan --scale` estimates the speed on many GPUs. No GPU has been measured, so only the formulas were compared
with measurements, on the processes of one machine with gloo (`python benchmarks/scaling.py`). The
times of all-reduces ({len(ring["points"])} times: {counts} processes, 16 kB to 64 MB) were fitted by a ring with
{ring["gb_s"]:.2f} GB/s and {ring["latency_us"]:.0f} µs. The median error of the fitted times is
{100 * ring["error"]:.0f} %. If the formula is fitted without one size, and predicts this size, the median error is
{100 * ring["left_out_size"]:.0f} %; if it is fitted without one number of processes,
{100 * ring["left_out_processes"]:.0f} %.
The next table predicts the step of several processes (preset `{steps["preset"]}`, {steps["batch"]} windows for each
process) from the step of one process. With more processes than cores, the prediction divides the cores.

{table(["processes", "measured step (s)", "predicted step (s)", "error"], rows)}

{origin(found)}

The same formulas give these numbers for the preset `{found["plan"]["request"]["name"].split()[-1]}` on H200 GPUs, with
the assumptions that `dreamscale plan` prints (among others, {found["plan"]["request"]["micro"]} windows for each GPU, a
utilisation of 40 %, and enough storage):

{table([*heads, "limited by"], scale)}

Where this does not scale:

- **Reading.** Small models read fast: the column "read" is the rate at which all machines together read windows of 128
  stored channels. A file server with 10 GB/s is enough for about
  {10 / found["plan"]["scale"][0]["read_gb_s"]:.0f} GPUs of this preset. For more GPUs, copy the dataset to each
  machine's own disk; datasets in an object store are cached there (`DREAMSCALE_CACHE`).
- **Latency.** The time of communication grows with the number of GPUs, because a ring has as many parts as GPUs. With
  {found["plan"]["scale"][-1]["gpus"]} GPUs and small batches, communication takes longer than the backward pass; larger
  batches for each GPU, or fewer GPUs, are the way out.
- **The batch.** {found["plan"]["scale"][-1]["gpus"]} GPUs compute {found["plan"]["scale"][-1]["batch_size"]:,}
  windows in one step. Such a batch may need another learning rate, and a small corpus has few such batches.
"""


SECTIONS = {
    "sharding": sharding,
    "sharding_minute": sharding_minute,
    "sharding_checks": sharding_checks,
    "workers": workers,
    "planning": planning,
    "loading": loading,
    "pretraining": pretraining,
    "scaling": scaling,
    "trials": trials,
    "ddpm": ddpm,
    "finetuning": finetuning,
}


def main() -> None:
    found: dict[str, Any] = {n: json.loads((RESULTS / f"{n}.json").read_text()) for n in SECTIONS if _has(n)}
    minutes = sorted(RESULTS.glob("sharding_minute_*.json"))
    found["sharding_minute"] = [json.loads(path.read_text()) for path in minutes]
    versions: dict[str, str] = {}
    for name in ("sharding", "loading"):
        versions |= found[name]["versions"]
    head = HEAD.format(versions=", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    PAGE.write_text("\n".join([head, *(section(found[name]) for name, section in SECTIONS.items() if name in found)]))


def _has(name: str) -> bool:
    return (RESULTS / f"{name}.json").is_file()


if __name__ == "__main__":
    main()
