"""The policy loss on one process: agreement with dense float64, and every line of its contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from drpo_megatron.objectives import build
from drpo_megatron.trainer.vocab_parallel import PolicyLossOutput, vocab_parallel_logprobs, vocab_parallel_policy_loss
from tests.loss.reference import Case, make_case, reference_policy_loss, relative_error

DRPO = build({"name": "drpo", "delta": 0.15})
MODES = {"fused": {}, "chunked": {"chunk_bytes": 4096}, "low_memory": {"low_memory": True}}
TOLERANCE = 1e-5
"""Of the largest magnitude (of the loss: of its rows' sum of magnitudes, since rows cancel). FP32's unit roundoff, 6e-8,
times sqrt(n) of sums of 32 to 211 summands, and times e^(log pi - log mu) in the coefficients: some 1e-6, on any machine.
A wrong row, shard, chunk or temperature is off by 1e-2 and more."""
REORDERED = 2e-6
"""The same numbers, summed in another order: sqrt(211) unit roundoffs are 9e-7, and each side has its own."""

OBJECTIVES: dict[str, dict[str, Any]] = {
    "drpo": {"name": "drpo", "delta": 0.15},
    "dppo": {"name": "dppo", "delta": 0.05},
    "grpo": {"name": "grpo"},
    "spo": {"name": "spo", "eps": 0.5},
    "pg": {"name": "pg"},
    "cispo": {"name": "cispo"},
    "sapo": {"name": "sapo"},
    "sft": {"name": "sft"},
    "gspo": {"name": "gspo"},
    "topk": {"name": "dppo", "divergence": "topk_tv", "delta": 0.05, "num_topk": 5},
    "recompute": {"name": "grpo", "anchor": "recompute", "correction": {"name": "tis_token"}},
    "tis_sequence": {"name": "grpo", "anchor": "recompute", "correction": {"name": "tis_sequence"}},
    "kl_ref": {"name": "drpo", "delta": 0.15, "kl_ref": {"coef": 0.1}},
}


@pytest.fixture(params=MODES, name="mode")
def _mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MODES[request.param]


def run(case: Case, objective: Any = DRPO, **options: Any) -> tuple[PolicyLossOutput, torch.Tensor, torch.Tensor]:
    """Output, gradient of hidden and gradient of weight."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    out = vocab_parallel_policy_loss(hidden, weight, *case.vectors(), objective=objective, **options)
    out.loss.backward()
    return out, hidden.grad, weight.grad


def assert_agrees(case: Case, objective: Any = DRPO, mode: dict[str, Any] | None = None, **options: Any) -> None:
    out, grad_hidden, grad_weight = run(case, objective, **(mode or {}), **options)
    options.pop("vocab_size", None)
    expected = reference_policy_loss(case, objective, **options)
    assert (out.loss - expected.loss).abs() < TOLERANCE * expected.loss_magnitude
    for name in ("logprobs", "entropy", "coef"):
        assert relative_error(getattr(out, name), getattr(expected, name)) < TOLERANCE, name
    assert relative_error(grad_hidden, expected.grad_hidden) < TOLERANCE
    assert relative_error(grad_weight[: case.weight.shape[0]], expected.grad_weight) < TOLERANCE


def assert_reordered(case: Case, ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> None:
    """The loss, then tensors: equal but for the order of sums. Matrices of another shape are summed in another order on
    some machines, so that not even the same rows need be the same bits."""
    assert (ours[0] - theirs[0]).abs() <= REORDERED * reference_policy_loss(case, DRPO).loss_magnitude
    for mine, expected in zip(ours[1:], theirs[1:], strict=True):
        assert relative_error(mine, expected) <= REORDERED


def extras(case: Case, objective: Any) -> dict[str, torch.Tensor]:
    """The optional inputs that `objective` asks for."""
    size = case.targets.shape[0]
    generator = torch.Generator().manual_seed(9)
    near = case.behavior_logprobs + 0.2 * torch.randn(size, generator=generator)
    found: dict[str, torch.Tensor] = {}
    if objective.needs_old_logprobs:
        found["old_logprobs"] = near.clamp(max=0)
    if objective.needs_reference_logprobs:
        found["reference_logprobs"] = near.clamp(max=0)
    if objective.sequence_level:
        found["sequence_ids"] = torch.arange(size) // 12
    if objective.num_topk:
        logits = torch.randn(size, case.weight.shape[0], generator=generator)
        top = logits.log_softmax(-1).topk(objective.num_topk)
        found["topk_ids"], found["topk_behavior_logprobs"] = top.indices, top.values
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_agrees_with_dense_float64(name: str, mode: dict[str, Any]) -> None:
    case, objective = make_case(), build(OBJECTIVES[name])
    if objective.num_topk:
        case = case.with_(targets=case.targets.clamp(min=0), weights=torch.ones(48) / 48)
    assert_agrees(case, objective, mode, **extras(case, objective))


def test_temperature_and_entropy_agree_with_dense_float64(mode: dict[str, Any]) -> None:
    assert_agrees(make_case(), DRPO, mode, temperature=0.7, entropy_coef=0.3)


def test_bf16_operands_cost_only_the_rounding_of_the_gradients(mode: dict[str, Any]) -> None:
    case = make_case()
    case = case.with_(hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
    out, grad_hidden, grad_weight = run(case, **mode)
    expected = reference_policy_loss(case, DRPO)
    assert (out.loss - expected.loss).abs() < TOLERANCE * expected.loss_magnitude
    assert relative_error(out.logprobs, expected.logprobs) < TOLERANCE
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    assert relative_error(grad_hidden, expected.grad_hidden) < 2**-8
    assert relative_error(grad_weight, expected.grad_weight) < 2**-8


def test_masked_rows_are_never_read(mode: dict[str, Any]) -> None:
    case = make_case()
    masked = case.weights == 0
    poisons = (float("nan"), float("inf"), -float("inf"))
    poison = torch.tensor([poisons[i % 3] for i in range(int(masked.sum()))])
    poisoned = case.with_(
        hidden=case.hidden.clone(), behavior_logprobs=case.behavior_logprobs.clone(), advantages=case.advantages.clone()
    )
    poisoned.hidden[masked] = poison[:, None]
    poisoned.behavior_logprobs[masked] = poison
    poisoned.advantages[masked] = poison.flip(0)
    clean, poisoned = run(case, entropy_coef=0.1, **mode), run(poisoned, entropy_coef=0.1, **mode)
    for name in ("loss", "logprobs", "entropy", "coef", "objective_weight", "num_bad_behavior"):
        torch.testing.assert_close(getattr(poisoned[0], name), getattr(clean[0], name), rtol=0, atol=0)
    for name, statistic in clean[0].metrics.items():
        assert torch.equal(poisoned[0].metrics[name].data, statistic.data), name
    assert torch.equal(poisoned[1], clean[1]) and torch.equal(poisoned[2], clean[2])
    assert (poisoned[1][masked] == 0).all() and (poisoned[0].logprobs[masked] == 0).all()


def test_rows_without_advantage_add_exactly_nothing_but_report_their_logprob(mode: dict[str, Any]) -> None:
    case = make_case()
    idle = (case.advantages == 0) & (case.weights != 0)
    behavior = case.behavior_logprobs.clone()
    behavior[idle] = float("nan")
    out, grad_hidden, grad_weight = run(case.with_(behavior_logprobs=behavior), **mode)
    without, _, grad_weight_without = run(case.with_(weights=case.weights.masked_fill(idle, 0)), **mode)
    assert idle.any() and (grad_hidden[idle] == 0).all() and (out.coef[idle] == 0).all()
    assert_reordered(case, (out.loss, grad_weight), (without.loss, grad_weight_without))
    assert relative_error(out.logprobs, reference_policy_loss(case, DRPO).logprobs) < TOLERANCE
    assert out.num_bad_behavior == int(idle.sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_behavior_is_dropped_and_counted(bad: float, mode: dict[str, Any]) -> None:
    case = make_case()
    behavior = case.behavior_logprobs.clone()
    behavior[[0, 3, 2]] = bad  # row 2 is masked: it does not count
    out, *gradients = run(case.with_(behavior_logprobs=behavior), entropy_coef=0.1, **mode)
    weights = case.weights.clone()
    weights[[0, 3]] = 0
    expected, *expected_gradients = run(case.with_(weights=weights), entropy_coef=0.1, **mode)
    assert out.num_bad_behavior == 2
    assert_reordered(case, (out.loss, *gradients), (expected.loss, *expected_gradients))
    for name, statistic in expected.metrics.items():
        ours = out.metrics[name]
        # A quantile is known to half a percent, by its bins; a mean has the exact number of rows beside its sum.
        assert ours.value() == pytest.approx(statistic.value(), rel=0.01, abs=TOLERANCE, nan_ok=True), name
        assert len(ours.data) != 2 or ours.data[1] == statistic.data[1], name


def test_bad_behavior_raises_and_names_the_row() -> None:
    case = make_case()
    behavior = case.behavior_logprobs.clone()
    behavior[4] = float("nan")
    with pytest.raises(ValueError, match=r"behavior_logprobs\[4\]=nan is not finite.*bad_behavior: drop"):
        run(case.with_(behavior_logprobs=behavior), bad_behavior="raise")


def test_log_mu_above_zero_is_clamped(mode: dict[str, Any]) -> None:
    case = make_case()
    above, zero = case.behavior_logprobs.clone(), case.behavior_logprobs.clone()
    above[0], zero[0] = 0.5, 0.0
    ours, expected = (run(case.with_(behavior_logprobs=b), **mode) for b in (above, zero))
    assert torch.equal(ours[0].loss, expected[0].loss) and torch.equal(ours[1], expected[1])


def test_logits_of_ten_thousand_keep_their_digits(mode: dict[str, Any]) -> None:
    # z = 2500 w_i + w_(i+1) / 4 with whole w in [-4, 4]: the logits are exact, so any error is the softmax's.
    case = make_case(num_tokens=8, hidden_size=8, vocab_size=300)
    weight = torch.randint(-4, 5, (300, 8), generator=torch.Generator().manual_seed(1)).float()
    hidden = 2500 * torch.eye(8) + torch.eye(8).roll(1, dims=1) / 4
    assert (hidden @ weight.T).abs().max() >= 1e4
    targets = torch.where(case.weights == 0, -100, (hidden @ weight.T).argmax(1))
    behavior = torch.full((8,), -3.0)
    case = case.with_(hidden=hidden, weight=weight, behavior_logprobs=behavior, targets=targets)
    assert_agrees(case, DRPO, mode, entropy_coef=0.1)


def test_both_probabilities_underflowed(mode: dict[str, Any]) -> None:
    case = make_case(num_tokens=8, hidden_size=8, vocab_size=20)
    weight = torch.randint(-3, 4, (20, 8), generator=torch.Generator().manual_seed(1)).float()
    weight[0] = 200.0  # every other token has a probability of about exp(-200), below FP32's smallest number
    targets = torch.arange(1, 9)
    logprobs = weight.T.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert (logprobs.float().exp() == 0).all()
    case = case.with_(hidden=torch.eye(8), weight=weight, targets=targets, weights=torch.ones(8))
    case = case.with_(behavior_logprobs=(logprobs + 0.25).float())
    assert_agrees(case, DRPO, mode)


def test_ratio_is_truncated_and_so_is_the_coefficient(mode: dict[str, Any]) -> None:
    case = make_case()
    behavior = case.behavior_logprobs.clone()
    behavior[0] = -1000.0
    case = case.with_(behavior_logprobs=behavior)
    pg = build({"name": "pg"})
    out, grad_hidden, _ = run(case, pg, log_ratio_max=3.0, **mode)
    assert out.coef[0].item() == pytest.approx(-case.advantages[0].item() * torch.tensor(3.0).exp().item())
    assert grad_hidden.isfinite().all()
    assert_agrees(case, DRPO, mode)  # default limit of 20


def test_padding_rows_have_no_probability_and_no_gradient_whatever_they_hold(mode: dict[str, Any]) -> None:
    case = make_case()
    padding = torch.tensor([float("nan"), float("inf"), 1e30])[:, None].expand(3, case.weight.shape[1])
    padded = case.with_(weight=torch.cat([case.weight, padding]))
    out, grad_hidden, grad_weight = run(padded, entropy_coef=0.1, vocab_size=211, **mode)
    expected, expected_hidden, expected_weight = run(case, entropy_coef=0.1, **mode)
    assert_reordered(
        case,
        (out.loss, out.logprobs, grad_hidden, grad_weight[:211]),
        (expected.loss, expected.logprobs, expected_hidden, expected_weight),
    )
    assert (grad_weight[211:] == 0).all()


@pytest.mark.parametrize("num_tokens", [0, 16])
def test_nothing_live_gives_zero_and_no_nan(num_tokens: int, mode: dict[str, Any]) -> None:
    case = make_case(num_tokens=num_tokens)
    case = case.with_(weights=torch.zeros(num_tokens), hidden=torch.full_like(case.hidden, float("nan")))
    out, grad_hidden, grad_weight = run(case, entropy_coef=0.1, **mode)
    assert out.loss.item() == 0 and out.logprobs.shape == (num_tokens,)
    assert grad_hidden.shape == case.hidden.shape and (grad_hidden == 0).all() and (grad_weight == 0).all()


def test_repeatable_bitwise(mode: dict[str, Any]) -> None:
    first, second = run(make_case(), **mode), run(make_case(), **mode)
    assert torch.equal(first[0].logprobs, second[0].logprobs) and torch.equal(first[0].loss, second[0].loss)
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])


@pytest.mark.parametrize("chunk_bytes", [1, 844, 5000, 10**9])
@pytest.mark.parametrize("low_memory", [False, True])
def test_chunk_size_does_not_matter(chunk_bytes: int, low_memory: bool) -> None:
    case = make_case(num_tokens=20)
    ours, expected = run(case, chunk_bytes=chunk_bytes, low_memory=low_memory), run(case)
    torch.testing.assert_close(ours[0].logprobs, expected[0].logprobs, rtol=REORDERED, atol=REORDERED)
    assert_reordered(case, (ours[0].loss, *ours[1:]), (expected[0].loss, *expected[1:]))


def test_packing_and_micro_batch_split_do_not_matter(mode: dict[str, Any]) -> None:
    case = make_case()
    whole, hidden_gradient, weight_gradient = run(case, **mode)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5))
    loss, total, hidden = torch.zeros(()), torch.zeros_like(weight_gradient), torch.zeros_like(hidden_gradient)
    for part in (order[:13], order[13:]):
        vectors = (vector[part] for vector in (case.hidden, *case.vectors()))
        micro = Case(next(vectors), case.weight, *vectors)
        out, hidden[part], grad_weight = run(micro, **mode)
        loss, total = loss + out.loss.detach(), total + grad_weight
        torch.testing.assert_close(out.logprobs, whole.logprobs[part], rtol=REORDERED, atol=REORDERED)
    assert_reordered(case, (loss, total, hidden), (whole.loss, weight_gradient, hidden_gradient))


