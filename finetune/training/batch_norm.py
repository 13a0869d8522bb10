"""Batch norm with statistics over the batches of all processes.

Tensor shapes: b samples of this process, F feature maps, H rows, W columns, R processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


def gather_rows(x_b: Tensor) -> Tensor:
    """Gather tensors from all processes, in the order of the ranks. Gradients flow back to every process.

    Parameters
    ----------
    x_b : Tensor, [b, ...]
        Tensor of this process. The size b must be equal on all processes.

    Returns
    -------
    Tensor, [R * b, ...]
        Concatenated tensors of all processes.
    """
    if _count_processes() == 1:
        return x_b
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x_b.contiguous()))


def _count_processes() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


class _Normalise(torch.autograd.Function):
    """Normalise feature maps by the mean and the variance over all processes.

    Both passes use PyTorch's fused batch norm, which needs a quarter of the time of single operations on the CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x_bFHW: Tensor, weight_F: Tensor, bias_F: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised feature maps, and the mean and the variance of each map over all processes."""
        _, own_mean_F, own_rstd_F = torch.native_batch_norm(x_bFHW, weight_F, bias_F, None, None, True, 0.0, eps)
        means_RF, rstds_RF = gather_rows(torch.stack([own_mean_F, own_rstd_F])[None]).unbind(dim=1)
        mean_F = means_RF.mean(dim=0)
        # The variance of all samples is the mean variance within the processes, plus the variance of their means.
        variance_F = (rstds_RF**-2 - eps + (means_RF - mean_F).square()).mean(dim=0)
        out, _, _ = torch.native_batch_norm(x_bFHW, weight_F, bias_F, mean_F, variance_F, False, 0.0, eps)
        ctx.save_for_backward(x_bFHW, weight_F, mean_F, variance_F)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean_F, variance_F)
        return out, mean_F, variance_F

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of the feature maps, the weight and the bias.

        The gradients of weight and bias are sums over the samples of this process. Their sums over all processes give
        the share of the gradient of `x_bFHW` that comes from the mean and the variance.
        """
        x, weight_F, mean_F, variance_F = ctx.saved_tensors
        rstd_F = (variance_F + ctx.eps).rsqrt()
        x_grad, weight_grad, bias_grad = torch.ops.aten.native_batch_norm_backward(
            out_grad, x, weight_F, mean_F, variance_F, mean_F, rstd_F, False, ctx.eps, [True, True, True]
        )
        sums_RF = gather_rows(torch.stack([weight_grad, bias_grad])[None])
        weight_sum_F, bias_sum_F = sums_RF.sum(dim=0)
        scale_F = weight_F * rstd_F / (x.numel() // x.shape[1] * len(sums_RF))
        slope_F = -scale_F * rstd_F * weight_sum_F
        shift_F = -scale_F * bias_sum_F - slope_F * mean_F
        x_grad.addcmul_(x, slope_F[:, None, None]).add_(shift_F[:, None, None])
        return x_grad, weight_grad, bias_grad, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on every device. PyTorch's own `SyncBatchNorm` needs GPUs.

    In training, all processes must have equally large batches, so that R processes compute the same outputs, gradients
    and running statistics as one process with the whole batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise feature maps.

        Parameters
        ----------
        input : Tensor, shape (b, F, H, W)
            Feature maps of this process.

        Returns
        -------
        Tensor, shape (b, F, H, W)
            Normalised feature maps. Statistics are exchanged only in training and only if gradients are computed:
            without gradients, e.g. in `calibrate_batch_norm`, every process has the same samples.
        """
        processes = _count_processes()
        if processes == 1 or not self.training or not torch.is_grad_enabled():
            return super().forward(input)
        # Compute in the type of the weights, because the input has only 16 bits in mixed precision.
        x = input.to(self.weight.dtype)
        out, mean_F, variance_F = _Normalise.apply(x, self.weight, self.bias, self.eps)
        self._update_running_statistics(mean_F, variance_F, x.numel() // x.shape[1] * processes)
        return out.to(input.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean_F: Tensor, variance_F: Tensor, count: int) -> None:
        running_mean, running_var, tracked = self.running_mean, self.running_var, self.num_batches_tracked
        assert running_mean is not None and running_var is not None and tracked is not None
        tracked.add_(1)
        share = 1 / float(tracked) if self.momentum is None else self.momentum
        running_mean.lerp_(mean_F, share)
        running_var.lerp_(variance_F * (count / max(1, count - 1)), share)


def synchronise_batch_norms(module: nn.Module) -> None:
    """Replace every `BatchNorm2d` inside a module by a `SyncBatchNorm2d` with the same weights and statistics.

    Parameters
    ----------
    module : Module
        Module that is changed in place. The names of the module's weights stay as they are.
    """
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            assert child.affine and child.track_running_stats
            norm = SyncBatchNorm2d(child.num_features, child.eps, child.momentum).to(child.weight)
            norm.load_state_dict(child.state_dict())
            module.register_module(name, norm.train(child.training))
        else:
            synchronise_batch_norms(child)
