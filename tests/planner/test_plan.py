"""Plans: arithmetic against closed forms, what fits and what to change, scaling over GPUs, and the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.cli import main
from drpo_megatron.config import Config, load_config
from drpo_megatron.config.checks import layout_problems
from drpo_megatron.config.hf_config import read_hf_config
from drpo_megatron.planner.activations import chunks_in_flight
from drpo_megatron.planner.hardware import RESERVED_BYTES
from drpo_megatron.planner.model import read_model
from drpo_megatron.planner.plan import make_plan, on_gpus
from drpo_megatron.planner.search import remedies, search
from drpo_megatron.planner.step_time import model_flops
from drpo_megatron.planner.work import work_of

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "qwen3_30b_a3b_bf16.yaml"
GPU = 80 * 2**30


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def recipe(*overrides: str) -> Config:
    return load_config(RECIPE, overrides)


def model_of(config: Config) -> Any:
    return read_model(config.model.hf_path)


def test_a_1f1b_stage_holds_as_many_micro_batches_as_there_are_stages_after_it_and_one() -> None:
    four = recipe("parallel={num_ranks: 16, tensor: 2, sequence: true, pipeline: 4}")
    assert [chunks_in_flight(four, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert chunks_in_flight(four, 0, 2) == 2
    virtual = recipe("parallel={num_ranks: 16, tensor: 2, sequence: true, pipeline: 4, virtual_pipeline: 3}")
    # 2 (PP - 1 - stage) + (VPP - 1) PP + 1 chunks.
    assert [chunks_in_flight(virtual, stage, 8) for stage in range(4)] == [15, 13, 11, 9]


def test_traffic_of_a_step_is_that_of_its_collectives() -> None:
    config = recipe("model.recompute=none", "parallel.expert=16")
    plan = make_plan(config, model_of(config), GPU)
    traffic, work = plan.stages[0].traffic, plan.work
    tokens = work.num_tokens / config.parallel.data
    assert work.tokens_per_micro_batch * work.num_micro_batches * work.num_updates == pytest.approx(tokens)
    hidden_states = tokens * 2048 * 2
    # 48 layers dispatch and combine, forward and backward, 8 rows a token over 16 ranks; half the tokens are mine.
    assert traffic["expert"].bytes == pytest.approx(48 * 4 * hidden_states / 2 * 8 * 15 / 16)
    # 48 attention blocks of 5 gathers and scatters; embedding and head 2 each; halves travel.
    assert traffic["tensor"].bytes == pytest.approx((48 * 5 + 4) * hidden_states / 2)
    # 4 optimiser steps: gradients in FP32 and weights in BF16 over 8 ranks.
    assert traffic["data"].bytes == pytest.approx(4 * 6 * plan.stages[0].counts.dense * 7 / 8)
    assert not traffic["expert"].is_within_node and traffic["tensor"].is_within_node


def test_flops_of_a_token_are_6_a_parameter_it_meets_and_attention() -> None:
    config = recipe()
    model, work = model_of(config), work_of(config)
    met = model.num_active_parameters - 151936 * 2048
    # Two matmuls, 2 FLOPs each, with half of a mean sequence; backward is twice forward.
    attention = 48 * 3 * 2 * 2 * (work.mean_tokens / 2) * 4096
    assert model_flops(model, work.mean_tokens) == pytest.approx(6 * met + attention)


def test_a_bubble_shrinks_with_virtual_stages() -> None:
    layout = "num_ranks: 16, tensor: 2, sequence: true, pipeline: 4, expert: 2"
    plain, virtual = recipe(f"parallel={{{layout}}}"), recipe(f"parallel={{{layout}, virtual_pipeline: 4}}")
    plans = [make_plan(config, model_of(config), GPU) for config in (plain, virtual)]
    num = plans[0].work.num_micro_batches
    assert plans[0].time.bubble_share == pytest.approx(3 / (num + 3))
    assert plans[1].time.bubble_share < plans[0].time.bubble_share


def test_on_more_gpus_engines_keep_their_share() -> None:
    config = on_gpus(recipe(), 64)
    assert (config.parallel.num_ranks, config.rollout.engine.num_engines) == (32, 16)
    with pytest.raises(ValueError, match=r"--gpus 40 can't be shared .* multiples of 8 .* use 16, 32, .* GPUs"):
        on_gpus(recipe(), 40)


def test_colocated_engines_use_the_ranks_gpus_and_what_their_states_leave() -> None:
    apart = recipe("parallel.num_ranks=32", "rollout.engine.num_engines=16")
    together = recipe("parallel.num_ranks=32", "rollout.engine.num_engines=16", "cluster.placement=colocated")
    beside, shared = (make_plan(config, model_of(config), GPU) for config in (apart, together))
    assert (beside.num_gpus, shared.num_gpus) == (64, 32)
    # Training needs what it needs: the engines release their memory, all but what a second process reserves.
    assert shared.fullest.total == beside.fullest.total
    assert beside.usable_bytes - shared.usable_bytes == RESERVED_BYTES
    states = max(stage.states.total for stage in shared.stages)
    assert beside.rollout.cache_bytes - shared.rollout.cache_bytes == states + RESERVED_BYTES
    assert shared.rollout.weight_bytes == beside.rollout.weight_bytes
    assert states + shared.engine_share * GPU < GPU - RESERVED_BYTES
    assert not shared.fits  # The recipe's engines ask for 0.85 of a GPU.
    share = f"rollout.engine.flags.mem-fraction-static={shared.engine_share}"
    fitting = recipe("parallel.num_ranks=32", "rollout.engine.num_engines=16", "cluster.placement=colocated", share)
    assert make_plan(fitting, model_of(fitting), GPU).fits
    scaled = on_gpus(together, 64)
    assert (scaled.parallel.num_ranks, scaled.rollout.engine.num_engines) == (64, 32)
    with pytest.raises(ValueError, match=r"--gpus 33 .* use 24, 32, 40, 48 GPUs"):
        on_gpus(together, 33)


def test_a_remedy_makes_a_recipe_fit() -> None:
    config = recipe("parallel.expert=1", "trainer.optimizer.distributed=false")
    model, hf_config = model_of(config), read_hf_config(config.model.hf_path)
    assert not make_plan(config, model, GPU).fits
    found = remedies(config, model, hf_config, GPU)
    assert any(text.startswith("parallel.expert=") for text in found)
    for text in found:
        changed = recipe("parallel.expert=1", "trainer.optimizer.distributed=false", text)
        assert make_plan(changed, model, GPU).ranks_fit, text


def test_searched_layouts_are_allowed_fit_and_come_in_order() -> None:
    config = recipe()
    model, hf_config = model_of(config), read_hf_config(config.model.hf_path)
    plans = search(config, model, hf_config, GPU)
    assert len(plans) > 10
    times = [plan.time.total_s for plan in plans]
    assert times == sorted(times)
    for plan in plans:
        assert plan.fullest.total <= plan.usable_bytes
        assert layout_problems(config.model_copy(update={"parallel": plan.parallel}), hf_config) == []


def outcome(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = outcome(capsys, RECIPE, "--gpus", 64)
    assert code == 0
    for text in ("30.53 B parameters", "64 GPUs = 32 trainer ranks", "optimizer states", "all-to-all", "bubble"):
        assert text in out
    code, out, _ = outcome(capsys, RECIPE, "--search", "--json", "--plot", tmp_path / "scaling.png")
    plan = json.loads(out)
    assert code == 0 and plan["fits"] and len(plan["proposals"]) > 10
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "40"], "use 16, 32, "),
        (["--gpu-memory", "24GB"], r"any one of these makes it fit|no single change"),
        (["parallel.tensor=3"], "num_attention_heads=32 is not divisible by parallel.tensor=3"),
        (["rollout.engine={name: transformers, num_engines: 16}"], "too little for one sequence"),
        (["model.hf_path=nowhere"], "nowhere does not exist"),
    ],
)
def test_a_recipe_that_can_not_fit_ends_with_what_to_change(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, _, err = outcome(capsys, RECIPE, *arguments)
    assert code == 2 and err.startswith("error: ")
    assert re.search(message, err), err


def test_a_size_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", str(RECIPE), "--gpu-memory", "much"])
    assert "'much' is not a size such as 80GB" in capsys.readouterr().err
