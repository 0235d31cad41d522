"""What ``-o`` may replace: absent files and earlier results, with ``--force`` what else a user can mean by it, and never a
result lost. The oracle is the folder: names, kinds and bytes of all that is in it, before and after."""

import contextlib
import errno
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from autopar.cli.main import run
from autopar.cluster.cost_tables import load_cluster, save_cluster
from autopar.core.errors import PlanFileError
from autopar.core.plan_file import load_plan, save_plan
from tests.unit.sample_plan import sample_plan

torch.set_num_threads(1)
MODEL = """
import torch
from pathlib import Path

Path("traced").touch()
GLOBAL_BATCH = 16

def build_model():
    return torch.nn.Linear(8, 8)

def example_inputs(batch_size):
    return {"input": torch.empty(batch_size, 8)}

def loss_fn(output, inputs):
    return output.sum()
"""
ESTIMATE = ["estimate", "clob.py", "--gpus", "4", "--cluster", "cpu-gloo", "--layout", "dp=4", "-q"]
Make = Callable[[Path], object]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("clob.py").write_text(MODEL)
    return tmp_path


def snapshot() -> dict[str, object]:
    """Everything in the working folder: links by where they lead, files by their bytes, the rest by its kind."""

    def content(path: Path) -> object:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            return os.readlink(path)
        return path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)

    return {path.name: content(path) for path in Path().iterdir()}


def a_plan(**changes: object) -> bytes:
    """The file of a plan, with other values for some of its keys."""
    return json.dumps(json.loads(msgspec.json.encode(sample_plan())) | changes).encode()


