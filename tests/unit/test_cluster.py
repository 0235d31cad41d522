"""The machine's tables: what they refuse, that more work takes longer, who shares which NICs, and published points."""

import itertools
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from autopar.cluster import Cluster, RankGroup, cluster_names, load_cluster, save_cluster
from autopar.cluster.cost_tables import device_names, load_device
from autopar.core.errors import PlanFileError, UsageError
from tests.conftest import ROOT

MEASURED = ROOT / "../shared/measurements"
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
needs_measurements = pytest.mark.skipif(not MEASURED.is_dir(), reason="no folder of measurements beside the checkout")


def node_group(num_ranks: int) -> RankGroup:
    return RankGroup(num_ranks=num_ranks, ranks_per_node=num_ranks, num_nodes=1, groups_per_node=1)


def written(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "cluster.json"
    path.write_text(json.dumps(document))
    return path


def test_every_shipped_table_loads() -> None:
    wanted = {"p3.16xlarge", "dgx-a100", "dgx-a100-40g", "dgx-h100", "dgx-h200", "dgx-b200", "a40", "t4", "cpu-gloo"}
    assert wanted <= set(cluster_names())
    assert {load_cluster(name).name for name in cluster_names()} == set(cluster_names())
    assert {"V100-SXM-32GB", "H100-PCIe", "L40S"} <= set(device_names())
    assert [load_device(name).name for name in device_names()] == list(device_names())


def test_shipped_devices_have_the_published_sizes() -> None:
    v100, a100, cpu = (load_cluster(name) for name in ("p3.16xlarge", "dgx-a100", "cpu-gloo"))
    assert (v100.device.default_dtype, a100.device.default_dtype, cpu.device.default_dtype) == (
        "float16", "bfloat16", "float32")  # fmt: skip
    assert v100.device.memory_bytes / 2**30 == pytest.approx(15.78)
    assert a100.device.peak_flops_per_s == {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12}
    assert (v100.inter_node_gbits_per_s, a100.inter_node_gbits_per_s) == (25, 1600)
    assert cpu.device.context_bytes == cpu.communication_buffer_bytes(3) == 0
    assert 300 < a100.communication_buffer_bytes(1) / 2**20 < 450


def test_overridden_keys_reach_cluster_and_device() -> None:
    cluster = load_cluster(
        "dgx-a100", inter_node_gbits_per_s=800, device="V100-SXM-32GB", memory_gib=20, devices_per_node=4, launch_s=1e-6
    )
    assert (cluster.inter_node_gbits_per_s, cluster.device.name, cluster.devices_per_node) == (800, "V100-SXM-32GB", 4)
    assert (cluster.device.memory_bytes, cluster.device.launch_s) == (20 * 2**30, 1e-6)
    assert cluster.provenance["inter_node_gbits_per_s"].source == "given by the user"
    assert load_cluster(load_cluster("dgx-a100"), devices_per_node=4).devices_per_node == 4
    assert load_cluster("dgx-a100", devices_per_node=4).fingerprint != load_cluster("dgx-a100").fingerprint
    assert load_cluster("dgx-a100").fingerprint == load_cluster("dgx-a100").fingerprint


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dgx-z9", {}, "dgx-h100"),
        ("dgx-a100", {"nonsense": 1}, "inter_node_gbits_per_s"),
        ("dgx-a100", {"device": "Z9"}, "L40S"),
        ("dgx-a100", {"inter_node_efficiency": 1.2}, "efficiency"),
        ("dgx-a100", {"sustained_fraction": 0}, "efficiency"),
        ("dgx-a100", {"inter_node_gbits_per_s": -1}, "positive"),
        ("dgx-a100", {"inter_node_gbits_per_s": "fast"}, "float"),
        ("dgx-a100", {"devices_per_node": 2.5}, "int"),
        ("dgx-a100", {"memory_gib": 0}, "positive"),
        ("dgx-a100", {"memory_gib": "much"}, "number"),
        ("dgx-a100", {"memory_gib": 1, "memory_bytes": 1}, "both"),
    ],
)
def test_a_wrong_name_or_override_is_refused(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_cluster(name, **overrides)


def _torn(document: dict[str, Any], change: str) -> None:
    device = document["device"]
    curve = document["collectives"][0]
    changes = {
        "unknown key": lambda: document.update(colour="red"),
        "missing key": lambda: document.pop("nics_per_node"),
        "efficiency above 1": lambda: device.update(memory_efficiency=1.5),
        "efficiency zero": lambda: device["matmul"]["efficiency"].__setitem__(3, 0.0),
        "grid of another size": lambda: device["matmul"]["efficiency"].pop(),
        "nodes out of order": lambda: device["matmul"]["m"].reverse(),
        "time falls": lambda: curve["time_s"].__setitem__(-1, curve["time_s"][0] / 2),
        "bytes out of order": lambda: curve["num_bytes"].reverse(),
        "two curves": lambda: document["collectives"].append(curve),
        "no curve": lambda: document.update(
            collectives=[c for c in document["collectives"] if "gather" not in c["kind"]]
        ),
        "missing source": lambda: document["provenance"].pop("collectives"),
        "missing device source": lambda: device["provenance"].pop("matmul"),
        "empty source": lambda: device["provenance"]["matmul"].update(source=" "),
        "no date": lambda: device["provenance"]["matmul"].update(date="lately"),
        "slowdown below 1": lambda: document.update(training_slowdown=0.5),
        "unknown dtype": lambda: device["peak_flops_per_s"].update(float7=1.0),
        "unknown device": lambda: document.update(device="Z9"),
    }
    changes[change]()


@pytest.mark.parametrize(
    "change",
    ["unknown key", "missing key", "efficiency above 1", "efficiency zero", "grid of another size",
     "nodes out of order", "time falls", "bytes out of order", "two curves", "no curve", "missing source",
     "missing device source", "empty source", "no date", "slowdown below 1", "unknown dtype", "unknown device"],
)  # fmt: skip
def test_a_table_that_breaks_a_rule_is_refused(tmp_path: Path, change: str) -> None:
    document = msgspec.to_builtins(load_cluster("dgx-h100"))
    document = json.loads(json.dumps(document))
    assert load_cluster(written(tmp_path, document)) == load_cluster("dgx-h100")
    _torn(document, change)
    with pytest.raises(PlanFileError):
        load_cluster(written(tmp_path, document))


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.json"
    save_cluster(load_cluster("dgx-h100"), path)
    path.write_text(path.read_text()[:1000])
    with pytest.raises(PlanFileError, match=r"half\.json"):
        load_cluster(path)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    cluster = load_cluster("p3.16xlarge", inter_node_gbits_per_s=100)
    save_cluster(cluster, tmp_path / "mine.json")
    reloaded = load_cluster(str(tmp_path / "mine.json"))
    assert reloaded == cluster
    assert reloaded.fingerprint == cluster.fingerprint


def groups_by_hand(
    cluster: Cluster, sizes: tuple[int, ...], axes: tuple[int, ...], first: int
) -> set[tuple[int, int, int, int]]:
    """All (ranks, most in a node, nodes, sharers) of the groups, by enumerating coordinates."""
    coordinates = list(itertools.product(*(range(size) for size in sizes)))
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, coordinate in enumerate(coordinates):
        key = tuple(c for axis, c in enumerate(coordinate) if axis not in axes)
        groups.setdefault(key, []).append((first + rank) // cluster.devices_per_node)
    found = set()
    crossing = [set(nodes) for nodes in groups.values() if len(set(nodes)) > 1]
    for nodes in groups.values():
        most = max(nodes.count(node) for node in nodes)
        sharers = max(sum(node in other for other in crossing) for node in nodes) if len(set(nodes)) > 1 else 1
        found.add((len(nodes), most, len(set(nodes)), sharers))
    return found


def test_groups_are_those_of_an_enumeration() -> None:
    meshes = [(2, 8), (4, 4), (3, 5), (2, 3, 4), (6, 2), (12,), (2, 2, 2, 3), (1, 7), (5, 1, 3)]
    for per_node, sizes, first in itertools.product((1, 3, 4, 5, 8), meshes, (0, 3, 8)):
        cluster = load_cluster("dgx-h100", devices_per_node=per_node)
        for count in range(1, len(sizes) + 1):
            for axes in itertools.combinations(range(len(sizes)), count):
                group = cluster.axis_group(int(np.prod(sizes)), sizes, axes, first)
                every = groups_by_hand(cluster, sizes, axes, first)
                if group.num_ranks == 1:
                    assert group == node_group(1)
                    continue
                assert msgspec.structs.astuple(group) in every
                others = [RankGroup(**dict(zip(RankGroup.__struct_fields__, fields, strict=True))) for fields in every]
                prices = [float(cluster.collective_s("all_gather", 2.0**36, other)) for other in others]
                if group.num_nodes > 1:
                    assert float(cluster.collective_s("all_gather", 2.0**36, group)) >= max(prices) * 0.999


def test_groups_that_cross_share_the_nics() -> None:
    cluster = load_cluster("p3.16xlarge")
    assert cluster.axis_group(16, (2, 8), (0,)).groups_per_node == 8
    alone = cluster.collective_s(
        "all_reduce", 2**30, RankGroup(num_ranks=2, ranks_per_node=1, num_nodes=2, groups_per_node=1)
    )
    eight = cluster.collective_s("all_reduce", 2**30, cluster.axis_group(16, (2, 8), (0,)))
    assert float(eight / alone) == pytest.approx(8, rel=0.01)
    one, four = (cluster.transfer_s(2**30, same_node=False, num_senders=sharers) for sharers in (1, 4))
    assert float(four / one) == pytest.approx(4, rel=0.01)
    assert float(cluster.transfer_s(2**20, same_node=True)) < float(cluster.transfer_s(2**20, same_node=False))


def test_one_rank_uses_one_nic() -> None:
    # DGX H100: 8 x 50 GB/s; one rank gets 50, 8 that share get 50 each, of which 0.43 is reached
    cluster = load_cluster("dgx-h100")
    for sharers in (1, 8):
        assert float(cluster.transfer_s(1e9, same_node=False, num_senders=sharers)) == pytest.approx(
            1e9 / (50e9 * 0.43) * cluster.training_slowdown, rel=0.01
        )


@pytest.mark.parametrize(
    ("num_ranks", "busbw_gbytes"), [(2, 22.5), (3, 45), (4, 85), (5, 37), (6, 45.6), (7, 87), (8, 134)]
)
def test_the_cube_mesh_is_not_one_number(num_ranks: int, busbw_gbytes: float) -> None:
    cluster = load_cluster("p3.16xlarge", training_slowdown=1.0)
    seconds = float(cluster.collective_s("all_reduce", 2**30, node_group(num_ranks)))
    assert 2**30 * 2 * (num_ranks - 1) / num_ranks / seconds / 1e9 == pytest.approx(busbw_gbytes, rel=0.02)


@pytest.mark.parametrize(
    ("name", "gbits", "num_nodes", "num_bytes", "busbw_gbytes"),
    [("dgx-a100", 400, 2, 2**30, 76.8), ("dgx-h100", 3200, 2, 2**30, 437), ("dgx-b200", 3200, 4, 2**30, 362)],
)
def test_all_reduce_across_nodes_is_near_published(
    name: str, gbits: float, num_nodes: int, num_bytes: int, busbw_gbytes: float
) -> None:
    cluster = load_cluster(name, training_slowdown=1.0, inter_node_gbits_per_s=gbits)
    n = num_nodes * 8
    seconds = float(cluster.collective_s("all_reduce", num_bytes, cluster.axis_group(n, (n,), (0,))))
    assert num_bytes * 2 * (n - 1) / n / seconds / 1e9 == pytest.approx(busbw_gbytes, rel=0.2)


@pytest.mark.parametrize("name", cluster_names())
def test_more_bytes_take_longer_and_one_rank_or_none_nothing(name: str) -> None:
    cluster = load_cluster(name)
    sizes = np.logspace(0, 11, 200)
    per_node = cluster.devices_per_node
    for kind in KINDS:
        for num_ranks in range(2, per_node + 1):
            seconds = cluster.collective_s(kind, sizes, node_group(num_ranks))
            assert (np.diff(seconds) >= -1e-12 * seconds[:-1]).all()
            assert (seconds > 0).all()
        across = cluster.collective_s(kind, sizes, cluster.axis_group(3 * per_node, (3 * per_node,), (0,)))
        assert (np.diff(across) >= -1e-12 * across[:-1]).all()
        assert float(cluster.collective_s(kind, 1e9, node_group(1))) == 0.0
        assert cluster.collective_s(kind, np.array([0.0, 8.0]), node_group(2))[0] == 0.0
    assert float(cluster.transfer_s(0, same_node=True)) == 0.0


@pytest.mark.parametrize("name", device_names())
def test_more_work_never_takes_much_less_time(name: str) -> None:
    device = load_device(name)
    dtype = device.default_dtype
    ladder = np.unique(np.logspace(0, 5.3, 240).astype(int))
    for other in (1, 64, 500, 4096, 50257):
        for shape in ((ladder, other, 4096), (4096, ladder, other), (other, 4096, ladder), (other, ladder, 777)):
            seconds = device.matmul_s(*shape, dtype=dtype)
            assert (np.diff(seconds) >= -0.03 * seconds[:-1]).all(), shape
            assert (seconds >= device.kernel_latency_s).all()
            fastest = (
                2.0 * np.prod(np.broadcast_arrays(*(np.asarray(x, float) for x in shape)), axis=0) / device.peak(dtype)
            )
            assert (seconds > fastest).all()
    for flash, backward in itertools.product((True, False), repeat=2):
        times = device.attention_s(
            4, 16, 16, ladder, ladder, 64, causal=True, dtype=dtype, backward=backward, flash=flash
        )
        assert (np.diff(times) >= 0).all()
        assert (times > 0).all()


def test_shapes_broadcast_and_batches_add_work() -> None:
    device = load_device("H100-SXM-80GB")
    grid = device.matmul_s(np.array([[64], [4096]]), np.array([256, 1024, 8192]), 4096, dtype="bfloat16")
    assert grid.shape == (2, 3)
    one, many = (device.matmul_s(1024, 1024, 1024, batch, dtype="bfloat16") for batch in (1, 64))
    assert 5 * float(one) < float(many) <= 64 * float(one)
    assert float(device.matmul_s(4096, 4096, 4096, dtype="float32")) > 5 * float(
        device.matmul_s(4096, 4096, 4096, dtype="bfloat16")
    )
    with pytest.raises(UsageError, match="float16"):
        load_device("V100-SXM-16GB").matmul_s(8, 8, 8, dtype="bfloat16")


def test_flash_reads_no_scores_and_causal_saves_half() -> None:
    device = load_device("A100-SXM-80GB")

    def seconds(**changed: bool) -> float:
        setting = {"causal": True, "backward": False, "flash": True} | changed
        return float(device.attention_s(4, 32, 32, 4096, 4096, 128, dtype="bfloat16", **setting))

    assert seconds() < seconds(causal=False) < 2.01 * seconds()
    assert seconds(backward=True) > 2.4 * seconds()
    assert seconds(flash=False) > 2.5 * seconds()
    # 4*32*4096^2 scores * 8 bytes at 0.8 * 2039 GB/s, and two products that move 2 bytes a score and 2 * 4*32*4096*128 * 2
    assert seconds(flash=False) == pytest.approx(10.53e-3 + 2 * 2.796e-3, rel=0.002)


@needs_measurements
def test_the_tables_are_within_their_stated_error() -> None:
    from tests.benchmarks import fit_cost_tables as fit

    components = MEASURED / "components"
    for name, file, p90 in (
        ("A100-SXM-80GB", "a100", 0.17),
        ("H100-SXM-80GB", "h100", 0.10),
        ("H200-SXM-141GB", "h200", 0.10),
    ):
        ratio, outside = fit.matmul_ratios(load_device(name), fit.rows_of(components / f"gemm_bf16_{file}_sxm.csv"))
        assert np.median(np.abs(ratio[outside] - 1)) < 0.03
        assert np.quantile(np.abs(ratio[outside] - 1), 0.9) < p90
        if file != "h200":
            rows = fit.rows_of(components / f"attn_causal_fwd_bf16_d128_{file}_sxm.csv")
            assert np.quantile(np.abs(fit.attention_ratios(load_device(name), rows) - 1), 0.9) < 0.13
        ratio = fit.collective_ratios(f"dgx-{file}", fit.rows_of(components / f"nccl_{file}_sxm.csv"))
        assert np.quantile(np.abs(ratio - 1), 0.9) < 0.14


def test_loading_needs_no_torch() -> None:
    code = "import sys, autopar.cluster as c; c.load_cluster('dgx-h100'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "autopar").rglob("__init__.py")}
    assert folders | {"autopar.cost_tables"} == listed, (
        "add the new folder to [tool.setuptools] packages in pyproject.toml"
    )
