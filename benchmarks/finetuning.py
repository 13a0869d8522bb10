"""Measure fine-tuning, and plain PyTorch loops with diffusers on the same networks and shapes.

``python benchmarks/finetuning.py [--width 64] [--latent 16] [--batch 8] [--steps 6] [--device cpu] [--out FILE.json]``

Three parts are measured: the alignment of the encoder, the training of Stable Diffusion, and the generation of images.
In each part, Dreamscale and a plain loop take turns. Dreamscale trains with its own loop, `finetune.training.fit.fit`,
which reads the trials from a dataset on disk, scales them and draws the noise for each step. The plain loop is written
like the training script of diffusers, and takes EEG that is already scaled from a tensor in memory. Both train the same
weights with AdamW. All networks have random weights, and EEG and latents are random noise.

The "synchronisations" of a step are counted in a run of its own: how often a step asks for the value of a tensor, as
``float(loss)`` does. On a GPU, the program then waits until the GPU has finished all earlier work. In this run, the
plain loop uses the fused AdamW, because on a CPU, the default AdamW asks for the value of one counter for each weight.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from machine import describe_run, peak_memory, start_memory
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from data_sharding.common.files import write_json
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.samples import Sample
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.align import Aligner
from finetune.clip_head import ClipHead, ClipHeadConfig
from finetune.diffusion import Sampling
from finetune.eeg import ImageAugmentConfig, prepare_eeg
from finetune.images import ImageTable
from finetune.stable_diffusion.conditioner import Conditioner, ConditionerConfig
from finetune.stable_diffusion.model import EEGDiffusion
from finetune.stable_diffusion.portable.pipeline import sample_images
from finetune.training.accelerate import make_accelerator, make_loader, open_run, quiet_libraries
from finetune.training.config import TrainingConfig
from finetune.training.fit import fit
from finetune.training.step_random import StepRandom
from pretrain.encoder.encoder import EEGEncoder
from pretrain.model.config import EncoderConfig
from pretrain.runs.tracking import TrackerConfig

SPEC = PreprocessSpec(sfreq=256.0, highpass=0.5, lowpass=45.0, window=512, stride=512)
TRIALS = 64
LENGTH, PROJECTION = 77, 768
"""Number of condition tokens of Stable Diffusion, and width of CLIP's embeddings."""
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
Measured = dict[str, float]


def make_dataset(path: Path, channels: int = 64) -> EEGDataset:
    """Write a dataset of random trials, each with an image of its own, and open it."""
    rng, samples = np.random.default_rng(0), []
    for number in range(TRIALS):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(stream, "png")
        meta = {"n": channels, "ch_names": [f"E{i + 1}" for i in range(channels)], "positions": [None] * channels}
        meta |= {"reference": "average", "sfreq": SPEC.sfreq, "start": float(number), "recording": "r", "subject": "s"}
        meta |= {"session": "", "corpus": "c", "bads": [], "split": "train", "image_id": f"i{number}", "label": 0}
        eeg = rng.normal(0, 20, (channels, SPEC.window)).astype(np.float32)
        samples.append(Sample(key=f"t{number:03d}", eeg=eeg, meta=meta, image=stream.getvalue(), image_ext="png"))
    write_dataset(path, {"train": samples}, SPEC, labels=["image"])
    return EEGDataset(path)


def make_encoder(options: argparse.Namespace) -> EEGEncoder:
    config = EncoderConfig(samples=SPEC.window, dim=options.dim, depth=options.depth, heads=4)
    return EEGEncoder(config, SPEC)


def make_diffusion(options: argparse.Namespace) -> EEGDiffusion:
    """Make encoder, projector and a U-Net of the layout of Stable Diffusion 1.5 with random weights."""
    encoder = make_encoder(options)
    unet = diffusers.UNet2DConditionModel(
        sample_size=options.latent,
        block_out_channels=tuple(options.width * factor for factor in (1, 2, 4, 4)),
        cross_attention_dim=PROJECTION,
        norm_num_groups=min(32, options.width),
    )
    sizes = ConditionerConfig(tokens=encoder.n_tokens, dim=encoder.dim, length=LENGTH, width=PROJECTION)
    model = EEGDiffusion(encoder, Conditioner(sizes), unet, diffusers.DDPMScheduler(**SCHEDULE))
    model.choose_trainables("E+A")
    return model


