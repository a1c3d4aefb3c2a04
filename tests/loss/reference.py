"""The policy loss as a textbook writes it: dense float64 logits, autograd, no chunks, no shards, no compaction."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from drpo_megatron.objectives.base import Objective, ObjectiveInputs


@dataclass(frozen=True)
class Case:
    """One whole problem, as a single process holds it."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    behavior_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor

    def vectors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.targets, self.behavior_logprobs, self.advantages, self.weights

    def with_(self, **changes: torch.Tensor) -> Case:
        return replace(self, **changes)


@dataclass(frozen=True)
class Reference:
    loss: torch.Tensor
    loss_magnitude: torch.Tensor
    """Sum of the rows' absolute losses: what an error of the loss is small against, because rows cancel."""
    logprobs: torch.Tensor
    entropy: torch.Tensor
    coef: torch.Tensor
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor


def make_case(num_tokens: int = 48, hidden_size: int = 32, vocab_size: int = 211, seed: int = 0) -> Case:
    """Logits of a few nats, mu near pi, a quarter of the rows masked, a quarter without advantage."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(num_tokens, hidden_size), normal(vocab_size, hidden_size) / hidden_size**0.5 * 2
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    behavior = (logprobs + 0.3 * normal(num_tokens)).clamp(max=0)
    advantages, weights = normal(num_tokens), torch.full((num_tokens,), 1 / 64)
    advantages[1::4] = 0
    weights[2::4] = 0
    targets[2::4] = -100
    return Case(hidden, weight, targets, behavior, advantages, weights)


def reference_policy_loss(
    case: Case,
    objective: Objective,
    *,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    log_ratio_max: float = 20.0,
    **extra: torch.Tensor,
) -> Reference:
    """Live rows only; `extra` are old_logprobs, reference_logprobs, sequence_ids, topk_ids, topk_behavior_logprobs."""
    live = case.weights != 0
    hidden, weight = (tensor.double().requires_grad_() for tensor in (case.hidden, case.weight))
    logprobs_all = (hidden[live] @ weight.T / temperature).log_softmax(-1)
    logprobs = logprobs_all.gather(1, case.targets[live][:, None])[:, 0]
    entropy = -(logprobs_all.exp() * logprobs_all).sum(-1)
    chosen = {name: value[live] for name, value in extra.items()}
    topk_ids = chosen.pop("topk_ids", None)
    behavior = case.behavior_logprobs[live].double()
    inputs = ObjectiveInputs(
        logprobs=logprobs.detach(),
        behavior_logprobs=behavior,
        advantages=case.advantages[live].double(),
        anchor_logprobs=chosen["old_logprobs"].double() if objective.needs_old_logprobs else behavior,
        weights=case.weights[live].double(),
        topk_logprobs=None if topk_ids is None else logprobs_all.detach().gather(1, topk_ids),
        log_ratio_max=log_ratio_max,
        **chosen,
    )
    outputs = objective(inputs)
    per_row = outputs.loss - entropy_coef * entropy.detach()
    # The objective's own gradient has its own tests; here coef is what multiplies grad log pi.
    surrogate = (inputs.weights * (outputs.coef * logprobs - entropy_coef * entropy)).sum()
    surrogate.backward()

    def full(values: torch.Tensor) -> torch.Tensor:
        out = values.new_zeros(case.targets.shape[0])
        out[live] = values.detach()
        return out

    return Reference(
        loss=(inputs.weights * per_row).sum(),
        loss_magnitude=(inputs.weights * per_row).abs().sum(),
        logprobs=full(logprobs),
        entropy=full(entropy),
        coef=full(outputs.coef),
        grad_hidden=hidden.grad,
        grad_weight=weight.grad,
    )


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude; the difference itself where FP32 has only 0 for them."""
    if ours.numel() == 0:
        return 0.0
    scale = expected.float().abs().max().double()
    difference = (ours.detach().double() - expected.double()).abs().max()
    return (difference / scale if scale > 0 else difference).item()
