"""Engines: how several processes train the weights of one module together.

`Engine` is the default: every process holds all weights. `_DeepSpeedEngine` (ZeRO 1 to 3) and `_FSDPEngine` divide the
state of the optimiser, the gradients or also the weights among the processes, so that each process needs less memory.
The config file of ``accelerate launch`` chooses the engine, and `make_engine` makes it.

Accelerate starts the processes and reads its config file. DeepSpeed's engine and FSDP's modules are made here and not
by ``Accelerator.prepare``, for three reasons: they then also work on CPUs, the models that are not trained stay whole
on every process, and the checkpoints are the same for all engines.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn

from data_sharding.common.config import merge_configs
from data_sharding.common.errors import RequestError
from finetune.training.config import TrainingConfig
from finetune.training.parameters import EMA, load_trainables, make_optimizer, trainables
from pretrain.runs.distributed import import_deepspeed
from pretrain.training.deepspeed_engine import (
    MOMENTS,
    adam_steps,
    common_settings,
    fill_optimizer_state,
    gather_tensor,
    own_part,
    set_adam_steps,
    set_moment,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

DEEPSPEED, FSDP = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"
"""Environment variables that ``accelerate launch`` sets to ``true`` if its config file chooses DeepSpeed or FSDP."""


def _is_chosen(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


@contextmanager
def hide_engine() -> Iterator[None]:
    """Hide the choice of DeepSpeed or FSDP from Accelerate inside the ``with`` block.

    With DeepSpeed, Accelerate would make the library transformers divide every model that it loads among the processes
    (``zero.Init``), also the frozen models.
    """
    hidden = {name: os.environ.pop(name) for name in (DEEPSPEED, FSDP) if name in os.environ}
    try:
        yield
    finally:
        os.environ |= hidden


def check_engine(device: torch.device) -> None:
    """Check the settings of DeepSpeed or FSDP in Accelerate's config file, before any long work.

    Parameters
    ----------
    device : torch.device
        Device of the training.

    Raises
    ------
    RequestError
        If a setting is not supported, or belongs into the config of the training.
    """
    if _is_chosen(DEEPSPEED):
        import_deepspeed(device)
        _read_deepspeed_settings()
    elif _is_chosen(FSDP):
        _read_fsdp_settings()


def _read_deepspeed_settings() -> dict[str, Any]:
    """Return DeepSpeed's config from Accelerate's config file, without the settings that `_DeepSpeedEngine` chooses."""
    from accelerate import DeepSpeedPlugin

    try:
        settings = _drop_auto(DeepSpeedPlugin().deepspeed_config)
    except ValueError as error:
        raise RequestError(f"Accelerate's config file: {str(error).splitlines()[0]}") from None
    stage = settings["zero_optimization"].get("stage")
    if stage not in (1, 2, 3):
        raise RequestError(
            f"Accelerate's config file: zero_stage is {stage}; use 1, 2 or 3, or configs/accelerate/multi_gpu.yaml"
        )
    for name in ("offload_optimizer", "offload_param"):
        part = settings["zero_optimization"].get(name) or {}
        if part.get("device") not in (None, "none", "cpu"):
            raise RequestError(
                f"Accelerate's config file: {name}_device is {part['device']}, which is not supported; use none or cpu"
            )
        if part.get("device") != "cpu":
            settings["zero_optimization"].pop(name, None)
    replaced = {
        "gradient_clipping": "training.grad_clip",
        "train_batch_size": "training.batch_size",
        "train_micro_batch_size_per_gpu": "training.micro_batch_size",
        "optimizer": "training.lr, training.weight_decay and training.betas",
        "scheduler": "training.lr, training.min_lr and training.warmup",
        "fp16": "training.precision",
        "bf16": "training.precision",
        "torch_autocast": "training.precision",
    }
    if settings.pop("gradient_accumulation_steps", 1) != 1:
        replaced["gradient_accumulation_steps"] = "training.micro_batch_size"
        settings["gradient_accumulation_steps"] = True
    for name, key in replaced.items():
        value = settings.pop(name, None)
        if value and not (isinstance(value, dict) and value.get("enabled") is False):
            raise RequestError(
                f"Accelerate's config file: remove the setting {name} of DeepSpeed; set {key} in the training's config"
            )
    settings.pop("steps_per_print", None)
    return settings


def _drop_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's settings without those whose value is ``auto``."""
    parts = {k: _drop_auto(v) if isinstance(v, Mapping) else v for k, v in settings.items()}
    return {key: value for key, value in parts.items() if value != "auto"}


