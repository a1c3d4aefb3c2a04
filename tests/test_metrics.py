"""Statistics merge over micro-batches and ranks to what the whole batch would have given."""

from __future__ import annotations

import math

import pytest
import torch

from drpo_megatron.metrics import Statistic, merge_all, reduce_over
from tests.distributed import run_ranks


def _statistics(values: torch.Tensor) -> dict[str, Statistic]:
    return {
        "a/mean": Statistic.mean(values),
        "a/weighted": Statistic.mean(values, weights=values),
        "a/sum": Statistic.sum(values),
        "a/min": Statistic.min(values),
        "a/max": Statistic.max(values),
        "a/p99": Statistic.of_quantile(values, 0.99),
        "a/effective_share": Statistic.effective_share(values),
    }


def _expected(values: torch.Tensor) -> dict[str, float]:
    v = values.double()
    return {
        "a/mean": v.mean().item(),
        "a/weighted": (v.square().sum() / v.sum()).item(),
        "a/sum": v.sum().item(),
        "a/min": v.min().item(),
        "a/max": v.max().item(),
        "a/effective_share": (v.sum() ** 2 / (v.numel() * v.square().sum())).item(),
    }


def _sample(seed: int, size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) ** 3


def test_merging_parts_gives_the_statistics_of_the_whole() -> None:
    parts = [_sample(0, 10), _sample(1, 0), _sample(2, 990)]
    merged, whole = merge_all(_statistics(part) for part in parts), torch.cat(parts)
    for name, number in _expected(whole).items():
        assert merged[name].value() == pytest.approx(number), name
    assert merged["a/p99"].value() == Statistic.of_quantile(whole, 0.99).value()


def _reduced_on_ranks(rank: int, world_size: int) -> dict[str, float]:
    import torch.distributed as dist

    mine = _sample(rank, 100 if rank == 0 else 0)  # rank 1 has no tokens, and must not drag anything toward 0 or inf
    return {name: s.value() for name, s in reduce_over(_statistics(mine), dist.group.WORLD).items()}


def _reduced_on_full_ranks(rank: int, world_size: int) -> dict[str, float]:
    import torch.distributed as dist

    reduced = reduce_over(_statistics(_sample(rank, 50 * (rank + 1))), dist.group.WORLD)
    return {name: s.value() for name, s in reduced.items()}


@pytest.mark.parametrize(
    "function, whole",
    [
        (_reduced_on_ranks, _sample(0, 100)),
        (_reduced_on_full_ranks, torch.cat([_sample(0, 50), _sample(1, 100)])),
    ],
    ids=["one rank empty", "both ranks"],
)
def test_reduction_over_two_ranks_gives_every_rank_the_statistics_of_the_whole(function, whole) -> None:  # type: ignore[no-untyped-def]
    first, second = run_ranks(2, function)
    assert first == second
    for name, number in _expected(whole).items():
        assert first[name] == pytest.approx(number), name
    assert first["a/p99"] == Statistic.of_quantile(whole, 0.99).value()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_quantile_sketch_is_within_half_a_percent(share: float) -> None:
    values = 10 ** (-7 * _sample(0, 20000))
    exact = values.double().sort().values[math.ceil(share * values.numel()) - 1].item()
    assert Statistic.of_quantile(values, share).value() == pytest.approx(exact, rel=0.005)


def test_nan_is_the_highest_quantile_and_no_crash() -> None:
    values = torch.tensor([0.1, 0.1, 0.1, float("nan")])
    assert Statistic.of_quantile(values, 0.5).value() == pytest.approx(0.1, rel=0.005)
    assert Statistic.of_quantile(values, 0.99).value() == pytest.approx(1.0, rel=0.005)


def test_quantile_of_zeros_is_zero() -> None:
    assert Statistic.of_quantile(torch.zeros(5), 0.99).value() == 0


def test_empty_statistics_are_nan_and_an_empty_sum_is_zero() -> None:
    values = {name: statistic.value() for name, statistic in _statistics(torch.zeros(0)).items()}
    assert values.pop("a/sum") == 0
    assert all(math.isnan(number) for number in values.values())


def test_effective_share_of_equal_ratios_is_one_and_of_one_heavy_ratio_is_one_nth() -> None:
    assert Statistic.effective_share(torch.full((8,), 3.0)).value() == pytest.approx(1)
    assert Statistic.effective_share(torch.tensor([1e9, 1e-9, 1e-9, 1e-9])).value() == pytest.approx(0.25)


def test_kinds_do_not_mix() -> None:
    with pytest.raises(ValueError, match="cannot merge a mean with a max"):
        Statistic.mean(torch.ones(1)).merge(Statistic.max(torch.ones(1)))
