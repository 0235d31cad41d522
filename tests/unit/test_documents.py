"""What README.md and docs/ show is true: every command runs, every transcript is what is printed, every link leads somewhere.

The fast tier runs the commands on small models (`SMALL` replaces the sizes that they name); the slow one runs those of
the README as they stand and compares what is printed, and starts the processes that torchrun and verify need.
"""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from autopar.cli.main import run
from tests import command_reference

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = re.compile(r"\b[A-Z]{4,}(?:\.\w+)?\b")  # `autopar compare PLAN ...` is a form, not a command
SMALL = {
    "gpt.py": "layers=4 hidden=64 heads=8 vocab=256 seq=32",
    "llama.py": "layers=16 hidden=64 heads=8 kv_heads=8 vocab=256 seq=32",
    "nano_gpt.py": "layers=4 width=64 heads=8 vocab=256 context=32",
}
STARTS_PROCESSES = re.compile(r"^torchrun |^autopar verify |^autopar profile | --exec ")
FOR_DEVELOPERS = re.compile(r"^(pip|python -m pytest|ruff|mypy)\b")
PATHS_OF_JQ = re.compile(r"\| jq \.(\S+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownCommand:
    """A command line of a document, and the lines printed below it (none where it shows none)."""

    document: Path
    line: str
    output: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """Its words without the comment and the pipe behind it."""
        return shlex.split(PATHS_OF_JQ.sub("", self.line), comments=True)


def shown_commands(document: Path) -> Iterator[ShownCommand]:
    """Commands of ``console`` blocks, of the examples in a command's help, and in the text between backticks."""
    text = document.read_text()
    for block in re.findall(r"(?ms)^```console\n(.*?)^```$", text):
        for command in re.split(r"(?m)^\$ ", block)[1:]:
            line, *output = command.splitlines()
            yield from (ShownCommand(document=document, line=part, output=tuple(output)) for part in line.split(" && "))
    for line in re.findall(r"(?m)^ +((?:autopar|torchrun) .*)$", text):
        yield ShownCommand(document=document, line=line)
    for line in re.findall(r"`((?:autopar|torchrun|python -m) [^`]+)`", re.sub(r"(?ms)^```.*?^```$", "", text)):
        if not PLACEHOLDERS.search(line) and "-" in line:
            yield ShownCommand(document=document, line=line)


COMMANDS = [command for document in DOCUMENTS for command in shown_commands(document)]
FIRST_SHOWN = {each.line: each for each in reversed(COMMANDS)}
OURS = [
    each for each in COMMANDS if each.line.startswith(("autopar ", "torchrun ")) and each is FIRST_SHOWN[each.line]
]  # a line that several documents show once, where it is shown first


def shrunk(words: list[str]) -> list[str]:
    """The words of a command with its model's sizes replaced by small ones, and a search for many GPUs by one for 8."""
    model = next((Path(word).name for word in words if Path(word).name in SMALL), None)
    if model is None or words[1] not in ("plan", "estimate"):
        return words
    others = [word for at, word in enumerate(words) if word != "--set" and words[at - 1] != "--set"]
    searched = "--layout" not in words  # two layers will do where no layout asks for more
    sizes = re.sub(r"layers=\d+", "layers=2", SMALL[model]) if searched else SMALL[model]
    small = [word for setting in sizes.split() for word in ("--set", setting)]
    batch = [] if "--global-batch" in words or "gbs=" in " ".join(words) else ["--global-batch", "64"]
    gpus = ["--gpus", "8"] if searched else []
    return [*others, *small, *batch, *gpus, "-q"]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model files where the commands look for them, and plans of 4 and of 16 devices."""
    folder = tmp_path_factory.mktemp("shown")
    shutil.copytree(ROOT / "examples", folder / "examples")
    for path in (ROOT / "examples").glob("*.py"):
        shutil.copy(path, folder)
    shutil.copy(ROOT / "cost_tables" / "cluster.dgx-h100.json", folder / "table.json")
    with contextlib.chdir(folder):
        for gpus in ("4", "16"):
            words = ["plan", "examples/gpt.py", "--gpus", gpus, "--cluster", "cpu-gloo"]
            assert run([*shrunk(["autopar", *words, "--layout", "tp=2"])[1:], "-o", f"{gpus}.plan.json"]) == 0
    return folder


@pytest.fixture
def folder(plans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``plans`` as the working directory, with gpt.plan.json of 16 devices."""
    shutil.copytree(plans, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "16.plan.json", tmp_path / "gpt.plan.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", sorted({each.document for each in OURS}), ids=lambda path: path.name)
def test_shown_commands_run(document: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in OURS:
        if command.document != document or STARTS_PROCESSES.search(command.line):
            continue
        capfd.readouterr()
        if command.output and command.output[0].startswith("autopar: "):
            assert run(command.words[1:]) == 2, command.line
            assert capfd.readouterr().err.splitlines()[-len(command.output) :] == list(command.output)
            continue
        words = shrunk(command.words)
        assert run([*words[1:], *(["--force"] if "-o" in words else [])]) == 0, command.line
        printed = capfd.readouterr().out
        if keys := PATHS_OF_JQ.search(command.line):
            part = json.loads(printed)
            for key in keys[1].split("."):
                part = part[key]


def test_developers_commands_are_those_of_the_continuous_integration() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for command in COMMANDS:
        if FOR_DEVELOPERS.search(command.line):
            line = re.sub(r" +#.*| tests/\S+| -m slow", "", command.line)
            assert re.sub(r"^pip install ", "pip install -q ", line) in script, command.line


def test_the_command_reference_is_current() -> None:
    assert command_reference.PATH.read_text() == command_reference.reference(), "python -m tests.command_reference"


def test_the_model_of_the_readme_is_the_end_of_the_example() -> None:
    block = re.search(r"(?ms)^```python\n(GLOBAL_BATCH.*?)^```$", (ROOT / "README.md").read_text())
    assert block is not None
    shown = [line for line in block[1].splitlines() if line]
    example = [line for line in (ROOT / "examples" / "nano_gpt.py").read_text().splitlines() if line]
    assert shown == example[-len(shown) :]
    assert len(shown) <= 15


def test_the_readme_has_fewer_than_900_words() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 900


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for each in OURS if each.output and each.output[0][:8] != "autopar:"])
def test_a_transcript_is_what_is_printed(
    command: ShownCommand, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Line by line, but for the seconds of the search; an ellipsis stands for lines left out."""
    assert run(command.words[1:]) == 0
    printed = [re.sub(r", [\d.]+ m?s$", "", line.rstrip()) for line in capfd.readouterr().out.splitlines()]
    at = 0
    for line in command.output:
        if line not in ("", "..."):
            at = printed.index(re.sub(r", [\d.]+ m?s$", "", line), at) + 1


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for each in OURS if STARTS_PROCESSES.search(each.line)], ids=lambda c: c.line)
def test_commands_that_start_processes_run(command: ShownCommand, folder: Path) -> None:
    shutil.copy("4.plan.json", "gpt.plan.json")
    words = shlex.split(command.line.replace("--nproc-per-node=8", "--nproc-per-node=2"), comments=True)
    if "--exec" in words:
        words += ["--steps", "2"]  # argparse takes the last
    if "profile" in words:
        words += ["--force", "--device", "cpu", *([] if "--quick" in words else ["--quick"])]
    if words[0] == "autopar":
        words[:1] = [sys.executable, "-m", "autopar"]
    else:
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", sorted({each.words[2] for each in COMMANDS if each.line.startswith("python -m tests.")})
)
def test_modules_that_documents_name_run(module: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert found.returncode == 0, found.stderr