def device(path: Path) -> None:
    """A second /dev/null, which a wrong write may destroy."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        path.write_bytes(b"anything")
    except OSError:
        pytest.skip("makes a device, which this user or file system may not")


def listening_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


def link_to(name: str, content: bytes | None = None) -> Make:
    def make(path: Path) -> None:
        if content is not None:
            Path(name).write_bytes(content)
        path.symlink_to(name)

    return make


def file_of(content: bytes) -> Make:
    return lambda path: path.write_bytes(content)


TERRAFORM = b'{"format_version": "1.2", "planned_values": {}, "resource_changes": []}'  # of `terraform show -json`
OTHER = "choose another file with -o, or replace this one with --force"
THROUGH = "choose another file with -o, or write through the link with --force"
INTO = "-o - writes to stdout, --force into it"
NAMES = "choose another file with -o"

# What is at the path; what the message says of it and as the way out (None: it is replaced); the file that --force writes.
PLACES: dict[str, tuple[Make, tuple[str, str] | None, str | None]] = {
    "nothing": (lambda path: None, None, "x.json"),
    "a plan": (file_of(a_plan()), None, "x.json"),
    "a plan of an older version": (file_of(a_plan(format_version="0.9", search="?")), None, "x.json"),
    "a plan of a newer version": (file_of(a_plan(format_version="7.0", colour="red")), None, "x.json"),
    "a plan with its keys sorted": (file_of(json.dumps(json.loads(a_plan()), sort_keys=True).encode()), None, "x.json"),
    "the model": (
        file_of(MODEL.encode()),
        (f"it is a file of {len(MODEL)} bytes that is not an autopar plan", OTHER),
        "x.json",
    ),
    "an empty file": (file_of(b""), ("it is an empty file", OTHER), "x.json"),
    "a torn plan": (file_of(a_plan()[:-40]), ("that is torn or no JSON, so not an autopar plan", OTHER), "x.json"),
    "a plan and more": (file_of(a_plan() + b"!"), ("that is torn or no JSON", OTHER), "x.json"),
    "other JSON": (file_of(b'{"a": 1}'), ("it is a JSON file that is not an autopar plan", OTHER), "x.json"),
    "another JSON list": (file_of(b"[1, 2]"), ("it is a file of 6 bytes that is not an autopar plan", OTHER), "x.json"),
    "a plan of another program": (file_of(TERRAFORM), ("it is a JSON file that is not an autopar", OTHER), "x.json"),
    "nested JSON": (file_of(b'{"a":' * 100_000), ("so not an autopar plan", OTHER), "x.json"),
    "no UTF-8": (file_of(b'{"\xff'), ("so not an autopar plan", OTHER), "x.json"),
    "a link to a plan": (link_to("p.json", a_plan()), ("it is a symbolic link to p.json", THROUGH), "p.json"),
    "a link to the model": (link_to("clob.py"), ("it is a symbolic link to clob.py", THROUGH), "clob.py"),
    "a link to nothing": (
        link_to("p.json"),
        ("it is a symbolic link to p.json, which does not exist", THROUGH),
        "p.json",
    ),
    "a link to itself": (link_to("x.json"), ("a symbolic link to x.json (Too many levels", NAMES), None),
    "a link to a folder": (link_to("."), ("is a directory", ""), None),
    "a link into no folder": (link_to("no/p.json"), ("there is no folder", NAMES), None),
    "a directory": (lambda path: path.mkdir(), ("is a directory", ""), None),
    "a socket": (listening_socket, ("it is a socket", NAMES), None),
    "a device": (device, ("it is a device", INTO), "x.json"),
    "a pipe": (os.mkfifo, ("it is a pipe", INTO), "x.json"),
}


@pytest.mark.parametrize("what", PLACES)
def test_only_an_earlier_plan_is_replaced(folder: Path, capsys: Capture, what: str) -> None:
    make, message, _ = PLACES[what]
    make(Path("x.json"))
    before = snapshot()
    code = run([*ESTIMATE, "-o", "x.json"])
    out, err = capsys.readouterr()
    if message is None:
        assert (code, err) == (0, "")
        assert load_plan("x.json").gpus == 4
        return
    assert (code, out) == (2, "")
    for words in ("x.json", *message):
        assert words in err
    assert len(err.splitlines()) <= 2
    assert snapshot() == before  # nothing was traced either: the model leaves a file when it is loaded


@pytest.mark.parametrize("what", [what for what, (_, message, _) in PLACES.items() if message is not None])
def test_force_writes_what_a_user_can_mean(folder: Path, capsys: Capture, what: str) -> None:
    make, _, written = PLACES[what]
    path = Path("x.json")
    make(path)
    before = snapshot()
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()), daemon=True)
    if path.is_fifo():
        reader.start()
    code = run([*ESTIMATE, "-o", "x.json", "--force"])
    if written is None:
        assert code == 2
        assert snapshot() == before
        return
    assert code == 0, capsys.readouterr().err
    if reader.ident is not None:
        reader.join()
        Path("read.json").write_bytes(read[0])
        assert load_plan("read.json").gpus == 4
    after = snapshot()
    if isinstance(before.get(written), int):  # a device or pipe stays one
        assert after[written] == before[written]
    else:
        assert load_plan(written).gpus == 4
    untouched = set(before) - {written}
    assert {name: after[name] for name in untouched} == {name: before[name] for name in untouched}


def test_the_default_name_is_under_the_same_rule(folder: Path, capsys: Capture) -> None:
    Path("clob.plan.json").write_text("notes")
    before = snapshot()
    words = ["plan", "clob.py", "--gpus", "4", "--cluster", "cpu-gloo", "--layout", "dp=4"]
    assert run(words) == 2
    assert "cannot write clob.plan.json: it is a file of 5 bytes that is not an autopar plan" in capsys.readouterr().err
    assert snapshot() == before
    assert run([*words, "--force"]) == 0
    assert run([*words, "--json"]) == 0  # by now it is a plan
    err = capsys.readouterr().err
    assert err.count("wrote clob.plan.json\n") == 1
    assert load_plan("clob.plan.json").gpus == 4


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Runs as nobody where the tests run as root, whom no permission stops."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.setresuid(65534, 65534, 0)
    except PermissionError:
        pytest.skip("root that may not become another user")
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_files_and_folders_that_permissions_protect(folder: Path, capsys: Capture) -> None:
    """An unreadable file may be anything; a read-only plan was protected on purpose; a read-only folder takes no file."""
    folder.chmod(0o777)
    Path("locked").mkdir()
    for name, mode in (("unreadable.json", 0), ("protected.json", 0o444), ("locked/p.json", 0o644), ("locked", 0o555)):
        if name != "locked":
            Path(name).write_bytes(a_plan())
        Path(name).chmod(mode)
    obstacles = {
        "unreadable.json": "it is a file that cannot be read (Permission denied), so maybe not an autopar plan; "
        + OTHER,
        "protected.json": "it is write-protected; " + OTHER,
        "locked/p.json": "the folder locked cannot be written; " + NAMES,
        "locked/new.json": "the folder locked cannot be written; " + NAMES,
    }
    with without_privileges():
        for name, message in obstacles.items():
            assert run([*ESTIMATE, "-o", name]) == 2
            assert capsys.readouterr().err.removesuffix("\n").endswith(f"cannot write {name}: {message}")
        assert run([*ESTIMATE, "-o", "locked/p.json", "--force"]) == 2
    assert not Path("traced").exists()
    capsys.readouterr()
    Path("locked").chmod(0o755)  # for who removes the folder


# What appears at the path while the model is built; in Python.
ARRIVALS = {
    "a file": "Path('x.json').write_text('theirs')",
    "a folder": "Path('x.json').mkdir()",
    "a link": "Path('x.json').symlink_to('clob.py')",
    "a pipe": "os.mkfifo('x.json')",
}


@pytest.mark.parametrize("what", ARRIVALS)
def test_what_appears_during_the_search_stays_and_so_does_the_plan(folder: Path, capsys: Capture, what: str) -> None:
    Path("clob.py").write_text(
        MODEL.replace("    return torch.nn", f"    import os; {ARRIVALS[what]}\n    return torch.nn")
    )
    Path("x.1.json").write_text("taken")
    before = snapshot()
    assert run([*ESTIMATE, "-o", "x.json", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["plan"] == "x.2.json"
    assert load_plan("x.2.json").gpus == 4
    assert err.startswith("autopar: cannot write x.json: it is a")
    assert err.endswith("; the result is in x.2.json\n")
    after = snapshot()
    arrived = {"a file": b"theirs", "a folder": stat.S_IFDIR, "a link": "clob.py", "a pipe": stat.S_IFIFO}[what]
    assert after["x.json"] == arrived
    assert {name: after[name] for name in before} == before


def test_a_plan_that_somebody_replaces_during_the_search_is_no_plan_any_more(folder: Path, capsys: Capture) -> None:
    Path("x.json").write_bytes(a_plan())
    edit = "Path('x.json').write_text('theirs')"
    Path("clob.py").write_text(MODEL.replace("    return torch.nn", f"    {edit}\n    return torch.nn"))
    assert run([*ESTIMATE, "-o", "x.json"]) == 0
    assert Path("x.json").read_text() == "theirs"
    assert load_plan("x.1.json").gpus == 4
    assert "the result is in x.1.json" in capsys.readouterr().err


@pytest.mark.parametrize("links", ["hard links", "no hard links"])
def test_what_appears_in_the_last_moment_stays(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, links: str
) -> None:
    """Between the last look at the path and the rename, with and without a file system that has hard links."""
    real = os.link

    def late(source: str, target: Path) -> None:
        if Path(target).name == "x.json":
            Path("x.json").write_text("theirs")
        if links == "no hard links":
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        real(source, target)

    monkeypatch.setattr("os.link", late)
    assert run([*ESTIMATE, "-o", "x.json"]) == 0
    assert Path("x.json").read_text() == "theirs"
    assert load_plan("x.1.json").gpus == 4
    assert {path.name for path in Path().glob("[!_]*")} == {"clob.py", "traced", "x.1.json", "x.json"}


def test_a_folder_that_goes_away_costs_no_plan(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("results", "temporary"):
        Path(name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder / "temporary"))
    Path("clob.py").write_text(MODEL.replace("    return torch.nn", "    Path('results').rmdir()\n    return torch.nn"))
    assert run([*ESTIMATE, "-o", "results/x.json"]) == 6
    out, err = capsys.readouterr()
    (rescued,) = Path("temporary").glob("*/x.json")
    assert load_plan(rescued).gpus == 4
    assert out == ""
    assert (
        err
        == f"autopar: cannot write results/x.json: there is no folder results; the result is in {folder / rescued}\n"
    )


def test_a_model_that_changes_the_working_folder_does_not_move_the_plan(folder: Path) -> None:
    Path("elsewhere").mkdir()
    Path("clob.py").write_text(MODEL + "\nimport os; os.chdir('elsewhere')\n")
    assert run([*ESTIMATE, "-o", "x.json"]) == 0
    assert load_plan(folder / "x.json").gpus == 4
    assert os.listdir(folder / "elsewhere") == []


@pytest.mark.parametrize("command", ["plan", "estimate"])
@pytest.mark.parametrize("quiet", [True, False])
def test_stdout_takes_the_plan_alone(folder: Path, capsys: Capture, command: str, quiet: bool) -> None:
    words = [word for word in (command, *ESTIMATE[1:]) if word != "-q"] + ["-q"] * quiet
    assert run([*words, "-o", "-"]) == 0
    out, err = capsys.readouterr()
    Path("x.plan.json").write_text(out)
    assert load_plan("x.plan.json").gpus == 4
    assert run(["show", "x.plan.json"]) == 0
    text = capsys.readouterr().out
    assert err.endswith(text)
    assert (err == text) == quiet
    assert not Path("-").exists()
    assert not Path("clob.plan.json").exists()


def test_stdout_takes_no_two_documents(folder: Path, capsys: Capture) -> None:
    assert run([*ESTIMATE, "-o", "-", "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert (error["code"], error["kind"], err) == (2, "UsageError", "")
    assert "-o - and --json" in error["message"]
    assert not Path("traced").exists()


def test_a_file_named_dash_can_be_written(folder: Path) -> None:
    assert run([*ESTIMATE, "-o", "./-"]) == 0
    assert load_plan("-").gpus == 4


def test_names_as_long_as_the_file_system_takes(folder: Path, capsys: Capture) -> None:
    assert run([*ESTIMATE, "-o", "x" * 255]) == 0
    assert load_plan("x" * 255).gpus == 4
    assert run([*ESTIMATE, "-o", "x" * 256]) == 2
    assert "File name too long" in capsys.readouterr().err


def test_profile_replaces_only_tables_of_its_own(folder: Path, capsys: Capture) -> None:
    """``--base nowhere`` ends the command once the file has been looked at."""
    words = ["profile", "--device", "cpu", "--quick", "-q", "--base", "nowhere", "-o", "t.json"]
    shipped = load_cluster("cpu-gloo")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: save_cluster(shipped, "t.json"), "it is a JSON file that is not a cost table made by autopar profile"),
        (lambda: Path("t.json").write_bytes(a_plan()), "it is a JSON file that is not a cost table"),
        (
            lambda: save_cluster(msgspec.structs.replace(shipped, name="profile of a chip"), "t.json"),
            "no cluster 'nowhere'",
        ),
        (lambda: Path("t.json").unlink(), "no cluster 'nowhere'"),
    ]
    for make, message in cases:
        make()
        before = snapshot()
        assert run(words) == 2
        assert message in capsys.readouterr().err
        assert snapshot() == before
    Path("t.json").write_text("notes")
    assert run([*words, "--force"]) == 2
    assert "no cluster 'nowhere'" in capsys.readouterr().err
    assert run([*words[:-1], "-", "--json"]) == 2
    assert "-o - and --json" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_the_library_replaces_any_file_unless_told_to_take_care(folder: Path) -> None:
    path = Path("x.json")
    path.write_text("notes")
    Path("link.json").symlink_to("x.json")
    for name in ("x.json", "link.json"):
        with pytest.raises(PlanFileError, match=f"cannot write {name}: it is a"):
            save_plan(sample_plan(), name, force=False)
    assert path.read_text() == "notes"
    save_plan(sample_plan(), "link.json")
    assert os.readlink("link.json") == "x.json"
    assert load_plan(path) == sample_plan()
    save_plan(sample_plan(), path, force=False)
    with pytest.raises(PlanFileError, match=r"cannot write \.: it is a directory"):
        save_plan(sample_plan(), ".")
