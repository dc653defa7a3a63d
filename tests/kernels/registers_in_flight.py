"""Finds registers that a kernel overwrites while matrix units may still read them.

A product of sm_90 is started, and reads a left operand in registers until it has been waited for;
Triton up to 3.7 does not always wait before the next turn of a loop. Results are then right or
wrong by chance, and the interpreter shows nothing.
"""

from __future__ import annotations

import re

LABEL = re.compile(r"(\$\w+):")
BRANCH = re.compile(r"(?:@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$\w+);")
WAIT = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)")
RESULTS = re.compile(
    r"(?:@!?%p\d+\s+)?(?:\{ \.reg[^;]*; (?:mov[^;]*; )?)?[\w.:]+\s+(\{[^}]*\}|%\w+)"
)
STORES = ("st.", "cp.", "bar.", "red.")
TURNS = 2
"""Of each loop: what one starts, the next may overwrite."""


def overwritten(ptx: str) -> list[str]:
    """The instructions of a kernel that do it, of those on the way through all of its loops."""
    lines = [line.split("//")[0].strip() for line in ptx[ptx.index(".entry") :].splitlines()]
    labels = {found[1]: at for at, line in enumerate(lines) if (found := LABEL.fullmatch(line))}
    turns: dict[int, int] = {}
    groups: list[set[str]] = []
    started: set[str] = set()
    found: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if branch := BRANCH.match(line):
            target = labels[branch[1]]
            if target < at and turns.get(at, 0) < TURNS:
                turns[at] = turns.get(at, 0) + 1
                at = target
                continue
        elif "wgmma.mma_async" in line:
            _, *operands = re.findall(r"\{([^{}]*)\}", line)
            started.update(name for operand in operands for name in re.findall(r"%\w+", operand))
        elif "wgmma.commit_group" in line:
            groups.append(started)
            started = set()
        elif wait := WAIT.match(line):
            groups = groups[len(groups) - min(len(groups), int(wait[1])) :]
        elif (results := RESULTS.match(line)) and not line.startswith(STORES):
            busy = started.union(*groups)
            if busy.intersection(re.findall(r"%\w+", results[1])):
                found.append(line)
        at += 1
    return found