def test_without_grad_the_numbers_are_the_same_and_no_gradient_exists() -> None:
    case = make_case()
    expected, _, _ = run(case)
    weight = case.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    with torch.no_grad():
        out = vocab_parallel_policy_loss(case.hidden, weight, *case.vectors(), objective=DRPO, main_grad_fusion=True)
    assert not out.loss.requires_grad and weight.grad is None and (weight.main_grad == 0).all()
    torch.testing.assert_close(out.loss, expected.loss.detach())
    torch.testing.assert_close(out.logprobs, expected.logprobs)


def test_logprobs_alone_agree_and_touch_no_gradient() -> None:
    case = make_case()
    weight = case.weight.clone().requires_grad_()
    expected = reference_policy_loss(case, DRPO, temperature=0.7)
    for live in (None, case.weights != 0):
        out = vocab_parallel_logprobs(case.hidden, weight, case.targets, temperature=0.7, live=live, with_entropy=True)
        assert relative_error(out.logprobs, expected.logprobs) < TOLERANCE
        assert relative_error(out.entropy, expected.entropy) < TOLERANCE
        assert not out.logprobs.requires_grad and weight.grad is None


def test_only_the_wanted_gradient_is_made(mode: dict[str, Any]) -> None:
    case = make_case()
    _, expected_hidden, expected_weight = run(case, **mode)
    for frozen in ("hidden", "weight"):
        tensors = {"hidden": case.hidden.clone(), "weight": case.weight.clone()}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name != frozen)
        out = vocab_parallel_policy_loss(*tensors.values(), *case.vectors(), objective=DRPO, **mode)
        out.loss.backward()
        assert tensors[frozen].grad is None
        trained = tensors["weight" if frozen == "hidden" else "hidden"]
        assert torch.equal(trained.grad, expected_weight if frozen == "hidden" else expected_hidden)


