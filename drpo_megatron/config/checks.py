"""What no single section can see: whether sections agree with each other, with the model and with their files.

Cheap on purpose, so that all of it is said at once and before anything slow: it reads config.json and looks whether
files are there. Lines of data files and the checkpoint's shards are checked by those that read them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from drpo_megatron.config.hf_config import HFModelConfig, read_hf_config
from drpo_megatron.config.objective import DRPOConfig, GSPOConfig, ImportedObjectiveConfig, SAPOConfig
from drpo_megatron.config.placement_checks import placement_problems
from drpo_megatron.config.problems import listed
from drpo_megatron.config.sections import Config, ImportedReward, ParallelSection
from drpo_megatron.config.sglang_checks import sglang_problems
from drpo_megatron.imported import OBJECTIVE_ARGUMENTS, REWARD_ARGUMENTS, Arguments, check_function

_MEGATRON_FILES = ("metadata.json", ".metadata", "common.pt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_config(config: Config) -> list[str]:
    """Warnings: what is allowed, but probably not meant.

    Raises: ValueError that lists everything that can't work, each with the keys, their values and what to do.
    """
    files = {"data.train": config.data.train, "data.heldout": config.data.heldout}
    if config.warmup is not None:
        files["warmup.data"] = config.warmup.data
    problems = [
        *_file_problems(files),
        *_rank_problems(config.parallel),
        *_rollout_problems(config),
        *_batch_problems(config),
        *_objective_problems(config),
        *_reward_problems(config),
        *placement_problems(config),
    ]
    try:
        model = read_hf_config(config.model.hf_path)
    except ValueError as error:
        problems.append(str(error))
    else:
        problems += [*_tokenizer_problems(config), *_model_problems(config.parallel, model)]
        problems += [*_context_problems(config, model), *_weights_problems(config, model)]
        problems += [*_routing_problems(config, model), *sglang_problems(config, model)]
    if problems:
        raise ValueError(listed("this configuration can't run", problems))
    return list(_warnings(config))


def check_evaluation(config: Config) -> None:
    """As `check_config`, of what scoring a model reads: held-out problems, the checkpoint, the length of a response."""
    problems = [*_file_problems({"data.heldout": config.data.heldout}), *_reward_problems(config)]
    try:
        model = read_hf_config(config.model.hf_path)
    except ValueError as error:
        problems.append(str(error))
    else:
        problems += [*_tokenizer_problems(config), *_context_problems(config, model)]
    if problems:
        raise ValueError(listed("this model can't be scored", problems))


def layout_problems(config: Config, model: HFModelConfig) -> list[str]:
    """Why this layout can't train this model, as far as numbers tell: what the planner has to respect."""
    return [
        *_rank_problems(config.parallel),
        *_model_problems(config.parallel, model),
        *_batch_problems(config),
        *_context_problems(config, model),
    ]


# --- files --------------------------------------------------------------------------------------------------------


def _file_problems(files: dict[str, str | None]) -> Iterator[str]:
    for key, name in files.items():
        if name is None:
            continue
        if not Path(name).is_file():
            yield f"{key}: {name} does not exist or is not a file; give a JSONL file, one object a line"
        elif Path(name).stat().st_size == 0:
            yield f"{key}: {name} is empty; give at least one line"


def _tokenizer_problems(config: Config) -> Iterator[str]:
    directory = Path(config.model.hf_path)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        yield (
            f"model.hf_path: {directory} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); copy it there from "
            "where the model came from"
        )


def _weights_problems(config: Config, model: HFModelConfig) -> Iterator[str]:
    if model.quantization is not None:
        yield (
            f"model.hf_path: {config.model.hf_path} is quantised ({model.quantization}), and training starts from weights "
            "that aren't; take the checkpoint that it came from, or dequantise it with drpo-megatron convert "
            "hf-to-megatron and megatron-to-hf"
        )
    if config.model.megatron_path is None:
        return
    directory = Path(config.model.megatron_path)
    if missing := [name for name in _MEGATRON_FILES if not (directory / name).is_file()]:
        yield (
            f"model.megatron_path: {directory} is no Megatron checkpoint ({', '.join(missing)} is missing); give what "
            "drpo-megatron convert hf-to-megatron wrote, or checkpoints/step_<n>/trainer of a run"
        )
    elif (directory / "hf" / "config.json").is_file() and read_hf_config(directory / "hf") != model:
        yield (
            f"model.megatron_path: {directory} is of another model than model.hf_path={config.model.hf_path}: "
            f"{directory / 'hf' / 'config.json'} says so; give a checkpoint of the same"
        )


# --- the layout ---------------------------------------------------------------------------------------------------


