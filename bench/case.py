"""What a case is, how contenders take turns, and what a result holds."""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.load import Sample, Target, paced, wrk
from bench.process import PINNINGS, BenchError, Group, Memory, Pinning, Workspace

DIRECT = "direct"
MESH = "meshproxy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    rounds: int = 5
    seconds: int = 3
    own_seconds: int | None = None
    """The same where it was asked for, for a case that would otherwise take another length; None: not asked for."""
    minutes: float = 30.0
    """Of the soak."""
    contenders: frozenset[str] = frozenset()
    """Only these take part; empty: all."""
    pinning: str | None = None
    """Overrides the pinning each case was written for."""
    absent: frozenset[str] = frozenset()
    """Contenders whose program is not installed."""

    def wants(self, name: str) -> bool:
        """Whether it takes part; a pair of Envoys is named envoy-pair-…, and `envoy` stands for all of them."""
        family = name.partition("-")[0]
        return family not in self.absent and (not self.contenders or bool({name, family} & self.contenders))

    def pinned(self, default: str) -> Pinning:
        return PINNINGS[self.pinning or default]


@dataclass(frozen=True, slots=True)
class Contender:
    """groups: the proxies, without origin and load; empty for no proxy."""

    name: str
    target: Target
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """One derived number. at_most / at_least: the budget it must keep, None where there is none."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def keeps_budget(self) -> bool:
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


@dataclass(slots=True)
class Outcome:
    """rows: contender → measure → median over the rounds; rounds: the same, every round."""

    case: str
    question: str
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    pinning: str = ""
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def median(self, contender: str, measure: str) -> float | None:
        return self.rows.get(contender, {}).get(measure)

    def best(self, contenders: Sequence[str], measure: str, least: bool = False) -> float | None:
        values = [value for name in contenders if (value := self.median(name, measure)) is not None]
        return (min(values) if least else max(values)) if values else None

    def ratio(self, name: str, over: Sequence[str], measure: str, at_least: float | None = None) -> None:
        """Adds meshproxy's measure over the best of `over`, when both ran."""
        mine, theirs = self.median(MESH, measure), self.best(over, measure)
        if mine is not None and theirs:
            self.figures.append(Figure(name, mine / theirs, "×", at_least=at_least))

    def per_cpu(self, name: str, over: Sequence[str]) -> None:
        """Adds the least CPU a request costs any of `over`, over meshproxy's: what a machine shared with others, or a
        load that is itself the limit, does not change much."""
        mine = self.median(MESH, "cpu_us_per_request")
        theirs = self.best(over, "cpu_us_per_request", least=True)
        if mine and theirs:
            self.figures.append(Figure(name, theirs / mine, "×"))

    def added(self, name: str, over: Sequence[str], measure: str, at_most: float | None = None) -> None:
        """Adds meshproxy's added latency over the least added latency of `over`, direct subtracted from both."""
        base, mine = self.median(DIRECT, measure), self.median(MESH, measure)
        theirs = self.best(over, measure, least=True)
        if base is not None and mine is not None and theirs is not None and theirs > base:
            self.figures.append(Figure(name, (mine - base) / (theirs - base), "×", at_most=at_most))

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "question": self.question,
            "pinning": self.pinning,
            "medians": self.rows,
            "rounds": self.rounds,
            "figures": [{**asdict(figure), "keeps_budget": figure.keeps_budget} for figure in self.figures],
            "notes": self.notes,
        }


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    question: str
    run: Callable[[Settings, Outcome], None]
    by_name_only: bool = False
    """Takes too long to be part of a run of all cases."""


def say(text: str) -> None:
    """Progress, on stderr: stdout belongs to the results."""
    print(text, file=sys.stderr, flush=True)


Load = Callable[[Contender, float, Workspace], Sample]


def flat_out(connections: int) -> Load:
    """As many requests as that many connections get through."""
    return lambda contender, seconds, place: wrk(contender.target, connections, seconds, contender.groups, place)


def at_rate(rate: int) -> Load:
    """That many requests a second, whatever the answers do."""
    return lambda contender, seconds, workspace: paced(contender.target, rate, seconds, contender.groups, workspace)


def compare(
    outcome: Outcome,
    settings: Settings,
    contenders: Sequence[Contender],
    load: Load,
    workspace: Workspace,
) -> None:
    """Rounds A B C, A B C, …: whatever disturbs the machine disturbs all of them. One short round first warms up.

    All contenders stay up for the whole case; an idle one uses no measurable CPU.
    """
    outcome.pinning = workspace.pinning.name
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        load(contender, 1, workspace)
    for number in range(1, settings.rounds + 1):
        for contender in contenders:
            sample = load(contender, settings.seconds, workspace)
            for group in contender.groups:
                if group.process.poll() is not None:
                    raise BenchError(f"{group.name} ended under load:\n{group.tail()}")
            samples[contender.name].append(sample)
            say(
                f"  {outcome.case} {number}/{settings.rounds} {contender.name:<16}"
                f"{sample.req_s:>9.0f} req/s  p50 {sample.p50_us:>6.0f} µs  p99 {sample.p99_us:>6.0f} µs"
                + (f"  failed {sample.failed}" if sample.failed else "")
            )
    for contender in contenders:
        rounds = [asdict(sample) for sample in samples[contender.name]]
        outcome.rounds[contender.name] = rounds
        outcome.rows[contender.name] = {
            measure: statistics.median(values)
            for measure in rounds[0]
            if (values := [sample[measure] for sample in rounds if sample[measure] is not None])
        }
        if contender.groups:
            memory = total_memory(contender.groups)
            outcome.rows[contender.name] |= memory.as_row()
        failed = sum(sample.failed for sample in samples[contender.name])
        if failed:
            outcome.notes.append(f"{contender.name}: {failed} requests failed")
        busy = outcome.median(contender.name, "load_busy")
        if contender.groups and busy is not None and busy > 0.95:
            outcome.notes.append(
                f"{contender.name}: the load generator's core was the limit; CPU per request tells the proxies apart"
            )
    base = outcome.median(DIRECT, "p50_us")
    if base is not None:
        base_p99 = outcome.median(DIRECT, "p99_us") or 0.0
        for row in outcome.rows.values():
            row["added_p50_us"] = row["p50_us"] - base
            row["added_p99_us"] = row["p99_us"] - base_p99


def total_memory(groups: Sequence[Group]) -> Memory:
    parts = [group.memory() for group in groups]
    pages = [part.pages_mib for part in parts]
    return Memory(
        sum(part.pss_mib for part in parts),
        sum(part.private_mib for part in parts),
        sum(part.processes for part in parts),
        # Programs of a pair share the binary's pages; counted per program, as on two machines.
        sum(page for page in pages if page is not None) if None not in pages else None,
    )
