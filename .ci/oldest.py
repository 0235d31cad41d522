"""Prints the oldest version of every dependency that pyproject.toml allows, as pip constraints."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    name, lowest = re.match(r"([A-Za-z0-9_-]+)>=([0-9.]+)", requirement).groups()
    print(f"{name}=={lowest}")
