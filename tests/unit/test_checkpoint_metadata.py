"""The metadata of torch.distributed.checkpoint read as data: what torch's own reader finds, and nothing is run."""

import contextlib
import copy
import io
import os
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, save
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from autopar.core.errors import CheckpointError
from autopar.runtime.checkpoint_metadata import TensorIndex, metadata_of, read_metadata
from tests.hostile import Call


def written(folder: Path) -> Metadata:
    """A checkpoint that torch writes of tensors, numbers and an optimizer's groups; its metadata, read by torch."""
    state = {
        "model": {
            "weight": torch.randn(6, 4),
            "scalar": torch.tensor(3),
            "empty": torch.empty(0, 4),
            "flag": torch.tensor([True]),
        },
        "half": torch.zeros(3, dtype=torch.bfloat16),
        "optimizer": {
            "state": {0: {"step": torch.tensor(1.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": ["a"]}],
        },
        "epoch": 3,
        "note": None,
    }
    with warnings.catch_warnings(action="ignore"):  # of one process without torch.distributed
        save(state, storage_writer=FileSystemWriter(folder))
    return FileSystemReader(folder).read_metadata()


def sharded(num_rows: int = 1000, dtype: torch.dtype = torch.float32) -> Metadata:
    """A tensor of four columns in two boxes, and an object."""
    first = num_rows // 3
    offsets, rows = [torch.Size([0, 0]), torch.Size([first, 0])], [first, num_rows - first]
    return Metadata(
        state_dict_metadata={
            "model.weight": TensorStorageMetadata(
                properties=TensorProperties(dtype=dtype),
                size=torch.Size([num_rows, 4]),
                chunks=[ChunkStorageMetadata(at, torch.Size([n, 4])) for at, n in zip(offsets, rows, strict=True)],
            ),
            "epoch": BytesStorageMetadata(),
        },
        planner_data={"model.weight": ("model", "weight"), "epoch": ("epoch",)},
        storage_data={
            MetadataIndex("model.weight", offsets[0], 0): _StorageInfo("__0_0.distcp", 0, 70_000),
            MetadataIndex("model.weight", offsets[1], 1): _StorageInfo("__1_0.distcp", 2**40, 2**33),
            MetadataIndex("epoch"): _StorageInfo("__0_0.distcp", 70_000, 1200, ["stream.zstd/1"]),
        },
    )


def assert_same(found: TensorIndex, wanted: Metadata) -> None:
    tensors = {
        key: value for key, value in wanted.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)
    }
    assert found.tensors == tensors
    assert found.places == wanted.storage_data


def test_torch_s_own_metadata_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    metadata = written(tmp_path)
    found = read_metadata(tmp_path)
    assert_same(found, metadata)
    assert {"model.weight", "model.scalar", "half", "optimizer.state.0.step"} <= set(found.tensors)
    assert "epoch" not in found.tensors


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_any_protocol_and_dtype_are_read(protocol: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64):
        metadata = sharded(dtype=dtype)
        assert_same(metadata_of(pickle.dumps(metadata, protocol=protocol)), metadata)


def test_metadata_from_before_torch_2_3_is_read() -> None:
    """``TensorProperties`` lived in another module, which torch 2.13 still has."""
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldProperties

    metadata, old = sharded(), sharded()
    old.state_dict_metadata["model.weight"].properties = OldProperties(dtype=torch.float32)  # type: ignore[union-attr]
    assert_same(metadata_of(pickle.dumps(old)), metadata)


def within(change: Callable[[Metadata, Any], None]) -> Callable[[Any], Any]:
    """Metadata with a payload somewhere in it."""

    def made(payload: Any) -> Metadata:
        metadata = sharded()
        change(metadata, payload)
        return metadata

    return made


def index(metadata: Metadata) -> MetadataIndex:
    return next(iter(metadata.storage_data))


class Key:
    """A payload that can be the key of a dict."""

    def __init__(self, payload: Any) -> None:
        self.payload = payload

    def __reduce__(self) -> Any:
        return self.payload.__reduce__()


PLACES: dict[str, Callable[[Any], Any]] = {
    "instead of it": lambda payload: payload,
    "a list around it": lambda payload: [payload, sharded()],
    "planner data": within(lambda data, payload: setattr(data, "planner_data", {"epoch": ("epoch", payload)})),
    "version": within(lambda data, payload: setattr(data, "version", payload)),
    "a shape": within(lambda data, payload: setattr(data.state_dict_metadata["model.weight"], "size", payload)),
    "an entry": within(lambda data, payload: data.state_dict_metadata.update(other=payload)),
    "a name": within(lambda data, payload: data.state_dict_metadata.update({Key(payload): BytesStorageMetadata()})),
    "a file": within(lambda data, payload: setattr(data.storage_data[index(data)], "relative_path", payload)),
    "a key's attribute": within(lambda data, payload: index(data).__dict__.update(hint=payload)),
    "the arguments of an allowed class": lambda payload: Call(torch.Size, payload),
    "the state of an allowed class": lambda payload: Call(torch.Size, (1,), state=payload),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_payload_in_metadata_is_named_and_not_run(place: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content = pickle.dumps(PLACES[place](Call(os.system, f"touch {marker}")))
    with pytest.raises(CheckpointError, match=r"\.metadata names posix\.system, which is not part of the metadata"):
        metadata_of(content)
    assert not marker.exists()
    with contextlib.suppress(Exception):
        pickle.loads(content)
    assert marker.exists(), "the payload is none"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(FileSystemReader, "/"), "torch.distributed.checkpoint.filesystem.FileSystemReader"),
        (Call(save, {}), "torch.distributed.checkpoint.state_dict_saver.save"),
        (Call(torch.load, "/weights.pt"), "torch.serialization.load"),
        (Call(torch.save, 1, "/weights.pt"), "torch.serialization.save"),
        (Call(torch.compile, 3), "torch.compile"),
        (Call(Path.touch, "marker"), "pathlib.Path.touch"),
        (Call(TensorProperties.create_from_tensor, 1), "torch.distributed.checkpoint.metadata.TensorProperties.create_from_tensor"),
    ],
)  # fmt: skip
def test_other_names_of_allowed_modules_are_refused(call: Call, name: str) -> None:
    metadata = sharded()
    metadata.planner_data = call
    with pytest.raises(CheckpointError, match=f"names {name}, which") as caught:
        metadata_of(pickle.dumps(metadata))
    assert "\n" not in str(caught.value)


def test_an_archive_of_torch_save_is_no_metadata() -> None:
    stream = io.BytesIO()
    torch.save(sharded(), stream)
    with pytest.raises(CheckpointError, match="damaged, or not of torch"):
        metadata_of(stream.getvalue())


def tensor(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["model.weight"]


FAULTS: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "a box is missing": (lambda data: tensor(data).chunks.pop(), "do not cover it"),
    "a box is there twice": (lambda data: tensor(data).chunks.append(tensor(data).chunks[0]), "do not cover it"),
    "a box is too large": (lambda data: setattr(tensor(data), "size", torch.Size([999, 4])), "reaches beyond"),
    "a box has too few dims": (lambda data: setattr(tensor(data), "size", torch.Size([4000])), "damaged"),
    "a box is in no file": (lambda data: data.storage_data.pop(index(data)), "in no file"),
    "a file is outside": (lambda data: setattr(data.storage_data[index(data)], "relative_path", "../a"), "outside"),
    "a file is anywhere": (
        lambda data: setattr(data.storage_data[index(data)], "relative_path", "/etc/passwd"),
        "outside",
    ),
    "a place is before the file": (lambda data: setattr(data.storage_data[index(data)], "offset", -1), "bytes"),
    "a dtype is none": (lambda data: setattr(tensor(data), "properties", torch.float32), "without properties"),
    "there are no places": (lambda data: setattr(data, "storage_data", None), "damaged"),
    "there are no tensors": (lambda data: setattr(data, "state_dict_metadata", [1]), "damaged"),
    "places are tensors": (lambda data: setattr(data, "storage_data", data.state_dict_metadata), "damaged"),
    "a name is a number": (lambda data: data.state_dict_metadata.update({3: BytesStorageMetadata()}), "without a name"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("fault", FAULTS)
def test_metadata_that_does_not_fit_itself_is_refused(fault: str) -> None:
    change, message = FAULTS[fault]
    metadata = copy.deepcopy(sharded())
    change(metadata)
    with pytest.raises(CheckpointError, match=message):
        metadata_of(pickle.dumps(metadata))


def test_damaged_metadata_is_refused_or_read() -> None:
    """Bits of it flipped: an index or an error of ours, whatever the bit meant."""
    content = pickle.dumps(sharded())
    draw = random.Random(0)
    for bit in range(8 * len(content)):
        if draw.random() < 0.2:
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            with contextlib.suppress(CheckpointError):
                metadata_of(bytes(flipped))


def test_a_folder_without_metadata(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: No such file"):
        read_metadata(tmp_path)
