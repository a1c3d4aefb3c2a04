"""A RolloutEngine (see engine.py) in front of one or several SGLang servers, which somebody else keeps running."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from drpo_megatron.checkpoint.hf import tensor_checksum
from drpo_megatron.config.hf_config import ExpertRouting, read_expert_routing, read_hf_config
from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.sglang_client import Generated, LoopThread, SGLangClient
from drpo_megatron.rollout.sglang_router import SGLangRouter
from drpo_megatron.rollout.sglang_server import Endpoint
from drpo_megatron.rollout.sglang_sync import WeightSender
from drpo_megatron.types import Completion


class SGLangEngine:
    """Nothing is drawn before the first `finish_update`: a server's weights count when they were verified.

    SGLang's sampler takes no seed that has an effect, so `GenerationRequest.seed` is not used: draws differ from run
    to run.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        section: SGLangEngineSection,
        hf_path: str,
        wait_for_server_s: float = 300.0,
    ) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(hf_path, local_files_only=True, trust_remote_code=False)
        self.stop_ids = _stop_ids(hf_path, self.tokenizer.eos_token_id)
        self.context_length = read_hf_config(hf_path).max_position_embeddings
        self.policy_version = 0
        self._loop = LoopThread()
        self._loop.run(self._connect(endpoints, section, read_expert_routing(hf_path)))
        self.sender = WeightSender(self.clients, self._loop, section, hf_path, wait_for_server_s)
        self._received: dict[str, str] = {}
        self._label = ""
        self._drawn: dict[tuple[str, SamplingParams], Completion] = {}
        """Of a `generate` that was interrupted: what had finished, with the weights of `_label`."""

    async def _connect(
        self, endpoints: Sequence[Endpoint], section: SGLangEngineSection, routing: ExpertRouting | None
    ) -> None:
        self.clients = [SGLangClient(endpoint, self.stop_ids, routing) for endpoint in endpoints]
        self.router = SGLangRouter(
            self.clients, section.max_concurrent_requests, section.max_attempts, section.request_timeout_s
        )

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]:
        """Completions in the order of the requests.

        Raises: ValueError for a prompt that leaves no room in the context, before anything is sent. NoServerLeft when
            the servers, or their weights, are lost; after the next update the same call goes on where it stopped.
        """
        for request in requests:
            if len(request.prompt_ids) + params.max_response_tokens > self.context_length:
                raise ValueError(
                    f"{request.request_id}: {len(request.prompt_ids)} prompt tokens + {params.max_response_tokens} response "
                    f"tokens exceed the model's context of {self.context_length}"
                )
        missing = [request for request in requests if (request.request_id, params) not in self._drawn]
        self._loop.run(self._draw(missing, params))
        return [self._drawn.pop((request.request_id, params)) for request in requests]

    async def _draw(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> None:
        groups = [list(group) for _, group in groupby(requests, key=lambda request: request.prompt_ids)]
        async for index, generated in self.router.stream(groups, params):
            for request, drawn in zip(groups[index], generated, strict=True):
                self._drawn[request.request_id, params] = self._completion(drawn)

    def _completion(self, drawn: Generated) -> Completion:
        versions = self.router.policy_versions(drawn)
        stopped = bool(drawn.token_ids) and drawn.token_ids[-1] in self.stop_ids
        return Completion(
            token_ids=drawn.token_ids,
            logprobs=drawn.logprobs,
            # SGLang calls it `length` when the last token allowed is a stop token.
            finish_reason="stop" if stopped else drawn.finish_reason,
            text=self.tokenizer.decode(drawn.token_ids, skip_special_tokens=True),
            policy_version=min((version for version, _ in versions), default=self.policy_version),
            topk_ids=drawn.topk_ids,
            topk_logprobs=drawn.topk_logprobs,
            routed_experts=drawn.routed_experts,
        )

    # --- weights ------------------------------------------------------------------------------------------------------

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Send one bucket to all servers. From the first one on nothing is drawn until `finish_update`."""
        bucket = list(named_tensors)
        if not self.sender.is_open:
            self.router.withdraw()
            self._received = {}
        self._received |= {name: tensor_checksum(tensor) for name, tensor in bucket}
        self.sender.send(bucket)

    def finish_update(self, policy_version: int, expected_checksums: dict[str, str]) -> None:
        """Publish on every server that holds exactly what the trainer exported; ValueError or SyncFailed if none does."""
        wrong = [
            name
            for name in sorted(self._received.keys() | expected_checksums.keys())
            if self._received.get(name) != expected_checksums.get(name)
        ]
        if wrong:
            raise ValueError(
                f"weights of policy version {policy_version} did not arrive as the trainer sent them: "
                f"{', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}"
            )
        digest = hashlib.sha256(repr(sorted(expected_checksums.items())).encode()).hexdigest()[:12]
        label = f"{policy_version}-{digest}"
        clients = self.sender.finish(label)
        if label != self._label:
            self._drawn = {}
        self.policy_version, self._label = policy_version, label
        self.router.publish(label, policy_version, clients)

    def close(self) -> None:
        self.sender.close()
        self._loop.run(self._disconnect())
        self._loop.close()

    async def _disconnect(self) -> None:
        for client in self.clients:
            await client.close()


def _stop_ids(hf_path: str, tokenizer_eos: int | None) -> tuple[int, ...]:
    source = GenerationConfig if (Path(hf_path) / "generation_config.json").is_file() else AutoConfig
    configured = source.from_pretrained(hf_path, local_files_only=True).eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer_eos}
    return tuple(sorted(i for i in ids if i is not None))
