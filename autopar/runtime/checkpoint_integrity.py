"""Checks the files of a checkpoint before any of it is loaded.

Tensors: torch saves each as a zip archive with the CRC-32 of its records, but does not compare these when it loads.
Here they are compared, whoever wrote the checkpoint, and the tensor must have the dtype and shape that the metadata
states.

Small files: ``SHA256SUMS`` has their hashes, in the format of ``sha256sum --check SHA256SUMS``.

A checkpoint of another writer has no such file, and an archive that was saved under
``torch.serialization.set_crc32_options(False)`` has no CRCs; these are not checked.
"""

import hashlib
import io
import itertools
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo  # private; tried on torch 2.13.0
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from autopar.core.errors import CheckpointError
from autopar.core.write_file import write_atomically
from autopar.runtime.checkpoint_metadata import METADATA, TensorIndex

SUMS = "SHA256SUMS"


class CheckedReader(FileSystemReader):
    """Reads a folder's tensors for torch.distributed.checkpoint, by an index that ``read_metadata`` read as data."""

    def __init__(self, folder: Path, index: TensorIndex) -> None:
        super().__init__(folder)
        self.folder, self.index = folder, index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, as torch's own class."""
        return Metadata(state_dict_metadata={**self.index.tensors}, storage_data={**self.index.places})


def write_sums(folder: Path) -> None:
    """Write the hashes of all files of a checkpoint but those of tensors."""
    paths = sorted(path for path in folder.iterdir() if path.suffix != ".distcp")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths]
    write_atomically(folder / SUMS, "".join(lines).encode())


def check_sums(folder: Path) -> None:
    """CheckpointError where a file is missing or differs from its hash; without hashes nothing is checked."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{SUMS} cannot be read: {error}") from None
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line)
        if match is None:
            raise CheckpointError(f"{SUMS} is damaged")
        digest, name = match.groups()
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise CheckpointError(f"{name} is damaged: its hash differs from {SUMS}")


def check_tensors(reader: CheckedReader, names: Iterable[str], *, rank: int, num_ranks: int) -> None:
    """Check this rank's share of the stored boxes of these tensors: about ``1 / num_ranks`` of their bytes.

    CheckpointError where a file is missing or too short, or a box in it is damaged or of another tensor."""
    boxes = [
        (reader.index.places[MetadataIndex(name, box.offsets)], name, box.sizes)
        for name in names
        for box in reader.index.tensors[name].chunks
        if math.prod(box.sizes)
    ]
    boxes.sort(key=lambda box: (box[0].relative_path, box[0].offset))
    sums = list(itertools.accumulate(place.length + 1 for place, *_ in boxes))
    for (place, name, shape), running_sum in zip(boxes, sums, strict=True):
        if (running_sum - 1) * num_ranks // sums[-1] != rank:
            continue
        file, dtype = place.relative_path, reader.index.tensors[name].properties.dtype
        try:
            with open(reader.folder / file, "rb") as opened:
                stored = _tensor_at(reader, opened, place)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
        except _DamageError as error:
            raise CheckpointError(f"{file} is damaged, in {name} at byte {place.offset}: {error}") from None
        if stored.shape != shape or stored.dtype != dtype:
            raise CheckpointError(
                f"{file} has {stored.dtype} of shape {tuple(stored.shape)} at byte {place.offset}, where {METADATA} "
                f"has {dtype} of shape {tuple(shape)}, of {name}"
            )


class _DamageError(Exception):
    """What is wrong with the bytes of a tensor."""


def _tensor_at(reader: CheckedReader, file: BinaryIO, place: _StorageInfo) -> Tensor:
    """The tensor stored at a place of a file, on the meta device; _DamageError where it cannot be read."""
    size = file.seek(0, os.SEEK_END)
    if place.offset + place.length > size:
        raise _DamageError(f"it ends at byte {size}, before byte {place.offset + place.length}")
    stream: Any = _FileRange(file, place.offset, place.length)
    try:
        stream = reader.transforms.transform_load_stream(stream, place.transform_descriptors or (), stream)
        return _read_checked(stream if stream.seekable() else io.BytesIO(stream.read()))
    except Exception as error:  # a damaged header leads zipfile and torch.load to errors of any kind
        raise _DamageError((str(error) or type(error).__name__).splitlines()[0][:200]) from None


def _read_checked(archive: Any) -> Tensor:
    """The tensor of an archive of ``torch.save``, on the meta device; its data is read only to compare its CRC.
    ValueError where it is damaged or not a tensor."""
    with zipfile.ZipFile(archive) as records:
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.infolist()):
            raise ValueError("a record is compressed")
        if any(record.CRC for record in records.infolist()):
            damaged = records.testzip()
            if damaged is not None:
                raise ValueError(f"record {damaged} does not match its CRC-32")
    archive.seek(0)
    try:
        tensor = torch.load(archive, map_location="meta", weights_only=True)
    except pickle.UnpicklingError:  # torch's message would advise to load it without this check
        archive.seek(0)
        names = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(archive)) or "nothing that can be read"
        raise ValueError(f"it names {names}, which is not part of a tensor; nothing of it was run") from None
    if not isinstance(tensor, Tensor):
        raise ValueError("it is not a tensor")
    return tensor


class _FileRange(io.RawIOBase):
    """``length`` bytes of a file from ``start`` on, as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position, from the first of these bytes."""
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position and return it; ValueError before the first of these bytes."""
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if position < 0:
            raise ValueError("a position before the start")
        self.position = position
        return position

    def readinto(self, buffer: Any, /) -> int:
        """Read into a buffer from the position on; returns the number of bytes."""
        view = memoryview(buffer)[: max(0, self.length - self.position)]
        self.file.seek(self.start + self.position)
        count = self.file.readinto(view)  # type: ignore[attr-defined]
        self.position += count
        return int(count)
