"""The objective section: what is accepted, what is refused and how the message reads; objectives by import path."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from drpo_megatron.config.objective import DRPOConfig, ObjectiveConfig, parse_objective
from drpo_megatron.objectives import REGISTRY, build
from tests.objectives.reference import make_inputs

DOCS = Path(__file__).parents[2] / "docs" / "objectives.md"


@pytest.mark.parametrize("given, resolved", [("paper", 12.5), ("trust-region", 0.15), ("0.3", 0.3), (2, 2.0)])
def test_delta_is_a_number_or_a_preset(given: Any, resolved: float) -> None:
    config = parse_objective({"name": "drpo", "delta": given})
    assert isinstance(config, DRPOConfig) and config.delta == resolved


@pytest.mark.parametrize(
    "config, message",
    [
        ({"name": "drpo"}, "delta\n.*Field required"),
        ({"name": "dppo"}, "delta\n.*Field required"),
        ({"name": "drpo", "delta": 0}, "greater than 0"),
        ({"name": "dppo", "delta": -0.1}, "greater than 0"),
        ({"name": "drpo", "delta": float("inf")}, "less than or equal to 1000000"),
        ({"name": "drpo", "delta": float("nan")}, "greater than 0|finite number"),
        ({"name": "drpo", "delta": "papr"}, r"delta='papr' is neither.*paper \(12.5\), trust-region \(0.15\)"),
        ({"name": "drpo", "delta": 0.1, "detla_mask": 0.1}, "detla_mask\n.*not permitted"),
        ({"name": "drop", "delta": 0.1}, "'drop' found using 'name' does not match.*'drpo'"),
        ({"name": "grpo", "dual_clip": 1.0}, "greater than 1"),
        ({"name": "grpo", "eps_low": 1.5}, "less than or equal to 1"),
        ({"name": "grpo", "correction": {"name": "icepop"}}, "correction=icepop with anchor=rollout"),
        ({"name": "pg", "anchor": "recompute", "correction": {"name": "tis"}}, "'tis' found using 'name'"),
        (
            {"name": "pg", "anchor": "recompute", "correction": {"name": "icepop", "min_ratio": 6}},
            "min_ratio=6.0 is not below max_ratio=5.0",
        ),
        ({"name": "dppo", "delta": 0.1, "divergence": "topk_tv", "anchor": "recompute"}, "engine's top tokens"),
        ({"name": "pg", "kl_ref": {"coef": 0.1, "estimator": "k4"}}, "'k1', 'k2' or 'k3'"),
        ({"name": "import", "path": "no_colon"}, "not of the form package.module:function"),
    ],
)
def test_bad_sections_are_refused_with_the_reason(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        build(config)
    assert re.search(message, str(error.value), re.DOTALL), str(error.value)


def test_every_config_section_has_a_formula_and_a_row_in_the_docs() -> None:
    names = set(TypeAdapter(ObjectiveConfig).json_schema()["discriminator"]["mapping"])
    assert names == set(REGISTRY) | {"import"}
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    for name in names:
        assert any(f"`{name}`" in row.split("|")[1] for row in rows), f"docs/objectives.md has no row for {name}"


def test_the_config_imports_no_torch() -> None:
    code = "import sys, drpo_megatron.config.objective; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_delta_that_corrects_nothing_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"delta=12.5.*within \[0.92, 1.08\].*no update is ever corrected"):
        build({"name": "drpo", "delta": "paper"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build({"name": "drpo", "delta": "trust-region"})


def test_the_boundary_and_the_needs_are_announced_by_the_objective() -> None:
    assert build({"name": "drpo", "delta": 0.2}).delta == 0.2
    assert build({"name": "dppo", "delta": 0.2}).delta == 0.2
    assert build({"name": "dppo", "delta": 0.2, "divergence": "binary_kl"}).delta is None
    topk = build({"name": "dppo", "delta": 0.2, "divergence": "topk_kl", "num_topk": 7})
    assert topk.num_topk == 7 and build({"name": "dppo", "delta": 0.2}).num_topk == 0
    with pytest.raises(ValueError, match="needs topk_logprobs"):
        topk(make_inputs(torch.zeros(1), torch.zeros(1), torch.ones(1)))


def test_objectives_travel_to_other_processes() -> None:
    objective = build({"name": "drpo", "delta": 0.15})
    inputs = make_inputs(torch.tensor([-1.0]), torch.tensor([-1.5]), torch.tensor([1.0]))
    assert torch.equal(pickle.loads(pickle.dumps(objective))(inputs).coef, objective(inputs).coef)


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The worked example of docs/objectives.md, saved as a module outside the package."""
    (example,) = re.findall(r"```python\n(# power_objective\.py\n.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "power_objective.py").write_text(example)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "power_objective", raising=False)
    return "power_objective"


def test_the_docs_example_runs_by_import_path_and_its_coefficient_is_autograd(user_module: str) -> None:
    objective = build({"name": "import", "path": f"{user_module}:power", "options": {"exponent": 0.5}})
    log_pi = torch.tensor([-0.1, -3.0, -8.0], dtype=torch.float64, requires_grad=True)
    log_mu = torch.tensor([-0.4, -2.0, -7.5], dtype=torch.float64)
    a = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    loss = -a * (log_pi.exp() / log_mu.exp()) ** 0.5 / 0.5
    (expected,) = torch.autograd.grad(loss.sum(), log_pi)
    outputs = objective(make_inputs(log_pi.detach(), log_mu, a))
    torch.testing.assert_close(outputs.loss, loss.detach())
    torch.testing.assert_close(outputs.coef, expected)
    torch.testing.assert_close(outputs.weight, -expected / (a * (log_pi - log_mu).exp().detach()))


def test_corrections_and_kl_wrap_an_imported_objective_too(user_module: str) -> None:
    shared = {"anchor": "recompute", "correction": {"name": "tis_token", "max_ratio": 1.0}}
    objective = build({"name": "import", "path": f"{user_module}:power", "options": {"exponent": 1.0}, **shared})
    log_pi, log_mu, log_old = (torch.tensor([x]) for x in (-1.0, -2.0, -2.5))
    inputs = make_inputs(log_pi, log_mu, torch.ones(1), old_logprobs=log_old)
    expected = -torch.exp(log_pi - log_old) * torch.exp(log_old - log_mu)
    torch.testing.assert_close(objective(inputs).coef, expected)


@pytest.mark.parametrize(
    "path, message",
    [
        ("no_such_module_anywhere:f", "module 'no_such_module_anywhere' cannot be imported.*PYTHONPATH"),
        ("power_objective:pwoer", "power_objective has no callable 'pwoer'; it has:.*power"),
    ],
)
def test_a_function_that_cannot_be_imported_is_named(user_module: str, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"name": "import", "path": path})


def test_outputs_of_the_wrong_kind_or_shape_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_objective.py").write_text(
        "from drpo_megatron.objectives import ObjectiveOutputs\n"
        "def scalar(inputs, options):\n"
        "    return ObjectiveOutputs(inputs.logprobs.sum(), inputs.logprobs, inputs.logprobs)\n"
        "def tensor(inputs, options):\n"
        "    return inputs.logprobs\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    inputs = make_inputs(torch.zeros(2), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"wrong_objective:scalar returned loss of shape \(\); it must be \(2,\)"):
        build({"name": "import", "path": "wrong_objective:scalar"})(inputs)
    with pytest.raises(ValueError, match="returned Tensor; return an ObjectiveOutputs"):
        build({"name": "import", "path": "wrong_objective:tensor"})(inputs)