class Count(TorchDispatchMode):
    """Count how often the value of a tensor is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.found += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Clock:
    """Record when each step begins, and how long the preparation of its batch takes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begun: list[float] = []
        self.prepared: list[float] = []

    def prepare(self, make: Callable[[], Any]) -> Any:
        """Prepare the batch of a step with the function `make`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.begun.append(time.perf_counter())
        made = make()
        self.prepared.append(time.perf_counter() - self.begun[-1])
        return made

    def result(self, batch: int) -> Measured:
        """Return medians over the steps, without the first step and the last one, whose end is not recorded."""
        steps = [after - before for before, after in zip(self.begun[1:], self.begun[2:], strict=False)]
        step = statistics.median(steps)
        return {"step_s": step, "images_per_s": batch / step, "host_ms": 1000 * statistics.median(self.prepared[1:])}


class TimedLoader:
    """Loader whose batches are prepared with a clock: a step begins when the loop asks for its batch."""

    def __init__(self, loader: Any, clock: Clock) -> None:
        self.loader, self.clock = loader, clock

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            yield self.clock.prepare(lambda: next(batches))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def with_memory(device: torch.device, run: Callable[[], Measured]) -> Measured:
    """Run a program, and add by how many GiB the memory grew at the peak: gradients, optimiser and activations."""
    before = start_memory(device)
    found = run()
    return {**found, "growth_gib": peak_memory(device) - before}


class Bench:
    """The networks and data of all programs."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.runs, self.counting = options, folder, 0, False
        self.accelerator = make_accelerator(num_processes=1, device=options.device, precision=options.precision)
        self.device = self.accelerator.device
        torch.manual_seed(0)
        self.data = make_dataset(folder / "data")
        self.table = ImageTable(self.data)
        self.diffusion = make_diffusion(options).to(self.device)
        encoder = make_encoder(options)
        sizes = ClipHeadConfig(tokens=encoder.n_tokens, dim=encoder.dim, projection=PROJECTION)
        self.aligner = Aligner(encoder, ClipHead(sizes), "both", 0.1).to(self.device)
        self.latents = torch.randn(TRIALS, 4, options.latent, options.latent)
        self.targets = F.normalize(torch.randn(TRIALS, PROJECTION), dim=-1)
        eeg = torch.as_tensor(np.stack([self.data[n].eeg for n in range(TRIALS)])).float()
        self.scaled = self.diffusion.encoder.scale_for_model(eeg.repeat(1, 128 // eeg.shape[1], 1))

    def train(self, module: Any, inputs: Any, steps: int, clock: Clock) -> None:
        """Train a module with Dreamscale's loop."""
        self.runs += 1
        settings = TrainingConfig(
            steps=steps, batch_size=self.options.batch, warmup=1, precision=self.options.precision
        )

        def timed(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
            before = time.perf_counter()
            made = inputs(batch, random)
            clock.prepared[-1] += time.perf_counter() - before
            return made

        run = open_run(RunConfig(output=str(self.folder / f"run{self.runs}")), self.accelerator)
        loader: Any = TimedLoader(make_loader(self.data, settings, 0, self.accelerator), clock)
        fit(module, config=settings, seed=0, accelerator=self.accelerator, run=run, loader=loader, inputs=timed)
        run.close()
        self.accelerator.free_memory()

    def _eeg(self, batch: Batch, random: StepRandom) -> Tensor:
        return prepare_eeg(batch, self.data, self.table, ImageAugmentConfig(), random, self.diffusion.encoder)

    def ours_align(self, steps: int, clock: Clock) -> None:
        """Align the encoder with Dreamscale."""

        def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
            row = torch.as_tensor(self.table.row_of[batch.numbers])
            return {"x": self._eeg(batch, random), "target": self.targets[row], "row": row}

        self.train(self.aligner, inputs, steps, clock)

    def ours_diffusion(self, steps: int, clock: Clock) -> None:
        """Train Stable Diffusion with Dreamscale."""

        def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
            b, row = len(batch.numbers), torch.as_tensor(self.table.row_of[batch.numbers])
            latent, shape = self.latents[row], self.latents.shape[1:]
            tensors = {"x": self._eeg(batch, random), "latent": latent + 0.1 * random.normal(b, *shape)}
            tensors |= {"noise": random.normal(b, *shape), "time": random.integers(1000, b)}
            return {**tensors, "keep": random.uniform(b) >= 0.1}

        self.train(self.diffusion, inputs, steps, clock)

    def plain(
        self, module: Any, extra: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor], steps: int, clock: Clock
    ) -> None:
        """Train with a loop like that of diffusers' script train_text_to_image.py."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=self.counting or None)
        loader = DataLoader(TensorDataset(self.scaled, extra), batch_size=self.options.batch, shuffle=True)
        module, optimizer, loader = self.accelerator.prepare(module.train(), optimizer, loader)

        def endless() -> Iterator[list[Tensor]]:
            while True:
                yield from loader

        batches = endless()
        for _ in range(steps):
            x, other = clock.prepare(lambda: next(batches))
            with self.accelerator.autocast():
                loss = loss_of(x, other)
            self.accelerator.gather(loss.repeat(len(x))).mean().item()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.detach().item()
        self.accelerator.free_memory()

    def plain_align(self, steps: int, clock: Clock) -> None:
        """Align the encoder with the plain loop."""

        def loss_of(x: Tensor, target: Tensor) -> Tensor:
            embeds = self.aligner.embed(x)
            logits, own = embeds @ target.T / 0.1, torch.arange(len(x), device=x.device)
            contrast = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
            return 1 - (embeds * target).sum(-1).mean() + contrast

        self.plain(self.aligner, self.targets, loss_of, steps, clock)

    def plain_diffusion(self, steps: int, clock: Clock) -> None:
        """Train Stable Diffusion with the plain loop."""
        model = self.diffusion

        def loss_of(x: Tensor, latent: Tensor) -> Tensor:
            noise, time_B = torch.randn_like(latent), torch.randint(1000, (len(x),), device=x.device)
            states, _ = model.conditioner(model.encoder(x))
            guess = model.unet(model.noising.add_noise(latent, noise, time_B), time_B, states).sample
            return F.mse_loss(guess.float(), noise.float())

        self.plain(model, self.latents, loss_of, steps, clock)

    def _make_vae(self) -> Any:
        kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        widths = tuple(max(8, self.options.width // 4) * factor for factor in (1, 2, 4, 4))
        vae = diffusers.AutoencoderKL(block_out_channels=widths, norm_num_groups=8, latent_channels=4, **kinds)  # pyright: ignore[reportArgumentType] - the library takes lists
        return vae.to(self.device).eval()

    def generation(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """Return functions that generate a batch of images: Dreamscale, and the stock pipeline of diffusers."""
        vae, unet, b, steps = self._make_vae(), self.diffusion.unet.eval(), self.options.batch, self.options.denoising
        schedule = diffusers.DPMSolverMultistepScheduler(**SCHEDULE)
        kind: Any = diffusers.StableDiffusionPipeline
        # The parts that read texts are left out.
        stock = kind(vae, None, None, unet, schedule, None, None, requires_safety_checker=False)
        stock.set_progress_bar_config(disable=True)
        states = torch.randn(b, LENGTH, PROJECTION, device=self.device)
        null = torch.zeros_like(states)
        chosen = Sampling(sampler="dpmsolver++", steps=steps, guidance_scale=2.0)

        def ours() -> object:
            config = self.diffusion.noising.config
            return sample_images(unet, vae, config, (states, None), (null, None), chosen, list(range(b))).cpu()

        def plain() -> object:
            embeds: Any = {"prompt_embeds": states, "negative_prompt_embeds": null}
            return stock(**embeds, num_inference_steps=steps, guidance_scale=2.0, output_type="np")

        return ours, plain


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Config of the runs of this benchmark."""

    output: str
    tracker: TrackerConfig = field(default_factory=lambda: TrackerConfig(kind="none"))


def count_in_steps(run: Callable[[int], None], steps: int) -> float:
    """Return the synchronisations of a step: the difference between a long run and a short one."""
    counts = []
    for number in (steps, 2 * steps):
        with Count() as count:
            run(number)
        counts.append(count.found)
    return (counts[1] - counts[0]) / steps


def measure_training(bench: Bench, part: str) -> dict[str, Measured]:
    options, programs = bench.options, {"Dreamscale": f"ours_{part}", "plain loop": f"plain_{part}"}
    found: dict[str, list[Measured]] = {name: [] for name in programs}
    for _ in range(options.rounds):
        for name, method in programs.items():

            def run(method: str = method) -> Measured:
                clock = Clock(bench.device)
                getattr(bench, method)(options.steps + 2, clock)
                return clock.result(options.batch)

            found[name].append(with_memory(bench.device, run))
    result = {name: summarise(runs) for name, runs in found.items()}
    bench.counting = True
    for name, method in programs.items():
        # A line of the log after every tenth step is part of Dreamscale's loop.
        count = count_in_steps(lambda n, m=method: getattr(bench, m)(n, Clock(bench.device)), 10)
        result[name]["synchronisations"] = count
    bench.counting = False
    return result


def measure_generation(bench: Bench) -> dict[str, Measured]:
    options, programs = bench.options, dict(zip(("Dreamscale", "plain loop"), bench.generation(), strict=True))
    found: dict[str, list[Measured]] = {name: [] for name in programs}
    for number in range(options.rounds + 1):
        for name, generate in programs.items():

            def run(generate: Callable[[], object] = generate) -> Measured:
                before = time.perf_counter()
                generate()
                if bench.device.type == "cuda":
                    torch.cuda.synchronize(bench.device)
                seconds = time.perf_counter() - before
                return {"step_s": seconds / options.denoising, "images_per_s": options.batch / seconds}

            measured = with_memory(bench.device, run)
            if number:
                found[name].append(measured)
    result = {name: summarise(runs) for name, runs in found.items()}
    for name, generate in programs.items():
        with Count() as count:
            generate()
        result[name]["synchronisations"] = count.found / options.denoising
    return result


def summarise(runs: list[Measured]) -> Measured:
    """Return the median of each value over the rounds, and the largest growth of the memory."""
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {**middle, "growth_gib": max(run["growth_gib"] for run in runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="feature maps at the first level of the U-Net (SD: 320)")
    parser.add_argument("--latent", type=int, default=16, help="width and height of the latents (SD 1.5: 64)")
    parser.add_argument("--dim", type=int, default=128, help="width of the encoder's tokens")
    parser.add_argument("--depth", type=int, default=4, help="number of the encoder's blocks")
    parser.add_argument("--batch", type=int, default=8, help="number of trials in a step")
    parser.add_argument("--steps", type=int, default=6, help="number of measured steps in a round")
    parser.add_argument("--rounds", type=int, default=3, help="how often the programs take turns")
    parser.add_argument("--denoising", type=int, default=5, help="denoising steps of an image")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet_libraries()
    about = describe_run()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        results: dict[str, Any] = {}
        for part, measure in (
            ("alignment", lambda: measure_training(bench, "align")),
            ("training", lambda: measure_training(bench, "diffusion")),
            ("generation", lambda: measure_generation(bench)),
        ):
            results[part] = measure()
            print(json.dumps({part: results[part]}), flush=True)
        sizes = {"U-Net": bench.diffusion.unet, "encoder": bench.diffusion.encoder}
        parameters = {name: sum(p.numel() for p in net.parameters()) for name, net in sizes.items()}
    if options.out is not None:
        device = bench.device
        gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
        versions = {name: version(name) for name in ("torch", "diffusers", "accelerate")}
        settings = {key: value for key, value in vars(options).items() if key not in ("out", "device")}
        about |= {"command": " ".join(["python", *sys.argv]), **gpu, "threads": torch.get_num_threads()}
        write_json(
            options.out,
            {**about, "versions": versions, "settings": settings, "parameters": parameters, "results": results},
        )


if __name__ == "__main__":
    main()
