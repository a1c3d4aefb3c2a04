"""The stages, in their order: each stands on what those before it proved."""

from __future__ import annotations

from drpo_megatron.doctor.accept.stage import Stage

_HERE = "drpo_megatron.doctor.accept"

STAGES = (
    Stage("environment", "versions that go together, devices, file system, limits", f"{_HERE}.environment", 180.0),
    Stage("collectives", "sums over all ranks and every pair are right; bandwidth", f"{_HERE}.collectives", 400.0),
    Stage("loss", "the loss kernel equals float64; its speed beside the others'", f"{_HERE}.loss", 400.0),
    Stage(
        "layouts", "a training step of every layout that fits equals transformers on the CPU", f"{_HERE}.layouts", 900.0
    ),
    Stage("recipes", "Transformer Engine's recipes compute what is emulated", f"{_HERE}.recipes", 600.0),
    Stage("sglang", "a server's probabilities, three ways of sync, memory given back", f"{_HERE}.sglang", 900.0),
    Stage("quickstart", "whole runs learn, in BF16 and FP8", f"{_HERE}.quickstart", 1200.0),
    Stage("throughput", "tokens/s of a 0.6B model beside a bare Megatron-Core loop", f"{_HERE}.throughput", 600.0),
)


def choose(names: str | None) -> list[Stage]:
    """Of `a,b`, in the order above; None: all. ValueError names the ones there are."""
    if names is None:
        return list(STAGES)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [stage.name for stage in STAGES]
    if not wanted or (unknown := [name for name in wanted if name not in known]):
        raise ValueError(
            f"--stages {names}: {', '.join(unknown) if wanted else 'nothing'} is none of {', '.join(known)}"
        )
    return [stage for stage in STAGES if stage.name in wanted]
