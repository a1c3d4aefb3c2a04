"""Checkpoints from strangers: nothing in them is run, and what is damaged is named."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import WriteItemType

from drpo_megatron.checkpoint.checksums import CHECKSUMS_FILE
from drpo_megatron.checkpoint.extra_state import rewritten
from drpo_megatron.checkpoint.fixed_pickle import load_fixed
from drpo_megatron.checkpoint.torch_dist import Box, TorchDistCheckpoint
from drpo_megatron.checkpoint.torch_dist_reader import read_metadata
from drpo_megatron.checkpoint.torch_save import load_saved
from drpo_megatron.conversion.to_megatron import hf_to_megatron
from tests.distributed import run_ranks
from tests.pretended_gpu import fetch
from tests.pretended_gpu.worker import Environment, Ranks
from tests.tiny import random_samples, save_checkpoint, tiny_config, tiny_moe_config

ENUMS = (_MEM_FORMAT_ENCODING, WriteItemType)
"""All that stand in the metadata of a checkpoint."""


PLANTED_IN = ("embedding.word_embeddings.weight", "linear_qkv._extra_state/shard_0_1")
"""Of what every version writes; 0.19's settings are a `common_state` among the shards."""


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.marker,)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def planted(directory: Path, trap: Trap) -> Iterator[str]:
    """Puts the trap into one place after the other, every other one as it was. What is named is the file."""
    good = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    metadata = pickle.loads(good[".metadata"])
    assert ("common.pt" in good) != any(index.fqn.startswith("common_state") for index in metadata.storage_data)
    traps = {".metadata": pickle.dumps(trap), "common.pt": saved({"optimizer": trap})}
    for name, data in traps.items():
        (directory / name).write_bytes(data)
        yield name
        if name in good:
            (directory / name).write_bytes(good[name])
        else:  # Megatron-Core 0.19 writes no common.pt, and reads an older one's.
            (directory / name).unlink()
    for value in (trap, [trap], {"a": torch.zeros(2), "b": trap}):
        for index, place in metadata.storage_data.items():
            if index.fqn.endswith(PLANTED_IN) or index.fqn.startswith("common_state"):
                (directory / "trap.distcp").write_bytes(saved(value))
                changed = metadata.storage_data | {
                    index: replace(place, relative_path="trap.distcp", offset=0, length=len(saved(value)))
                }
                other = pickle.loads(good[".metadata"])
                other.storage_data = changed
                (directory / ".metadata").write_bytes(pickle.dumps(other))
                yield f"trap.distcp: {index.fqn}"
                (directory / ".metadata").write_bytes(good[".metadata"])


def flipped(good: bytes, rng: random.Random) -> bytes:
    bad = bytearray(good)
    for _ in range(rng.choice([1, 1, 8])):
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    return bytes(bad)


def load_all(rank: int, world_size: int, hf_path: str, scratch: str) -> list[str]:
    """Everything that loads, from a checkpoint with a trap or a flipped byte in it. What went wrong in whose words."""
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.checkpoint.megatron import load_weights
    from drpo_megatron.trainer.trainer import Trainer

    trainer = Trainer(tiny_config(hf_path))
    trainer.train_step(random_samples(4, seed=1))
    directory, marker = Path(scratch) / "checkpoint", Path(scratch) / "marker"
    trainer.save_checkpoint(directory)
    (directory / CHECKSUMS_FILE).unlink()  # Who plants a trap doesn't leave them as they were.
    weights = {name: tensor.clone() for name, tensor in trainer.export_weights() if tensor is not None}
    problems: list[str] = []

    def attempt(what: str, call: Callable[[], Any], must_name: str | None) -> None:
        try:
            call()
            message = None
        except ValueError as error:
            message = str(error)
        if marker.exists():
            problems.append(f"{what}: code of the checkpoint was run")
            marker.rmdir()
        if must_name is not None and (message is None or f"{directory}/{must_name}" not in message):
            problems.append(f"{what}: {must_name} is not named: {message}")
        if message is not None and str(directory) not in message:
            problems.append(f"{what}: no file is named: {message}")

    for place in planted(directory, Trap(marker)):
        attempt(f"resume with {place}", lambda: trainer.load_checkpoint(directory), place)
        # Weights are all that is read of a checkpoint to start from, so a trap elsewhere is never even seen.
        is_read = place == ".metadata" or place.startswith("trap.distcp: embedding")
        attempt(f"start with {place}", lambda: load_weights(directory, trainer.chunks), place if is_read else None)
    rng = random.Random(0)
    for name in [".metadata", "__0_0.distcp"] * 8:
        good = (directory / name).read_bytes()
        (directory / name).write_bytes(flipped(good, rng))
        attempt(f"start with a damaged {name}", lambda: load_weights(directory, trainer.chunks), None)
        (directory / name).write_bytes(good)
    trainer.load_checkpoint(directory)
    for name, tensor in trainer.export_weights():
        if tensor is not None and not torch.equal(tensor, weights[name]):
            problems.append(f"{name} has changed")
    return problems


