"""Where a transformers model keeps every tensor of its checkpoint.

transformers 5 keeps a layer's experts stacked, `experts.gate_up_proj` [E, 2 I, H] and `experts.down_proj` [E, H, I], and
calls some modules by names of its own; checkpoints mostly hold every expert's matrices and keep their authors' names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

_GATE_UP = (("gate_proj", "up_proj"), ("w1", "w3"))
_DOWN = ("down_proj", "w2")
"""What checkpoints call the matrices of one expert: most, and Mixtral's."""


def checkpoint_slots(model: torch.nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Checkpoint name -> the part of the model's memory that holds it.

    Args:
        names: every tensor's name in the checkpoint.

    Raises: ValueError that names the parameters which none of the names fits.
    """
    known = frozenset(names)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    slots: dict[str, torch.Tensor] = {}
    homeless: list[str] = []
    for name, parameter in model.state_dict(keep_vars=True).items():
        if name in tied:
            continue
        found = next((named for named in _spellings(name, parameter.data) if known.issuperset(named)), None)
        if found is None:
            homeless.append(name)
        else:
            slots |= found
    if homeless:
        raise ValueError(
            f"the checkpoint has no tensors for {len(homeless)} parameters of the engine's model: "
            f"{', '.join(homeless[:5])}{' ...' if len(homeless) > 5 else ''}"
        )
    return slots


def _spellings(name: str, tensor: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Every way in which a checkpoint may hold the parameter."""
    for spelled in (
        name,
        name.replace("model.", "model.language_model.", 1),  # The text model of one with vision.
        name.replace(".mlp.", ".block_sparse_moe."),  # Mixtral.
    ):
        yield {spelled: tensor}
        block, _, matrix = spelled.rpartition(".")
        if block.endswith(".experts") and matrix == "gate_up_proj":
            for gate, up in _GATE_UP:
                yield {
                    f"{block}.{expert}.{which}.weight": half
                    for expert, both in enumerate(tensor)
                    for which, half in zip((gate, up), both.chunk(2), strict=True)
                }
        elif block.endswith(".experts") and matrix == "down_proj":
            for down in _DOWN:
                yield {f"{block}.{expert}.{down}.weight": slot for expert, slot in enumerate(tensor)}
