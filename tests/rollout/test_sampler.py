"""What is drawn, what is trained on, and what a rollout is after a trip through a file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.rollout.buffer import RolloutBuffer
from drpo_megatron.rollout.dump import read_rollout, write_rollout
from drpo_megatron.rollout.sampler import make_requests, to_samples
from drpo_megatron.types import Completion, Prompt, RolloutGroup

DRAWN_AS = {"model num_layers": 2, "tokenizer": "abc", "rollout.temperature": 1.0}
PROMPTS = [Prompt("a", (1, 2), "3", "1+2="), Prompt("b", (4,), "4", metadata={"level": 2})]


def group(prompt: Prompt, rewards: tuple[float, ...], versions: tuple[int, ...] | None = None) -> RolloutGroup:
    # 0.1 + 0.2 and 1/3 have no short decimal form.
    completions = tuple(
        Completion((5, i), (-(0.1 + 0.2), -1 / 3), "stop", f"5 {i}", version)
        for i, version in enumerate(versions or (0,) * len(rewards))
    )
    return RolloutGroup(prompt, completions, rewards)


def test_every_request_has_a_seed_of_its_own_that_does_not_depend_on_the_order() -> None:
    requests = make_requests(PROMPTS, 4, step=3, seed=0)
    assert [r.request_id for r in requests] == [f"{p}/{i}" for p in "ab" for i in range(4)]
    assert [r.prompt_ids for r in requests] == [(1, 2)] * 4 + [(4,)] * 4
    seeds = {r.request_id: r.seed for r in requests}
    assert {r.request_id: r.seed for r in make_requests(PROMPTS[::-1], 4, step=3, seed=0)} == seeds
    others = make_requests(PROMPTS, 4, step=4, seed=0) + make_requests(PROMPTS, 4, step=3, seed=1)
    assert len({*seeds.values(), *(r.seed for r in others)}) == 24
    assert all(0 <= seed < 2**63 for seed in seeds.values())


def test_request_seeds_are_equal_in_another_process() -> None:
    code = (
        "from drpo_megatron.rollout.sampler import make_requests; from drpo_megatron.types import Prompt;"
        "print(make_requests([Prompt('a', (1,), '')], 1, step=2, seed=7)[0].seed)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == make_requests([Prompt("a", (1,), "")], 1, step=2, seed=7)[0].seed


def test_samples_carry_their_groups_centred_rewards() -> None:
    samples = to_samples(
        [group(PROMPTS[0], (1.0, 0.0, 0.0, 1.0), (6, 6, 7, 7)), group(PROMPTS[1], (1.0,) * 4)], "group_mean"
    )
    assert [s.advantage for s in samples] == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    third = samples[2]
    assert (third.sample_id, third.prompt_ids, third.response_ids) == ("a/2", (1, 2), (5, 2))
    assert (third.behavior_logprobs, third.policy_version) == ((-(0.1 + 0.2), -1 / 3), 7)


def test_the_engines_top_tokens_reach_the_samples_and_the_file(tmp_path: Path) -> None:
    ids, logprobs = ((5, 7), (9, 0)), ((-0.1, -1 / 3), (-0.5, -1.5))
    completion = Completion((5, 1), (-0.1, -2.0), "stop", "5 1", 3, topk_ids=ids, topk_logprobs=logprobs)
    groups = [RolloutGroup(PROMPTS[1], (completion, completion), (0.0, 1.0))]
    sample = to_samples(groups, "group_mean")[0]
    assert (sample.topk_ids, sample.topk_behavior_logprobs) == (ids, logprobs)
    write_rollout(tmp_path / "rollout.jsonl", 1, groups, DRAWN_AS)
    assert read_rollout(tmp_path / "rollout.jsonl", DRAWN_AS)[1] == groups


def test_an_empty_completion_counts_in_its_group_but_is_not_trained() -> None:
    empty = Completion((), (), "abort", "", 0)
    full = group(PROMPTS[0], (1.0,)).completions[0]
    (sample,) = to_samples([RolloutGroup(PROMPTS[0], (empty, full), (0.0, 1.0))], "group_mean")
    assert (sample.sample_id, sample.advantage) == ("a/1", 0.5)


def test_two_groups_of_one_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt a has two groups"):
        to_samples([group(PROMPTS[0], (1.0, 0.0))] * 2, "group_mean")


def test_a_rollout_file_gives_back_the_same_bits(tmp_path: Path) -> None:
    metrics = ({"n": 1 / 3, "format/ok": 1.0}, {})
    with_metrics = replace(group(PROMPTS[1], (1e-300, 2.0)), reward_metrics=metrics)
    groups = [group(PROMPTS[0], (1 / 3, 0.0)), with_metrics]
    write_rollout(tmp_path / "rollout.jsonl", 12, groups, DRAWN_AS)
    assert read_rollout(tmp_path / "rollout.jsonl", DRAWN_AS) == (12, groups)
    assert [p.name for p in tmp_path.iterdir()] == ["rollout.jsonl"]


def written(tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A rollout file of two groups, and its lines."""
    file = tmp_path / "rollout.jsonl"
    write_rollout(file, 3, [group(PROMPTS[0], (1.0, 0.0)), group(PROMPTS[1], (1.0, 0.0))], DRAWN_AS)
    return file, [json.loads(line) for line in file.read_text().splitlines()]


