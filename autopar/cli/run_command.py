"""`autopar run`: the command that starts a training script on as many ranks as a plan has GPUs."""

import os
import shlex
from pathlib import Path

import click

from autopar.cli.claimed_stdout import ResultCommand, invocation, print_result
from autopar.cli.command_options import count_option
from autopar.core.errors import UsageError

EXAMPLES = """\b
Examples:
  autopar run gpt.plan.json -- train_gpt.py --steps 100
  autopar run gpt.plan.json --launcher slurm --rendezvous node0:29500 -- train_gpt.py
  autopar run gpt.plan.json --exec -- train_gpt.py"""


class RunCommand(ResultCommand):
    """A command whose words behind ``--`` are a script's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The words that are left; click.UsageError for an option that the command lacks."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(f"{error.format_message()} The options of the script go behind --.", ctx) from None


@click.command(
    "run",
    cls=RunCommand,
    short_help="Print or run a plan's launch command.",
    epilog=EXAMPLES,
)
@click.argument("plan_file", metavar="PLAN", type=click.Path())
@click.argument("script", metavar="-- train.py [ARGS]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--launcher", type=click.Choice(["torchrun", "slurm", "torchx"]), default="torchrun", show_default=True)
@click.option(
    "--ranks-per-node",
    type=count_option("--ranks-per-node"),
    metavar="N",
    help="Ranks on each node; else the cluster's devices per node.",
)
@click.option("--rendezvous", metavar="HOST:PORT", help="Where the nodes meet; not needed for one node.")
@click.option(
    "--max-restarts", type=click.IntRange(min=0), default=0, show_default=True, help="Restarts after a failure."
)
@click.option("--exec", "execute", is_flag=True, help="Run the command instead of printing it.")
def run_command(
    *,
    plan_file: str,
    script: tuple[str, ...],
    launcher: str,
    ranks_per_node: int | None,
    rendezvous: str | None,
    max_restarts: int,
    execute: bool,
) -> None:
    """Print the command that runs train.py under PLAN (passed to it as --plan PLAN); with --exec, run it."""
    from autopar.cli.inputs import load_plan_cluster
    from autopar.core.plan_file import load_plan

    plan = load_plan(plan_file)
    if not script:
        raise UsageError("no training script; write it behind --, such as: autopar run gpt.plan.json -- train.py")
    per_node = ranks_per_node
    if per_node is None:
        cluster = load_plan_cluster(plan, Path(plan_file), None, way_out="give --ranks-per-node")
        per_node = min(plan.gpus, cluster.devices_per_node)
    nodes, rest = divmod(plan.gpus, per_node)
    if rest and nodes:
        raise UsageError(f"the plan's {plan.gpus} ranks do not fill nodes of {per_node}; give --ranks-per-node")
    nodes, per_node = max(nodes, 1), min(per_node, plan.gpus)
    arguments = list(script)
    if not any(word == "--plan" or word.startswith("--plan=") for word in arguments):
        arguments += ["--plan", str(Path(plan_file))]
    line = launch_command(launcher, nodes, per_node, arguments, rendezvous, max_restarts)
    if not execute:
        print_result(shlex.join(line))
        return
    if launcher == "torchrun" and nodes > 1 and rendezvous is None:
        raise UsageError(f"the plan needs {nodes} nodes; give --rendezvous HOST:PORT and run this on each of them")
    invocation().stdout.restore()  # for the training script
    try:
        os.execvp(line[0], line)
    except FileNotFoundError:
        raise UsageError(f"there is no {line[0]} on this machine; leave out --exec to print the command") from None


def launch_command(
    launcher: str, nodes: int, per_node: int, arguments: list[str], rendezvous: str | None, max_restarts: int
) -> list[str]:
    """The words of the command that starts ``arguments`` (a script and its options) on ``nodes`` x ``per_node`` ranks.

    >>> " ".join(launch_command("torchrun", 1, 4, ["train.py"], None, 0))
    'torchrun --standalone --nproc-per-node=4 train.py'
    """
    restarts = [f"--max-restarts={max_restarts}"] if max_restarts else []
    if launcher == "torchx":
        return [
            "torchx", "run", "--scheduler=local_cwd" if nodes == 1 else "--scheduler=slurm", "dist.ddp",
            "-j", f"{nodes}x{per_node}", *([f"--max_retries={max_restarts}"] if max_restarts else []),
            "--script", arguments[0], "--", *arguments[1:],
        ]  # fmt: skip
    endpoint = rendezvous or "HOST:29500"
    spread = (
        ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    )
    # torch 2.13's restarted workers find the addresses of the dead ones in a store that is shared with the agent.
    fresh = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"] if max_restarts else []
    line = [*fresh, "torchrun", *spread, f"--nproc-per-node={per_node}", *restarts, *arguments]
    if launcher == "slurm":
        return ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", f"--gpus-per-node={per_node}", *line]
    return line
