"""AdamW for Megatron's optimizers where no fused one is installed: torch's kernel, `step` kept in the parameter group.

The interface is that of Transformer Engine's and NVIDIA apex's FusedAdam, which Megatron-Core's checkpoints assume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class Adam(torch.optim.Optimizer):
    """Adam or (adam_w_mode) AdamW. State of a parameter: exp_avg and exp_avg_sq, nothing else."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        """Raises: ValueError for `capturable`, which is for CUDA graphs: `step` is a number of the host."""
        if capturable:
            raise ValueError("this Adam can't be captured in a CUDA graph; install Transformer Engine or apex")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        )
        self.update = adamw if adam_w_mode else adam

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for param in params:
                state = self.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
            # The kernel counts a step itself, on the tensors it is given.
            steps = [torch.full((), float(group["step"] - 1), device=p.device) for p in params]
            self.update(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                steps,
                fused=all(p.dtype == torch.float32 for p in params) or None,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
