"""The sections of a run's YAML file. A field without a default must be given.

`drpo_megatron.config.objective` holds the tagged union of objectives; `load.py` reads and overrides; `checks.py`
compares sections with each other and with the files they name, before any process starts.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from drpo_megatron.config.base import (
    Address,
    Beta,
    Coefficient,
    Count,
    CountOrNone,
    DirectoryName,
    FlagName,
    FlagValue,
    GradientNorm,
    ImportPath,
    LearningRate,
    Line,
    LogRatio,
    NoLearningRate,
    Processes,
    Seconds,
    Section,
    Seed,
    Share,
    Temperature,
    TemperatureOrZero,
    Text,
    Threads,
    TopK,
)
from drpo_megatron.config.objective import ObjectiveConfig
from drpo_megatron.config.precision import PrecisionSection


class RunSection(Section):
    name: DirectoryName
    """Names the run directory: `<output_dir>/<name>-<stamp>`."""
    output_dir: Line = "runs"
    """Where run directories are made."""
    run_dir: Line | None = None
    """An exact run directory instead of `<output_dir>/<name>-<stamp>`. Refused when it already holds a run."""
    seed: Seed = 0
    """Seeds everything: prompt order, sampling, shuffles. The same seed and layout repeat a run."""
    num_steps: CountOrNone
    """Rollout-and-train steps. Each makes `trainer.optimizer_steps_per_rollout` optimiser steps. 0: only the warm-up."""


class ModelSection(Section):
    hf_path: Line
    """Directory of the Hugging Face checkpoint to start from: config.json, safetensors, tokenizer."""
    megatron_path: Line | None = None
    """Megatron checkpoint of the same model whose weights the policy starts from instead of hf_path's: what
    `drpo-megatron convert hf-to-megatron` wrote, or `checkpoints/step_<n>/trainer` of another run. Every rank reads its
    own shards, whatever layout wrote it. Config, tokenizer and the engines' first weights still come from hf_path."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation. `full` recomputes every layer in the backward pass: least memory, about 1.3 x time."""
    moe_token_dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts' ranks. `alltoall` scales; `allgather` suits few experts on few ranks."""
    moe_aux_loss_coeff: Coefficient = 0.0
    """Weight of the load-balancing loss in an optimiser step's loss, in each layer with experts: E sum_i f_i P_i of a
    micro-batch (1 when balanced; f_i the share of its token-expert pairs, P_i the mean router probability, padding
    included), averaged over micro-batches by their tokens. Whole under any layout. 0 for RL: its gradient is not the
    policy's."""
    freeze_router: bool = False
    """Keep the routers' weights as they are. Some find RL of MoE steadier with it."""


class ParallelSection(Section):
    num_ranks: Processes = 1
    """Trainer processes. data parallel = num_ranks / (tensor x pipeline x context)."""
    tensor: Processes = 1
    """Tensor parallel size: splits heads, hidden sizes and the vocabulary."""
    sequence: bool = False
    """Sequence parallel: shards activations between the tensor-parallel regions. Required by MoE with tensor > 1."""
    pipeline: Processes = 1
    """Pipeline stages."""
    virtual_pipeline: Count | None = None
    """Model chunks a stage (interleaved 1F1B): a smaller bubble for more communication."""
    context: Processes = 1
    """Context parallel size: splits every sequence (zig-zag) over ranks."""
    expert: Processes = 1
    """Expert parallel size: each rank holds num_experts / expert experts."""
    expert_tensor: Processes = 1
    """Tensor parallel size inside an expert. 1 (whole experts) is nearly always right."""

    @property
    def data(self) -> int:
        return self.num_ranks // (self.tensor * self.pipeline * self.context)


