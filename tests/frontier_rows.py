"""Rows as a sweep writes them, for the tests of tables and figures."""

from __future__ import annotations

import numpy as np

from raytrust import metrics


def finished(name="PowerSGD rank 4 + EF", accuracy=0.93, leakage=0.41, **changes):
    row = {
        "name": name,
        "compressor": "powersgd",
        "rank": 4,
        "level": None,
        "equal_to_rank": None,
        "equal_by": None,
        "error_feedback": True,
        "status": "finished",
        "reason": None,
        "accuracy": accuracy,
        "accuracy_interval": list(metrics.proportion_interval(round(360 * accuracy), 360)),
        "n_test": 360,
        "leakage_ssim": leakage,
        "leakage_interval": [leakage - 0.1, leakage + 0.1],
        "ssim_std": 0.1,
        "psnr": 18.2,
        "n_images": 4,
        "naive_ssim": leakage / 2,
        "aware_ssim": leakage,
        "oracle_ssim": leakage + 0.02,
        "bytes_per_step": 12345,
        "compression_ratio": 72.1,
        "attack": {"objective": "aware", "tv": 0.01, "step_size": 0.1, "restarts": 2, "capture_step": 0},
        "attacks_tried": 7,
        "seeds": [0],
    }
    assert set(changes) <= set(row)
    return row | changes


def failed(name="Top-K 0.01 %", reason="loss became NaN at step 120"):
    numbers = dict.fromkeys(finished())
    return numbers | {"name": name, "compressor": "topk", "error_feedback": False, "status": "failed", "reason": reason}


def sweep(n, seed=0, **changes):
    """n defences as a real sweep has them: accuracies within a few percent, many of the leakages close."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        compressor, label = [("powersgd", "PowerSGD rank"), ("topk", "Top-K of the bytes of rank"), ("sign", "sign")][
            i % 3
        ]
        row = finished(
            name=f"{label} {2 ** (i // 6)}{' + EF' if i % 2 else ''}",
            accuracy=round(360 * rng.uniform(0.91, 0.94)) / 360,
            leakage=float(rng.beta(2, 6)),
            compressor=compressor,
            error_feedback=bool(i % 2),
            bytes_per_step=int(10 ** rng.uniform(4.5, 7.5)),
        )
        rows.append(row | changes)
    return rows
