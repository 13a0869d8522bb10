"""DeepSpeed around the autoencoder: its config, optimiser, and the whole state out of it and back."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.model.build import build_autoencoder, count_parameters
from pretrain.runs.checkpoint import CheckpointReader, divide_by_size
from pretrain.runs.distributed import World
from pretrain.training.config import OptimizerConfig, PretrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's two, as PyTorch names them."""


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips the gradient and leaves out a step whose gradient is not finite.

    ZeRO's optimisers do so themselves; this one is for stage 0, where DeepSpeed would step into the NaN.

    Parameters
    ----------
    groups : list of dict
        Parameter groups.
    clip : float
        Largest norm of the whole gradient; 0 for no limit.
    **options
        As for `torch.optim.AdamW`.
    """

    def __init__(self, groups: list[dict[str, Any]], *, clip: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self._clip = clip
        # DeepSpeed's engine looks for these two.
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step, unless the gradient is not finite.

        Parameters
        ----------
        closure : None
            Not supported.
        """
        # Gradients are averaged over the processes by now, so all of them come to the same verdict.
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._clip or float("inf"))
        self._global_grad_norm = float(norm)
        self.overflow = not torch.isfinite(norm).item()
        if not self.overflow:
            super().step(closure)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into those that decay and those that do not.

    Parameters
    ----------
    module : nn.Module
        The model.
    weight_decay : float
        Decay of the matrices.

    Returns
    -------
    list of dict
        Two groups for an optimiser; every trainable parameter is in exactly one.
    """
    decayed, kept = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name.endswith(("cls_token", "mask_token"))
            (kept if free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def build_optimizer(module: nn.Module, config: OptimizerConfig, *, zero_stage: int) -> torch.optim.Optimizer:
    """PyTorch's own AdamW: nothing to compile, and one of those that ZeRO knows.

    Parameters
    ----------
    module : nn.Module
        The model.
    config : OptimizerConfig
        How it learns.
    zero_stage : int
        ZeRO's stage.

    Returns
    -------
    torch.optim.Optimizer
        The optimiser that DeepSpeed wraps.
    """
    groups = parameter_groups(module, config.weight_decay)
    # One pass over memory in place of ten, on a processor, too.
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    if zero_stage == 0:
        return GuardedAdamW(groups, clip=config.grad_clip, **options)
    return torch.optim.AdamW(groups, **options)


def deepspeed_config(config: PretrainConfig, *, parameters: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own config out of ours.

    Parameters
    ----------
    config : PretrainConfig
        The request.
    parameters : int
        Trainable values of the model.
    device : torch.device
        Where it trains.

    Returns
    -------
    dict
        What `deepspeed.initialize` takes; `config.deepspeed` is merged over it.
    """
    share = config.batch_size // config.num_processes
    # The buckets are buffers: of DeepSpeed's 5e8 values each, a small model would pay gigabytes.
    bucket = int(min(5e8 if device.type == "cuda" else 5e7, max(parameters, 2**16)))
    generated: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro,
        "gradient_accumulation_steps": share // config.micro,
        # Stage 0 clips in its optimiser, where the norm is seen and a NaN stopped.
        "gradient_clipping": config.optimizer.grad_clip if config.zero_stage else 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        # Stage 1 adds each bf16 gradient to the float32 ones as soon as it is there, and drops it.
        "bf16": {"enabled": config.precision == "bf16", "immediate_grad_update": config.precision == "bf16"},
        # Without these two, bf16 gradients are summed over processes and micro batches in bf16.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        # PyTorch's own Adam works on the processor too; DeepSpeed's is compiled for minutes.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if config.offload != "none":
        pinned = {"device": "cpu", "pin_memory": device.type == "cuda"}
        generated["zero_optimization"]["offload_optimizer"] = pinned
        if config.offload == "all":
            generated["zero_optimization"]["offload_param"] = dict(pinned)
    return merged(generated, config.deepspeed)


