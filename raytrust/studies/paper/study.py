"""The paper's tables as a study: victims, the search for the paper's setting, tables 1 and 2, section 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from raytrust.config import digest
from raytrust.data import Dataset
from raytrust.jobs.job import Job
from raytrust.jobs.runner import Bundle, each
from raytrust.jobs.store import JobStore, claim
from raytrust.studies.membership import jobs as membership
from raytrust.studies.membership.pool import draw_pool
from raytrust.studies.paper.jobs import KINDS, Attack
from raytrust.studies.paper.plan import Budget, Setting
from raytrust.studies.paper.selection import NOT_FINISHED, Plan, chosen, plan_for, worst_attacks
from raytrust.studies.published import CELLS, TABLE_1, TITLES
from raytrust.studies.study import Phase


@dataclass(frozen=True)
class PaperConfig:
    """tables: 1, 2 or both. images: evaluated in a cell of table 1, by default the budget's."""

    budget: Budget
    tables: tuple[int, ...] = (1, 2)
    images: int | None = None
    seed: int = 0
    datasets: tuple[str, ...] = field(default=("cifar10",))

    def __post_init__(self) -> None:
        if not self.tables or not set(self.tables) <= {1, 2}:
            raise ValueError(f"Expected tables={self.tables} to be 1, 2 or both.")
        if self.images is not None and self.images < 2:
            raise ValueError(f"Expected images={self.images} to be at least 2, for an interval.")
        if unknown := [d for d in self.datasets if d not in TABLE_1] or not self.datasets:
            raise ValueError(f"Expected datasets={unknown} to be among {', '.join(TABLE_1)}.")


def open_run(root: Path, config: PaperConfig, data: dict[str, Dataset], options: dict[str, Any]) -> None:
    """Begin a run in `root`, or go on with the same one; options are kept for whoever resumes it.

    Raises ValueError if `root` holds another run, or the data don't suffice.
    """
    for name, dataset in data.items():
        # Both raise where the data don't suffice: that must show now, not after hours of table 1.
        plan_for(name, dataset, config.budget, config.images, config.seed)
        if 2 in config.tables:
            draw_pool(config.budget.membership_config(config.seed, len(dataset.train_labels)), dataset)
    identity: dict[str, Any] = {"config": asdict(config), "data": {name: d.fingerprint() for name, d in data.items()}}
    # Compares the text, as JSON would turn tuples into lists and equal configs into different ones.
    identity["id"] = digest(str(identity))
    claim(root / "paper.json", {**identity, "options": options}, lambda kept: kept.get("id"), "run")


class PaperStudy:
    """One data set after another, and of each table 1 before table 2, so that a run cut short has some of them whole.

    data: by the names in `config.datasets`. say: is told what the search chose.
    """

    kinds = (*KINDS, *membership.KINDS)

    def __init__(self, config: PaperConfig, data: dict[str, Dataset], root: Path, say: Callable[[str], None]):
        self._config, self._say = config, say
        self.data = {d.fingerprint(): d for d in data.values()}
        self._stores = {name: JobStore(root, d.fingerprint()) for name, d in data.items()}
        self._plans = {name: plan_for(name, d, config.budget, config.images, config.seed) for name, d in data.items()}
        audited = data if 2 in config.tables else {}
        audit = config.budget.membership_config
        self._audits = {name: audit(config.seed, len(d.train_labels)) for name, d in audited.items()}

    @property
    def stores(self) -> Sequence[JobStore]:
        return list(self._stores.values())

    def phases(self) -> Iterator[Phase]:
        for name, store in self._stores.items():
            for words, jobs in self._inversion(name) if 1 in self._config.tables else ():
                yield f"{TITLES[name]}, {words}", jobs
            if name in self._audits:
                models = membership.plan(self._audits[name])
                yield f"{TITLES[name]}, table 2: {len(self._audits[name].arms)} defences", each(store, models)

    def left(self) -> list[Job]:
        jobs: list[Job] = []
        for name, store in self._stores.items():
            if 1 in self._config.tables:
                jobs += store.missing(self._guess(name))
            if name in self._audits:
                jobs += store.missing(membership.plan(self._audits[name]))
        return jobs

    def _inversion(self, name: str) -> Iterator[tuple[str, list[Bundle]]]:
        """Table 1 and section 3."""
        plan, store = self._plans[name], self._stores[name]
        search, theory = flat(plan.search().values()), dear_first(plan.theory().values())
        yield "training victims", each(store, dear_first(plan.trainings()))
        yield "searching the paper's setting", each(store, dear_first(search))
        settings = chosen(store, plan)
        if settings == NOT_FINISHED:
            # The time was up before the search had ended.
            return
        if isinstance(settings, str):
            # Section 3 rests on no setting of the search, and is tested all the same.
            self._say(f"{TITLES[name]}: no setting of the search gave a figure: {settings}")
            yield "section 3", each(store, theory)
            return
        self._say(f"{TITLES[name]}: nearest to the paper is {settings[0].name}")
        # In one phase, so that no processor waits between the table, the search for the worst case and section 3.
        jobs = [*_table_1(plan, settings), *theory]
        yield "table 1: naive and aware attacks, search for the worst case, section 3", each(store, jobs)
        worst = [worst_attacks(store, plan, settings, cell) for cell in CELLS]
        yield "table 1: the worst case", each(store, dear_first(flat(w for w in worst if not isinstance(w, str))))

    def _guess(self, name: str) -> list[Job]:
        """The jobs of table 1 and section 3, with what the search may choose for what it has not chosen yet."""
        plan, store = self._plans[name], self._stores[name]
        jobs: list[Job] = [*plan.trainings(), *flat(plan.search().values()), *plan.theory().values()]
        settings = chosen(store, plan)
        if isinstance(settings, str) and settings != NOT_FINISHED:
            return jobs
        known = not isinstance(settings, str)
        if isinstance(settings, str):
            # Any two settings will do for counting, as the number of jobs hardly depends on what is chosen.
            every = plan.budget.search(plan.seed)
            settings = every[0], every[-1]
        jobs += _table_1(plan, settings)
        # An attack that is not in the portfolio: what is chosen there need not be done again, a guess must count it.
        other = replace(settings[1], attack=replace(settings[1].attack, tv=0.5))
        for cell in CELLS:
            worst = worst_attacks(store, plan, settings, cell) if known else NOT_FINISHED
            if worst == NOT_FINISHED:
                jobs += plan.worst(other, cell)
            elif not isinstance(worst, str):
                jobs += worst
        return jobs


def dear_first(jobs: Iterable[Job]) -> list[Job]:
    """So that at the end of a phase no processor waits for long."""
    return sorted(jobs, key=lambda job: -job.cost)


def flat(groups: Iterable[Sequence[Attack]]) -> list[Attack]:
    return [job for group in groups for job in group]


def _table_1(plan: Plan, settings: tuple[Setting, Setting]) -> list[Job]:
    """The attacks at the nearest setting, and those among which the worst case is sought."""
    portfolio = [jobs for cell in CELLS for jobs in plan.portfolio(settings[1], cell).values()]
    return [*dear_first(flat(plan.table(settings[0]).values())), *dear_first(flat(portfolio))]