def _read_fsdp_settings() -> Any:
    """Return Accelerate's object with the settings of FSDP."""
    from accelerate import FullyShardedDataParallelPlugin

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RequestError("Accelerate's config file: only FSDP 2 is supported; set fsdp_version: 2")
    if _is_chosen("FSDP_OFFLOAD_PARAMS"):
        raise RequestError(
            "Accelerate's config file: fsdp_offload_params is not supported; set it to false, or use "
            "configs/accelerate/zero3.yaml with offload_param_device: cpu"
        )
    if _is_chosen("FSDP_ACTIVATION_CHECKPOINTING"):
        raise RequestError(
            "Accelerate's config file: fsdp_activation_checkpointing is not supported; set it to false, and use a "
            "smaller training.micro_batch_size"
        )
    # The module is whole on every process before FSDP divides it, so nothing must be loaded in another way.
    return FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)


class Engine:
    """Train a module whose weights every process holds: a run of one process, or PyTorch's DDP.

    In this class, the part of a weight that a process holds is the whole weight. Subclasses divide the weights.

    Parameters
    ----------
    module : Module
        The module to train, with the weights from which the training starts.
    config : TrainingConfig
        Settings of the training.
    accelerator : Accelerator
        The accelerator that `make_accelerator` returned.
    lr_scale : callable, optional
        Function that takes the name of a parameter and returns the factor of this parameter's learning rate.

    Attributes
    ----------
    module : Module
        The module. Between the evaluations, only this class changes its weights; see `evaluation`.
    shapes : dict
        Shape of each trainable weight, by name.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainingConfig,
        accelerator: Accelerator,
        lr_scale: Callable[[str], float] | None = None,
    ) -> None:
        self.module, self.config, self.accelerator = module, config, accelerator
        self.shapes = {name: parameter.shape for name, parameter in trainables(module).items()}
        self.micro_batches = config.micro_batches(accelerator.num_processes)
        self.start(lr_scale)

    def start(self, lr_scale: Callable[[str], float] | None) -> None:
        """Make the optimiser, and prepare the module for the training by several processes."""
        self.trained = self.module.to(self.accelerator.device)
        self.optimizer: Any = make_optimizer(self.trained, self.config, lr_scale)
        self.wrapped, self._guarded = self.accelerator.prepare(self.trained, self.optimizer)

    def weights(self) -> dict[str, Tensor]:
        """Return this process's part of each trainable weight, in fp32."""
        return {name: parameter.detach() for name, parameter in trainables(self.trained).items()}

    def gather(self, name: str, part: Tensor) -> Tensor:
        """Return a whole weight, or its average, from the parts of all processes; every process must call this."""
        del name
        return part

    def take_part(self, name: str, whole: Tensor) -> Tensor:
        """Return the part of a whole weight, or of its average, that this process holds."""
        del name
        return whole

    def has_moments(self, name: str) -> bool:
        """Return whether the optimiser has moments of a weight: AdamW has none if there never was a gradient."""
        return MOMENTS[0] in self.optimizer.state.get(trainables(self.trained)[name], {})

    def gather_moment(self, name: str, key: str) -> Tensor:
        """Return AdamW's moment `key` of a weight as a whole tensor; every process must call this."""
        return self.optimizer.state[trainables(self.trained)[name]][key]

    def set_moments(self, moments: dict[str, dict[str, Tensor]], steps: int) -> None:
        """Set AdamW's moments, given as whole tensors by key and name, and its number of steps."""
        for name, parameter in trainables(self.trained).items():
            if name in moments[MOMENTS[0]]:
                self.optimizer.state[parameter] = {
                    # A fused AdamW stores its step count on the device of the weights.
                    "step": torch.tensor(float(steps), device=parameter.device),
                    # AdamW creates its moments in the memory format of the weights, so copy the loaded moments into
                    # this format.
                    **{key: self._fill_moment(parameter, found[name]) for key, found in moments.items()},
                }

    def _fill_moment(self, parameter: Any, whole: Tensor) -> Tensor:
        return torch.zeros_like(parameter).copy_(whole)

    def adam_steps(self) -> int:
        """Return how many steps AdamW took, without skipped steps."""
        steps = {int(state["step"]) for state in self.optimizer.state.values()}
        assert len(steps) <= 1
        return max(steps, default=0)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]

    def compute(self, inputs: dict[str, Tensor], *, last: bool) -> dict[str, Tensor]:
        """Do the forward pass and the backward pass of one micro batch, and return the module's outputs.

        Parameters
        ----------
        inputs : dict
            The module's arguments.
        last : bool
            True for the last micro batch of a step. Processes exchange gradients only then; for the other micro
            batches, each process only sums its own gradients.
        """
        with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            out = self.wrapped(**inputs)
            self.accelerator.backward(out["loss"] / self.micro_batches)
        return out

    def step(self, *, broken: bool = False) -> tuple[float, bool]:
        """Clip the gradient and update the weights.

        Parameters
        ----------
        broken : bool
            True, on all processes: the step must be skipped, because a loss is not finite.

        Returns
        -------
        float
            Norm of the gradient.
        bool
            False if the step was skipped, because it is broken or because the gradient is not finite. All processes
            skip the same steps, because they have the same gradient.
        """
        parameters = [p for p in trainables(self.trained).values() if p.grad is not None]
        norm: Any = nn.utils.clip_grad_norm_(parameters, self.config.grad_clip or math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        applied = math.isfinite(norm) and not broken
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, applied

    @contextmanager
    def evaluation(self, ema: EMA | None) -> Iterator[nn.Module]:
        """Give the module whole weights, or their moving average, inside the ``with`` block.

        Every process must enter the block.

        Yields
        ------
        Module
            The module, in evaluation mode and on the device of the training.
        """
        kept = {name: weight.clone() for name, weight in self.weights().items()} if ema else None
        if ema:
            load_trainables(self.module, ema.shadow)
        self.module.eval()
        try:
            yield self.module
        finally:
            self.module.train()
            if kept:
                load_trainables(self.module, kept)

    def finish(self, best: dict[str, Tensor] | None, ema: EMA | None) -> None:
        """Load the best weights, or else the moving average, or else the newest weights, and end the training."""
        found = best or (ema and ema.shadow)
        if found:
            load_trainables(self.module, found)
        self.module.eval()


class _CopyEngine(Engine):
    """An engine that trains a copy of the module, because it changes the copy's parameters or adds hooks to them.

    The module itself stays as it is, on the CPU, and receives whole weights for each evaluation and at the end.
    """

    def start(self, lr_scale: Callable[[str], float] | None) -> None:
        ddp = "works only with DDP; set it to false, or use configs/accelerate/multi_gpu.yaml"
        # A copy of a compiled module is not compiled.
        if any(getattr(part, "_compiled_call_impl", None) is not None for part in self.module.modules()):
            raise RequestError(f"compute.compile {ddp}")
        if any(parameter.dtype != torch.float32 for parameter in self.module.parameters()):
            raise RequestError(f"compute.frozen_bf16 {ddp}")
        self.module.cpu()
        self.trained = copy.deepcopy(self.module).to(self.accelerator.device).train()
        if self.config.precision == "bf16":
            _autocast_forward(self.trained, self.accelerator.device.type)
        self.divide(lr_scale)

    def divide(self, lr_scale: Callable[[str], float] | None) -> None:
        """Divide the copy among the processes, and make its optimiser."""
        raise NotImplementedError

    def load_whole(self, parts: Mapping[str, Tensor]) -> None:
        """Load whole weights, from the parts of all processes, into the module, and also the buffers of the copy."""
        with torch.no_grad():
            for name, parameter in trainables(self.module).items():
                parameter.copy_(self.gather(name, parts[name]))
            for name, buffer in self.trained.named_buffers():
                self.module.get_buffer(name).copy_(buffer)

    @contextmanager
    def evaluation(self, ema: EMA | None) -> Iterator[nn.Module]:
        self.load_whole(ema.shadow if ema else self.weights())
        self.module.to(self.accelerator.device).eval()
        try:
            yield self.module
        finally:
            self.module.cpu()

    def finish(self, best: dict[str, Tensor] | None, ema: EMA | None) -> None:
        self.load_whole(ema.shadow if ema else self.weights())
        if best:
            load_trainables(self.module, best)
        self.module.to(self.accelerator.device).eval()
        del self.trained, self.wrapped, self.optimizer


def _autocast_forward(module: nn.Module, device_type: str) -> None:
    """Let the forward pass of a module compute in bf16, with fp32 weights, as Accelerate does under DDP."""
    forward = module.forward

    def compute(**inputs: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device_type, torch.bfloat16):
            out = forward(**inputs)
        return {name: value.float() for name, value in out.items()}

    module.forward = compute


class _DeepSpeedEngine(_CopyEngine):
    """Train with DeepSpeed's ZeRO.

    Each process holds a part of the optimiser's state (stage 1), also of the gradients (stage 2), and also of the
    weights (stage 3).
    """

    def divide(self, lr_scale: Callable[[str], float] | None) -> None:
        import deepspeed

        optimizer = make_optimizer(self.trained, self.config, lr_scale)
        settings = self._settings(sum(shape.numel() for shape in self.shapes.values()))
        self.wrapped, *_ = deepspeed.initialize(model=self.trained, optimizer=optimizer, config=settings)
        self.optimizer = self.wrapped.optimizer
        self.stage: int = self.wrapped.zero_optimization_stage()
        fill_optimizer_state(self.wrapped)

    def _settings(self, parameters: int) -> dict[str, Any]:
        """Return DeepSpeed's config: the settings of Accelerate's config file override the chosen settings."""
        config = self.config
        chosen = common_settings(
            batch_size=config.batch_size,
            micro=config.batch_size // self.accelerator.num_processes // self.micro_batches,
            micro_batches=self.micro_batches,
            grad_clip=config.grad_clip,
            parameters=parameters,
            device=self.accelerator.device,
        )
        chosen["zero_allow_untested_optimizer"] = True
        return merge_configs(chosen, _read_deepspeed_settings())

    def weights(self) -> dict[str, Tensor]:
        found = trainables(self.trained)
        return {name: p.ds_tensor.detach() if self.stage == 3 else p.detach() for name, p in found.items()}

    def gather(self, name: str, part: Tensor) -> Tensor:
        if self.stage < 3:
            return part
        part = part.to(self.accelerator.device)
        parts = [torch.empty_like(part) for _ in range(self.accelerator.num_processes)]
        torch.distributed.all_gather(parts, part)
        # The last part is filled up with zeros, so that all parts have the same size.
        return torch.cat(parts)[: self.shapes[name].numel()].view(self.shapes[name])

    def take_part(self, name: str, whole: Tensor) -> Tensor:
        return own_part(trainables(self.trained)[name], whole) if self.stage == 3 else whole

    def has_moments(self, name: str) -> bool:
        return True

    def gather_moment(self, name: str, key: str) -> Tensor:
        return gather_tensor(self.wrapped, trainables(self.trained)[name], key).view(self.shapes[name])

    def set_moments(self, moments: dict[str, dict[str, Tensor]], steps: int) -> None:
        for name, parameter in trainables(self.trained).items():
            for key, found in moments.items():
                if name in found:
                    set_moment(self.wrapped, parameter, key, found[name])
        set_adam_steps(self.wrapped, steps)

    def adam_steps(self) -> int:
        return adam_steps(self.wrapped)

    def compute(self, inputs: dict[str, Tensor], *, last: bool) -> dict[str, Tensor]:
        out = self.wrapped(**inputs)
        loss = out["loss"]
        # DeepSpeed skips a step whose gradient is not finite, so give a loss that is not finite such a gradient.
        self.wrapped.backward(loss if math.isfinite(float(loss.detach())) else loss * math.nan)
        if not last:
            # DeepSpeed counts micro batches by calls of `step`, which updates the weights only after the last one.
            self.wrapped.step()
        return out

    def step(self, *, broken: bool = False) -> tuple[float, bool]:
        self.wrapped.step()
        applied = bool(self.wrapped.was_step_applied())
        assert not (broken and applied)
        norm = self.wrapped.get_global_grad_norm()
        return (float(norm) if applied and norm is not None else math.nan), applied

    def finish(self, best: dict[str, Tensor] | None, ema: EMA | None) -> None:
        engine = self.wrapped
        super().finish(best, ema)
        engine.destroy()


class _FSDPEngine(_CopyEngine):
    """Train with PyTorch's FSDP 2: each process holds a part of each weight, its gradient and its moments."""

    def divide(self, lr_scale: Callable[[str], float] | None) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        settings, device = _read_fsdp_settings(), self.accelerator.device
        mesh = init_device_mesh(device.type, (self.accelerator.num_processes,))
        # In bf16, weights are sent as bf16, and gradients are summed over the processes in fp32.
        half = torch.bfloat16 if self.config.precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        options = {"mesh": mesh, "mp_policy": policy}
        units = _find_units(self.trained, settings)
        for unit in units:
            fully_shard(unit, **options, reshard_after_forward=bool(settings.reshard_after_forward))
        self.wrapped: Any = fully_shard(self.trained, **options)
        if device.type == "cpu":
            # The communication backend gloo cannot average, so let FSDP sum the gradients and divide the sum.
            for unit in (*units, self.wrapped):
                unit.set_force_sum_reduction_for_comms(True)
        self.optimizer = make_optimizer(self.trained, self.config, lr_scale)

    def _to_dtensor(self, name: str, part: Tensor) -> Any:
        from torch.distributed.tensor import DTensor

        like: Any = trainables(self.trained)[name]
        return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())

    def weights(self) -> dict[str, Tensor]:
        found: dict[str, Any] = trainables(self.trained)
        return {name: parameter.to_local().detach() for name, parameter in found.items()}

    def gather(self, name: str, part: Tensor) -> Tensor:
        return self._to_dtensor(name, part).full_tensor()

    def take_part(self, name: str, whole: Tensor) -> Tensor:
        return self._divide(trainables(self.trained)[name], whole).to_local()

    @staticmethod
    def _divide(like: Any, whole: Tensor) -> Any:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    def _fill_moment(self, parameter: Any, whole: Tensor) -> Tensor:
        return self._divide(parameter, whole)

    def gather_moment(self, name: str, key: str) -> Tensor:
        return self.optimizer.state[trainables(self.trained)[name]][key].full_tensor()

    def compute(self, inputs: dict[str, Tensor], *, last: bool) -> dict[str, Tensor]:
        self.wrapped.set_requires_gradient_sync(last)
        out = self.wrapped(**inputs)
        (out["loss"] / self.micro_batches).backward()
        return out


