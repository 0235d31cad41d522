"""Cost tables in files: a cluster by name or file, with some keys overridden.

The tables are ``cost_tables/cluster.NAME.json`` and ``cost_tables/device.NAME.json``; a wheel has the folder inside the
package, a checkout next to it. A cluster's file names its device or contains it (what ``save_cluster`` writes).
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from autopar.cluster.cluster import Cluster
from autopar.cluster.device import Device
from autopar.cluster.number_source import NumberSource
from autopar.core.errors import PlanFileError, UsageError
from autopar.core.units import GIB
from autopar.core.write_file import FileKind, write_file

T = TypeVar("T", Cluster, Device)
PROFILE_NAME_PREFIX = "profile of "  # what the names of tables made by `autopar profile` begin with
NOT_OVERRIDABLE = ("name", "device", "provenance", "collectives", "matmul", "flash_attention", "peak_flops_per_s")


class _ProfileMarker(msgspec.Struct):
    """The keys by which tables made by `autopar profile` differ from tables that ship or are written by hand."""

    name: Annotated[str, msgspec.Meta(pattern=f"^{PROFILE_NAME_PREFIX}")]
    device: dict[str, msgspec.Raw]
    provenance: dict[str, msgspec.Raw]


PROFILE_FILE_KIND = FileKind(name="a cost table made by autopar profile", marker=_ProfileMarker)


def cost_tables_folder() -> Path:
    """The folder of the shipped tables: in the installed package, or next to it in a checkout. PlanFileError without one."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "cost_tables", package.parent / "cost_tables"):
        if folder.is_dir():
            return folder
    raise PlanFileError(f"no folder cost_tables in or next to {package}: reinstall autopar")


def cluster_names() -> tuple[str, ...]:
    """Names of the clusters that ship, sorted."""
    return _shipped_names("cluster")


def device_names() -> tuple[str, ...]:
    """Names of the devices that ship, sorted."""
    return _shipped_names("device")


def _shipped_names(kind: str) -> tuple[str, ...]:
    """Sorted names of the shipped tables of a kind."""
    found = cost_tables_folder().glob(f"{kind}.*.json")
    return tuple(sorted(path.name.removeprefix(f"{kind}.").removesuffix(".json") for path in found))


def load_device(name: str) -> Device:
    """A shipped device by name; UsageError, with the names that ship, for any other."""
    if name not in device_names():
        raise UsageError(f"no device {name!r}; the devices are {', '.join(device_names())}")
    path = cost_tables_folder() / f"device.{name}.json"
    return _validated(_read_json(path), Device, path)


def load_cluster(cluster: "str | Path | Cluster", **overrides: Any) -> Cluster:
    """A shipped cluster by name, a cluster from a file, or ``cluster`` itself, with keys of it or of its device overridden.

    ``device`` takes a device's name, ``memory_gib`` sets the device's memory. UsageError for an unknown name, key or
    value; PlanFileError for a file that is incomplete or breaks a rule of the tables.

    >>> load_cluster("dgx-a100", inter_node_gbits_per_s=800).inter_node_gbits_per_s
    800.0
    """
    found = cluster if isinstance(cluster, Cluster) else _read_cluster(cluster)
    return _overridden(found, overrides) if overrides else found


def software_document(name: str) -> Any:
    """The shipped table of a training program, decoded but not validated."""
    return _read_json(cost_tables_folder() / f"software.{name}.json")


def uncertainty_document() -> Any:
    """The shipped table of intervals, decoded but not validated."""
    return _read_json(cost_tables_folder() / "uncertainty.json")


def save_cluster(cluster: Cluster, path: str | Path) -> None:
    """Write a cluster with its device atomically; ``load_cluster(path)`` reads it back. It replaces any file, as
    ``save_plan`` does."""
    write_file(Path(path), cluster_content(cluster), PROFILE_FILE_KIND, force=True)


def cluster_content(cluster: Cluster) -> bytes:
    """The bytes of a cluster's file."""
    return msgspec.json.format(msgspec.json.encode(cluster), indent=1) + b"\n"


def check_cluster_content(content: bytes, path: Path) -> None:
    """PlanFileError, naming ``path``, where the ``content`` of a cluster's file breaks a rule of the tables."""
    _validated(msgspec.json.decode(content), Cluster, path)


def _read_cluster(name: "str | Path") -> Cluster:
    """A cluster by the name of a shipped table, else from a file."""
    if str(name) in cluster_names():
        path = cost_tables_folder() / f"cluster.{name}.json"
    else:
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no cluster {str(name)!r}: name a file, or one of {', '.join(cluster_names())}")
    document = _read_json(path)
    if isinstance(document, dict) and isinstance(document.get("device"), str):
        device = document["device"]
        if device not in device_names():
            raise PlanFileError(f"{path}: no device {device!r}; the devices are {', '.join(device_names())}")
        document["device"] = _read_json(cost_tables_folder() / f"device.{device}.json")
    return _validated(document, Cluster, path)


def _read_json(path: Path) -> Any:
    """A decoded JSON file; PlanFileError where it cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise PlanFileError(f"cannot read {path}: {error}") from error


def _validated(document: Any, kind: type[T], path: Path) -> T:
    """The table of a decoded file; PlanFileError, naming ``path``, where it breaks a rule."""
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise PlanFileError(f"{path} is not a table of autopar: {error}") from error


def _overridden(cluster: Cluster, overrides: dict[str, Any]) -> Cluster:
    """``cluster`` with other keys; UsageError as in ``load_cluster``."""
    cluster_keys = {key for key in Cluster.__struct_fields__ if key not in NOT_OVERRIDABLE}
    device_keys = {key for key in Device.__struct_fields__ if key not in NOT_OVERRIDABLE}
    known = sorted({"device", "memory_gib", *cluster_keys, *device_keys})
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise UsageError(f"no key {', '.join(unknown)} in cluster {cluster.name}; the keys are {', '.join(known)}")
    device = load_device(str(overrides["device"])) if "device" in overrides else cluster.device
    changes = {key: value for key, value in overrides.items() if key in device_keys}
    if "memory_gib" in overrides:
        if "memory_bytes" in overrides:
            raise UsageError("memory_gib and memory_bytes both set the device's memory: give one")
        try:
            changes["memory_bytes"] = int(float(overrides["memory_gib"]) * GIB)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"memory_gib = {overrides['memory_gib']!r} is not a number") from error
    device = _with_numbers(device, changes)
    cluster = msgspec.structs.replace(cluster, device=device)
    return _with_numbers(cluster, {key: value for key, value in overrides.items() if key in cluster_keys})


def _with_numbers(table: T, changes: dict[str, Any]) -> T:
    """``table`` with other numbers, whose source is the user; UsageError where they break a rule of the table."""
    if not changes:
        return table
    document = msgspec.to_builtins(table)
    given = NumberSource(source="given by the user", date="", status="given")
    for key, value in changes.items():
        document[key] = value
        document["provenance"][key] = msgspec.to_builtins(given)
    try:
        return msgspec.convert(document, type(table))
    except msgspec.ValidationError as error:
        listed = ", ".join(f"{key}={value!r}" for key, value in changes.items())
        raise UsageError(f"cannot set {listed} in {table.name}: {error}") from error