class OptimizerSection(Section):
    lr: LearningRate
    """Peak learning rate."""
    min_lr: NoLearningRate = 0.0
    """Where cosine and linear schedules end."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Decay after the warm-up, over all optimiser steps of the run."""
    warmup_steps: CountOrNone = 0
    """Optimiser steps of linear warm-up from 0."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: LearningRate = 1e-8
    weight_decay: Coefficient = 0.01
    """Decoupled (AdamW); biases and norms are exempt."""
    clip_grad: GradientNorm = 1.0
    """Global gradient norm limit. 0 switches clipping off."""
    distributed: bool = True
    """Shard optimizer state (and FP32 masters) over data parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on. Helps on GPUs."""

    @model_validator(mode="after")
    def _rates_go_together(self) -> OptimizerSection:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr:g} is above lr={self.lr:g}, where the schedule starts; lower it")
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"lr={self.lr:g} x weight_decay={self.weight_decay:g} = {self.lr * self.weight_decay:g}: a step would "
                "take the whole weight away; keep it below 1"
            )
        return self


class TrainerSection(Section):
    backend: Literal["auto", "cpu", "gpu"] = "auto"
    """`cpu`: gloo and the CPU platform; `gpu`: NCCL, `auto`: gpu where CUDA is there."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Compute dtype of the trainer. bf16 keeps FP32 masters in the optimizer."""
    optimizer_steps_per_rollout: Count = 4
    """Optimiser steps on one rollout, each on its own share of the sequences mu frozen: later ones are off-policy."""
    max_tokens_per_micro_batch: Count = 8192
    """Padded tokens of one packed micro-batch of one rank. Bounds activation memory. At least the longest sequence."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = "seq-mean-token-sum-norm"
    """How per-token losses become one number, always over the whole global batch of an optimiser step."""
    horizon: Count | None = None
    """Divisor of seq-mean-token-sum-norm. None: rollout.max_response_tokens (the paper's choice)."""
    entropy_coef: Coefficient = 0.0
    """Weight of the entropy bonus. 0 in the paper."""
    routing_replay: Literal["off", "measure", "rollout"] = "off"
    """Experts of the tokens in the trainer. `rollout`: those that the engine used, which reports them for every token
    (R3); the router still weighs them, and learns. `measure`: the trainer's own, and the metric
    mismatch/router_flips/share counts where the engine used others. `off`: the engine reports nothing, which saves
    experts a token x layers bytes a token on the way (up to 256 experts)."""
    bad_behavior: Literal["drop", "raise"] = "drop"
    """What to do with a live token whose mu is not finite: give it weight 0 and count it, or stop."""
    log_ratio_max: LogRatio = 20.0
    """Upper limit of log(pi/mu) in the loss."""
    loss_chunk_mb: Count | None = None
    """MiB of FP32 logits a chunk of the loss kernel. Each chunk reads and writes the whole gradient of this rank's share of
    the LM head. None: on a GPU 1024, or what 4,096 rows take if that is more; 64 on a CPU."""
    loss_low_memory: bool = False
    """The loss kernel keeps one tile of logits and no FP32 gradient of the LM head, and computes logits again in the
    backward pass: four matmuls instead of three (docs/loss.md has both measured)."""
    optimizer: OptimizerSection


class WarmupSection(Section):
    data: Line
    """JSONL of demonstrations: the train file's fields and `response`."""
    num_steps: Count
    """Optimiser steps of supervised warm-up before RL."""
    sequences_per_step: Count
    """Demonstrations an optimiser step."""
    optimizer: OptimizerSection


class TransformersEngineSection(Section):
    name: Literal["transformers"] = "transformers"
    num_engines: Processes = 1
    """Engine processes. Each takes a share of the prompts."""
    max_batch_tokens: Count = 65536
    """Upper limit of (prompt + response) x sequences decoded together; requests are sorted by length into batches."""
    num_threads: Threads = 1
    """CPU threads an engine."""


class SGLangEngineSection(Section):
    name: Literal["sglang"] = "sglang"
    num_engines: Processes = 1
    """Servers to launch. One process sends each group of requests to the least loaded; it also keeps the weights that
    were published last, in its machine's memory, for servers that are lost and come back."""
    servers: tuple[Line, ...] = ()
    """URLs of servers that somebody else runs, such as http://10.0.0.7:30000. None is launched then."""
    api_key_file: Line | None = None
    """File with the key of `servers` in its first line. Launched servers get a random key each."""
    python: Line = ".venv-sglang/bin/python"
    """Interpreter of the environment that SGLang is installed in; `make sglang-cpu` makes the default's."""
    tensor_parallel: Processes = 1
    """GPUs a replica: SGLang's --tp-size."""
    data_parallel: Processes = 1
    """Replicas inside a server: SGLang's --dp-size."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the servers' weights and of what is sent to them. auto: the checkpoint's own."""
    flags: dict[FlagName, FlagValue] = {}
    """Further flags of SGLang by name, such as {mem-fraction-static: 0.8}. true: given without a value; false: not."""
    num_threads: Threads = 1
    """CPU threads a server."""
    max_concurrent_requests: Count = 256
    """Requests that one server is given at once. What it can't run (--max-running-requests) waits in its queue."""
    request_timeout_s: Seconds = 1800.0
    """A request that takes longer is aborted and sent again."""
    max_attempts: Count = 4
    """Times a request is sent before the run ends with an error. The loss of a server doesn't count."""
    health_interval_s: Seconds = 10.0
    """How often a launched server is asked whether it lives."""
    hang_timeout_s: Seconds = 180.0
    """A launched server that gives no sign of life for so long is killed and started again. More than a sync takes."""
    max_restarts: CountOrNone = 5
    """Deaths in a row, each within a minute of the start, after which the run ends."""
    sync: Literal["disk", "distributed", "tensor"] = "distributed"
    """How weights travel: by files that all servers can read; broadcast; by shared memory to servers on the engine's
    machine."""
    broadcast: Literal["gloo", "nccl"] = "gloo"
    """Of sync=distributed. gloo: from the engine process's memory. nccl: from the GPU of rank 0, which it shares; needs
    GPUs, and servers on others."""
    sync_dir: Line | None = None
    """Of sync=disk. Whole weights stand in it twice for a moment. None: a temporary directory of the engine's machine."""
    sync_timeout_s: Seconds = 600.0
    """A server that takes longer for a step of a weight update is left out until the next one."""

    @model_validator(mode="after")
    def _asked_before_killed(self) -> SGLangEngineSection:
        if self.hang_timeout_s <= self.health_interval_s:
            raise ValueError(
                f"hang_timeout_s={self.hang_timeout_s:g} is not above health_interval_s={self.health_interval_s:g}: a "
                "server would be killed before it was asked; raise it"
            )
        return self

    @property
    def gpus_a_server(self) -> int:
        return self.tensor_parallel * self.data_parallel

    @property
    def uses_nccl(self) -> bool:
        return self.sync == "distributed" and self.broadcast == "nccl"


EngineConfig = Annotated[TransformersEngineSection | SGLangEngineSection, Field(discriminator="name")]


class RolloutSection(Section):
    engine: EngineConfig = TransformersEngineSection()
    prompts_per_step: Count
    """Prompts (groups) a rollout."""
    samples_per_prompt: Count
    """G, completions of each prompt; group-relative advantages need at least 2."""
    max_response_tokens: Count
    """Longest response; longer ones end with finish_reason `length`."""
    temperature: TemperatureOrZero = 1.0
    """Sampling temperature; pi is taken at the same one. Must be > 0 to train."""
    top_p: Share = 1.0
    """Must be 1 to train: otherwise the reported mu is not the distribution sampled from."""
    top_k: TopK = -1
    """Must be -1 (off) to train, for the same reason."""
    resample_equal_groups: CountOrNone = 0
    """Draw up to this many further rounds of prompts to replace groups whose rewards are all equal (no gradient)."""
    max_staleness: CountOrNone = 0
    """k: the engines draw for the next k steps while the trainer trains, and a sample is trained on at most k policy
    versions after it was drawn; an older one is dropped and counted. 0: generation and training take turns. With 1 a
    step takes about the longer of both."""
    dump: bool = False
    """Keep what every step trained on, in `rollouts/` of the run directory."""
    from_dump: Line | None = None
    """Directory of dumped rollouts to train on, step by step, instead of new ones: no engine and no reward is started.
    What `train --from-dump` sets. None: draw."""


class DataSection(Section):
    train: Line
    """JSONL of training prompts."""
    heldout: Line | None = None
    """JSONL of held-out prompts; evaluated before and after."""
    prompt_field: Line = "prompt"
    answer_field: Line = "answer"
    system_prompt: Text | None = None
    max_prompt_tokens: Count | None = None
    """Longer prompts are refused by name. None: the model's context minus max_response_tokens."""
    shuffle: bool = True


class ArithmeticReward(Section):
    name: Literal["arithmetic"] = "arithmetic"


class MathReward(Section):
    name: Literal["math"] = "math"
    timeout_s: Seconds = 5.0
    """Time limit a problem; beyond it the reward is 0 and the time-out is counted."""
    num_workers: Processes | None = None
    """Processes that compute rewards at the same time, started as they are needed. None: the cores that they may use."""


class ImportedReward(Section):
    name: Literal["import"] = "import"
    path: ImportPath
    """`package.module:function`, called as function(response: str, answer: str, prompt: Prompt), with `num_tokens`,
    `finish_reason` and `metadata` by keyword where its signature names them. It may be async. It returns a number, or a
    dictionary of numbers: `reward`, and metrics that the run shows as reward/NAME."""
    timeout_s: Seconds = 10.0
    """Time limit of a call; beyond it the reward is 0 and the time-out is counted."""
    num_workers: Processes | None = None
    """Processes that compute rewards at the same time, started as they are needed. None: the cores that they may use. A
    plain function that waits for others (a service, a sandbox) may have many more."""
    concurrency: Count = 512
    """Calls of an async function at a time, over all workers. A plain function has one a worker."""
    batch_size: Count | None = None
    """The function takes lists (of responses, answers, prompts) of at most so many, and returns a list of rewards. In
    training a list holds responses of one prompt. None: it takes one response."""


RewardConfig = Annotated[ArithmeticReward | MathReward | ImportedReward, Field(discriminator="name")]


class AdvantageSection(Section):
    name: Literal["group_mean", "group_mean_std", "rloo"] = "group_mean"
    """group_mean: reward - group mean (the paper's); group_mean_std: over the group's std; rloo: leave-one-out."""


class EvalSection(Section):
    every: CountOrNone = 0
    """Evaluate on the held-out file every so many steps. 0: only before and after."""
    samples_per_prompt: Count = 1
    temperature: Temperature = 1.0
    max_prompts: Count | None = None
    """Use the first so many held-out prompts. None: all."""


class CheckpointSection(Section):
    every: CountOrNone = 0
    """Save every so many steps (and always at the end). 0: only at the end."""
    keep: Count = 2
    """How many of the newest checkpoints stay on disk."""
    fallback: bool = False
    """A resumed run whose newest checkpoint is damaged or incomplete says so, and continues from the one before.
    false: it ends with an error that names the file; a job that Slurm requeued falls back all the same."""
    save_hf: bool = True
    """Write the trained model as a Hugging Face checkpoint at the end."""


class WandbSection(Section):
    enabled: bool = False
    mode: Literal["offline", "online"] = "offline"
    """offline needs no account and no network; `wandb sync` uploads later."""
    project: Line = "drpo_megatron"
    entity: Line | None = None


class ProfileSection(Section):
    first_step: Count
    """Step of the run whose training is the first in the trace. The very first is slower than the others."""
    num_steps: Count = 1
    """Tens of MB a step."""

    @property
    def last_step(self) -> int:
        return self.first_step + self.num_steps - 1


class MetricsSection(Section):
    console: Literal["auto", "progress", "plain", "off"] = "auto"
    """`progress`: a live table; `plain`: one line a step (logs, CI); auto: by whether stdout is a terminal."""
    tensorboard: bool = False
    wandb: WandbSection = WandbSection()
    plot: bool = True
    """Draw `training.png` in the run directory at the end."""
    profile: ProfileSection | None = None
    """Trace trainer rank 0 with torch's profiler for a few steps, into RUN_DIR/profile/. Those steps are slower."""


class ClusterSection(Section):
    ray_address: Address | None = None
    """None: a Ray of our own on this machine. `auto` or HOST:PORT joins a running one."""
    num_machines: Processes = 1
    """How many machines of the cluster at ray_address the run waits for before it starts."""
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    """disaggregated: engines have GPUs of their own. colocated: SGLang servers stand on the ranks' GPUs; drawing and
    training take turns, and the servers give their weights' and cache's memory back while the ranks train."""
    startup_timeout_s: Seconds = 300.0
    """How long actors may take to start before the run ends with an error that names the one that did not."""
    step_timeout_s: Seconds = 3600.0
    """A process that gives no answer for so long (a training step, a weight update, a checkpoint, a batch of rewards), or
    a collective that waits longer, ends the run. The error names who is stopped or silent, and every process writes its
    stack into its log. More than the longest step takes."""
    rank_threads: Threads = 1
    """OMP_NUM_THREADS of a trainer rank on CPU. More than cores / ranks makes everything crawl."""


class Config(Section):
    """A whole run."""

    run: RunSection
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    objective: ObjectiveConfig
    advantages: AdvantageSection = AdvantageSection()
    trainer: TrainerSection
    precision: PrecisionSection = PrecisionSection()
    warmup: WarmupSection | None = None
    rollout: RolloutSection
    data: DataSection
    reward: RewardConfig
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    metrics: MetricsSection = MetricsSection()
    cluster: ClusterSection = ClusterSection()
