"""The DeepSpeed engine: functions that create its config and optimiser, and that save and restore its whole state."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor, nn

from data_sharding.common.config import merge_configs
from pretrain.model.build import build_autoencoder, count_parameters
from pretrain.runs.checkpoint import CheckpointReader, divide_by_size
from pretrain.runs.distributed import World
from pretrain.training.config import OptimizerConfig, PretrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""PyTorch's names of Adam's two moments."""


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips the gradient and skips a step whose gradient is not finite.

    This class is used at ZeRO stage 0 only. With the plain AdamW, DeepSpeed would take a step with a NaN gradient at
    this stage, and the weights would become NaN. At stages 1 to 3, ZeRO's own optimisers skip steps whose gradient is
    not finite.

    Parameters
    ----------
    groups : list of dict
        Parameter groups, from `parameter_groups`.
    clip : float
        Largest norm of the whole gradient. 0: the norm has no limit.
    **options
        Further options of `torch.optim.AdamW`.
    """

    def __init__(self, groups: list[dict[str, Any]], *, clip: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self._clip = clip
        # These two attributes have the names under which DeepSpeed's engine reads them.
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take an optimiser step if the gradient is finite; `closure` is not supported."""
        # DeepSpeed averages the gradients over the processes before it calls this method. All processes therefore see
        # the same gradient and skip the same steps.
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._clip or float("inf"))
        self._global_grad_norm = float(norm)
        self.overflow = not torch.isfinite(norm).item()
        if not self.overflow:
            super().step(closure)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the model's parameters into a group with weight decay and a group without weight decay.

    Parameters
    ----------
    module : nn.Module
        The model.
    weight_decay : float
        Weight decay of the weight matrices.

    Returns
    -------
    list of dict
        Two parameter groups for an optimiser. Every trainable parameter is in exactly one of the two groups.
    """
    decayed, others = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name.endswith(("cls_token", "mask_token"))
            (others if free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(module: nn.Module, config: OptimizerConfig, *, zero_stage: int) -> torch.optim.Optimizer:
    """Build PyTorch's AdamW, which ZeRO supports; unlike DeepSpeed's own Adam, it need not be compiled first.

    Parameters
    ----------
    module : nn.Module
        The model.
    config : OptimizerConfig
        Optimiser settings.
    zero_stage : int
        Stage of ZeRO, 0 to 3.

    Returns
    -------
    torch.optim.Optimizer
        The optimiser, to be passed to DeepSpeed.
    """
    groups = parameter_groups(module, config.weight_decay)
    # The fused AdamW is faster than the normal AdamW, on CPUs too: in one step, the fused AdamW goes through the memory
    # once, the normal AdamW about ten times.
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    if zero_stage == 0:
        return GuardedAdamW(groups, clip=config.grad_clip, **options)
    return torch.optim.AdamW(groups, **options)


def common_settings(
    *, batch_size: int, micro: int, micro_batches: int, grad_clip: float, parameters: int, device: torch.device
) -> dict[str, Any]:
    """Return the settings of DeepSpeed that are the same in every training of this project.

    Parameters
    ----------
    batch_size : int
        Number of samples in one optimiser step, summed over all processes.
    micro : int
        Number of samples that one process computes in one forward pass.
    micro_batches : int
        Number of forward passes of one process in one step.
    grad_clip : float
        Largest norm of the gradient; 0 switches DeepSpeed's clipping off.
    parameters : int
        Number of trainable parameters of the model.
    device : torch.device
        Device of the training.

    Returns
    -------
    dict
        A part of the config for `deepspeed.initialize`, without the stage of ZeRO and the precision.
    """
    # Each communication bucket is a buffer in memory, so limit its size to the number of parameters. With DeepSpeed's
    # default of 5e8 values, a small model would need gigabytes for the buckets. ZeRO refuses an odd size.
    bucket = int(min(5e8 if device.type == "cuda" else 5e7, max(parameters + parameters % 2, 2**16)))
    return {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": grad_clip,
        "zero_optimization": {
            "overlap_comm": device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "communication_data_type": "fp32",
        # With False, DeepSpeed accepts PyTorch's Adam for an offloaded optimiser too. DeepSpeed's CPU Adam would take
        # minutes to compile.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def deepspeed_config(config: PretrainConfig, *, parameters: int, device: torch.device) -> dict[str, Any]:
    """Translate the run's config into a config for DeepSpeed.

    Parameters
    ----------
    config : PretrainConfig
        The run's config.
    parameters : int
        Number of trainable parameters of the model.
    device : torch.device
        Device of the training.

    Returns
    -------
    dict
        The config for `deepspeed.initialize`. Keys in `config.deepspeed` override the generated keys.
    """
    common = common_settings(
        batch_size=config.batch_size,
        micro=config.micro,
        micro_batches=config.batch_size // config.num_processes // config.micro,
        # At stage 0, `GuardedAdamW` clips the gradient, because it computes the gradient's norm anyway; so DeepSpeed
        # must not clip.
        grad_clip=config.optimizer.grad_clip if config.zero_stage else 0.0,
        parameters=parameters,
        device=device,
    )
    own: dict[str, Any] = {
        "zero_optimization": {"stage": config.zero_stage},
        # With immediate_grad_update, stage 1 adds each bf16 gradient to the float32 gradients as soon as it is
        # computed, and then frees the memory of the bf16 gradient.
        "bf16": {"enabled": config.precision == "bf16", "immediate_grad_update": config.precision == "bf16"},
        # Without the keys communication_data_type and data_types, bf16 gradients would be summed in bf16, both over the
        # processes and over the micro batches.
        "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": False,
    }
    generated = merge_configs(common, own)
    if config.offload != "none":
        pinned = {"device": "cpu", "pin_memory": device.type == "cuda"}
        generated["zero_optimization"]["offload_optimizer"] = pinned
        if config.offload == "all":
            generated["zero_optimization"]["offload_param"] = dict(pinned)
    return merge_configs(generated, config.deepspeed)


def start_engine(deepspeed: Any, config: PretrainConfig, device: torch.device) -> Any:
    """Build the model, its optimiser and DeepSpeed's engine.

    Parameters
    ----------
    deepspeed : module
        DeepSpeed, from `pretrain.runs.distributed.import_deepspeed`.
    config : PretrainConfig
        The run's config.
    device : torch.device
        Device of the training.

    Returns
    -------
    DeepSpeedEngine
        The engine, with Adam's moments allocated.
    """
    torch.manual_seed(config.seed)
    model = build_autoencoder(config.model)
    settings = deepspeed_config(config, parameters=count_parameters(model), device=device)
    # Move the model to the device before the optimiser is built: a fused AdamW needs its parameters on their final
    # device.
    model.to(device)
    optimizer = build_optimizer(model, config.optimizer, zero_stage=config.zero_stage)
    # DeepSpeed's bf16 optimiser prints tables of memory at every log level; hide this output.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if hasattr(engine.optimizer, "get_grads_for_reduction"):
        # The bf16 optimiser of stage 1 keeps the float32 gradients of each parameter group in one large tensor. To sum
        # this tensor over the processes, DeepSpeed would copy it into a bucket and back in every step, even if there is
        # only one process. With a bucket size of 0, the tensor is summed in place.
        reduce = engine.buffered_allreduce_fallback
        engine.buffered_allreduce_fallback = lambda grads=None, elements_per_buffer=0: reduce(grads, 0)
    fill_optimizer_state(engine)
    return engine


def fill_optimizer_state(engine: Any) -> None:
    """Allocate Adam's moments, filled with zeros, before the first step.

    The moments are allocated early so that the checkpoints of all steps, even of step 0, hold tensors of the same
    names.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The DeepSpeed engine; any ZeRO stage is possible.
    """
    inner = _inner(engine)
    fused = bool(inner.defaults.get("fused"))
    for flat in _updated_tensors(engine):
        if not inner.state[flat]:
            # These are the tensors that torch.optim.Adam itself would create in its first step.
            counter = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
            inner.state[flat] = {"step": counter} | {name: torch.zeros_like(flat) for name in MOMENTS}
    if engine.zero_optimization_stage() in (1, 2):
        # Let DeepSpeed look up the moments of each parameter now; otherwise it would do this only in its first step.
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def adam_steps(engine: Any) -> int:
    """Return how many steps Adam took, without skipped steps; Adam's bias correction depends on this number."""
    return int(next(iter(_inner(engine).state.values()))["step"])


