"""One call of the policy loss: from hidden states to loss and gradients, by one of the walks over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from drpo_megatron.metrics import Statistic
from drpo_megatron.objectives.base import Objective, ObjectiveInputs
from drpo_megatron.objectives.diagnostics import policy_statistics
from drpo_megatron.trainer.vocab_parallel_batch import Rows, TokenBatch
from drpo_megatron.trainer.vocab_parallel_chunks import (
    GradientSums,
    Head,
    LogitScales,
    fused_gradient,
    measure,
    recomputed_gradient,
)
from drpo_megatron.trainer.vocab_parallel_rows import SoftmaxRows
from drpo_megatron.trainer.vocab_parallel_shards import gather_hidden, reduce_hidden_gradient


@dataclass(slots=True)
class PolicyLossTask:
    """`forward` once, then `backward` at most once. Results are [N], with 0 on rows that are not live."""

    head: Head
    batch: TokenBatch
    rows: Rows
    objective: Objective
    entropy_coef: float
    log_ratio_max: float
    sequence_parallel: bool
    recompute: bool
    """Gradients are made in the backward, from logits computed again, instead of in the forward."""

    softmax: SoftmaxRows = field(init=False)
    coef: torch.Tensor = field(init=False)
    objective_weight: torch.Tensor = field(init=False)
    metrics: dict[str, Statistic] = field(init=False)
    _hidden_dtype: torch.dtype = field(init=False)
    _weight: torch.Tensor = field(init=False)
    _needs: tuple[bool, bool] = field(init=False)
    _gradients: tuple[torch.Tensor | None, torch.Tensor | None] | None = field(init=False, default=None)
    _recomputable: tuple[torch.Tensor, torch.Tensor, LogitScales] | None = field(init=False, default=None)
    """The rows that have a gradient, their hidden states, and what to scale their gradient with."""

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, needs: tuple[bool, bool]) -> torch.Tensor:
        """The loss. `needs` says whether the gradients of hidden and of weight are wanted."""
        self._hidden_dtype, self._weight, self._needs = hidden.dtype, weight, needs
        gathered = gather_hidden(hidden, self.head.group, self.sequence_parallel)
        zeros = torch.zeros(self.num_rows, dtype=self.head.compute_dtype, device=hidden.device)
        logprobs = zeros.new_zeros(self.batch.num_ids, self.num_rows)
        self.softmax = SoftmaxRows(zeros, zeros.clone(), zeros.clone(), logprobs)

        fused = any(needs) and not self.recompute
        if fused:
            self._make_gradients(gathered)
        measured = self.rows.only_logprobs if fused else self.rows.live
        if measured.numel():
            softmax = measure(self.head, self._operands(gathered, measured), self.batch.ids(measured))
            self.softmax.put(measured, softmax)
        loss, target_scale = self._loss()
        if any(needs) and self.recompute:
            active = self.rows.gradient
            if self.entropy_coef == 0:  # clipped and masked tokens have no gradient
                active = active[target_scale[active] != 0]
            scales = target_scale[active], self._entropy_scale(active)
            self._recomputable = active, self._operands(gathered, active), scales
        return loss

    def backward(
        self, grad_loss: torch.Tensor, main_grad: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of hidden and of weight. With `main_grad` the weight's is added to it, and None is returned."""
        if self._recomputable is not None:
            return self._recompute_gradients(grad_loss, main_grad)
        if self._gradients is None:
            raise RuntimeError("the policy loss was run backward twice; its gradients are freed by the first backward")
        (hidden, weight), self._gradients = self._gradients, None
        if hidden is not None:
            hidden = hidden * grad_loss.to(hidden.dtype)
        if weight is not None and main_grad is not None:
            main_grad.addcmul_(weight, grad_loss)
            weight = None
        if weight is not None:
            weight = weight.mul_(grad_loss).to(self._weight.dtype)
        return hidden, weight

    @property
    def num_rows(self) -> int:
        return self.batch.targets.shape[0]

    def _operands(self, gathered: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return gathered[rows].to(self.head.operand_dtype)

    def _inputs(self, rows: torch.Tensor, logprobs: torch.Tensor) -> ObjectiveInputs:
        return self.batch.inputs(
            rows, logprobs, old_is_anchor=self.objective.needs_old_logprobs, log_ratio_max=self.log_ratio_max
        )

    def _make_gradients(self, gathered: torch.Tensor) -> None:
        """Three matmuls: fills the softmax of the gradient rows and keeps the gradients of a loss scale of 1."""
        rows = self.rows.gradient

        def scales_of(chunk: slice, softmax: SoftmaxRows) -> LogitScales:
            self.softmax.put(rows[chunk], softmax)
            inputs = self._inputs(rows[chunk], softmax.logprobs)
            return inputs.weights * self.objective(inputs).coef, self._entropy_scale(rows[chunk])

        sums, weight = self._new_sums(rows, main_grad=None)
        fused_gradient(self.head, self._operands(gathered, rows), self.batch.ids(rows), scales_of, sums)
        self._gradients = self._finish_hidden(sums, rows), weight

    def _recompute_gradients(
        self, grad_loss: torch.Tensor, main_grad: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        rows, hidden, (target_scale, entropy_scale) = self._recomputable
        scales = target_scale * grad_loss, None if entropy_scale is None else entropy_scale * grad_loss
        sums, weight = self._new_sums(rows, main_grad)
        recomputed_gradient(self.head, hidden, self.batch.targets[rows], self.softmax.select(rows), scales, sums)
        return self._finish_hidden(sums, rows), None if weight is None else weight.to(self._weight.dtype)

    def _loss(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss over all rows at once (so that chunks do not show in it), and [N] d loss / d logprobs."""
        good, gradient = self.rows.good, self.rows.gradient
        inputs = self._inputs(good, self.softmax.logprobs[:, good])
        outputs = self.objective(inputs)
        entropy = self.softmax.entropy[good]
        per_token = inputs.weights * (outputs.loss - self.entropy_coef * entropy)
        self.coef = scatter(outputs.coef, good, self.num_rows)
        self.objective_weight = scatter(outputs.weight, good, self.num_rows)
        self.metrics = policy_statistics(
            inputs=inputs, outputs=outputs, entropy=entropy, delta=getattr(self.objective, "delta", None)
        )
        loss = scatter(per_token, good, self.num_rows)[gradient].sum()
        return loss, scatter(inputs.weights * outputs.coef, good, self.num_rows)

    def _entropy_scale(self, rows: torch.Tensor) -> torch.Tensor | None:
        return self.batch.weights[rows].float() * self.entropy_coef if self.entropy_coef else None

    def _new_sums(self, rows: torch.Tensor, main_grad: torch.Tensor | None) -> tuple[GradientSums, torch.Tensor | None]:
        """Empty sums, and the weight's gradient [rows of the shard, H] that they fill unless it is `main_grad`."""
        dtype, (needs_hidden, needs_weight) = self.head.compute_dtype, self._needs
        weight = torch.zeros_like(self._weight, dtype=dtype) if needs_weight and main_grad is None else None
        hidden = self._weight.new_zeros(rows.shape[0], self._weight.shape[1], dtype=dtype) if needs_hidden else None
        total = weight if main_grad is None else main_grad
        real = total[: self.head.weight.shape[0]] if needs_weight else None
        return GradientSums(hidden, real), weight

    def _finish_hidden(self, sums: GradientSums, rows: torch.Tensor) -> torch.Tensor | None:
        if sums.hidden is None:
            return None
        gradient = sums.hidden.new_zeros(self.num_rows, sums.hidden.shape[1], dtype=self._hidden_dtype)
        gradient[rows] = sums.hidden.to(gradient.dtype)
        return reduce_hidden_gradient(gradient, self.head.group, self.sequence_parallel)


def scatter(values: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    """[size] with `values` at `rows` and 0 elsewhere."""
    out = values.new_zeros(size)
    out[rows] = values
    return out
