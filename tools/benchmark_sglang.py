"""The SGLang engine against the bare server, and the three ways of weight sync, on one server of this machine.

    python tools/benchmark_sglang.py [--hf DIR] [--requests 64] [--max-response 40] [--repeats 5] [--json FILE]

Generation: the same requests, all at once, by the engine and by a client that only posts them to /generate. The two
take turns; tokens a second are counted of what came back. Sync: a whole `publish` of the checkpoint, checksums included,
beside its floor: the bytes, copied once at the speed at which this machine copies memory. Needs `make sglang-cpu`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp
import torch

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.sglang_engine import SGLangEngine
from drpo_megatron.rollout.sglang_server import Endpoint, ServerKeeper, SGLangServer, server_dtype, server_flags
from drpo_megatron.weight_sync import publish

WAYS = ("disk", "distributed", "tensor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", default="data/quickstart/model", help="checkpoint (default: the quickstart's)")
    parser.add_argument("--python", default=".venv-sglang/bin/python", help="interpreter with SGLang")
    parser.add_argument("--requests", type=int, default=64, help="requests at once (default 64)")
    parser.add_argument("--max-response", type=int, default=40, help="longest response (default 40)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default 5)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()

    section = SGLangEngineSection(python=args.python, flags={"max-running-requests": args.requests})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = server_dtype(section, args.hf)
    with tempfile.TemporaryDirectory() as directory:
        flags = server_flags(args.hf, section, dtype, device)
        server = SGLangServer(flags, args.python, device, Path(directory, "server.log"))
        keeper = ServerKeeper(server, section, startup_timeout_s=600.0)
        try:
            keeper.start()
            sync = {way: measure_sync(server.endpoint, args.hf, way, dtype, args.repeats) for way in WAYS}
            rates = measure_generation(server.endpoint, args)
        finally:
            keeper.close()
    bandwidth = copy_bandwidth()
    show(args, rates, sync, bandwidth)
    if args.json:
        figures = {"generate_tokens_per_s": rates, "sync": sync, "copy_bytes_per_s": bandwidth}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure_sync(endpoint: Endpoint, hf: str, way: str, dtype: str, repeats: int) -> dict[str, float]:
    """Bytes and median seconds of a publication, after one that warms up."""
    engine = SGLangEngine([endpoint], SGLangEngineSection(sync=way), hf)
    tensors = list(HFCheckpoint(hf).iter_tensors())
    reports = [
        publish(tensors, version, engine.load_weights, engine.finish_update, dtype=getattr(torch, dtype))
        for version in range(repeats + 1)
    ]
    engine.close()
    return {"bytes": reports[0].num_bytes, "seconds": statistics.median(report.seconds for report in reports[1:])}


def measure_generation(endpoint: Endpoint, args: argparse.Namespace) -> dict[str, float]:
    engine = SGLangEngine([endpoint], SGLangEngineSection(), args.hf)
    tensors = list(HFCheckpoint(args.hf).iter_tensors())
    dtype = getattr(torch, server_dtype(SGLangEngineSection(), args.hf))
    publish(tensors, 0, engine.load_weights, engine.finish_update, dtype=dtype)
    rng, vocab = random.Random(0), engine.tokenizer.vocab_size
    prompts = [tuple(rng.randrange(vocab) for _ in range(rng.randint(2, 20))) for _ in range(args.requests)]
    requests = [GenerationRequest(f"{i}/0", prompt, i) for i, prompt in enumerate(prompts)]

    def ours() -> int:
        return sum(len(c.token_ids) for c in engine.generate(requests, SamplingParams(args.max_response)))

    def bare() -> int:
        return asyncio.run(post_all(endpoint, prompts, args.max_response, engine.stop_ids))

    rates: dict[str, list[float]] = {"engine": [], "bare": []}
    for repeat in range(args.repeats + 1):
        for name, run in (("engine", ours), ("bare", bare)):
            started = time.perf_counter()
            num_tokens = run()
            if repeat:  # The first warms up.
                rates[name].append(num_tokens / (time.perf_counter() - started))
    engine.close()
    ratio = statistics.median(a / b for a, b in zip(rates["engine"], rates["bare"], strict=True))
    return {name: statistics.median(values) for name, values in rates.items()} | {"ratio": ratio}


async def post_all(
    endpoint: Endpoint, prompts: list[tuple[int, ...]], max_new_tokens: int, stop: tuple[int, ...]
) -> int:
    """The tokens that came back for all prompts, posted at once."""
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    params = {"temperature": 1.0, "max_new_tokens": max_new_tokens, "stop_token_ids": stop}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def post(prompt: tuple[int, ...]) -> int:
            body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True}
            async with session.post(f"{endpoint.url}/generate", json=body) as response:
                response.raise_for_status()
                return len((await response.json())["output_ids"])

        return sum(await asyncio.gather(*map(post, prompts)))


def copy_bandwidth(num_bytes: int = 256 * 2**20, repeats: int = 5) -> float:
    """Bytes a second that one thread copies in memory."""
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.empty(num_bytes, dtype=torch.uint8)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return num_bytes / min(seconds[1:])


def show(
    args: argparse.Namespace, rates: dict[str, float], sync: dict[str, dict[str, float]], bandwidth: float
) -> None:
    print(f"{args.requests} requests at once, up to {args.max_response} tokens each")
    print(f"  engine                  {rates['engine']:8,.0f} tokens/s")
    print(f"  bare server, a client   {rates['bare']:8,.0f} tokens/s")
    print(f"  ratio, pair by pair     {rates['ratio']:8.2f}")
    print(f"sync of {args.hf}; memory is copied at {bandwidth / 1e9:.1f} GB/s")
    print("  way              bytes   seconds     floor")
    for way, figures in sync.items():
        floor = figures["bytes"] / bandwidth
        print(f"  {way:12} {figures['bytes']:>11,} {figures['seconds']:9.3f} {floor:9.5f}")


if __name__ == "__main__":
    main()