def test_another_file_is_no_rollout(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"id": "a"}')
    with pytest.raises(ValueError, match="line 1 is not the head of a rollout file"):
        read_rollout(tmp_path / "x.jsonl", DRAWN_AS)


def test_a_rollout_file_that_was_cut_off_is_refused_wherever_the_cut_is(tmp_path: Path) -> None:
    file, lines = written(tmp_path)
    whole = file.read_text()
    file.write_text(whole[:-40])
    with pytest.raises(ValueError, match="line 3 is not JSON"):
        read_rollout(file, DRAWN_AS)
    file.write_text("\n".join(map(json.dumps, lines[:2])))
    with pytest.raises(ValueError, match="has 1 groups, but its head promises 2: it was cut off"):
        read_rollout(file, DRAWN_AS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("rewards"), "line 2 is not a rollout group: 'rewards'"),
        (lambda g: g["completions"][1].pop("logprobs"), "line 2 is not a rollout group: .*'logprobs'"),
        (lambda g: g["completions"][1]["logprobs"].pop(), "completion 1 has 2 token_ids and 1 logprobs"),
        (lambda g: g["rewards"].pop(), "it has 2 completions and 1 rewards"),
    ],
)
def test_a_group_that_lacks_something_is_refused_by_line_and_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    file, lines = written(tmp_path)
    change(lines[1])
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=message):
        read_rollout(file, DRAWN_AS)


def test_rollouts_that_were_drawn_otherwise_are_refused_by_every_difference(tmp_path: Path) -> None:
    file, _ = written(tmp_path)
    with pytest.raises(
        ValueError, match="model num_layers is 2 there and 4 here; tokenizer is 'abc' there and 'xyz' here"
    ):
        read_rollout(file, {"model num_layers": 4, "tokenizer": "xyz", "rollout.temperature": 1.0})


def numbered(ticket: int, rewards: tuple[float, ...], versions: tuple[int, ...] | None = None) -> RolloutGroup:
    return group(Prompt(f"p{ticket}", (1,), "1"), rewards, versions)


def test_the_buffer_gives_groups_in_the_order_in_which_they_were_asked_for() -> None:
    buffer = RolloutBuffer(max_staleness=1, replaces_equal_groups=False)
    groups = [numbered(ticket, (1.0, 0.0)) for ticket in range(4)]
    for ticket in (2, 0, 3, 1):
        buffer.put(ticket, groups[ticket])
    assert buffer.take(3) == (groups[:3], [])
    assert buffer.take(1) == (groups[3:], [])