def _rank_problems(parallel: ParallelSection) -> Iterator[str]:
    for keys in (("tensor", "pipeline", "context"), ("expert", "expert_tensor", "pipeline")):
        sizes = [getattr(parallel, key) for key in keys]
        product = math.prod(sizes)
        if parallel.num_ranks % product:
            yield (
                f"parallel.num_ranks={parallel.num_ranks} is not divisible by {' x '.join(keys)} = "
                f"{' x '.join(map(str, sizes))} = {product}; use a multiple of {product}, or lower one of them"
            )
    if parallel.sequence and parallel.tensor == 1:
        yield (
            "parallel.sequence=true with parallel.tensor=1: it shards activations between tensor-parallel ranks, and "
            "there is one; set parallel.sequence=false, or a larger parallel.tensor"
        )
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} with parallel.pipeline=1: one stage has nothing to "
            "interleave; leave virtual_pipeline out, or set a larger parallel.pipeline"
        )


def _model_problems(parallel: ParallelSection, model: HFModelConfig) -> Iterator[str]:
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "intermediate_size": model.intermediate_size,
        "shared_expert_intermediate_size": model.shared_expert_intermediate_size,
        "linear_num_key_heads": model.linear_num_key_heads,
    }
    yield from _indivisible(sizes, "tensor", parallel.tensor)
    if parallel.context > 1 and model.linear_num_key_heads is not None:
        yield (
            f"parallel.context={parallel.context}, but {model.model_type} has gated delta nets, which read a sequence "
            "from its start: Megatron trains them without context parallelism; set parallel.context=1"
        )
    yield from _layer_problems(parallel, model)
    if model.num_experts is not None:
        yield from _indivisible({"num_experts": model.num_experts}, "expert", parallel.expert)
        inner = {"moe_intermediate_size": model.moe_intermediate_size}
        yield from _indivisible(inner, "expert_tensor", parallel.expert_tensor)
        if parallel.tensor > 1 and not parallel.sequence:
            yield (
                f"parallel.tensor={parallel.tensor} without parallel.sequence, and {model.model_type} has "
                f"{model.num_experts} experts: Megatron trains experts under tensor parallelism only with sequence "
                "parallelism; set parallel.sequence=true"
            )
        return
    for key in ("expert", "expert_tensor"):
        if getattr(parallel, key) > 1:
            yield (
                f"parallel.{key}={getattr(parallel, key)}, but {model.model_type} is a dense model without experts; "
                f"set parallel.{key}=1"
            )


def _layer_problems(parallel: ParallelSection, model: HFModelConfig) -> Iterator[str]:
    num_chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if model.num_layers % num_chunks == 0:
        return
    virtual = f" x parallel.virtual_pipeline={parallel.virtual_pipeline}" if parallel.virtual_pipeline else ""
    yield (
        f"num_hidden_layers={model.num_layers} is not divisible by parallel.pipeline={parallel.pipeline}{virtual}; "
        f"use {_divisors(model.num_layers)} chunks in all"
    )


def _indivisible(sizes: dict[str, int | None], key: str, parts: int) -> Iterator[str]:
    """One problem for each size of the model that can't be cut into `parts`; the fix suits all sizes."""
    present = {name: size for name, size in sizes.items() if size is not None}
    for name, size in present.items():
        if size % parts:
            yield f"{name}={size} is not divisible by parallel.{key}={parts}; use {_divisors(*present.values())}"


def _divisors(*numbers: int) -> str:
    common = math.gcd(*numbers)
    *others, last = [str(n) for n in range(1, common + 1) if common % n == 0]
    return f"{', '.join(others)} or {last}" if others else last


# --- the work of a step -------------------------------------------------------------------------------------------