def test_no_checkpoint_runs_code_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    hf_path = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=1))
    [problems] = run_ranks(1, load_all, str(hf_path), str(tmp_path), timeout_s=300)
    assert problems == []


def load_all_there(rank: int, num_ranks: int, environment: Environment, hf_path: str, scratch: str) -> list[str]:
    import importlib.metadata

    assert f"megatron-core=={importlib.metadata.version('megatron-core')}" in fetch.NEWEST_MEGATRON.packages
    return load_all(rank, num_ranks, hf_path, scratch)


def test_neither_does_one_with_the_newest_megatron_core(tmp_path: Path) -> None:
    """Its reader is another one than 0.16.1's, and what is put in its place, too."""
    if problem := fetch.fetch(fetch.NEWEST_MEGATRON):
        pytest.skip(problem)
    hf_path = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=1))
    environment = Environment("cpu-newest", (fetch.NEWEST_MEGATRON.folder,), gpu=False)
    with Ranks(environment) as ranks:
        [problems] = ranks.run(1, load_all_there, str(hf_path), str(tmp_path))
    assert problems == []


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("converted")
    hf_to_megatron(
        save_checkpoint(scratch / "hf", tiny_moe_config(num_hidden_layers=1)),
        scratch / "megatron",
        say=lambda text: None,
    )
    return scratch / "megatron"


def test_flipped_bits_end_in_one_error_that_names_the_file(converted: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(converted, tmp_path / "checkpoint"))
    rng, num_refused = random.Random(1), 0
    for number in range(600):
        file = directory / rng.choice([".metadata", ".metadata", "__0_0.distcp", "metadata.json"])
        good = file.read_bytes()
        file.write_bytes(flipped(good, rng))
        try:
            checkpoint = TorchDistCheckpoint(directory)
            for key, tensor in checkpoint.tensors.items():
                for chunk in tensor.chunks[: 1 + number % 3]:
                    box = Box(key, tuple(chunk.offsets), tuple(chunk.sizes))
                    checkpoint.read(box, torch.empty(box.size, dtype=checkpoint.dtype(key)))
        except ValueError as error:
            num_refused += 1
            assert str(directory) in str(error)
        file.write_bytes(good)
    assert num_refused > 200


def test_flipped_bits_of_objects_end_in_one_error_that_names_the_file() -> None:
    value = {
        "optimizer": {"lr": 1e-3, "betas": (0.9, 0.999), "steps": [1, 2], "name": "adam", "on": True, "none": None},
        "state": torch.arange(6.0).reshape(2, 3).t(),
        "bytes": io.BytesIO(b"abc"),
        "raw": b"\x00\xff",
        "ids": {1, 2},
    }
    rng, good = random.Random(2), saved(value)
    num_refused = 0
    for _ in range(3000):
        try:
            load_saved(flipped(good, rng), "common.pt")
        except ValueError as error:
            num_refused += 1
            assert str(error).startswith("common.pt is damaged: ")
    assert num_refused > 300


