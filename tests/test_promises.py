"""The promises and their tests: each names the other, and each mutant still fits the code.

`pytest -m full tests/test_promises.py -n0` breaks a copy of the code by each mutant in turn, and sees its test fail.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from promises import PROMISES, Mutant

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parent
ROOT = TESTS.parent
BROKEN = [pytest.param(mutant, id=f"{key}-{number}") for key, promise in PROMISES.items()
          for number, mutant in enumerate(promise.mutants)]  # fmt: skip


@cache
def marked() -> dict[str, set[str]]:
    """By promise, the tests that say in their mark that they hold it."""
    found: dict[str, set[str]] = {}
    for file in sorted(TESTS.rglob("test_*.py")):
        for test in functions(ast.parse(file.read_text(encoding="utf-8"))):
            for promise in promised(test):
                found.setdefault(promise, set()).add(f"{file.relative_to(TESTS).as_posix()}::{test.name}")
    return found


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            yield node


def promised(test: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for decorator in test.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.promise":
            for argument in decorator.args:
                yield ast.literal_eval(argument)


def test_every_promise_names_the_tests_that_hold_it_and_is_named_by_them() -> None:
    assert {key: set(promise.tests) for key, promise in PROMISES.items()} == marked()


def test_every_promise_has_a_mutant() -> None:
    assert [key for key, promise in PROMISES.items() if not promise.mutants] == []


@pytest.mark.parametrize("mutant", BROKEN)
def test_a_mutant_still_fits_the_code(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.right) == 1
    assert mutant.wrong != mutant.right
    compile((ROOT / mutant.file).read_text(encoding="utf-8").replace(mutant.right, mutant.wrong), mutant.file, "exec")


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", BROKEN)
def test_a_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    for folder in ("vespera_exec", "roles", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    broken = tmp_path / mutant.file
    broken.write_text(broken.read_text(encoding="utf-8").replace(mutant.right, mutant.wrong), encoding="utf-8")
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n0",
            "-x",
            "-p",
            "no:cacheprovider",
            "--timeout=120",
            f"tests/{mutant.caught_by}",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 1, ran.stdout  # 1: tests failed; others: nothing was collected, or it was no test