def _find_units(module: nn.Module, settings: Any) -> list[Any]:
    """Find the parts of a module whose weights FSDP gathers at a time; inner parts come before outer parts.

    Parameters
    ----------
    module : Module
        The module to divide.
    settings : FullyShardedDataParallelPlugin
        Accelerate's settings. ``fsdp_auto_wrap_policy`` decides which layers of a list of layers (`ModuleList`) are
        units: SIZE_BASED_WRAP: layers with inner layers and more parameters than ``fsdp_min_num_params``;
        TRANSFORMER_BASED_WRAP: layers of the classes ``fsdp_transformer_layer_cls_to_wrap``; NO_WRAP: none.

    Returns
    -------
    list of Module
        The units. The weights outside all units are gathered together.

    Raises
    ------
    RequestError
        If the module has no layer of the named classes.
    """
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    classes = set(settings.transformer_cls_names_to_wrap or [])
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    # A single linear layer is no unit, because FSDP forbids in-place operations on its output.
    blocks = {layer for part in lists for layer in part if any(True for _ in layer.children())}
    layers = {layer for layer in blocks if not isinstance(layer, nn.ModuleList | nn.ModuleDict)}
    if policy == "TRANSFORMER_BASED_WRAP":
        chosen = {layer for layer in module.modules() if type(layer).__name__ in classes}
        if not chosen:
            raise RequestError(
                f"Accelerate's config file: the model has no layer of the classes {', '.join(sorted(classes)) or '-'} "
                "(fsdp_transformer_layer_cls_to_wrap); use fsdp_auto_wrap_policy: SIZE_BASED_WRAP"
            )
    elif policy == "SIZE_BASED_WRAP":
        least = settings.min_num_params
        chosen = {layer for layer in layers if sum(p.numel() for p in layer.parameters()) > least}
    else:
        chosen = set()
    return [part for part in reversed(list(module.modules())) if part in chosen and part is not module]


def make_engine(
    module: nn.Module,
    config: TrainingConfig,
    accelerator: Accelerator,
    lr_scale: Callable[[str], float] | None = None,
    *,
    divide: bool = True,
) -> Engine:
    """Make the engine that Accelerate's config file chooses.

    Parameters
    ----------
    module, config, accelerator, lr_scale
        Arguments of `Engine`.
    divide : bool
        False: always use `Engine`, for a module whose forward pass changes its own weights.

    Returns
    -------
    Engine
        The engine, ready for the first step.
    """
    kind: type[Engine] = Engine
    if divide and _is_chosen(DEEPSPEED):
        kind = _DeepSpeedEngine
    elif divide and _is_chosen(FSDP):
        kind = _FSDPEngine
    return kind(module, config, accelerator, lr_scale)
