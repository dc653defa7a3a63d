"""How kernels are launched: most before the launch in front has ended, for which they wait; and
found on disk whatever a process has launched before."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lgcnet_fast.kernels import launches

ENGINES = ("infer_pool", "infer_stem", "infer_tile", "upsample_argmax")
"""Their launches start in order."""
FOLDER = Path(launches.__file__).parent
MODULES = sorted(FOLDER.glob("*.py"))
OF_ENGINES = [FOLDER / f"{name}.py" for name in ENGINES]


def functions(decorator: str, modules: Sequence[Path] = MODULES) -> Iterator[ast.FunctionDef]:
    """Those with this decorator, with or without options."""
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.FunctionDef):
                found = [ast.unparse(each).split("(")[0] for each in node.decorator_list]
                if decorator in found:
                    yield node


def launched() -> set[str]:
    """What stands before the grid of a launch: name[grid](...)."""
    return {
        ast.unparse(node.func.value)
        for module in MODULES
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    }


def first_statement(function: ast.FunctionDef) -> str:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return ast.unparse(body[0])


def test_every_kernel_of_training_waits_first() -> None:
    kernels = list(functions("kernel", sorted({*MODULES} - {*OF_ENGINES})))
    assert len(kernels) > 50
    late = [each.name for each in kernels if first_statement(each) != "wait_for_predecessor()"]
    assert late == []


def test_what_is_launched_is_a_kernel() -> None:
    assert launched() == {function.name for function in functions("kernel")}


def test_engines_launch_in_order() -> None:
    for module in OF_ENGINES:
        for function in functions("kernel", [module]):
            (decorator,) = function.decorator_list
            assert ast.unparse(decorator).startswith("kernel(programmatic=False, ")
        assert "wait_for_predecessor" not in module.read_text()


def test_functions_of_kernels_are_not_launched() -> None:
    assert not launched() & {function.name for function in functions("triton.jit")}


@pytest.mark.parametrize("options", [{}, {"do_not_specialize": ["size"]}])
def test_a_kernel_is_what_triton_makes_of_it(options: dict[str, list[str]]) -> None:
    def copy(x, size): ...

    made = launches.kernel(**options)(copy)
    assert type(made) is type(launches.wait_for_predecessor)
    assert made.fn is copy


KEYS = """
import importlib, json, pkgutil, random
from triton.runtime.jit import JITFunction
from lgcnet_fast import kernels as package
from lgcnet_fast.kernels.cache_keys import settle_key

functions = {}
for found in pkgutil.iter_modules(package.__path__):
    module = importlib.import_module(f"{package.__name__}.{found.name}")
    for name, value in vars(module).items():
        if isinstance(value, JITFunction):
            functions[f"{value.__module__}.{value.__name__}"] = value

def keys(order):
    for function in functions.values():
        function.hash, function.used_global_vals = None, {}
    for name in order:
        settle_key(functions[name])
    return {name: function.cache_key for name, function in functions.items()}

orders = [sorted(functions), sorted(functions, reverse=True)]
orders += [random.Random(seed).sample(orders[0], len(functions)) for seed in range(3)]
first, *others = map(keys, orders)
changing = [name for name in functions if any(other[name] != first[name] for other in others)]
print(json.dumps([len(functions), changing]))
"""


def test_keys_on_disk_do_not_depend_on_what_was_launched_before() -> None:
    pytest.importorskip("triton.knobs")  # Without it nothing is compiled ahead.
    done = subprocess.run(
        [sys.executable, "-c", KEYS],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    count, changing = json.loads(done.stdout)
    assert count > 150 and not changing
