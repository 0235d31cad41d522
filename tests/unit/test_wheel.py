"""The wheel has every module and table and the mark of a typed package, and an ordinary install of it finds its tables."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that what an earlier build left among the sources does not get in."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("autopar", "cost_tables"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-q", "-w", str(target)]
    subprocess.run(command, cwd=source, check=True)
    (built,) = target.glob("autopar-*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_every_module_and_table(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "autopar").rglob("*.py")}
    tables = {f"autopar/cost_tables/{path.name}" for path in (ROOT / "cost_tables").glob("*.json")}
    assert found == modules | tables | {"autopar/py.typed"}


@pytest.mark.slow
def test_installed_wheel_prices_a_layout(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    # Dependencies are this interpreter's; the wheel's own folder comes first on the path.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.copy(ROOT / "examples" / "gpt.py", tmp_path / "gpt.py")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        done = subprocess.run(arguments, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(str(python), "-c", "import autopar; print(autopar.__file__)").startswith(str(site))
    program = str(venv / "bin" / "autopar")
    assert "p3.16xlarge" in run(program, "cluster", "list")
    assert '"fits"' in run(
        program, "estimate", "gpt.py", "--gpus", "8", "--set", "size=350M", "--layout", "dp=8", "--json"
    )