def set_adam_steps(engine: Any, steps: int) -> None:
    """Set the number that `adam_steps` returns."""
    for state in _inner(engine).state.values():
        state["step"].fill_(steps)


def divide_state(engine: Any, world: World) -> list[list[str]]:
    """Divide the tensors of a checkpoint among the processes that write them.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The DeepSpeed engine.
    world : World
        The processes of the run.

    Returns
    -------
    list of list of str
        For each rank, the names of the tensors that it writes.
    """
    sizes = {f"weights/{name}": buffer.numel() for name, buffer in _buffers(engine.module)}
    for name, parameter in engine.module.named_parameters():
        size = _numel(parameter)
        sizes[f"weights/{name}"] = size
        if parameter.requires_grad:
            sizes |= {f"{key}/{name}": size for key in MOMENTS}
    return divide_by_size(sizes, world.size)


def gather_state(engine: Any, world: World) -> dict[str, Tensor]:
    """Copy this process's share of the weights and moments to the CPU; every process must call this function.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The DeepSpeed engine; any ZeRO stage is possible.
    world : World
        The processes of the run.

    Returns
    -------
    dict of str to Tensor
        float32 weights as ``weights/NAME`` and Adam's moments as ``exp_avg/NAME`` and ``exp_avg_sq/NAME``. The shares
        of all processes together hold the same tensors, whatever the number of processes and the ZeRO stage.
    """
    mine = set(divide_state(engine, world)[world.rank])
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        kinds = {"weights": None} | ({key: key for key in MOMENTS} if parameter.requires_grad else {})
        for kind, key in kinds.items():
            # Gathering is a collective operation, so every process visits the same parameters in the same order.
            whole = gather_tensor(engine, parameter, key)
            if f"{kind}/{name}" in mine:
                state[f"{kind}/{name}"] = _to_cpu(whole, parameter)
    for name, buffer in _buffers(engine.module):
        if f"weights/{name}" in mine:
            state[f"weights/{name}"] = buffer.detach().to("cpu", copy=True)
    return state


