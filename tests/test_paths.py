"""Names from files and users stay in their directory, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drpo_megatron.checkpoint.hf import INDEX_FILE, HFCheckpoint
from drpo_megatron.checkpoint.hf_files import CarriedFiles
from drpo_megatron.paths import file_name, inside

BAD = ["", ".", "..", "../a", "a/..", "a/../../b", "/etc/passwd", "a//b", "a/", "a\0b", "a\nb", "a\x1b[2Jb", "a\u202eb"]
BAD += ["a\udc80", "a\u2028b", "x" * 256, "é" * 128, "./a"]
GOOD = ["a", "a.safetensors", "hf/a.json", "a b", "$(a)'\"", "..a", "a..", "日本語", "x" * 255, ".hidden", "a/b/c"]


@pytest.mark.parametrize("name", BAD)
def test_what_leads_out_or_cant_be_shown_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^index\.json names the file .* it has to lie in") as refused:
        inside(tmp_path, name, "index.json")
    assert str(refused.value).isprintable()
    with pytest.raises(ValueError, match=r"^run\.name is ") as refused:
        file_name(name, "run.name")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", GOOD)
def test_other_names_are_joined_as_they_are(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name, "index.json") == tmp_path / name
    assert inside(tmp_path, name, "index.json", for_writing=True) == tmp_path / name
    if "/" not in name:
        assert file_name(name, "run.name") == name


@pytest.mark.parametrize("name", [None, 1, ["a"], {"a": 1}])
def test_what_is_no_text_is_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index\.json has .* for a file name"):
        inside(tmp_path, name, "index.json")


def test_links_may_be_read_through_but_not_written_through(tmp_path: Path) -> None:
    directory, outside = tmp_path / "snapshot", tmp_path / "blobs"
    directory.mkdir()
    outside.mkdir()
    (outside / "precious").write_text("precious")
    (directory / "file").symlink_to("../blobs/precious")
    (directory / "folder").symlink_to("../blobs")
    (directory / "own").symlink_to("other")
    for name in ("file", "folder/precious", "folder/new"):
        assert inside(directory, name, "index.json") == directory / name
        with pytest.raises(ValueError, match="a symbolic link that leads out of"):
            inside(directory, name, "index.json", for_writing=True)
    assert inside(directory, "own", "index.json", for_writing=True) == directory / "own"
    (tmp_path / "alias").symlink_to(directory)  # The directory itself may be a link.
    assert inside(tmp_path / "alias", "new", "index.json", for_writing=True) == tmp_path / "alias" / "new"


@pytest.mark.parametrize("name", ["../shared.safetensors", "/tmp/shared.safetensors", "a\nb.safetensors"])
def test_an_index_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(ValueError, match=rf"{INDEX_FILE} names the file .* it has to lie in {tmp_path}"):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize("name", ["../victim.safetensors", "/tmp/victim.safetensors", "config.json"])
def test_a_record_of_tensors_that_leads_out_or_to_another_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    record = {"headers": {name: "{}"}, "index": None, "is_trained": False, "untrained": None}
    (tmp_path / "tensors.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"tensors\.json (names the file|is damaged .*) "):
        CarriedFiles(tmp_path)