def _rollout_problems(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if not 0 < rollout.temperature < math.inf:
        yield (
            f"rollout.temperature={rollout.temperature}: training needs the probabilities that were sampled from, and "
            "they exist only for a temperature above 0; use 1.0"
        )
    for key, value, off in (("top_p", rollout.top_p, 1), ("top_k", rollout.top_k, -1)):
        if value != off:
            yield (
                f"rollout.{key}={value} cuts the distribution that is sampled from, so mu would not be the policy's "
                f"own; training needs rollout.{key}={off}"
            )
    if rollout.samples_per_prompt < 2:
        yield (
            f"rollout.samples_per_prompt={rollout.samples_per_prompt} with advantages={config.advantages.name}: "
            "advantages compare the answers to one prompt, and need at least 2"
        )


def _batch_problems(config: Config) -> Iterator[str]:
    profile = config.metrics.profile
    if profile is not None and profile.last_step > config.run.num_steps:
        yield (
            f"metrics.profile ends with step {profile.last_step}, after run.num_steps={config.run.num_steps}: its trace "
            "would never be written; lower metrics.profile.first_step or num_steps"
        )
    if config.run.num_steps == 0 and config.warmup is None:
        yield "run.num_steps=0 without a warmup section leaves nothing to do; give one of them"
    rollout, trainer, parallel = config.rollout, config.trainer, config.parallel
    num_sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    num_updates = trainer.optimizer_steps_per_rollout
    drawn = (
        f"rollout.prompts_per_step={rollout.prompts_per_step} x "
        f"rollout.samples_per_prompt={rollout.samples_per_prompt} = {num_sequences} sequences"
    )
    if num_sequences % num_updates:
        yield f"{drawn} can't be shared evenly by trainer.optimizer_steps_per_rollout={num_updates}; make it a divisor"
    elif num_sequences // num_updates < parallel.data:
        yield (
            f"{drawn} in trainer.optimizer_steps_per_rollout={num_updates} steps are {num_sequences // num_updates} a "
            f"step, fewer than the {parallel.data} data-parallel ranks; draw more, or make fewer optimiser steps"
        )
    if config.warmup is not None and config.warmup.sequences_per_step < parallel.data:
        yield (
            f"warmup.sequences_per_step={config.warmup.sequences_per_step} is less than the {parallel.data} "
            f"data-parallel ranks; use at least {parallel.data}"
        )
    # A prompt of one token, the longest response, and the padding of zig-zag context parallelism.
    unit = 2 * parallel.context if parallel.context > 1 else 1
    needed = math.ceil((rollout.max_response_tokens + 1) / unit) * unit
    if needed > trainer.max_tokens_per_micro_batch:
        yield (
            f"trainer.max_tokens_per_micro_batch={trainer.max_tokens_per_micro_batch} can't hold a prompt and "
            f"rollout.max_response_tokens={rollout.max_response_tokens}; use at least {needed} and the longest prompt"
        )


def _routing_problems(config: Config, model: HFModelConfig) -> Iterator[str]:
    replay = config.trainer.routing_replay
    if replay != "off" and model.num_experts is None:
        yield (
            f"trainer.routing_replay={replay}, but {model.model_type} is a dense model without experts to choose from; "
            "set trainer.routing_replay=off"
        )


def _context_problems(config: Config, model: HFModelConfig) -> Iterator[str]:
    longest, context = config.rollout.max_response_tokens, model.max_position_embeddings
    if longest + 1 > context:
        yield (
            f"rollout.max_response_tokens={longest} leaves no room for a prompt in the model's context, "
            f"max_position_embeddings={context}; use less than {context}"
        )


# --- the objective ------------------------------------------------------------------------------------------------


def _objective_problems(config: Config) -> Iterator[str]:
    context = config.parallel.context
    if context > 1 and (reason := _sequence_level(config)):
        yield (
            f"{reason} needs all tokens of a sequence on one rank, and parallel.context={context} splits sequences; "
            "set parallel.context=1, or choose a token-level objective"
        )

    if isinstance(config.objective, ImportedObjectiveConfig):
        yield from _function_problems("objective", config.objective.path, OBJECTIVE_ARGUMENTS)


def _reward_problems(config: Config) -> Iterator[str]:
    if isinstance(config.reward, ImportedReward) and config.rollout.from_dump is None:
        yield from _function_problems("reward", config.reward.path, REWARD_ARGUMENTS)


def _function_problems(key: str, path: str, arguments: Arguments) -> Iterator[str]:
    try:
        check_function(key, path, arguments)
    except ValueError as error:
        yield str(error)


def _sequence_level(config: Config) -> str | None:
    """What in the objective makes a token's coefficient depend on its whole sequence, if anything."""
    objective = config.objective
    if isinstance(objective, GSPOConfig):
        return "objective.name=gspo"
    if isinstance(objective, ImportedObjectiveConfig) and objective.sequence_level:
        return f"objective.path={objective.path} with sequence_level=true"
    if objective.correction is not None and objective.correction.name == "tis_sequence":
        return "objective.correction=tis_sequence"
    return None


def _warnings(config: Config) -> Iterator[str]:
    objective, aggregation = config.objective, config.trainer.aggregation
    if isinstance(objective, GSPOConfig | SAPOConfig) and aggregation != "seq-mean-token-mean":
        weighed = {
            "token-mean": "by its length",
            "seq-mean-token-sum-norm": "by its length over trainer.horizon",
        }[aggregation]
        yield (
            f"objective.name={objective.name} with trainer.aggregation={aggregation} is not the paper's objective: a "
            f"sequence counts {weighed}, and there each counts the same; trainer.aggregation=seq-mean-token-mean is the "
            "paper's"
        )
    if (
        isinstance(objective, DRPOConfig)
        and objective.delta >= 1
        and objective.penalty == "l2"
        and objective.advantage_weighted
    ):
        yield (
            f"objective.delta={objective.delta:g}: |pi - mu| never exceeds 1, so no token can be beyond the boundary "
            "and none is ever corrected; objective.delta=trust-region (0.15) can be reached"
        )
