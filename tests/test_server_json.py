"""`server.json` by the rules of the MCP registry, and against what it describes."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import vespera_exec
from vespera_exec.settings import Settings

ROOT = Path(__file__).parents[1]
ENTRY: dict[str, Any] = json.loads((ROOT / "server.json").read_text(encoding="utf-8"))
(PACKAGE,) = ENTRY["packages"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_it_says_what_the_registry_requires_within_its_limits() -> None:
    assert ENTRY.keys() == {"$schema", "name", "title", "description", "version", "packages"}
    assert re.fullmatch(r"[a-zA-Z0-9.-]+/[a-zA-Z0-9._-]+", ENTRY["name"])
    assert 3 <= len(ENTRY["name"]) <= 200
    assert 1 <= len(ENTRY["title"]) <= 100
    assert 1 <= len(ENTRY["description"]) <= 100
    assert re.fullmatch(r"\d+\.\d+\.\d+", ENTRY["version"]), "one version, no range"
    assert PACKAGE["registryType"] == "pypi"
    assert PACKAGE["transport"] == {"type": "stdio"}


def test_it_describes_the_package_that_is_built_here() -> None:
    assert ENTRY["version"] == PACKAGE["version"] == PROJECT["version"] == vespera_exec.__version__
    assert PACKAGE["identifier"] == PROJECT["name"]
    # `uvx NAME` runs the script of that name.
    assert PACKAGE["identifier"] in PROJECT["scripts"]


def test_the_readme_names_the_entry_so_that_the_registry_sees_whose_package_it_is() -> None:
    assert f"<!-- mcp-name: {ENTRY['name']} -->" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_variables_are_settings_with_their_defaults() -> None:
    known = {f"VESPERA_{field.name.upper()}": field.default for field in fields(Settings)}
    described = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    for variable in PACKAGE["environmentVariables"]:
        assert variable.keys() <= {"name", "description", "format", "default"}
        assert variable["format"] in {"string", "number", "boolean", "filepath"}
        assert f"`{variable['name']}`" in described
        if "default" in variable:
            assert variable["default"] == str(known[variable["name"]]).lower()
