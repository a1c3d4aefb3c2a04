"""Scaling curves of a recipe: the same layout with more data parallelism, and the best layout that the search finds."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from drpo_megatron.config import Config
from drpo_megatron.config.checks import layout_problems
from drpo_megatron.config.hf_config import HFModelConfig
from drpo_megatron.config.sections import ParallelSection
from drpo_megatron.files import writing
from drpo_megatron.planner.model import Model
from drpo_megatron.planner.plan import Plan, make_plan, on_gpus
from drpo_megatron.planner.search import search

NUM_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def scaling(config: Config, model: Model, hf_config: HFModelConfig, gpu_bytes: int) -> dict[str, dict[int, Plan]]:
    """Plans that fit, by number of GPUs: `recipe` keeps the layout, `searched` takes the fastest estimate."""
    curves: dict[str, dict[int, Plan]] = {"recipe": {}, "searched": {}}
    for num_gpus in NUM_GPUS:
        if (scaled := _on_gpus(config, num_gpus)) and not layout_problems(scaled, hf_config):
            plan = make_plan(scaled, model, gpu_bytes)
            if plan.fits:
                curves["recipe"][num_gpus] = plan
        free = config.model_copy(update={"parallel": ParallelSection(num_ranks=config.parallel.num_ranks)})
        if (scaled := _on_gpus(free, num_gpus)) and (found := search(scaled, model, hf_config, gpu_bytes)):
            curves["searched"][num_gpus] = found[0]
    return curves


def _on_gpus(config: Config, num_gpus: int) -> Config | None:
    """None: the layout has no such size."""
    try:
        return on_gpus(config, num_gpus)
    except ValueError:
        return None


def draw_scaling(path: Path, config: Config, model: Model, hf_config: HFModelConfig, gpu_bytes: int) -> None:
    """Step time, throughput a GPU, and memory of the fullest rank over the number of GPUs."""
    curves = scaling(config, model, hf_config, gpu_bytes)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    labels = {"recipe": "the recipe's layout", "searched": "fastest layout by the estimate"}
    for name, plans in curves.items():
        style = {"marker": "o", "label": labels[name], "linestyle": "-" if name == "recipe" else "--"}
        numbers = list(plans)
        axes[0].plot(numbers, [plan.time.total_s for plan in plans.values()], **style)
        axes[1].plot(numbers, [plan.tokens_per_s_per_gpu for plan in plans.values()], **style)
        axes[2].plot(numbers, [plan.fullest.total / 2**30 for plan in plans.values()], **style)
    axes[0].set(title="Estimated time of a step (s)", yscale="log")
    axes[1].set(title="Estimated tokens/s a GPU")
    axes[2].set(title="Memory of the fullest trainer rank (GiB)")
    axes[2].axhline(gpu_bytes / 2**30, color="grey", linewidth=0.8)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(NUM_GPUS, [str(number) for number in NUM_GPUS])
        axis.set_xlabel("GPUs, engines included")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{config.run.name}: {model.num_parameters / 1e9:.1f} B parameters, the same work a step")
    with writing(path, "wb") as file:
        figure.savefig(file, dpi=120, format=Path(path).suffix[1:] or "png")
    plt.close(figure)
