"""The command line: what reaches the library, what is printed where, and every ending's exit code."""

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import autopar
from autopar.cli.main import autopar as program
from autopar.cli.main import run
from autopar.core.comparison import Comparison
from autopar.core.errors import (
    AutoparError,
    CheckError,
    CheckpointError,
    InfeasibleError,
    LayoutError,
    ModelError,
    PlanFileError,
    TimeLimitError,
    UsageError,
)
from autopar.core.plan_file import load_plan, save_plan
from tests.unit.sample_plan import sample_plan


class Library:
    """Stands in for cluster tables, model files and the search; records what it is called with."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self.error: BaseException | None = None
        self.file_batch: int | None = None

    def load_cluster(self, name: str, **overrides: Any) -> types.SimpleNamespace:
        self.calls["load_cluster"] = {"name": name, **overrides}
        if name == "nowhere":
            raise UsageError("unknown cluster 'nowhere'; `autopar cluster list` prints the names")
        return types.SimpleNamespace(name=name, fingerprint="ef" * 32)

    def load_workload(self, path: Any, **settings: Any) -> types.SimpleNamespace:
        self.calls["load_workload"] = {"path": str(path), **settings}
        return types.SimpleNamespace(global_batch=self.file_batch)

    def plan(self, workload: Any, *, progress: Callable[..., None], **options: Any) -> Any:
        self.calls["plan"] = options
        progress("search", "1 of 2", None, None)
        progress("search", "2 of 2", 2.0, 0.05)
        if self.error is not None:
            raise self.error
        return sample_plan()

    def estimate(self, workload: Any, **options: Any) -> Any:
        self.calls["estimate"] = options
        return sample_plan()

    def compare_megatron(self, plan: Any, workload: Any, cluster: Any, layout: str | None) -> Comparison:
        self.calls["compare"] = {"layout": layout}
        return Comparison(plan=plan, best=sample_plan(), num_layouts=240, num_fit=31, layout="tp=8,pp=2")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Library:
    fake = Library()
    modules: dict[str, dict[str, Any]] = {
        "autopar.cluster.cost_tables": {
            "load_cluster": fake.load_cluster,
            "cluster_names": lambda: ("dgx-h100", "dgx-a100", "p3.16xlarge"),
        },
        "autopar.workload.model_file": {"load_workload": fake.load_workload},
        "autopar.planner.planner": {"plan": fake.plan},
        "autopar.manual.layout_pricer": {"plan_layout": fake.estimate},
        "autopar.manual.megatron_grid": {"compare_megatron": fake.compare_megatron},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    return fake


def test_no_command_or_option_is_lost() -> None:
    """Names and options that users' scripts rely on; later work adds to them."""
    options = {
        name: sorted(o for p in command.params if isinstance(p, click.Option) for o in p.opts)
        for name, command in program.commands.items()
    }
    output = ("--json", "--quiet", "--verbose", "-q", "-v")
    shared = "--cluster --cluster-set --dtype --global-batch --gpus --json --layout --memory --micro-batch --optimizer"
    search = "--pin --quiet --recompute --schedule --set --time-limit --verbose --force --output -o -q -v"
    assert options["plan"] == sorted(f"{shared} {search}".split())
    assert options["estimate"] == sorted(f"{shared} {search} --tokens --mode --context --weights --kv-cache".split())
    assert options["compare"] == sorted(["--against", "--cluster", "--model", *output])
    assert options["show"] == sorted(output)
    assert options["profile"] == sorted(
        ["--base", "--device", "--force", "--json", "--output", "--quick", "--quiet", "-o", "-q"]
    )
    assert sorted(program.commands["cluster"].commands) == ["list", "show"]  # type: ignore[attr-defined]


def test_every_command_has_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    """The words of an example are options that the command has."""
    for name, command in program.commands.items():
        assert run([name, "--help"]) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        examples = [line for line in lines if f"autopar {name} " in line]
        assert examples, name
        known = {
            o for part in (command, *getattr(command, "commands", {}).values()) for p in part.params for o in p.opts
        }
        for example in examples:
            ours = example.split(f" {name} ", 1)[1].split(" -- ")[0].split(" | ")[0]
            assert {word for word in ours.split() if word.startswith("-")} <= known, example
    assert run(["--help"]) == 0
    help_text = capsys.readouterr().out
    for code in ("0 done", "2 usage", "4 no plan fits", "7 a check failed", "130 interrupted"):
        assert code in help_text


