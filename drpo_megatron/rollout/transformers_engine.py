"""The embedded rollout engine: a transformers model in this process, decoded batch by batch.

The decode loop is ours rather than `generate`, for three things that `generate` does not give together: the log-prob of
every draw without keeping [B, T, V] logits, draws that depend on the request's own seed and not on its neighbours in
the batch, and finished rows that leave the batch (and its KV cache) at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from drpo_megatron.checkpoint.hf import HFCheckpoint, tensor_checksum
from drpo_megatron.config.precision import PrecisionSection
from drpo_megatron.config.sections import TransformersEngineSection
from drpo_megatron.precision.rollout import RolloutPrecision
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.low_precision import RoundedActivations
from drpo_megatron.rollout.model_slots import checkpoint_slots
from drpo_megatron.rollout.routing_trace import RoutingTrace
from drpo_megatron.types import Completion


class TransformersEngine:
    """A RolloutEngine (see engine.py) over a local Hugging Face checkpoint, in FP32."""

    def __init__(
        self,
        hf_path: str,
        config: TransformersEngineSection,
        device: str = "cpu",
        precision: PrecisionSection | None = None,
    ) -> None:
        torch.set_num_threads(config.num_threads)
        self.config = config
        self.device = torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(hf_path, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            hf_path, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
        self.model = model.to(self.device).eval()
        self.stop_ids = _stop_ids(self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        self.context_length = self.model.config.max_position_embeddings
        names = HFCheckpoint(hf_path).names()
        self.slots = checkpoint_slots(self.model, names)
        self.rounding = self._round_activations(precision, names) if precision is not None else None
        self.policy_version = 0

    def _round_activations(self, section: PrecisionSection, names: Collection[str]) -> RoundedActivations | None:
        precision = RolloutPrecision.of_checkpoint(section, self.model.config, names)
        return RoundedActivations(self.model, self.slots, precision) if precision is not None else None

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]:
        """Completions in the order of the requests. ValueError for a prompt that leaves no room in the context."""
        done = {index: completion for batch in self.stream(requests, params) for index, completion in batch}
        return [done[i] for i in range(len(requests))]

    def stream(
        self, requests: Sequence[GenerationRequest], params: SamplingParams
    ) -> Iterator[list[tuple[int, Completion]]]:
        """The same, batch by batch, as (index of the request, completion) pairs."""
        for request in requests:
            if len(request.prompt_ids) + params.max_response_tokens > self.context_length:
                raise ValueError(
                    f"{request.request_id}: {len(request.prompt_ids)} prompt tokens + {params.max_response_tokens} response "
                    f"tokens exceed the model's context of {self.context_length}"
                )
        for batch in self._batches(requests, params):
            yield list(zip(batch, self._decode([requests[i] for i in batch], params), strict=True))

    def _batches(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[list[int]]:
        """Requests sorted by length, so that little is padding, cut where a batch would exceed max_batch_tokens."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        batches: list[list[int]] = []
        for index in order:
            longest = len(requests[index].prompt_ids) + params.max_response_tokens
            if not batches or longest * (len(batches[-1]) + 1) > self.config.max_batch_tokens:
                batches.append([])
            batches[-1].append(index)
        return batches

    @torch.inference_mode()
    def _decode(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]:
        """One batch. Prompts are padded on the left; rows that stop leave the batch and its cache."""
        width = max(len(request.prompt_ids) for request in requests)
        tokens = torch.zeros(len(requests), width, dtype=torch.long)
        attention = torch.zeros(len(requests), width, dtype=torch.long)
        for row, request in enumerate(requests):
            tokens[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            attention[row, width - len(request.prompt_ids) :] = 1
        uniforms = torch.from_numpy(
            np.stack(
                [np.random.Generator(np.random.Philox(r.seed)).random(params.max_response_tokens) for r in requests]
            )
        )
        tokens, attention, uniforms = (x.to(self.device) for x in (tokens, attention, uniforms))
        stop = torch.tensor(sorted(self.stop_ids), device=self.device)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        rows = torch.arange(len(requests), device=self.device)
        drawn: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        topk_ids: list[list[tuple[int, ...]]] = [[] for _ in requests]
        topk_logprobs: list[list[tuple[float, ...]]] = [[] for _ in requests]
        stopped = [False] * len(requests)
        cache = DynamicCache(config=self.model.config)
        num_columns = width + params.max_response_tokens - 1
        trace = RoutingTrace(self.model, len(requests), num_columns) if params.routed_experts else None
        for step in range(params.max_response_tokens):
            with trace or nullcontext():
                logits = self.model(
                    input_ids=tokens,
                    attention_mask=attention,
                    position_ids=positions,
                    past_key_values=cache,
                    logits_to_keep=1,
                ).logits[:, -1]
            if trace:
                trace.store(rows.tolist(), width + step - 1 if step else 0)
            distribution = log_distribution(logits, params)
            chosen, chosen_logprobs = draw(distribution, uniforms[:, step], params)
            if params.num_topk:
                top = distribution.topk(params.num_topk, dim=1)
                for row, ids, values in zip(rows.tolist(), top.indices.tolist(), top.values.tolist(), strict=True):
                    topk_ids[row].append(tuple(ids))
                    topk_logprobs[row].append(tuple(values))
            is_stop = torch.isin(chosen, stop)
            for row, token, logprob, ends in zip(
                rows.tolist(), chosen.tolist(), chosen_logprobs.tolist(), is_stop.tolist(), strict=True
            ):
                drawn[row].append(token)
                logprobs[row].append(logprob)
                stopped[row] = ends
            keep = (~is_stop).nonzero().squeeze(1)
            if not len(keep):
                break
            if len(keep) < len(rows):
                cache.reorder_cache(keep)  # The one selection of rows that recurrent states know, too.
                rows, attention, uniforms, positions, chosen = (
                    x[keep] for x in (rows, attention, uniforms, positions, chosen)
                )
            tokens = chosen[:, None]
            positions = positions[:, -1:] + 1
            attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=1)
        return [
            Completion(
                token_ids=tuple(drawn[row]),
                logprobs=tuple(logprobs[row]),
                finish_reason="stop" if stopped[row] else "length",
                text=self.tokenizer.decode(drawn[row], skip_special_tokens=True),
                policy_version=self.policy_version,
                topk_ids=tuple(topk_ids[row]) if params.num_topk else None,
                topk_logprobs=tuple(topk_logprobs[row]) if params.num_topk else None,
                routed_experts=trace.of(row, width - len(request.prompt_ids), width + len(drawn[row]) - 1)
                if trace
                else None,
            )
            for row, request in enumerate(requests)
        ]

    # --- weights ------------------------------------------------------------------------------------------------------

    def round_activations(self, is_on: bool) -> None:
        """Of an engine with a rollout recipe: whether its linear layers compute in low precision from now on."""
        if self.rounding is not None:
            self.rounding.is_on = is_on

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy tensors, named as in the checkpoint, into the model. ValueError for unknown names and wrong shapes."""
        for name, tensor in named_tensors:
            slot = self.slots.get(name)
            if slot is None:
                raise ValueError(f"the engine's model has no tensor {name}")
            if slot.shape != tensor.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; the engine's model needs {tuple(slot.shape)}"
                )
            slot.copy_(tensor)

    def finish_update(self, policy_version: int, expected_checksums: dict[str, str]) -> None:
        """Publish `policy_version` if the model holds exactly the expected tensors; ValueError names those that differ."""
        present = {name: tensor_checksum(slot) for name, slot in self.slots.items()}
        missing = sorted(present.keys() - expected_checksums.keys())
        unknown = sorted(expected_checksums.keys() - present.keys())
        different = sorted(n for n, checksum in present.items() if expected_checksums.get(n, checksum) != checksum)
        problems = [
            f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for what, names in (("not sent", missing), ("unknown", unknown), ("different", different))
            if names
        ]
        if problems:
            raise ValueError(
                f"weights of policy version {policy_version} are not what the trainer sent; " + "; ".join(problems)
            )
        self.policy_version = policy_version


def log_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[B, V] FP32 natural log-probs to draw from, given logits [B, V].

    They are those of softmax(logits / T), renormalised over the tokens that top-k and top-p leave. Temperature 0 is
    greedy, with the log-probs at T = 1.
    """
    scaled = logits.float() / (params.temperature or 1.0)
    if params.top_k > 0:
        threshold = scaled.topk(min(params.top_k, scaled.shape[1]), dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    if params.top_p < 1.0:
        ordered, order = scaled.softmax(1).sort(dim=1, descending=True)
        outside = ordered.cumsum(1) - ordered >= params.top_p
        scaled = scaled.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
    return scaled.log_softmax(1)


def draw(log_probs: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by inverse CDF: ids [B] int64 and their log-probs [B], from log_probs [B, V].

    Args:
        uniforms: [B] FP64 in [0, 1).
    """
    if params.temperature == 0:
        chosen = log_probs.argmax(1)
    else:
        cumulative = log_probs.double().exp().cumsum(1)
        # Scaled by the sum, so that rounding can't leave a draw beyond the last token; never a token of probability 0.
        chosen = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True).squeeze(1)
        chosen = chosen.clamp(max=log_probs.shape[1] - 1)
    return chosen, log_probs.gather(1, chosen[:, None]).squeeze(1)


def _stop_ids(*candidates: int | list[int] | None) -> set[int]:
    stop: set[int] = set()
    for candidate in candidates:
        if candidate is not None:
            stop |= {candidate} if isinstance(candidate, int) else set(candidate)
    return stop