def test_objects_come_back_as_torch_reads_them() -> None:
    value = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "steps": [1, 2**70, -1],
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "bytes": b"\x00\xff",
        "ids": {1, 2},
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "shared": [view := torch.arange(4), view[1:]],
        "fp8": torch.arange(3.0).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(True),
    }
    found, expected = load_saved(saved(value), "it"), torch.load(io.BytesIO(saved(value)), weights_only=False)
    assert found.keys() == expected.keys()
    for name, other in expected.items():
        if name == "shared":
            assert [x.tolist() for x in found[name]] == [x.tolist() for x in other]
        elif isinstance(other, torch.Tensor):
            assert (found[name].dtype, found[name].shape) == (other.dtype, other.shape)
            assert torch.equal(found[name].float(), other.float())
        else:
            assert (found[name], type(found[name])) == (other, type(other))


@pytest.mark.parametrize("numbering", [b"r\xff\xff\xff\x7f", b"p2147483647\n"])
def test_a_pickle_that_numbers_billions_of_objects_is_refused(numbering: bytes) -> None:
    """pickle would make room for all of them: 32 GB."""
    with pytest.raises(ValueError, match="it is damaged: it numbers more objects than it has bytes"):
        load_fixed(b"\x80\x04N" + numbering + b".", {}, "it")
    assert load_fixed(b"\x80\x04Nr\x03\x00\x00\x00.", {}, "it") is None


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_read(protocol: int) -> None:
    value = {"a": [1, 2.0, "é" * 70000, 2**900, -(2**31), None, True, (1, 2, 3, 4)], "b" * 300: {"c": [{}, ()]}}
    assert load_fixed(pickle.dumps(value, protocol), {}, "it") == value


@pytest.mark.parametrize("stride", [(1, 2), (3, -1), (10**12, 1)])
def test_a_tensor_beyond_its_storage_is_refused(stride: tuple[int, int]) -> None:
    """torch would enlarge the storage: to terabytes, if the file says so."""

    class Beyond:
        def __reduce__(self) -> Any:
            storage = torch.arange(6.0).untyped_storage()
            arguments = (torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True), 0)
            return torch._utils._rebuild_tensor_v2, (*arguments, (3, 4), stride, False, OrderedDict())

    with pytest.raises(ValueError, match="it is damaged: a tensor of shape .3, 4. doesn't fit its 24 bytes"):
        load_saved(saved(Beyond()), "it")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "a\nb", "a\0b", "", "__0_0.distcp/"])
def test_metadata_that_names_a_file_elsewhere_is_refused(name: str, converted: Path, tmp_path: Path) -> None:
    found = pickle.loads((converted / ".metadata").read_bytes())
    index, place = next(iter(found.storage_data.items()))
    found.storage_data = found.storage_data | {index: replace(place, relative_path=name)}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(ValueError, match="names the file .*it has to lie in"):
        read_metadata(tmp_path / ".metadata")


# --- Transformer Engine's state of a layer ----------------------------------------------------------------------------


def te_state() -> dict[str, Any]:
    """In the form of Transformer Engine's `get_extra_state`."""
    return {
        "scale_fwd": torch.arange(3.0),
        "amax_history_fwd": torch.arange(8.0).reshape(4, 2).t(),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1, "global_fp8_buffer_pos_fwd": [0, 1]},
    }


def as_bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def test_a_layers_state_is_written_anew_and_stays_the_same() -> None:
    old = te_state()
    new = pickle.loads(rewritten(as_bytes(old), "it").numpy().tobytes())
    by_torch = torch.load(rewritten(io.BytesIO(saved(old)), "it"), weights_only=True)
    for found in (new, by_torch):
        assert found["extra_fp8_variables"] == old["extra_fp8_variables"]
        assert torch.equal(found["scale_fwd"], old["scale_fwd"])
        assert torch.equal(found["amax_history_fwd"], old["amax_history_fwd"])
    assert rewritten(None, "it") is None and rewritten(torch.empty(0, dtype=torch.uint8), "it").numel() == 0


