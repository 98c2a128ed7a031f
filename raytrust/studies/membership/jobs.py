"""The jobs of a membership audit: models to train, each with what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from raytrust.config import Arm, Defence, MembershipConfig, digest, to_dict
from raytrust.jobs.job import Job, Place, Result, Results
from raytrust.jobs.store import JobStore, claim
from raytrust.studies.membership.properties import train_property
from raytrust.studies.membership.shadows import Shadow, model_config, train_shadow


@dataclass(frozen=True)
class ShadowModel(Job):
    """Train one model of an arm on its half of the pool, and keep its outputs and the scores of its messages."""

    kind: ClassVar[str] = "models"
    audit: MembershipConfig
    arm: Arm
    model: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}, model {self.model + 1}"

    def run(self, store: Results, place: Place) -> Result:
        shadow = train_shadow(self.audit, self.arm, self.model, place.images, place.device)
        return Result({"arm": self.arm.name}, {f.name: np.asarray(getattr(shadow, f.name)) for f in fields(shadow)})


@dataclass(frozen=True)
class PropertyModel(Job):
    """Train one model on a task of two classes, and keep the scores of property inference against its messages."""

    kind: ClassVar[str] = "properties"
    audit: MembershipConfig
    arm: Defence
    model: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}, property model {self.model + 1}"

    def run(self, store: Results, place: Place) -> Result:
        run = model_config(self.audit, self.arm, self.model)
        scores = train_property(self.audit, run, self.model, place.images, place.device)
        return Result({"arm": self.arm.name}, {name: np.asarray(value) for name, value in scores.items()})


Model: TypeAlias = ShadowModel | PropertyModel
KINDS = (ShadowModel.kind, PropertyModel.kind)


def shadow_models(config: MembershipConfig, arm: Arm) -> list[ShadowModel]:
    return [ShadowModel(_deciding(config), arm, model) for model in range(config.models)]


def property_models(config: MembershipConfig, arm: Arm) -> list[PropertyModel]:
    # Opacus trains DP-SGD without our channel, so that none of its messages is recorded.
    if not isinstance(arm, Defence):
        return []
    return [PropertyModel(_deciding(config), arm, model) for model in range(config.property_models)]


def plan(config: MembershipConfig) -> list[Model]:
    """All models of the audit, those of one arm together."""
    models: list[Model] = []
    # Arm by arm, so that a run which is cut short has whole rows.
    for arm in config.arms:
        models += [*shadow_models(config, arm), *property_models(config, arm)]
    return models


def arm_key(store: JobStore, config: MembershipConfig, arm: Arm) -> str:
    """Identifies the models of one arm."""
    return digest(_deciding(config), arm, store.fingerprint)


def load_shadows(store: JobStore, config: MembershipConfig, arm: Arm) -> list[Shadow] | None:
    """What is kept of all models of an arm, None if one is missing. Raises ValueError if a file is damaged."""
    models = shadow_models(config, arm)
    # Each model is attacked with the others as its shadows: with fewer of them it would be another, weaker attack.
    if not all(map(store.finished, models)):
        return None
    return [Shadow(**_scalars(store.arrays(model))) for model in models]


def reason_for_failure(store: JobStore, models: list[Any]) -> str | None:
    """Why the first of these models that failed did so, None if none did."""
    return next((reason for model in models if (reason := store.failure(model)) is not None), None)


def open_audit(root: Path, config: MembershipConfig, fingerprint: str, options: dict[str, Any]) -> JobStore:
    """Begin an audit in `root`, or go on with the same one. Raises ValueError if `root` holds another."""
    content = {"audit": to_dict(config), "data": fingerprint, "options": options}
    claim(root / "membership.json", content, lambda kept: (kept.get("audit"), kept.get("data")), "audit")
    return JobStore(root, fingerprint)


def _deciding(config: MembershipConfig) -> MembershipConfig:
    """What decides a model: not which others there are, or how they are attacked in the end."""
    # A defence that is added later, or another number of guesses, must not train the finished models again.
    return replace(config, name="", defences=(Defence(),), dp_sgd=(), guesses=2)


def _scalars(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    # An .npz file gives a number back as an array without dimensions.
    return {name: value.item() if value.ndim == 0 else value for name, value in arrays.items()}
