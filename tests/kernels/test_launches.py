"""Every kernel may be launched before the launch in front of it has ended, and waits for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from lgcnet_fast.kernels import launches

ENGINES = ("infer_pool", "infer_stem", "infer_tile", "upsample_argmax")
"""Their launches start in order."""
FOLDER = Path(launches.__file__).parent
MODULES = [path for path in sorted(FOLDER.glob("*.py")) if path.stem not in ENGINES]


def functions(decorator: str) -> Iterator[ast.FunctionDef]:
    """Of all modules, those with this decorator, with or without options."""
    for module in MODULES:
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


def test_every_kernel_waits_first() -> None:
    kernels = list(functions("kernel"))
    assert len(kernels) > 50
    late = [each.name for each in kernels if first_statement(each) != "wait_for_predecessor()"]
    assert late == []


def test_what_is_launched_is_a_kernel() -> None:
    assert launched() == {function.name for function in functions("kernel")}


def test_engines_launch_in_order() -> None:
    for name in ENGINES:
        assert "launches" not in (FOLDER / f"{name}.py").read_text()


def test_functions_of_kernels_are_not_launched() -> None:
    assert not launched() & {function.name for function in functions("triton.jit")}


@pytest.mark.parametrize("options", [{}, {"do_not_specialize": ["size"]}])
def test_a_kernel_is_what_triton_makes_of_it(options: dict[str, list[str]]) -> None:
    def copy(x, size): ...

    made = launches.kernel(**options)(copy)
    assert type(made) is type(launches.wait_for_predecessor)
    assert made.fn is copy
