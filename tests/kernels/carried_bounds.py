"""Finds what Triton up to 3.7 compiles wrongly: a nested loop bounded by what a loop carries.

Its remove-layout-conversions pass takes such a bound for unused and puts the value of before the
loop in its place (triton-lang/triton#9036). The interpreter does not show it.
"""

from __future__ import annotations

import re

VALUE = re.compile(r"%[\w]+")
LOOP = re.compile(r"scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)(?: iter_args\((.*?)\) ->)?")


def carried_bounds(ttir: str) -> list[str]:
    """The loops of a kernel, as the text of Triton's first IR has them, that are at risk."""
    operands: dict[str, list[str]] = {}
    carried: set[str] = set()
    found = []
    for line in ttir.splitlines():
        loop = LOOP.search(line)
        if loop:
            _, *bounds, arguments = loop.groups()
            if _reaches(bounds, carried, operands):
                found.append(line.strip())
            carried.update(VALUE.findall(arguments or "")[::2])
        elif " = " in line:
            results, operation = line.split(" = ", 1)
            operands |= {result: VALUE.findall(operation) for result in VALUE.findall(results)}
    return found


def _reaches(values: list[str], wanted: set[str], operands: dict[str, list[str]]) -> bool:
    """Whether one of the values is, or is computed from, a wanted one."""
    seen: set[str] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if value in wanted:
            return True
        if value not in seen:
            seen.add(value)
            pending += operands.get(value, [])
    return False