def test_a_layers_state_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    traps = [Trap(marker), te_state() | {"recipe": Trap(marker)}]
    states = [state for trap in traps for state in (as_bytes(trap), io.BytesIO(saved(trap)))]
    legacy = io.BytesIO()
    torch.save(Trap(marker), legacy, _use_new_zipfile_serialization=False)
    for data in (legacy.getvalue(), saved(Trap(marker))):  # What torch.storage._load_from_bytes would load.

        class InStorage:
            def __reduce__(self, data: bytes = data) -> Any:
                return torch.storage._load_from_bytes, (data,)

        states.append(as_bytes(InStorage()))
    for state in states:
        with pytest.raises(ValueError, match="^it is damaged: "):
            rewritten(state, "it")
    for state in ("text", torch.ones(3)):
        with pytest.raises(ValueError, match="is no state of a layer"):
            rewritten(state, "it")
    assert not marker.exists()


def test_a_flipped_bit_in_a_layers_state_is_one_error() -> None:
    rng, good = random.Random(3), as_bytes(te_state()).numpy().tobytes()
    num_refused = 0
    for _ in range(1000):
        try:
            rewritten(torch.frombuffer(bytearray(flipped(good, rng)), dtype=torch.uint8), "it")
        except ValueError as error:
            num_refused += 1
            assert str(error).startswith("it is damaged: ")
    assert num_refused > 300


# --- Python 3.11.0 to 3.11.3 pickle members of enums by `getattr` -----------------------------------------------------


def reduce_of_python_3_11_2(self: Enum, protocol: int) -> Any:
    return getattr, (type(self), self.name)


def by_getattr(member: Enum) -> Any:
    return reduce_of_python_3_11_2(member, 4)


def test_a_checkpoint_of_python_3_11_2_is_read(converted: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(converted, tmp_path / "checkpoint"))
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for protocol in (2, 4, 5):
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, protocol)
        pickler.dispatch_table = copyreg.dispatch_table | {kind: by_getattr for kind in ENUMS}  # type: ignore[misc]
        pickler.dump(metadata)
        assert b"getattr" in buffer.getvalue()
        (directory / ".metadata").write_bytes(buffer.getvalue())
        assert read_metadata(directory / ".metadata").state_dict_metadata == metadata.state_dict_metadata


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_path_is_read_as_every_python_pickles_it(module: str, converted: Path, tmp_path: Path) -> None:
    """Python 3.13 calls the module of paths pathlib._local, all others pathlib."""
    metadata = replace(read_metadata(converted / ".metadata"), storage_meta=StorageMeta(checkpoint_id=Path("a folder")))
    written = pickle.dumps(metadata, 2).replace(f"c{PosixPath.__module__}\n".encode(), f"c{module}\n".encode())
    assert f"c{module}\nPosixPath\n".encode() in written
    (tmp_path / ".metadata").write_bytes(written)
    assert read_metadata(tmp_path / ".metadata") == metadata


def test_getattr_in_a_pickle_reads_members_of_enums_and_nothing_else(tmp_path: Path) -> None:
    class Reaching:
        def __init__(self, target: Any, name: str) -> None:
            self.arguments = target, name

        def __reduce__(self) -> Any:
            return getattr, self.arguments

    for target, name in ((ENUMS[0], "__subclasses__"), (ENUMS[0], "mro"), (Metadata, "__init__"), ("text", "format")):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Reaching(target, name)))
        with pytest.raises(
            ValueError, match=r"\.metadata is damaged: it asks for '.*' of .*, which is no member of an enum"
        ):
            read_metadata(tmp_path / ".metadata")


def test_what_python_3_11_2_writes_needs_no_getattr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Enum, "__reduce_ex__", reduce_of_python_3_11_2)
    for kind in ENUMS:
        for member in kind:
            assert b"getattr" not in pickle.dumps(member) and pickle.loads(pickle.dumps(member)) is member


def test_the_trap_works(tmp_path: Path) -> None:
    """What is planted above would run, if it were unpickled."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "one")))
    torch.load(io.BytesIO(saved([Trap(tmp_path / "two")])), weights_only=False)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    with pytest.raises(
        ValueError, match=r"common.pt is damaged: it refers to posix.mkdir, which checkpoints have no use"
    ):
        load_saved(saved([Trap(tmp_path / "three")]), "common.pt")
    assert not (tmp_path / "three").exists()