def start_engine(deepspeed: Any, config: PretrainConfig, device: torch.device) -> Any:
    """Build the model, its optimiser and DeepSpeed's engine around them.

    Parameters
    ----------
    deepspeed : module
        DeepSpeed, as `pretrain.runs.distributed.import_deepspeed` gives it.
    config : PretrainConfig
        The request.
    device : torch.device
        Where it trains.

    Returns
    -------
    DeepSpeedEngine
        The engine, with Adam's moments in place.
    """
    torch.manual_seed(config.seed)
    model = build_autoencoder(config.model)
    settings = deepspeed_config(config, parameters=count_parameters(model), device=device)
    # Fused AdamW wants its parameters on the GPU already.
    model.to(device)
    optimizer = build_optimizer(model, config.optimizer, zero_stage=config.zero_stage)
    # Its bf16 optimiser prints memory tables, whatever the log level.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if hasattr(engine.optimizer, "get_grads_for_reduction"):
        # The bf16 optimiser of stage 1 keeps its float32 gradients in one tensor a group. Bucketed together they would
        # be copied to a new buffer and back at every step, on a single process, too; one by one they are reduced in
        # place.
        reduce = engine.buffered_allreduce_fallback
        engine.buffered_allreduce_fallback = lambda grads=None, elements_per_buffer=0: reduce(grads, 0)
    fill_optimizer_state(engine)
    return engine


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries.

    Parameters
    ----------
    base, over : mapping
        Where both have a value, `over` wins.

    Returns
    -------
    dict
        A new dictionary.
    """
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def fill_optimizer_state(engine: Any) -> None:
    """Give Adam its moments, zero, before the first step, so that a checkpoint has the same content at any step.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The engine, of any ZeRO stage.
    """
    inner = _inner(engine)
    fused = bool(inner.defaults.get("fused"))
    for flat in _stepped(engine):
        if not inner.state[flat]:
            # As torch.optim.Adam itself makes them at the first step.
            counter = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
            inner.state[flat] = {"step": counter} | {name: torch.zeros_like(flat) for name in MOMENTS}
    if engine.zero_optimization_stage() in (1, 2):
        # Where each parameter's moments lie; DeepSpeed finds out at its first step otherwise.
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def adam_steps(engine: Any) -> int:
    """Count the steps that Adam took, without those left out; its bias correction depends on them.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The engine.

    Returns
    -------
    int
        Steps.
    """
    return int(next(iter(_inner(engine).state.values()))["step"])


def divide_state(engine: Any, world: World) -> list[list[str]]:
    """Divide the tensors of a checkpoint among the processes that write them.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The engine.
    world : World
        The processes.

    Returns
    -------
    list of list of str
        Names of tensors by rank.
    """
    sizes = {f"weights/{name}": buffer.numel() for name, buffer in _buffers(engine.module)}
    for name, parameter in engine.module.named_parameters():
        size = _numel(parameter)
        sizes[f"weights/{name}"] = size
        if parameter.requires_grad:
            sizes |= {f"{key}/{name}": size for key in MOMENTS}
    return divide_by_size(sizes, world.size)


def gather_state(engine: Any, world: World) -> dict[str, Tensor]:
    """Copy this process's share of the whole state to the CPU; every process must call this function.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The engine, of any ZeRO stage.
    world : World
        The processes.

    Returns
    -------
    dict of str to Tensor
        float32 weights as ``weights/NAME`` and Adam's moments as ``exp_avg/NAME`` and ``exp_avg_sq/NAME``. Which
        tensors there are does not depend on the number of processes or the stage.
    """
    mine = set(divide_state(engine, world)[world.rank])
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        kinds = {"weights": None} | ({key: key for key in MOMENTS} if parameter.requires_grad else {})
        for kind, key in kinds.items():
            # Gathering is collective: every process visits the same parameters in the same order.
            whole = _whole(engine, parameter, key)
            if f"{kind}/{name}" in mine:
                state[f"{kind}/{name}"] = _to_cpu(whole, parameter)
    for name, buffer in _buffers(engine.module):
        if f"weights/{name}" in mine:
            state[f"weights/{name}"] = buffer.detach().to("cpu", copy=True)
    return state


@torch.no_grad()
def load_state(engine: Any, saved: CheckpointReader) -> None:
    """Restore weights and optimiser state, for any number of processes and any ZeRO stage.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The engine; `fill_optimizer_state` was called.
    saved : CheckpointReader
        The opened checkpoint.

    Raises
    ------
    RequestError
        If the checkpoint belongs to another model.
    """
    module = engine.module
    saved.check_names(name for names in divide_state(engine, World()) for name in names)
    for name, parameter in module.named_parameters():
        _set_weight(engine, parameter, saved[f"weights/{name}"])
        if parameter.requires_grad:
            for key in MOMENTS:
                _set_moment(engine, parameter, key, saved[f"{key}/{name}"])
    for name, buffer in _buffers(module):
        buffer.copy_(saved[f"weights/{name}"])
    for state in _inner(engine).state.values():
        state["step"].fill_(saved.manifest["adam_steps"])


def _inner(engine: Any) -> torch.optim.Optimizer:
    """Adam itself, under ZeRO's wrapping."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _stepped(engine: Any) -> list[Tensor]:
    """Tensors that Adam steps: the parameters at stage 0, else this process's flat parts of the float32 weights."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in _inner(engine).param_groups for p in group["params"] if p.requires_grad]


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    kept = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _to_cpu(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return whole.detach().to("cpu", torch.float32, copy=True).reshape(shape).contiguous()


def _whole(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    """Whole float32 weight (without a key) or moment of a parameter; collective from stage 1 on."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        return parameter if key is None else _inner(engine).state[parameter][key]
    if key is None and not hasattr(parameter, "ds_id") and parameter.dtype == torch.float32:
        # Float32 parameters of stages 1 and 2 are whole on every process.
        return parameter
    found = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
    assert found is not None
    return found


def _own_part(parameter: Any, whole: Tensor) -> Tensor:
    """Cut out the part of a parameter that lies here under stage 3, with zeros behind the end."""
    size = parameter.ds_tensor.numel()
    flat = whole.flatten()
    start = size * torch.distributed.get_rank()
    part = flat.new_zeros(size)
    found = flat[start : start + size]
    part[: found.numel()] = found
    return part


def _set_weight(engine: Any, parameter: Any, whole: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    whole = whole.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        part = _own_part(parameter, whole)
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.data.copy_(part)
        if parameter.numel() == parameter.ds_numel:
            # Small ones stay whole on every process.
            parameter.data.copy_(whole.view(parameter.ds_shape))
        return
    # Rounded as DeepSpeed itself rounds its float32 masters.
    parameter.data.copy_(whole)
    if engine.zero_optimization_stage() and parameter.requires_grad:
        safe_set_full_fp32_param(parameter, whole)


def _set_moment(engine: Any, parameter: Any, key: str, whole: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    whole = whole.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        safe_set_local_optimizer_state(parameter, _own_part(parameter, whole), key)
    elif engine.zero_optimization_stage():
        safe_set_full_optimizer_state(parameter, whole, key)
    else:
        _inner(engine).state[parameter][key].copy_(whole)
