"""Damage in the tensors of a checkpoint that torch wrote is found, by one of the ranks."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from autopar.core.errors import CheckpointError
from autopar.runtime.checkpoint_integrity import CheckedReader, check_sums, check_tensors, write_sums
from autopar.runtime.checkpoint_metadata import read_metadata

NUM_RANKS = 3
STATE = {"model": {f"w{n}": torch.full((n + 1, 50), float(n)) for n in range(12)}, "epoch": 3}


def written(folder: Path) -> CheckedReader:
    with warnings.catch_warnings(action="ignore"):  # of one process without torch.distributed
        save(STATE, storage_writer=FileSystemWriter(folder))
    return CheckedReader(folder, read_metadata(folder))


def complaints(reader: CheckedReader) -> list[str]:
    """What the ranks find wrong."""
    found = []
    for rank in range(NUM_RANKS):
        try:
            check_tensors(reader, list(reader.index.tensors), rank=rank, num_ranks=NUM_RANKS)
        except CheckpointError as error:
            found.append(str(error))
    return found


@pytest.fixture
def without_crcs() -> Iterator[None]:
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


def test_every_tensor_is_checked_by_one_rank(tmp_path: Path) -> None:
    reader = written(tmp_path)
    assert complaints(reader) == []
    for index, place in reader.index.places.items():
        if index.fqn not in reader.index.tensors:
            continue
        file = tmp_path / place.relative_path
        whole = file.read_bytes()
        value = STATE["model"][index.fqn.removeprefix("model.")]  # type: ignore[index]
        at = whole.index(value.numpy().tobytes(), place.offset)
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        (complaint,) = complaints(reader)
        assert complaint.endswith(
            f"in {index.fqn} at byte {place.offset}: record archive/data/0 does not match its CRC-32"
        )
        file.write_bytes(whole)
    assert complaints(reader) == []


@pytest.mark.usefixtures("without_crcs")
def test_a_checkpoint_without_crcs_is_read(tmp_path: Path) -> None:
    reader = written(tmp_path)
    assert complaints(reader) == []
    file = next(tmp_path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-700])
    assert "it ends at byte" in complaints(reader)[0]


def test_a_file_that_is_not_as_it_was_written_is_named(tmp_path: Path) -> None:
    check_sums(tmp_path)
    (tmp_path / "a.json").write_text("1")
    (tmp_path / "b.json").write_text("2")
    write_sums(tmp_path)
    check_sums(tmp_path)
    (tmp_path / "b.json").write_text("3")
    with pytest.raises(CheckpointError, match=r"b\.json is damaged"):
        check_sums(tmp_path)
    (tmp_path / "b.json").unlink()
    with pytest.raises(CheckpointError, match=r"b\.json cannot be read: No such file"):
        check_sums(tmp_path)
    (tmp_path / "SHA256SUMS").write_text("0  ../a.json\n")
    with pytest.raises(CheckpointError, match="SHA256SUMS is damaged"):
        check_sums(tmp_path)
