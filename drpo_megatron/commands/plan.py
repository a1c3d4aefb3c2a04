"""`drpo-megatron plan`: memory, communication and time of a recipe before it is submitted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drpo_megatron.commands import BadInput
from drpo_megatron.commands.arguments import memory_size, whole

if TYPE_CHECKING:
    from drpo_megatron.config import Config
    from drpo_megatron.config.hf_config import HFModelConfig
    from drpo_megatron.planner.model import Model
    from drpo_megatron.planner.plan import Plan

_HELP = """\
Say what every rank of a recipe holds, sends and waits for, and whether it fits. Needs config.json of the model, no
weights, data or GPU. Exit code 2 when it does not fit. KEY=VALUE overrides a key of the file.

examples:
  drpo-megatron plan examples/qwen3_30b_a3b_bf16.yaml
  drpo-megatron plan examples/qwen3_30b_a3b_bf16.yaml --gpus 64 --gpu-memory 141GB
  drpo-megatron plan examples/qwen3_235b_a22b.yaml --search
  drpo-megatron plan examples/qwen3_30b_a3b_bf16.yaml parallel.expert=16 --check --json
  drpo-megatron plan examples/qwen3_30b_a3b_bf16.yaml --plot scaling.png
"""


def add(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser("plan", help="memory, layout and time of a recipe", description=_HELP, **style)
    parser.add_argument("arguments", nargs="*", metavar="FILE KEY=VALUE", help="the recipe's YAML file, then overrides")
    parser.add_argument(
        "--gpus", type=whole(1, 2**20), metavar="N", help="of the whole job, engines included; default: the recipe's"
    )
    parser.add_argument(
        "--gpu-memory",
        type=memory_size,
        metavar="SIZE",
        default="80GB",
        help="of one GPU (GB is 2^30 bytes); default 80GB",
    )
    parser.add_argument("--search", action="store_true", help="propose layouts that fit, by estimated step time")
    parser.add_argument("--check", action="store_true", help="compare counts with the model that Megatron builds")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw scaling from 8 to 1,024 GPUs to a PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    try:
        config, hf_config, model = _read(args)
        from drpo_megatron.planner.plan import make_plan, on_gpus

        if args.gpus is not None:
            config = on_gpus(config, args.gpus)
        _check_layout(config, hf_config)
        plan = make_plan(config, model, args.gpu_memory)
        _print(args, config, hf_config, model, plan)
        if args.plot:
            from drpo_megatron.planner.plot import draw_scaling

            draw_scaling(args.plot, config, model, hf_config, args.gpu_memory)
    except (ValueError, OSError) as error:
        raise BadInput(error) from error
    if not plan.fits:
        raise BadInput(what_to_change(config, hf_config, model, plan))


def _read(args: argparse.Namespace) -> tuple[Config, HFModelConfig, Model]:
    from drpo_megatron.config import load_config
    from drpo_megatron.config.hf_config import read_hf_config

    if not args.arguments or "=" in args.arguments[0]:
        raise ValueError("which recipe? give a YAML file, such as examples/qwen3_30b_a3b_bf16.yaml")
    config = load_config(args.arguments[0], args.arguments[1:])
    hf_config = read_hf_config(config.model.hf_path)
    from drpo_megatron.planner.model import read_model

    return config, hf_config, read_model(config.model.hf_path)


def _check_layout(config: Config, hf_config: HFModelConfig) -> None:
    from drpo_megatron.config.checks import layout_problems
    from drpo_megatron.config.problems import listed

    if problems := layout_problems(config, hf_config):
        raise ValueError(listed("this layout can't train this model", problems))


def _print(args: argparse.Namespace, config: Config, hf_config: HFModelConfig, model: Model, plan: Plan) -> None:
    from drpo_megatron.planner.search import search

    proposals = search(config, model, hf_config, args.gpu_memory) if args.search else None
    built = None
    if args.check:
        from drpo_megatron.planner.built import built_stages, differences

        [built] = built_stages([config])
        if found := differences(model, config, built):
            raise ValueError(f"Megatron builds another model than was planned: {'; '.join(found)}")
    if args.json:
        fields: dict[str, Any] = plan.as_dict()
        if proposals is not None:
            fields["proposals"] = [proposal.as_dict() for proposal in proposals]
        if built is not None:
            fields["checked_stages"] = sorted(built)
        print(json.dumps(fields))
        return
    from drpo_megatron.planner.report import print_plan, print_proposals

    print_plan(config, model, plan)
    if built is not None:
        print(
            f"checked: stages {', '.join(map(str, sorted(built)))} hold what Megatron builds at {plan.parallel.num_ranks} ranks"
        )
    if proposals is not None:
        print_proposals(proposals, plan)


def what_to_change(config: Config, hf_config: HFModelConfig, model: Model, plan: Plan) -> str:
    from drpo_megatron.planner.hardware import ENGINE_MEMORY_SHARE
    from drpo_megatron.planner.report import gib
    from drpo_megatron.planner.search import remedies

    if not plan.ranks_fit:
        fixes = remedies(config, model, hf_config, plan.gpu_bytes)
        advice = (
            f"any one of these makes it fit: {', '.join(fixes)}" if fixes else "no single change of the layout does"
        )
        return (
            f"a trainer rank needs {gib(plan.fullest.total)}, and {gib(plan.usable_bytes)} of a GPU's {gib(plan.gpu_bytes)} "
            f"can be used; {advice}; --search proposes layouts, --gpus more GPUs"
        )
    rollout = plan.rollout
    if plan.engines_fit:
        return (
            f"rollout.engine.flags.mem-fraction-static={plan.asked_share:g} (SGLang takes about {ENGINE_MEMORY_SHARE} if it is "
            f"not given) is too much with cluster.placement=colocated, beside the ranks' parameters, gradients and optimizer "
            f"states; set it to at most {plan.engine_share:g}"
        )
    return (
        f"an engine has {gib(rollout.cache_bytes)} of a GPU left for keys and values after {gib(rollout.weight_bytes)} of "
        f"weights, too little for one sequence; use rollout.engine.name=sglang with a larger "
        f"rollout.engine.tensor_parallel than {rollout.gpus_per_replica}, or a lower rollout.max_response_tokens"
    )
