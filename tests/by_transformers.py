"""One optimiser step of DRPO by transformers' own model, by autograd: what the trainer is compared with in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from drpo_megatron.types import Sample
from tests.float64 import Exact, Values, exact
from tests.tiny import gradients


class Tokens(Protocol):
    @property
    def prompt_ids(self) -> tuple[int, ...]: ...
    @property
    def response_ids(self) -> tuple[int, ...]: ...


HORIZON = 16
"""The tiny config's max_response_tokens."""
METRICS = ("objective/loss", "optim/grad_norm", "policy/entropy/mean", "objective/weight/min", "mismatch/k1")


def logprobs_all(model: Any, samples: Sequence[Tokens], temperature: float = 1.0) -> list[torch.Tensor]:
    """Of each sample, [response tokens, V]. Samples are rows of one batch: they know nothing of each other, and no
    token sees the padding after it."""
    batch = pad_sequence([torch.tensor([*s.prompt_ids, *s.response_ids]) for s in samples], batch_first=True)
    rows = model(batch, use_cache=False).logits
    rows = (rows / temperature).log_softmax(-1)
    return [row[len(s.prompt_ids) - 1 :][: len(s.response_ids)] for row, s in zip(rows, samples, strict=True)]


def of_responses(logprobs: list[torch.Tensor], samples: Sequence[Tokens]) -> list[torch.Tensor]:
    """Of each sample, [response tokens]: those of the tokens that were drawn."""
    ids = (torch.tensor(sample.response_ids)[:, None] for sample in samples)
    return [row.gather(1, tokens).squeeze(1) for row, tokens in zip(logprobs, ids, strict=True)]


def drpo_step(model: Any, samples: list[Sample], delta: float = 0.15) -> dict[str, torch.Tensor]:
    """Log-probs by sample id, METRICS, and gradients by the names that transformers saves."""
    model.zero_grad()
    whole = logprobs_all(model, samples)
    drawn = of_responses(whole, samples)
    pi = torch.cat(drawn)
    mu = pi.new_tensor([x for sample in samples for x in sample.behavior_logprobs])
    advantages = pi.new_tensor([sample.advantage for sample in samples for _ in sample.response_ids])
    ratio, shift = (pi - mu).exp(), pi.exp() - mu.exp()
    per_token = -advantages * ratio + advantages.abs() * shift * (ratio - 1) / (2 * delta)
    loss = per_token.sum() / HORIZON / len(samples)  # Sum of a sequence / horizon, then the mean over sequences.
    loss.backward()
    everywhere = torch.cat(whole)
    weights = 1 - (advantages * shift).sign() * shift.abs() / delta
    grads = gradients(model)
    return {
        **{sample.sample_id: row.detach() for sample, row in zip(samples, drawn, strict=True)},
        "objective/loss": loss.detach(),
        "optim/grad_norm": torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt(),
        "policy/entropy/mean": -(everywhere.exp() * everywhere).sum(-1).mean().detach(),
        "objective/weight/min": weights[advantages != 0].min().detach(),
        "mismatch/k1": (mu - pi).mean().detach(),
        **grads,
    }


def exact_step(model: Any, samples: list[Sample]) -> Exact:
    return exact(model, lambda: drpo_step(model, samples))


@torch.no_grad()
def exact_logprobs(model: Any, samples: Sequence[Tokens], temperature: float = 1.0) -> Exact:
    """Under `all`, [every response token, V]; under `drawn`, [every response token, 1]."""

    def run() -> dict[str, torch.Tensor]:
        whole = logprobs_all(model, samples, temperature)
        return {"all": torch.cat(whole), "drawn": torch.cat(of_responses(whole, samples))[:, None]}

    return exact(model, run)


def by_trainer(logprobs: Any, metrics: dict[str, float], grads: Values) -> dict[str, torch.Tensor]:
    """What the trainer returned, by the names of `drpo_step`."""
    numbers = {name: torch.tensor(values) for name, values in logprobs.items()}
    return numbers | {name: torch.tensor(metrics[name]) for name in METRICS} | dict(grads)