class _LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest storage that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_nothing_as_large_as_the_logits_is_ever_made() -> None:
    case = make_case(num_tokens=512, hidden_size=8, vocab_size=4096)
    logits_bytes = 512 * 4096 * 4
    for mode, limit in (({"chunk_bytes": 2**19}, 2**19), ({"low_memory": True, "chunk_bytes": 2**17}, 2**17)):
        with _LargestTensor() as seen:
            run(case, **mode)
        operands = 4096 * 8 * 4  # the weight, and its gradient
        assert seen.largest <= max(2 * limit, operands) < logits_bytes / 7  # row statistics need room for two tiles


def test_inputs_that_do_not_fit_are_named() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"advantages has shape \[47\]; hidden has 48 rows"):
        run(case.with_(advantages=case.advantages[1:]))
    with pytest.raises(ValueError, match=r"targets\[0\]=211 is not a token id below vocab_size=211"):
        run(case.with_(targets=case.targets.clone().index_fill(0, torch.tensor([0]), 211)))
    with pytest.raises(ValueError, match="vocab_size=212 does not fit the LM head's 211 rows"):
        run(case, vocab_size=212)
    with pytest.raises(ValueError, match="temperature=0 is not positive"):
        run(case, temperature=0)
    with pytest.raises(ValueError, match="chunk_bytes=0 is not positive"):
        run(case, chunk_bytes=0)
    with pytest.raises(ValueError, match="objective gspo needs sequence_ids"):
        run(case, build({"name": "gspo"}))
    with pytest.raises(ValueError, match="main_grad_fusion=True needs weight.main_grad"):
        run(case, main_grad_fusion=True)
