"""`autopar cluster`: the clusters that ship, and the numbers of one of them."""

from collections.abc import Iterator
from typing import Any

import click

from autopar.cli.claimed_stdout import ResultCommand, print_result
from autopar.cli.command_options import Assignment, unique_assignments

MAX_LISTED_NUMBERS = 8
EXAMPLES = """\b
Examples:
  autopar cluster list
  autopar cluster show dgx-a100 --cluster-set inter_node_gbits_per_s=800
  autopar cluster show table.json --json | jq .device.matmul"""


@click.group("cluster", epilog=EXAMPLES)
def cluster_group() -> None:
    """List the clusters that ship with autopar, or show one."""


@cluster_group.command("list", cls=ResultCommand)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def list_command(*, as_json: bool) -> None:
    """Print the names that --cluster takes."""
    from autopar.cluster.cost_tables import cluster_names

    names = sorted(cluster_names())
    if as_json:
        from autopar.cli.output import print_document

        print_document({"clusters": names})
        return
    for name in names:
        print_result(name)


@cluster_group.command("show", cls=ResultCommand)
@click.argument("name", metavar="NAME|FILE")
@click.option(
    "--cluster-set", multiple=True, type=Assignment(), metavar="K=V", help="Override a key of the cluster's table."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show_cluster_command(*, name: str, cluster_set: tuple[tuple[str, Any], ...], as_json: bool) -> None:
    """Print every number of a cluster; the keys name the units."""
    import msgspec

    from autopar.cluster.cost_tables import load_cluster

    cluster = load_cluster(name, **unique_assignments("--cluster-set", cluster_set))
    document = msgspec.to_builtins(cluster, enc_hook=lambda value: value.tolist())
    if as_json:
        from autopar.cli.output import print_document

        print_document(document)
        return
    for line in table_lines(document, ""):
        print_result(line)


def table_lines(table: Any, indent: str) -> Iterator[str]:
    """The keys of a nested table, a line each; of a long list of numbers, the first and last.

    >>> list(table_lines({"link": {"latency_s": 1e-06}, "sizes": [1, 2]}, ""))
    ['link:', '  latency_s: 1e-06', 'sizes: 1, 2']
    """
    for key, value in table.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from table_lines(value, indent + "  ")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            yield f"{indent}{key}:"
            for item in value:
                first, *rest = table_lines(item, "") or [""]
                yield f"{indent}  - {first}"
                yield from (f"{indent}    {line}" for line in rest)
        elif isinstance(value, list | tuple):
            items = [str(item) for item in value]
            if len(items) > MAX_LISTED_NUMBERS:
                half = MAX_LISTED_NUMBERS // 2
                items = [*items[:half], f"... {len(items) - 2 * half} more ...", *items[-half:]]
            yield f"{indent}{key}: {', '.join(items)}"
        else:
            yield f"{indent}{key}: {value}"
