"""Every configuration that can't run is refused before anything starts, by the names and values that are wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.config import save_config
from drpo_megatron.config.checks import check_config, check_evaluation
from drpo_megatron.config.hf_config import KNOWN_MODEL_TYPES, HFModelConfig, read_hf_config
from drpo_megatron.config.sections import Config

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}

DENSE = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "intermediate_size": 48,
}
MOE = DENSE | {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": []}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint's small files and a prompt file; the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MOE))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    return tmp_path


def config(**sections: Any) -> Config:
    """16 sequences a rollout in 2 optimiser steps, with `sections` merged into it key by key."""
    defaults: dict[str, dict[str, Any]] = {
        "run": {"name": "checks", "num_steps": 1},
        "model": {"hf_path": "model"},
        "objective": {"name": "drpo", "delta": 0.15},
        "trainer": {
            "optimizer": {"lr": 1e-3},
            "optimizer_steps_per_rollout": 2,
            "max_tokens_per_micro_batch": 64,
        },
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 16},
        "data": {"train": "train.jsonl"},
        "reward": {"name": "arithmetic"},
    }
    merged = {
        name: changes if name == "objective" else defaults.get(name, {}) | changes for name, changes in sections.items()
    }
    return Config.model_validate(defaults | merged)


def problems(**sections: Any) -> list[str]:
    with pytest.raises(ValueError) as raised:
        check_config(config(**sections))
    title, *lines = str(raised.value).splitlines()
    assert title.startswith("this configuration can't run: ")
    return [line.removeprefix("  - ") for line in lines]


def the_problem(**sections: Any) -> str:
    found = problems(**sections)
    assert len(found) == 1, found
    return found[0]


LAYOUTS = [
    {},
    {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2},
    {"num_ranks": 4, "expert": 2, "expert_tensor": 2},
    {"num_ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    {"num_ranks": 8, "tensor": 2, "sequence": True, "pipeline": 2, "context": 2, "expert": 4},
]


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_layouts_that_fit_the_model_pass_without_warning(directory: Path, parallel: dict[str, Any]) -> None:
    assert check_config(config(parallel=parallel)) == []


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (
            {"num_ranks": 4, "tensor": 4, "sequence": True},
            "num_key_value_heads=2 is not divisible by parallel.tensor=4; use 1 or 2",
        ),
        ({"num_ranks": 3, "expert": 3}, "num_experts=4 is not divisible by parallel.expert=3; use 1, 2 or 4"),
        (
            {"num_ranks": 16, "expert_tensor": 16},
            "moe_intermediate_size=24 is not divisible by parallel.expert_tensor=16; use 1, 2, 3, 4, 6, 8, 12 or 24",
        ),
        ({"num_ranks": 2, "tensor": 2}, "set parallel.sequence=true"),
        ({"sequence": True}, "parallel.sequence=true with parallel.tensor=1"),
        ({"num_ranks": 3, "pipeline": 3}, "num_hidden_layers=4 is not divisible by parallel.pipeline=3;"),
        (
            {"num_ranks": 2, "pipeline": 2, "virtual_pipeline": 3},
            "num_hidden_layers=4 is not divisible by parallel.pipeline=2 x parallel.virtual_pipeline=3; use 1, 2 or 4",
        ),
        ({"virtual_pipeline": 2}, "parallel.virtual_pipeline=2 with parallel.pipeline=1"),
        (
            {"num_ranks": 6, "tensor": 2, "sequence": True, "pipeline": 2},
            "parallel.num_ranks=6 is not divisible by tensor x pipeline x context = 2 x 2 x 1 = 4; use a multiple of 4",
        ),
        (
            {"num_ranks": 2, "expert": 4},
            "parallel.num_ranks=2 is not divisible by expert x expert_tensor x pipeline = 4 x 1 x 1 = 4",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(directory: Path, parallel: dict[str, Any], expected: str) -> None:
    rollout = {"prompts_per_step": 96}  # Divisible among all these ranks.
    matching = [problem for problem in problems(parallel=parallel, rollout=rollout) if expected in problem]
    assert len(matching) == 1


@pytest.mark.parametrize("replay", ["measure", "rollout"])
def test_routing_needs_experts_and_an_engine_that_reports_them(directory: Path, replay: str) -> None:
    engine = {"name": "sglang", "python": sys.executable, "flags": {"enable-return-routed-experts": False}}
    owned = the_problem(trainer={"routing_replay": replay}, rollout={"engine": engine})
    assert owned.startswith("rollout.engine.flags.enable-return-routed-experts is set by trainer.routing_replay")
    assert check_config(config(trainer={"routing_replay": replay})) == []
    (directory / "model" / "config.json").write_text(json.dumps(DENSE))
    dense = the_problem(trainer={"routing_replay": replay})
    assert dense.startswith(f"trainer.routing_replay={replay}, but qwen3 is a dense model without experts")
    assert check_config(config(trainer={"routing_replay": "off"})) == []


@pytest.mark.parametrize("key", ["expert", "expert_tensor"])
def test_experts_of_a_dense_model_are_refused(directory: Path, key: str) -> None:
    (directory / "model" / "config.json").write_text(json.dumps(DENSE))
    problem = the_problem(parallel={"num_ranks": 2, key: 2})
    assert problem == f"parallel.{key}=2, but qwen3 is a dense model without experts; set parallel.{key}=1"


def test_a_dense_model_may_have_tensor_parallelism_without_sequence_parallelism(directory: Path) -> None:
    (directory / "model" / "config.json").write_text(json.dumps(DENSE))
    assert check_config(config(parallel={"num_ranks": 2, "tensor": 2})) == []


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"rollout": {"temperature": 0.0}}, "rollout.temperature=0.0"),
        ({"rollout": {"top_p": 0.9}}, "rollout.top_p=0.9 cuts the distribution"),
        ({"rollout": {"top_k": 50}}, "rollout.top_k=50 cuts the distribution"),
        ({"rollout": {"samples_per_prompt": 1}}, "rollout.samples_per_prompt=1 with advantages=group_mean"),
        ({"trainer": {"optimizer_steps_per_rollout": 3}}, "= 16 sequences can't be shared evenly"),
        ({"trainer": {"max_tokens_per_micro_batch": 16}}, "trainer.max_tokens_per_micro_batch=16 can't hold"),
        (
            {"rollout": {"max_response_tokens": 256}, "trainer": {"max_tokens_per_micro_batch": 1024}},
            "rollout.max_response_tokens=256 leaves no room for a prompt in the model's context, "
            "max_position_embeddings=256",
        ),
        ({"parallel": {"num_ranks": 16}}, "are 8 a step, fewer than the 16 data-parallel ranks"),
        ({"objective": {"name": "gspo"}, "parallel": {"num_ranks": 2, "context": 2}}, "objective.name=gspo"),
        (
            {
                "objective": {"name": "grpo", "anchor": "recompute", "correction": {"name": "tis_sequence"}},
                "parallel": {"num_ranks": 2, "context": 2},
            },
            "objective.correction=tis_sequence",
        ),
        (
            {
                "objective": {"name": "import", "path": "mine:f", "sequence_level": True},
                "parallel": {"num_ranks": 2, "context": 2},
            },
            "objective.path=mine:f with sequence_level=true",
        ),
    ],
)
def test_sections_that_contradict_each_other_are_refused(
    directory: Path, sections: dict[str, Any], expected: str
) -> None:
    (directory / "mine.py").write_text("def f(inputs, options): ...\n")
    assert expected in the_problem(**sections)


def test_the_micro_batch_limit_counts_the_padding_of_context_parallelism(directory: Path) -> None:
    rollout = {"max_response_tokens": 16}  # 17 tokens with a prompt of one, 20 as a multiple of 2 x 2.
    parallel = {"num_ranks": 2, "context": 2}
    assert "use at least 20 " in the_problem(
        rollout=rollout, parallel=parallel, trainer={"max_tokens_per_micro_batch": 19}
    )
    assert check_config(config(rollout=rollout, parallel=parallel, trainer={"max_tokens_per_micro_batch": 20})) == []


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({"context": 2}, "parallel.context=2, but qwen3_5_moe has gated delta nets"),
        ({"tensor": 2, "sequence": True}, "linear_num_key_heads=3 is not divisible by parallel.tensor=2"),
    ],
)
def test_a_layout_that_gated_delta_nets_cannot_have_is_refused(
    directory: Path, parallel: dict[str, Any], expected: str
) -> None:
    text = MOE | {"linear_num_key_heads": 3, "linear_key_head_dim": 8, "shared_expert_intermediate_size": 24}
    (directory / "model" / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe", "text_config": text}))
    assert the_problem(parallel={"num_ranks": 2} | parallel).startswith(expected)


def test_warm_up_batches_smaller_than_data_parallelism_are_refused(directory: Path) -> None:
    warmup = {"data": "train.jsonl", "num_steps": 1, "sequences_per_step": 3, "optimizer": {"lr": 1e-3}}
    problem = the_problem(warmup=warmup, parallel={"num_ranks": 4})
    assert problem.startswith("warmup.sequences_per_step=3 is less than the 4 data-parallel ranks")


def test_sequence_level_objectives_run_without_context_parallelism(directory: Path) -> None:
    trainer = {"aggregation": "seq-mean-token-mean"}
    assert check_config(config(objective={"name": "gspo"}, trainer=trainer)) == []


@pytest.mark.parametrize("name", ["gspo", "sapo"])
@pytest.mark.parametrize("aggregation", [None, "token-mean", "seq-mean-token-sum-norm"])
def test_objectives_of_papers_that_count_sequences_alike_say_so_under_another_aggregation(
    directory: Path, name: str, aggregation: str | None
) -> None:
    trainer = {"aggregation": aggregation} if aggregation else {}
    (warning,) = check_config(config(objective={"name": name}, trainer=trainer))
    used = aggregation or "seq-mean-token-sum-norm"
    assert warning.startswith(f"objective.name={name} with trainer.aggregation={used} is not the paper's objective")
    assert warning.endswith("trainer.aggregation=seq-mean-token-mean is the paper's")
    assert check_config(config(objective={"name": "grpo"}, trainer=trainer)) == []


def test_scoring_checks_what_it_reads_and_nothing_else(directory: Path) -> None:
    (directory / "heldout.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    data = {"train": "nowhere.jsonl", "heldout": "heldout.jsonl"}
    check_evaluation(config(data=data, trainer={"max_tokens_per_micro_batch": 1}))
    bad = config(data=data | {"heldout": "nowhere.jsonl"}, rollout={"max_response_tokens": 256})
    (directory / "model" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="this model can't be scored: 3 problems") as raised:
        check_evaluation(bad)
    for name in ("data.heldout: nowhere.jsonl", "rollout.max_response_tokens=256", "has no tokenizer"):
        assert name in str(raised.value)


def test_files_that_are_missing_or_empty_are_all_named(directory: Path) -> None:
    (directory / "empty.jsonl").touch()
    warmup = {"data": "model", "num_steps": 1, "sequences_per_step": 8, "optimizer": {"lr": 1e-3}}
    data = {"train": "nowhere.jsonl", "heldout": "empty.jsonl"}
    missing, empty, no_file = problems(data=data, warmup=warmup)
    assert missing.startswith("data.train: nowhere.jsonl does not exist")
    assert empty.startswith("data.heldout: empty.jsonl is empty")
    assert no_file.startswith("warmup.data: model does not exist or is not a file")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "model has no config.json; it is not a Hugging Face checkpoint"),
        ("{", "config.json is not JSON"),
        ("[]", "config.json holds a list, not an object"),
        (
            json.dumps(DENSE | {"model_type": "llama"}),
            "model_type='llama' is not supported; the supported ones are qwen2",
        ),
        (json.dumps(MOE | {"num_experts": None}), "num_experts is None; it must be a positive integer"),
        (json.dumps({"model_type": "qwen3"}), "num_hidden_layers is missing; it must be a positive integer"),
    ],
)
def test_a_broken_model_config_is_refused(directory: Path, content: str | None, expected: str) -> None:
    file = directory / "model" / "config.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    assert expected in the_problem()


def test_a_missing_checkpoint_or_tokenizer_is_named(directory: Path) -> None:
    assert the_problem(model={"hf_path": "gone"}) == "model.hf_path: the checkpoint directory gone does not exist"
    (directory / "model" / "tokenizer.json").unlink()
    assert the_problem().startswith("model.hf_path: model has no tokenizer")


def test_what_is_no_checkpoint_of_this_model_is_named(directory: Path) -> None:
    checkpoint = directory / "megatron"
    (checkpoint / "hf").mkdir(parents=True)
    missing = the_problem(model={"hf_path": "model", "megatron_path": "megatron"})
    assert "megatron is no Megatron checkpoint (metadata.json, .metadata, common.pt is missing)" in missing
    for name in ("metadata.json", ".metadata", "common.pt"):
        (checkpoint / name).touch()
    (checkpoint / "hf" / "config.json").write_text(json.dumps(MOE | {"num_experts": 8}))
    other = the_problem(model={"hf_path": "model", "megatron_path": "megatron"})
    assert "megatron is of another model than model.hf_path=model" in other


def test_quantised_weights_are_no_start(directory: Path) -> None:
    (directory / "model" / "config.json").write_text(json.dumps(MOE | {"quantization_config": {"quant_method": "fp8"}}))
    assert the_problem().startswith("model.hf_path: model is quantised (fp8), and training starts from weights that ar")


def test_all_problems_are_listed_at_once(directory: Path) -> None:
    found = problems(
        parallel={"num_ranks": 2, "tensor": 2},
        rollout={"temperature": 0.0, "top_k": 5},
        data={"train": "nowhere.jsonl"},
    )
    assert len(found) == 4


@pytest.mark.parametrize(("delta", "num_warnings"), [(0.15, 0), (0.999, 0), (1.0, 1), ("paper", 1)])
def test_a_boundary_that_cannot_be_reached_is_warned_of(directory: Path, delta: Any, num_warnings: int) -> None:
    assert len(check_config(config(objective={"name": "drpo", "delta": delta}))) == num_warnings


def test_the_model_config_is_what_transformers_writes(tmp_path: Path) -> None:
    from tests.tiny import tiny_dense_config, tiny_mixtral_config, tiny_moe_config, tiny_qwen3_5_config

    tiny_moe_config(mlp_only_layers=[0]).save_pretrained(tmp_path / "mixed")
    tiny_moe_config().save_pretrained(tmp_path / "moe")
    tiny_dense_config().save_pretrained(tmp_path / "dense")
    tiny_mixtral_config().save_pretrained(tmp_path / "mixtral")
    assert read_hf_config(tmp_path / "mixed") == HFModelConfig("qwen3_moe", 4, 4, 2, 256, 4, 24, 48)
    assert read_hf_config(tmp_path / "moe") == HFModelConfig("qwen3_moe", 4, 4, 2, 256, 4, 24, None)
    assert read_hf_config(tmp_path / "dense") == HFModelConfig("qwen3", 4, 4, 2, 256, None, None, 48)
    assert read_hf_config(tmp_path / "mixtral") == HFModelConfig("mixtral", 4, 4, 2, 256, 4, 48, None)
    tiny_qwen3_5_config().save_pretrained(tmp_path / "hybrid")
    assert read_hf_config(tmp_path / "hybrid") == HFModelConfig("qwen3_5_moe", 4, 4, 2, 256, 4, 24, None, 20, 2, 8)


def test_train_checks_before_it_loads_anything_heavy(directory: Path) -> None:
    bad = config(rollout={"temperature": 0.0}, parallel={"num_ranks": 2, "tensor": 2})
    save_config(bad, directory / "run.yaml")
    program = (
        "import sys; from drpo_megatron.cli import main; code = main(['train', 'run.yaml']); "
        "print(code, [name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"
    assert done.stderr.startswith("error: this configuration can't run: 2 problems\n  - ")
    assert "Traceback" not in done.stderr and not (directory / "runs").exists()


def test_the_known_model_types_are_the_families() -> None:
    from drpo_megatron.models import FAMILIES

    assert set(KNOWN_MODEL_TYPES) == set(FAMILIES)


def test_checking_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; import drpo_megatron.config.checks; "
        "print([name for name in ('torch', 'transformers', 'ray', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
