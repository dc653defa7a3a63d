"""What a family of kernels has measured: comparisons with PyTorch, and sweeps over tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.device import release_memory
from bench.kernels.timing import CANNOT_RUN, ROUNDS, Call, alike, in_turn, rotations
from bench.rounds import median, ratios, tenth_percentile

Part = Literal["table", "full", "sweep", "dry"]
Row = dict[str, Any]
Binding = Callable[[Any], Call]
"""From a set of inputs to a call; conversions of the inputs happen here, outside the timing."""


@dataclass(frozen=True)
class Comparison:
    """One line of a table."""

    operation: str
    """`depthwise forward`: what lines of several cases have in common."""
    case: str
    bytes: int
    """That have to move: the floor, at the copy bandwidth."""
    operations: int
    """Arithmetic operations."""
    make: Callable[[], Any]
    """A set of random inputs."""
    check: Callable[[Any], None]
    """Exits unless our result for these inputs is right."""
    ours: Callable[[Any], Any]
    stock: Mapping[str, Binding]
    """Alternatives by name."""
    stock_excess: Mapping[str, Binding] = field(default_factory=dict)
    """What an alternative does beyond the operation, measured apart and taken off."""
    most_sets: int = 64

    def __str__(self) -> str:
        return f"{self.operation} {self.case}"

    def verify(self) -> None:
        self.check(self.make())

    def times(self, rounds: int = ROUNDS) -> dict[str, list[float]]:
        """Seconds a call of ours and of every alternative that runs, one number a round."""
        sets = [self.make() for _ in range(min(rotations(self.bytes), self.most_sets))]
        calls: dict[str, Sequence[Call]] = {"ours": [lambda i=i: self.ours(i) for i in sets]}
        calls |= {name: [bind(i) for i in sets] for name, bind in self.stock.items()}
        calls |= {
            f"excess {name}": [bind(i) for i in sets] for name, bind in self.stock_excess.items()
        }
        found = in_turn(calls, rounds)
        release_memory()
        for name in self.stock_excess:
            excess = found.pop(f"excess {name}")
            if name in found:
                found[name] = [a - b for a, b in zip(found[name], excess, strict=True)]
        if len(found) < 2:
            raise SystemExit(f"{self}: ours or every alternative of PyTorch does not run")
        return found

    def measure(self, bandwidth: float, rounds: int = ROUNDS) -> Row:
        """Ours and all alternatives in turn; times in microseconds."""
        stock = self.times(rounds)
        ours_times = stock.pop("ours")
        best = min(sorted(stock), key=lambda name: median(stock[name]))
        ours, floor = median(ours_times), self.bytes / bandwidth
        return {
            "operation": self.operation,
            "case": self.case,
            "floor_us": floor * 1e6,
            "ours_us": ours * 1e6,
            "floor_ratio": ours / floor,
            "stock_us": median(stock[best]) * 1e6,
            "stock": best,
            "speed_up": median(stock[best]) / ours,
            "speed_up_p10": tenth_percentile(ratios(stock[best], ours_times)),
            "alternatives_us": {name: median(stock[name]) * 1e6 for name in sorted(stock)},
            "bytes": self.bytes,
            "operations": self.operations,
        }


@dataclass(frozen=True)
class Sweep:
    """The launch configurations of one kernel for one shape."""

    operation: str
    """Under which name the tuning table keeps the best one."""
    key: str
    """Under which shape key."""
    bytes: int
    make: Callable[[], Any]
    run: Callable[[Any, Any], Any]
    """From inputs and a configuration."""
    configs: Sequence[Any]
    """Dataclasses; the first is the default."""
    stock: Mapping[str, Binding] = field(default_factory=dict)
    """Alternatives by name, timed beside the configurations."""

    def __str__(self) -> str:
        return f"{self.operation} {self.key}"

    def measure(self, bandwidth: float, rounds: int = (ROUNDS + 1) // 2) -> Row:
        """Microseconds of every configuration that runs, fastest first; the first one is right."""
        sets = [self.make() for _ in range(min(rotations(self.bytes), 16))]
        found: list[tuple[float, Any]] = []
        for config in dict.fromkeys(self.configs):
            calls = [lambda i=i, c=config: self.run(i, c) for i in sets]
            times = in_turn({str(config): calls}, rounds)
            found += [(median(seconds) * 1e6, config) for seconds in times.values()]
        default = next((us for us, config in found if config == self.configs[0]), None)
        found.sort(key=lambda one: one[0])
        while found and self._differs(found[0][1], sets[0]):
            print(f"    WRONG RESULT: {self}: {found.pop(0)[1]} is left out", flush=True)
        calls_of_stock = {name: [bind(i) for i in sets] for name, bind in self.stock.items()}
        stock = in_turn(calls_of_stock, rounds) if calls_of_stock else {}
        release_memory()
        return {
            "operation": self.operation,
            "key": self.key,
            "floor_us": self.bytes / bandwidth * 1e6,
            "default_us": default,
            "configs": [{"config": vars(config), "us": us} for us, config in found],
            **({"stock_us": {k: median(v) * 1e6 for k, v in stock.items()}} if stock else {}),
        }

    def _differs(self, config: Any, inputs: Any) -> bool:
        """Whether a configuration has other results than the default: compilers err, too."""
        if config == self.configs[0]:
            return False
        try:
            expected = self.run(inputs, self.configs[0])
        except CANNOT_RUN:
            return False
        return not alike(self.run(inputs, config), expected)


@dataclass(frozen=True)
class Family:
    """Kernels that one script measures."""

    name: str
    comparisons: Callable[[Part], Iterable[Comparison]]
    sweeps: Callable[[bool], Iterable[Sweep]] = lambda tiny: ()
    """That `--part sweep` runs; of tiny shapes if True."""
    swept: Mapping[str, Callable[[str], Sweep]] = field(default_factory=dict)
    """By operation of the tuning table: from a shape key to the sweep that bench.tune runs."""