def test_plan_passes_every_option_to_the_library(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "plan models/gpt.py --gpus 64 --cluster dgx-a100 --cluster-set inter_node_gbits_per_s=800 "
        "--cluster-set device=X --set layers=96 --set tied=false --set rate=1e-3 --set size=39B --global-batch 1024 "
        "--micro-batch 8 --dtype fp16 --memory 12.5 --optimizer sgd --pin layers.*.wq.weight=S(0)R --recompute full "
        "--schedule gpipe --time-limit 30"
    )
    assert run(arguments.split()) == 0
    assert library.calls["load_cluster"] == {"name": "dgx-a100", "inter_node_gbits_per_s": 800, "device": "X"}
    assert library.calls["load_workload"] == {
        "path": "models/gpt.py", "layers": 96, "tied": False, "rate": 0.001, "size": "39B"
    }  # fmt: skip
    options = library.calls["plan"]
    assert options.pop("cluster").name == "dgx-a100"
    assert options == {
        "gpus": 64, "global_batch": 1024, "micro_batch": 8, "dtype": "fp16", "memory_gib": 12.5, "optimizer": "sgd",
        "pins": (("layers.*.wq.weight", "S(0)R"),), "recompute": "full", "schedule": "gpipe",
        "time_limit_s": 30.0,
    }  # fmt: skip
    saved = load_plan("gpt.plan.json")
    assert saved.command.startswith("autopar plan models/gpt.py --gpus 64")
    out, err = capsys.readouterr()
    assert "16,384 tokens/s" in out
    assert "search: 2 of 2, best 2.000 s, gap 5.0 %" in err
    assert err.endswith("wrote gpt.plan.json\n")


