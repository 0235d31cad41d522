"""Reads ``.metadata``, the index of a torch.distributed.checkpoint, without running anything.

The file is a pickle of torch's ``Metadata``, and torch's reader creates whatever objects a pickle asks for. Here it is
read as data (``pickled_data``), in which only torch's metadata classes may be named, and the index is built from that
data, field by field: each tensor's dtype and shape, the boxes it is stored in, and each box's bytes in a file.

What is stored as a Python object, such as a sampler's state, is a pickle too; it is ignored.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo  # private; tried on torch 2.13.0
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from autopar.core.errors import CheckpointError
from autopar.runtime.pickled_data import Global, Instance, NotAllowedError, read_data

METADATA = ".metadata"
_INDEX, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_OLD_INDEX = "torch.distributed._shard.sharded_tensor.metadata"  # where torch had TensorProperties before 2.3
_PROPERTIES = (f"{_INDEX}.TensorProperties", f"{_OLD_INDEX}.TensorProperties")
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

ALLOWED = frozenset(
    {
        *_PROPERTIES,
        *_DTYPES,
        f"{_INDEX}.Metadata",
        f"{_INDEX}.TensorStorageMetadata",
        f"{_INDEX}.BytesStorageMetadata",
        f"{_INDEX}.ChunkStorageMetadata",
        f"{_INDEX}.MetadataIndex",
        f"{_INDEX}.StorageMeta",
        f"{_INDEX}._MEM_FORMAT_ENCODING",
        f"{_OLD_INDEX}.MEM_FORMAT_ENCODING",
        f"{_FILES}._StorageInfo",
        "torch.Size",
        "torch.serialization._get_layout",
        "pathlib.PosixPath",  # the folder that it was saved to; Python 3.13 has it in pathlib._local
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
    }
)
"""All names in the pickle of a ``Metadata``, as torch's planners and file systems write it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorIndex:
    """The tensors of a checkpoint, by name, and where each of their boxes is stored, by name and offset."""

    tensors: Mapping[str, TensorStorageMetadata]
    places: Mapping[MetadataIndex, _StorageInfo]


def read_metadata(folder: Path) -> TensorIndex:
    """The index of a folder that torch.distributed.checkpoint wrote. CheckpointError where its ``.metadata`` cannot be
    read, is damaged, or names a class or function that torch's metadata does not have."""
    try:
        return metadata_of((folder / METADATA).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{METADATA} cannot be read: {error.strerror or error}") from None


def metadata_of(content: bytes) -> TensorIndex:
    """The index in the bytes of a ``.metadata``: of tensors only, each covered by boxes inside its shape, each box in a
    file of the same folder. CheckpointError as for ``read_metadata``."""
    try:
        fields = _fields(read_data(content, ALLOWED), f"{_INDEX}.Metadata")
        stored = {name: _tensor(entry) for name, entry in _tensors(fields["state_dict_metadata"])}
        places = dict(_place(index, info) for index, info in fields["storage_data"].items())
        _check_boxes(stored, places)
        for path in {PurePosixPath(place.relative_path) for place in places.values()}:
            if path.is_absolute() or ".." in path.parts:
                raise ValueError("a tensor is in a file outside its folder")
    except NotAllowedError as error:
        raise CheckpointError(
            f"{METADATA} names {error.name}, which is not part of the metadata of torch.distributed.checkpoint: it is "
            "damaged, or made to run code; nothing of it was run"
        ) from None
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{METADATA} is damaged, or not of torch.distributed.checkpoint: {error}") from None
    return TensorIndex(tensors=stored, places=places)


def _fields(data: Any, name: str) -> dict[str, Any]:
    """The fields of an object of the class ``name``; ValueError where it is not one."""
    if not isinstance(data, Instance) or data.name != name or not isinstance(data.state, dict):
        raise ValueError(f"expected a {name.rpartition('.')[2]}")
    return data.state


def _tensors(stored: dict[Any, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, fields) of the entries that are tensors."""
    for name, entry in stored.items():
        if not isinstance(name, str):
            raise ValueError("an entry without a name")
        if not isinstance(entry, Instance) or entry.name != f"{_INDEX}.BytesStorageMetadata":
            yield name, _fields(entry, f"{_INDEX}.TensorStorageMetadata")


def _tensor(fields: dict[str, Any]) -> TensorStorageMetadata:
    """A tensor's dtype, shape and boxes, from its fields."""
    properties = fields["properties"]
    if not isinstance(properties, Instance) or properties.name not in _PROPERTIES:
        raise ValueError("a tensor without properties")
    dtype = properties.state[0]  # the others are deprecated: layout, requires_grad, memory format, pinned
    if not isinstance(dtype, Global):
        raise ValueError("a tensor without a dtype")
    boxes = [_fields(box, f"{_INDEX}.ChunkStorageMetadata") for box in fields["chunks"]]
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=_DTYPES[dtype.name]),
        size=_size(fields["size"]),
        chunks=[ChunkStorageMetadata(offsets=_size(box["offsets"]), sizes=_size(box["sizes"])) for box in boxes],
    )


def _size(data: Any) -> torch.Size:
    """A shape or offset."""
    if not isinstance(data, Instance) or data.name != "torch.Size":
        raise ValueError("expected a torch.Size")
    size = torch.Size(*data.arguments)
    if size and not 0 <= min(size) <= max(size) < 2**63:
        raise ValueError("a size outside 0 to 2^63 - 1")
    return size


def _num_bytes(data: Any) -> int:
    """A position in a file, or a length."""
    if not isinstance(data, int) or not 0 <= data < 2**63:
        raise ValueError("expected a number of bytes")
    return data


def _place(index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    """(name and offset of a box, its bytes in a file), from the data of both."""
    key, value = _fields(index, f"{_INDEX}.MetadataIndex"), _fields(info, f"{_FILES}._StorageInfo")
    path, transforms = value["relative_path"], value.get("transform_descriptors")
    if (
        not isinstance(path, str)
        or not isinstance(key["fqn"], str)
        or not all(isinstance(each, str) for each in transforms or ())
    ):
        raise ValueError("a storage entry without the names of its tensor and file")
    offset = key.get("offset")
    return (
        MetadataIndex(key["fqn"], None if offset is None else _size(offset)),
        _StorageInfo(path, _num_bytes(value["offset"]), _num_bytes(value["length"]), transforms),
    )


def _check_boxes(stored: dict[str, TensorStorageMetadata], places: dict[MetadataIndex, _StorageInfo]) -> None:
    """Check that each tensor's boxes are inside it, cover it, and are stored; else ValueError. torch reads a tensor
    that lacks a box without an error and leaves its elements as they were."""
    for name, tensor in stored.items():
        boxes = [box for box in tensor.chunks if math.prod(box.sizes)]  # each rank without rows has an empty one
        for box in boxes:
            dims = zip(box.offsets, box.sizes, tensor.size, strict=True)
            if any(offset + size > full_size for offset, size, full_size in dims):
                raise ValueError(f"a box of {name} reaches beyond it")
            if MetadataIndex(name, box.offsets) not in places:
                raise ValueError(f"a box of {name} is in no file")
        covered = sum(math.prod(box.sizes) for box in boxes)
        if covered != math.prod(tensor.size) or len({box.offsets for box in boxes}) != len(boxes):
            raise ValueError(f"the stored boxes of {name} do not cover it")