def test_groups_of_equal_rewards_are_the_last_choice_where_they_can_be_replaced() -> None:
    equal, useful = (1.0, 1.0), (1.0, 0.0)
    rewards = [equal, useful, equal, useful, equal]
    groups = [numbered(ticket, r) for ticket, r in enumerate(rewards)]
    expected = {
        # (may be replaced, count): what is chosen, what is passed over, what stays
        (True, 2): ([1, 3], [0, 2], [4]),
        (True, 3): ([1, 3, 0], [2], [4]),
        (False, 3): ([1, 0, 2], [], [3, 4]),
    }
    for (replaces, count), (chosen, passed_over, left) in expected.items():
        buffer = RolloutBuffer(max_staleness=0, replaces_equal_groups=replaces)
        for ticket, each in enumerate(groups):
            buffer.put(ticket, each)
        assert buffer.take(count) == ([groups[i] for i in chosen], [groups[i] for i in passed_over])
        assert list(buffer) == [groups[i] for i in left]


def test_the_buffer_drops_what_its_oldest_completion_makes_too_stale() -> None:
    buffer = RolloutBuffer(max_staleness=1, replaces_equal_groups=False)
    stale, fresh = group(PROMPTS[0], (1.0, 0.0), (3, 5)), group(PROMPTS[1], (1.0, 0.0), (4, 5))
    buffer.put(0, stale)
    buffer.put(1, fresh)
    buffer.drop_stale(policy_version=4)
    assert (len(buffer), buffer.num_dropped) == (2, 0)
    buffer.drop_stale(policy_version=5)
    assert (list(buffer), buffer.num_dropped) == ([fresh], 1)


def test_the_buffer_comes_back_from_json() -> None:
    buffer = RolloutBuffer(max_staleness=0, replaces_equal_groups=False)
    groups = [group(PROMPTS[0], (1 / 3, 0.0)), group(PROMPTS[1], (0.0, 1.0))]
    buffer.put(8, groups[1])
    buffer.put(7, groups[0])
    buffer.num_dropped = 4
    other = RolloutBuffer(max_staleness=0, replaces_equal_groups=False)
    other.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    assert other.num_dropped == 4
    assert other.take(2) == (groups, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g["completions"][0]["logprobs"].__setitem__(1, float("nan")), "holds NaN, which is no JSON"),
        (lambda g: g["completions"][1]["logprobs"].__setitem__(0, float("-inf")), "holds -Infinity, which is no JSON"),
        (
            lambda g: g.update(reward_metrics=[{"n": 1.0}]),
            "is not a rollout group: it has 2 completions and 1 reward_metrics",
        ),
        (lambda g: g.update(reward_metrics=[{"n": "1"}, {}]), "metric n of reward 0 is '1'; metrics must be finite"),
        (
            lambda g: g.update(reward_metrics=[0.5, {}]),
            "is not a rollout group: reward_metrics of completion 0 are 0.5",
        ),
        (
            lambda g: g["completions"][0]["logprobs"].__setitem__(0, 0.7),
            "log mu 0 of completion 0 is 0.7; the log of a",
        ),
        (lambda g: g["completions"][0]["logprobs"].__setitem__(0, "-1"), "log mu 0 of completion 0 is '-1'"),
        (lambda g: g["completions"][0]["token_ids"].__setitem__(0, -1), "token 0 of completion 0 is -1; ids are whole"),
        (lambda g: g["completions"][0]["token_ids"].__setitem__(1, 1.5), "token 1 of completion 0 is 1.5"),
        (lambda g: g["completions"][0]["token_ids"].__setitem__(1, True), "token 1 of completion 0 is True"),
        (lambda g: g["prompt"]["token_ids"].__setitem__(0, None), "token 0 of the prompt is None"),
        (lambda g: g["rewards"].__setitem__(1, float("inf")), "holds Infinity, which is no JSON"),
        (lambda g: g["rewards"].__setitem__(0, None), "reward 0 is None"),
        (lambda g: (g["completions"].clear(), g["rewards"].clear()), "it has no completions"),
    ],
)
def test_numbers_that_nothing_draws_are_refused_by_file_line_and_prompt(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    file, lines = written(tmp_path)
    change(lines[2])
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=rf"{file}, line 3( \(prompt b\):)? {message}"):
        read_rollout(file, DRAWN_AS)
