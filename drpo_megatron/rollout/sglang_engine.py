"""A RolloutEngine (see engine.py) in front of SGLang servers, which a ServerKeeper or somebody else keeps running."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, groupby
from pathlib import Path
from queue import SimpleQueue

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from drpo_megatron.checkpoint.hf import tensor_checksum
from drpo_megatron.config.hf_config import ExpertRouting, read_expert_routing, read_hf_config
from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.sglang_client import Generated, LoopThread, SGLangClient
from drpo_megatron.rollout.sglang_router import NoServerLeft, SGLangRouter
from drpo_megatron.rollout.sglang_server import Endpoint
from drpo_megatron.rollout.sglang_sync import WeightSender
from drpo_megatron.rollout.sglang_transport import BroadcastFailed
from drpo_megatron.types import Completion

Bucket = list[tuple[str, torch.Tensor]]


class SGLangEngine:
    """Nothing is drawn before the first `finish_update`: a server's weights count when they were verified.

    The weights published last are kept in this process: when every server has been lost, those that come back get them
    and the requests go on. SGLang's sampler takes no seed that has an effect, so `GenerationRequest.seed` is not used:
    draws differ from run to run.

    Threads: one may draw while another brings new weights. Requests that run then go on with the new ones.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        section: SGLangEngineSection,
        hf_path: str,
        wait_for_server_s: float = 300.0,
    ) -> None:
        self.section = section
        self.tokenizer = AutoTokenizer.from_pretrained(hf_path, local_files_only=True, trust_remote_code=False)
        self.stop_ids = _stop_ids(hf_path, self.tokenizer.eos_token_id)
        self.context_length = read_hf_config(hf_path).max_position_embeddings
        self.policy_version = 0
        self._loop = LoopThread()
        self._loop.run(self._connect(endpoints, section, read_expert_routing(hf_path)))
        self.sender = WeightSender(self.clients, self._loop, section, hf_path, wait_for_server_s)
        self._label = ""
        self._buckets: list[Bucket] = []
        """The published weights, or those of an update that is not finished."""
        self._is_published = False
        self._update = threading.Lock()
        """Held from the first bucket of an update to its end, which are calls of their own."""
        self._is_updating = False

    async def _connect(
        self, endpoints: Sequence[Endpoint], section: SGLangEngineSection, routing: ExpertRouting | None
    ) -> None:
        self.clients = [SGLangClient(endpoint, self.stop_ids, routing) for endpoint in endpoints]
        self.router = SGLangRouter(
            self.clients, section.max_concurrent_requests, section.max_attempts, section.request_timeout_s
        )

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]:
        """Completions in the order of the requests. Raises what `stream` raises."""
        done = {index: completion for group in self.stream(requests, params) for index, completion in group}
        return [done[i] for i in range(len(requests))]

    def stream(
        self, requests: Sequence[GenerationRequest], params: SamplingParams
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Group by group, as they finish; neighbours with the same prompt are a group.

        Raises: ValueError for a prompt that leaves no room in the context, before anything is sent. NoServerLeft when
            no weights are published, or all servers were lost more than `max_restarts` times. SyncFailed when they
            were lost and none came back.
        """
        for request in requests:
            if len(request.prompt_ids) + params.max_response_tokens > self.context_length:
                raise ValueError(
                    f"{request.request_id}: {len(request.prompt_ids)} prompt tokens + {params.max_response_tokens} response "
                    f"tokens exceed the model's context of {self.context_length}"
                )
        missing = dict(enumerate(requests))
        num_losses = 0
        while missing:
            try:
                for drawn in self._stream_once(missing, params):
                    for index, _ in drawn:
                        del missing[index]
                    yield drawn
            except NoServerLeft:
                num_losses += 1
                with self._update:
                    if not self._is_published or num_losses > self.section.max_restarts:
                        raise
                    if not self.router.num_serving:
                        self._publish_again()

    def _stream_once(
        self, missing: dict[int, GenerationRequest], params: SamplingParams
    ) -> Iterator[list[tuple[int, Completion]]]:
        groups = [list(group) for _, group in groupby(missing.items(), key=lambda item: item[1].prompt_ids)]
        answers: SimpleQueue[tuple[int, list[Generated]] | None] = SimpleQueue()

        async def draw() -> None:
            try:
                async for answer in self.router.stream([[request for _, request in group] for group in groups], params):
                    answers.put(answer)
            finally:
                answers.put(None)

        drawing = self._loop.submit(draw())
        try:
            while (answer := answers.get()) is not None:
                group, generated = groups[answer[0]], answer[1]
                yield [(index, self._completion(g)) for (index, _), g in zip(group, generated, strict=True)]
            drawing.result()
        finally:
            drawing.cancel()

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
            version_spans=versions if len(versions) > 1 else (),
            topk_ids=drawn.topk_ids,
            topk_logprobs=drawn.topk_logprobs,
            routed_experts=drawn.routed_experts,
        )

    # --- weights ------------------------------------------------------------------------------------------------------

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Send one bucket to all servers. From the first one on nothing is drawn until the end of `finish_update`.

        Raises: SyncFailed when it reaches none, or the disk is full; BroadcastFailed as often as `max_attempts`.
        """
        if not self._is_updating:
            self._begin_update()
        bucket = list(named_tensors)
        self._buckets.append(bucket)
        try:
            self._send([bucket])
        except BaseException:
            self._end_update()
            raise

    def finish_update(self, policy_version: int, expected_checksums: dict[str, str]) -> None:
        """Publish on every server that holds exactly what the trainer exported; ValueError or SyncFailed if none does."""
        if not self._is_updating:
            raise ValueError(f"weights of policy version {policy_version} can't be published: none were sent")
        try:
            self._check_received(policy_version, expected_checksums)
            digest = hashlib.sha256(repr(sorted(expected_checksums.items())).encode()).hexdigest()[:12]
            self._publish(policy_version, f"{policy_version}-{digest}")
        finally:
            self._end_update()

    def release_memory(self) -> None:
        """Servers give up the memory of weights and cache until the next update; `finish_update` has it all back.

        Requests wait for that; those that run are put back, and go on with the new weights.
        """
        with self._update:
            self._is_published = False
            self._loop.run(self.router.withdraw(is_updating=True))
            self.sender.release_memory()

    def _begin_update(self) -> None:
        self._update.acquire()
        self._is_updating = True
        self._loop.run(self.router.withdraw(is_updating=True))
        self._buckets, self._is_published = [], False

    def _end_update(self) -> None:
        if not self._is_published:
            self._loop.run(self.router.withdraw(is_updating=False))
        self._is_updating = False
        self._update.release()

    def _check_received(self, policy_version: int, expected: dict[str, str]) -> None:
        received = {name: tensor_checksum(tensor) for bucket in self._buckets for name, tensor in bucket}
        names = sorted(received.keys() | expected.keys())
        if wrong := [name for name in names if received.get(name) != expected.get(name)]:
            raise ValueError(
                f"weights of policy version {policy_version} did not arrive as the trainer sent them: "
                f"{', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}"
            )

    def _send(self, buckets: Sequence[Bucket]) -> None:
        """A broadcast that breaks off begins anew, without the servers that don't answer any more."""
        for num_failures in count(1):
            try:
                for bucket in buckets:
                    self.sender.send(bucket)
                return
            except BroadcastFailed as error:
                if num_failures == self.section.max_attempts:
                    raise
                print(f"weights are sent again: {error}", flush=True)
                buckets = self._buckets

    def _publish(self, policy_version: int, label: str) -> None:
        self.router.expect(label, policy_version)
        clients = self.sender.finish(label)
        self.policy_version, self._label, self._is_published = policy_version, label, True
        self._loop.run(self.router.publish(label, policy_version, clients))

    def _publish_again(self) -> None:
        """To whichever servers answer, once the first does."""
        self._send(self._buckets)
        self._publish(self.policy_version, self._label)

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
