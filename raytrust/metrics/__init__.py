"""From scores to a membership audit's figures: pure functions on arrays, without torch.

A score is one number a point, higher always means member; `member` says who was one. `roc` has curves and areas,
`thresholds` decisions and balanced accuracy, `epsilon` the differential privacy that an attack refutes, `membership`
puts them together. All errors are a `ValueError` of one line.
"""

from __future__ import annotations

from raytrust.metrics.epsilon import EpsilonBound, one_run_epsilon
from raytrust.metrics.membership import AuditReport, audit, pooled_audit
from raytrust.metrics.roc import Roc, auc, auc_interval, roc, tpr_at_fpr
from raytrust.metrics.statistics import Figure
from raytrust.metrics.thresholds import (
    BalancedAccuracy,
    balanced_accuracy,
    best_thresholds,
    decide,
    null_floor,
    yeom_thresholds,
)

__all__ = [
    "AuditReport", "BalancedAccuracy", "EpsilonBound", "Figure", "Roc", "auc", "auc_interval", "audit",
    "balanced_accuracy", "best_thresholds", "decide", "null_floor", "one_run_epsilon", "pooled_audit", "roc",
    "tpr_at_fpr", "yeom_thresholds",
]  # fmt: skip