@torch.no_grad()
def load_state(engine: Any, saved: CheckpointReader) -> None:
    """Restore weights and optimiser state from a checkpoint; the ZeRO stage and number of processes may have changed.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The engine; `fill_optimizer_state` must have been called for it.
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
                set_moment(engine, parameter, key, saved[f"{key}/{name}"])
    for name, buffer in _buffers(module):
        buffer.copy_(saved[f"weights/{name}"])
    set_adam_steps(engine, saved.manifest["adam_steps"])


def _inner(engine: Any) -> torch.optim.Optimizer:
    """Return the Adam optimiser inside ZeRO's optimiser; at stage 0, the engine's optimiser is Adam itself."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _updated_tensors(engine: Any) -> list[Tensor]:
    """Return the tensors that Adam updates: at ZeRO stage 0 the parameters, else this process's part of them."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in _inner(engine).param_groups for p in group["params"] if p.requires_grad]


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return name and tensor of each buffer that is saved with the weights."""
    saved = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in saved]


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _to_cpu(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return whole.detach().to("cpu", torch.float32, copy=True).reshape(shape).contiguous()


def gather_tensor(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    """Gather Adam's moment `key` of a parameter (key None: its float32 weights); all processes must call this.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The DeepSpeed engine; any ZeRO stage is possible.
    parameter : nn.Parameter
        A parameter of the engine's module.
    key : str or None
        ``exp_avg``, ``exp_avg_sq``, or None.

    Returns
    -------
    Tensor
        The whole tensor.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        return parameter if key is None else _inner(engine).state[parameter][key]
    if key is None and not hasattr(parameter, "ds_id") and parameter.dtype == torch.float32:
        # At ZeRO stages 1 and 2 without bf16, each process holds the whole float32 parameter, so nothing need be
        # gathered.
        return parameter
    found = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
    assert found is not None
    return found


def own_part(parameter: Any, whole: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds at ZeRO stage 3; zeros fill the part up to its fixed size."""
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
        part = own_part(parameter, whole)
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.data.copy_(part)
        if parameter.numel() == parameter.ds_numel:
            # DeepSpeed also keeps a whole copy of each small parameter on every process; set this copy too.
            parameter.data.copy_(whole.view(parameter.ds_shape))
        return
    # The parameter may be bf16. The copy then rounds the float32 values, as DeepSpeed does with its master weights.
    parameter.data.copy_(whole)
    if engine.zero_optimization_stage() and parameter.requires_grad:
        safe_set_full_fp32_param(parameter, whole)


def set_moment(engine: Any, parameter: Any, key: str, whole: Tensor) -> None:
    """Set Adam's moment `key` of a parameter; every process passes the whole tensor and stores its part.

    Parameters
    ----------
    engine : DeepSpeedEngine
        The engine; `fill_optimizer_state` must have been called for it.
    parameter : nn.Parameter
        A parameter of the engine's module.
    key : str
        ``exp_avg`` or ``exp_avg_sq``.
    whole : Tensor
        The whole tensor.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    whole = whole.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        safe_set_local_optimizer_state(parameter, own_part(parameter, whole), key)
    elif engine.zero_optimization_stage():
        safe_set_full_optimizer_state(parameter, whole, key)
    else:
        _inner(engine).state[parameter][key].copy_(whole)
