"""The membership audit as a study: one phase, in which all models are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from raytrust.config import MembershipConfig
from raytrust.data import Dataset
from raytrust.jobs.job import Job
from raytrust.jobs.runner import each
from raytrust.jobs.store import JobStore
from raytrust.studies.membership.jobs import KINDS, plan
from raytrust.studies.membership.properties import choose_property
from raytrust.studies.study import Phase


class MembershipStudy:
    """left_out: why, by the name of what can't be measured on these images."""

    kinds = KINDS

    def __init__(self, config: MembershipConfig, data: Dataset, store: JobStore):
        self.config, self.left_out = measurable(config, data)
        self.data = {store.fingerprint: data}
        self.stores = [store]

    def phases(self) -> Iterator[Phase]:
        (store,) = self.stores
        yield f"models of {len(self.config.arms)} defences", each(store, plan(self.config))

    def left(self) -> list[Job]:
        return list(self.stores[0].missing(plan(self.config)))


def measurable(config: MembershipConfig, data: Dataset) -> tuple[MembershipConfig, dict[str, str]]:
    """The audit without what can't be measured on these images; and why, by the name of what is left out."""
    if config.property_models == 0:
        return config, {}
    # Hours of training must not be refused for the one part of the audit that these images do not allow.
    try:
        choose_property(config, data)
    except ValueError as error:
        return replace(config, property_models=0), {"property inference": str(error)}
    return config, {}


def setting(config: MembershipConfig, data: Dataset) -> str:
    """What was trained and attacked, in words."""
    train, threat = config.train, config.train.threat
    return (
        f"{data.name}: {config.models} models a defence, {train.model.title}, "
        f"{train.steps} steps of {train.batch_size} images, each on about half of {config.points} points, "
        f"{config.mislabelled} of them mislabelled and {config.duplicates} coming {config.copies} times. Messages: "
        f"batches of {threat.batch_size} images, vantage {threat.vantage}, batch norm in {threat.batch_norm} mode. "
        f"Seed {train.seed}."
    )