def test_json_is_one_document_with_the_frozen_keys(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    library.file_batch = 32
    assert run(["plan", "gpt.py", "--gpus", "8", "--json", "-q", "-o", "out.json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert err == ""
    wanted: dict[str, Any] = {
        "format_version": "1.0", "plan": "out.json", "model": {"parameters": 0, "flops_per_step": 0},
        "estimate": {"step_time_s": 0, "tokens_per_s": 0, "mfu": 0, "peak_memory_bytes": 0, "peak_tensor_bytes": 0,
                     "fits": True, "bubble_fraction": 0},
        "microbatches": 0, "micro_batch_size": 0, "schedule": "1f1b", "recompute": "none",
        "search": {"seconds": 0, "status": "optimal", "lower_bound_s": 0, "gap": 0},
    }  # fmt: skip
    for key, value in wanted.items():
        if isinstance(value, dict):
            assert set(value) <= set(document[key])
        assert key in document
    stage = document["stages"][0]
    assert stage["axes"] == {"dp": 2, "tp": 2}
    assert stage["blocks"] == ["embedding", "layers.0", "layers.1"]
    assert stage["num_gpus"] == 4
    assert stage["peak_memory_bytes"] == 11 * 2**30
    assert stage["seconds_per_microbatch"] == pytest.approx(0.18)
    assert document["model"]["parameters"] == 1_300_000_000


def test_estimate_writes_only_when_asked(library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", "gpt.py", "--gpus", "8", "--layout", "tp=2,gbs=32", "--recompute", "selective", "-q", "--json"]
    assert run(words) == 0
    assert library.calls["estimate"]["layout"] == "tp=2,gbs=32,recompute=selective"
    assert library.calls["estimate"]["global_batch"] == 32
    assert json.loads(capsys.readouterr().out)["plan"] is None
    assert list(tmp_path.iterdir()) == []
    assert run([*words, "-o", "p.json"]) == 0
    assert load_plan("p.json").gpus == 8


def test_the_batch_is_the_flag_then_the_layout_then_the_file(library: Library) -> None:
    library.file_batch = 1024
    for words, batch in (([], 1024), (["--layout", "gbs=64"], 64), (["--global-batch", "16"], 16)):
        assert run(["plan", "gpt.py", "--gpus", "8", "-q", *words]) == 0
        assert library.calls["estimate" if "--layout" in words else "plan"]["global_batch"] == batch


def test_show_prints_a_plan_file(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    save_plan(sample_plan(), "p.json")
    assert run(["show", "p.json"]) == 0
    assert "layers.*.attn.qkv.weight" in capsys.readouterr().out
    assert run(["show", "p.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == "p.json"


def plan_with_model(tmp_path: Path) -> Path:
    import hashlib

    import msgspec

    source = tmp_path / "gpt.py"
    source.write_text("# a model\n")
    model = msgspec.structs.replace(
        sample_plan().model, path=str(source), source_hash=hashlib.sha256(source.read_bytes()).hexdigest()
    )
    save_plan(sample_plan(model=model), tmp_path / "p.json")
    return source


def test_compare_prints_both_plans(library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_with_model(tmp_path)
    assert run(["compare", "p.json", "--against", "megatron", "-q"]) == 0
    assert library.calls["load_workload"]["layers"] == 4
    assert library.calls["compare"] == {"layout": None}
    assert "240 layouts priced, 31 of them fit" in capsys.readouterr().out
    assert run(["compare", "p.json", "--against", "megatron:tp=8, pp=2", "--json", "-q"]) == 0
    assert library.calls["compare"] == {"layout": "tp=8,pp=2"}
    assert json.loads(capsys.readouterr().out)["speedup"] == 1.0


def test_a_changed_model_or_cluster_is_refused(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = plan_with_model(tmp_path)
    source.write_text("# another model\n")
    assert run(["compare", "p.json", "--against", "megatron", "-q"]) == 6
    assert "changed since p.json was made" in capsys.readouterr().err
    assert run(["compare", "p.json", "--against", "megatron", "-q", "--model", str(source)]) == 0
    source.unlink()
    assert run(["compare", "p.json", "--against", "megatron", "-q"]) == 6
    monkeypatch.setattr(
        sys.modules["autopar.cluster.cost_tables"],
        "load_cluster",
        lambda name, **o: types.SimpleNamespace(fingerprint="00"),
    )
    assert run(["compare", "p.json", "--against", "megatron", "-q"]) == 6
    assert "tables of cluster p3.16xlarge are not those that p.json was made with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "gpus (--gpus) must be a whole number of at least 1, not 0"),
        (["--gpus", "x"], "gpus (--gpus) must be a whole number of at least 1, not 'x'"),
        ([], "Missing option '--gpus'"),
        (
            ["--gpus", "8"],
            "no global batch: give --global-batch (global_batch=), or set GLOBAL_BATCH = 1024 (say) in gpt.py",
        ),
        (["--gpus", "8", "--memory", "-1"], "memory_gib (--memory) must be a finite number above 0, not -1"),
        (["--gpus", "8", "--memory", "nan"], "memory_gib (--memory) must be a finite number above 0, not nan"),
        (["--gpus", "8", "--time-limit", "0"], "time_limit_s (--time-limit) must be a finite number above 0, not 0"),
        (["--gpus", "8", "--dtype", "int8"], "dtype (--dtype) must be one of bf16, fp16, fp32, not 'int8'"),
        (["--gpus", "8", "--set", "layers"], "is not KEY=VALUE"),
        (["--gpus", "8", "--set", "layers=1", "--set", "layers=2"], "--set layers is given twice, as 1 and as 2"),
        (["--gpus", "8", "--pin", "a=Q"], "'Q' at position 0 is none of"),
        (["--gpus", "8", "--pin", "S(0)R"], "is not GLOB=PLACEMENTS"),
        (["--gpus", "8", "--cluster", "nowhere"], "unknown cluster 'nowhere'"),
        (["--gpus", "8", "--layout", "tp=0,x=1"], "unknown key 'x'"),
        (["--gpus", "8", "--layout", "recompute=none", "--recompute", "full"], "give one of them"),
        (["--gpus", "8", "-o", "no/such/p.json"], "there is no folder no/such"),
        (["--gpu", "8", "--nodes", "2"], "No such option"),
    ],
)
def test_a_usage_error_exits_2_with_one_short_message(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(["plan", "gpt.py", "-q", *words]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert len(err.splitlines()) <= 4
    assert run(["plan", "gpt.py", "-q", *words, "--json"]) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)["error"]
    assert document["code"] == 2
    assert message in document["message"]
    assert err == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("u"), 2),
        (LayoutError(["a", "b"]), 2),
        (ModelError("m"), 3),
        (InfeasibleError("needs 5.2 GiB"), 4),
        (TimeLimitError("t"), 5),
        (PlanFileError("f"), 6),
        (CheckpointError("k"), 6),
        (CheckError("c"), 7),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (AutoparError("other"), 1),
    ],
)
def test_every_error_has_its_exit_code(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    library.error = error
    words = ["plan", "gpt.py", "--gpus", "8", "--global-batch", "32", "-q"]
    assert run(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.lstrip().startswith("autopar: ")
    assert "Traceback" not in err
    assert run([*words, "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == code
    if isinstance(error, LayoutError):
        assert json.loads(out)["error"]["faults"] == ["a", "b"]
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_truncated_or_missing_plan_file_exits_6(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plan(sample_plan(), "p.json")
    content = Path("p.json").read_bytes()
    Path("p.json").write_bytes(content[: len(content) // 2])
    for words in (["show", "p.json"], ["show", "none.json"], ["compare", "p.json", "--against", "megatron"]):
        assert run(words) == 6
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) <= 3


def test_cluster_list_and_show_print_tables(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cluster", "list"]) == 0
    assert capsys.readouterr().out == "dgx-a100\ndgx-h100\np3.16xlarge\n"
    assert run(["cluster", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"clusters": ["dgx-a100", "dgx-h100", "p3.16xlarge"]}
    assert run(["cluster", "show", "nowhere"]) == 2


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_imports_no_torch_and_no_solver() -> None:
    out = python(
        "import sys\nfrom autopar.cli.main import run\n"
        "for words in (['--help'], ['plan', '--help'], ['plan', 'x.py', '--gpus', '0']): run(words)\n"
        "print(sorted({'torch', 'numpy', 'pulp', 'highspy', 'rich', 'msgspec'} & set(sys.modules)))"
    )
    assert "Commands:" in out
    assert out.splitlines()[-1] == "[]"


def test_reading_a_plan_imports_no_torch(tmp_path: Path) -> None:
    save_plan(sample_plan(), tmp_path / "p.json")
    out = python(
        f"import sys, autopar\nautopar.load_plan({str(tmp_path / 'p.json')!r})\n"
        "from autopar.cli.main import run\n"
        f"run(['show', {str(tmp_path / 'p.json')!r}])\nprint('torch' in sys.modules)"
    )
    assert out.splitlines()[-1] == "False"


def test_importing_the_package_imports_no_torch() -> None:
    assert python("import sys, autopar; print('torch' in sys.modules, 'msgspec' in sys.modules)") == "False False\n"


def test_the_verb_plan_is_a_function_not_a_module(library: Library) -> None:
    workload: Any = None
    vars(autopar).pop("plan", None)  # loaded on first use
    assert autopar.plan(workload, cluster="dgx-h100", gpus=8, progress=lambda *news: None) == sample_plan()
    assert autopar.LayoutError is LayoutError

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = autopar.nothing
    del autopar.plan  # the next one asks for the real one


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    save_plan(sample_plan(), tmp_path / "p.json")
    code = f"from autopar.cli.main import run; raise SystemExit(run(['show', {str(tmp_path / 'p.json')!r}]))"
    shell = f'set -o pipefail; "{sys.executable}" -c "{code}" | true'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_run_takes_no_unknown_option_before_the_separator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt option is not the script's."""
    save_plan(sample_plan(), tmp_path / "p.json")
    plan = str(tmp_path / "p.json")
    for words in (
        ["--laucher", "slurm", "--", "train.py"],
        ["--rank-per-node=8", "--", "train.py"],
        ["train.py", "--lr=3"],
    ):
        assert run(["run", plan, *words]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert words[0 if words[0] != "train.py" else 1].split("=")[0] in printed.err
        assert "The options of the script go behind --" in printed.err


@pytest.mark.parametrize("own", [["--plan", "other.json"], ["--plan=other.json"]])
def test_run_leaves_the_plan_that_the_script_is_given(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plan(sample_plan(), tmp_path / "p.json")
    assert run(["run", str(tmp_path / "p.json"), "--ranks-per-node", "8", "--", "train.py", *own]) == 0
    assert capsys.readouterr().out.split()[-len(own) - 1 :] == ["train.py", *own]


def test_a_setting_is_the_number_or_bool_that_its_text_reads_as(library: Library, tmp_path: Path) -> None:
    texts = ("layers=96", "rate=1e-3", "tied=False", "kv=none", "size=39B", "name=a=b", "most=inf", "least=nan")
    settings = [word for text in texts for word in ("--set", text)]
    assert run(["plan", "m.py", "--gpus", "8", "--global-batch", "8", "-q", *settings]) == 0
    read = {"layers": 96, "rate": 1e-3, "tied": False, "kv": "none", "size": "39B", "name": "a=b"}
    assert library.calls["load_workload"] == {"path": "m.py", **read, "most": "inf", "least": "nan"}
    assert run(["plan", "m.py", "--gpus", "8", "--set", "layers"]) == 2
