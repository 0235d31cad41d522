"""`autopar profile`: the machine this runs on, as a table that --cluster takes."""

from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import click

from autopar.cli.claimed_stdout import ResultCommand, print_result
from autopar.cli.command_options import output_file_options
from autopar.cli.output_file import OutputFile

if TYPE_CHECKING:
    from autopar.cluster.cluster import Cluster

EXAMPLES = """\b
Examples:
  autopar profile -o table.json --quick
  torchrun --nproc-per-node=8 -m autopar profile -o table.json
  autopar plan gpt.py --gpus 8 --cluster table.json"""


@click.command(
    "profile", cls=ResultCommand, short_help="Measure this machine and write a table for --cluster.", epilog=EXAMPLES
)
@output_file_options("table", required=True)
@click.option("--quick", is_flag=True, help="A coarse table in seconds rather than minutes.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="What to measure; else the GPU if there is one.")
@click.option(
    "--base",
    metavar="NAME",
    help="The shipped cluster to take unmeasured numbers from; else the most similar one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the table as one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def profile_command(
    *, output: str, force: bool, quick: bool, device: str | None, base: str | None, as_json: bool, quiet: bool
) -> None:
    """Measure matmul, attention, bandwidth and launches of this machine; under torchrun, also collectives among its
    ranks.

    Each number of the table says whether it was measured here or copied from a shipped cluster. On CPUs a rank is a
    process of OMP_NUM_THREADS threads (default 1)."""
    from autopar.cluster.cost_tables import PROFILE_FILE_KIND, check_cluster_content, cluster_content

    file = OutputFile.checked(output, PROFILE_FILE_KIND, force=force, as_json=as_json)

    from autopar.cli.progress import progress_on_stderr
    from autopar.measure.profile_machine import profile_machine

    with progress_on_stderr(quiet) as progress:
        cluster = profile_machine(device=device, quick=quick, base=base, progress=progress)
    if cluster is None:  # another rank of the group writes and reports
        return

    content = cluster_content(cluster)
    path = file.write(content)
    # A table that its own rules refuse is an error now, not at its first use.
    check_cluster_content(content, path or Path(output))
    if as_json:
        import msgspec

        from autopar.cli.output import print_document

        print_document(msgspec.json.decode(msgspec.json.encode(cluster)))
        return
    with file.text_stream():
        print_result("\n".join(profile_lines(cluster)))
        if path is not None:
            print_result(f"written     {path}")


def profile_lines(cluster: "Cluster") -> list[str]:
    """The measured numbers, a line each; the last line names what was not measured here."""
    from autopar.core.units import gib_text, percent_text, seconds_text

    device = cluster.device
    peaks = ", ".join(f"{dtype} {peak / 1e12:,.2f} TFLOP/s" for dtype, peak in device.peak_flops_per_s.items())
    best, worst = max(device.matmul.efficiency), min(device.matmul.efficiency)
    lines = [
        f"device      {device.name}, {gib_text(device.memory_bytes)} for a rank",
        f"peak        {peaks}",
        f"matmul      {percent_text(worst)} to {percent_text(best)} of it, sustained {percent_text(device.sustained_fraction)}",
        f"attention   {percent_text(min(device.flash_attention.efficiency))} to "
        f"{percent_text(max(device.flash_attention.efficiency))}",
        f"memory      {device.memory_bytes_per_s / 1e9:,.1f} GB/s",
        f"launch      {seconds_text(device.launch_s)}, shortest kernel {seconds_text(device.kernel_latency_s)}",
    ]
    if cluster.provenance["collectives"].status == "measured":
        for curve in cluster.collectives:
            if curve.kind == "all_reduce":
                rate = curve.num_bytes[-1] / curve.time_s[-1] / 1e9
                lines.append(
                    f"all_reduce  {curve.num_ranks} ranks, {seconds_text(curve.time_s[0])} of {curve.num_bytes[0]:,} bytes, "
                    f"{rate:,.2f} GB/s of {curve.num_bytes[-1]:,}"
                )
    elsewhere = sorted(
        key for table in (cluster, device) for key, source in table.provenance.items() if source.status != "measured"
    )
    if elsewhere:
        lines += wrap(f"unmeasured  {', '.join(elsewhere)}", 110, subsequent_indent=" " * 12)
    return lines
