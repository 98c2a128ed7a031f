"""Rows as a sweep writes them, for the tests of tables and figures."""

from __future__ import annotations

import numpy as np

from raytrust.metrics import statistics

FLOOR = 0.2  # of every image


def finished(name="PowerSGD rank 4 + EF", accuracy=0.93, leakage=0.41, **changes):
    """A row whose verdict follows from its leakage: above 0.3 it leaks, below 0.1 it does not."""
    naive, n = changes.get("naive_ssim", leakage / 2), changes.get("n_images", 8)
    row = {
        "name": name,
        "compressor": "powersgd",
        "rank": 4,
        "level": None,
        "equal_to_rank": None,
        "equal_by": None,
        "error_feedback": True,
        "transforms": [],
        "noisy": False,
        "status": "finished",
        "reason": None,
        "accuracy": accuracy,
        "accuracy_interval": list(statistics.proportion_interval(round(360 * accuracy), 360)),
        "n_test": 360,
        "leakage_ssim": leakage,
        "leakage_interval": [leakage - 0.1, leakage + 0.1],
        "ssim_std": 0.1,
        "psnr": 18.2,
        "n_images": n,
        "naive_ssim": naive,
        "aware_ssim": leakage,
        "oracle_ssim": leakage + 0.02,
        "mean_image_ssim": FLOOR,
        "other_image_ssim": FLOOR / 2,
        "floor_ssim": FLOOR,
        "excess": leakage - FLOOR,
        "excess_interval": [leakage - FLOOR - 0.1, leakage - FLOOR + 0.1],
        "identified": n if leakage > 0.3 else 0,
        "candidates": 100,
        "naive_excess_interval": None if naive is None else [naive - FLOOR - 0.1, naive - FLOOR + 0.1],
        "naive_identified": None if naive is None else n if naive > 0.3 else 0,
        "bytes_per_step": 12345,
        "compression_ratio": 72.1,
        "attack": {"objective": "aware", "tv": 0.01, "step_size": 0.1, "restarts": 2, "capture_step": 0},
        "attacks_tried": 7,
        "seeds": [0],
        "remarks": [],
    }
    assert set(changes) <= set(row)
    return row | changes


def failed(name="Top-K 0.01 %", reason="loss became NaN at step 120"):
    numbers = dict.fromkeys(finished())
    return numbers | {"name": name, "compressor": "topk", "error_feedback": False, "status": "failed", "reason": reason}


def control(works=True, **changes):
    """Training without compression, on which the attack works or fails."""
    same = {"compressor": "none", "error_feedback": False, "rank": None, "bytes_per_step": 1_430_000}
    leakage = 0.8 if works else 0.15
    return finished("none", 0.94, leakage, **{**same, "naive_ssim": leakage, "compression_ratio": 1.0, **changes})


def audited():
    """A sweep as it should be: the attack works, one defence only looks private, one resists, one is ruined."""
    names = [(1, 0.72, 0.12, 12_300), (2, 0.75, 0.2, 24_600), (4, 0.78, 0.33, 49_200), (30, 0.79, 0.7, 369_000)]
    rows = [control()]
    for rank, aware, naive, size in names:
        accuracy = 0.92 + 0.004 * rank**0.5
        more = {"naive_ssim": naive, "rank": rank, "bytes_per_step": size, "error_feedback": False}
        rows.append(finished(f"PowerSGD rank {rank}", accuracy, aware, **more))
        more = {**more, "compressor": "topk", "rank": None, "naive_ssim": naive + 0.05}
        rows.append(finished(f"Top-K level {rank}", accuracy - 0.01, aware - 0.12, **more))
    rows.append(finished("signSGD", 0.9, 0.25, compressor="sign", error_feedback=False, bytes_per_step=45_000))
    rows.append(finished("ATOMO 1", 0.6, 0.05, compressor="atomo", error_feedback=False, bytes_per_step=9_000))
    return [*rows, failed()]


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
