"""Whether noise or a compressor protects better, at an accuracy that is no lower."""

from __future__ import annotations

from frontier_rows import failed, finished

from raytrust.reports.frontier_page import FrontierContext, page
from raytrust.reports.protection import noise_or_compression
from raytrust.studies.frontier.verdicts import judge_rows

PLAIN = finished("none", 0.95, 0.8, compressor="none", naive_ssim=0.8)


def noise(name: str, accuracy: float, leakage: float) -> dict[str, object]:
    return finished(name, accuracy, leakage, compressor="none", transforms=[name], noisy=True)


def test_each_meets_the_best_compressor_of_its_accuracy() -> None:
    rows = [
        PLAIN,
        noise("noise 0.1", 0.60, 0.05),
        noise("noise 0.01", 0.94, 0.7),
        noise("noise 0.001", 0.94, 0.35),
        finished("PowerSGD rank 1", 0.92, 0.31),
        finished("PowerSGD rank 4", 0.94, 0.5),
        finished("signSGD", 0.7, 0.1),
        finished("clip 1 + PowerSGD rank 1", 0.94, 0.0, transforms=["clip 1"]),
        failed(),
    ]
    lines = noise_or_compression(judge_rows(rows))  # type: ignore[arg-type]
    assert lines == [
        "noise 0.01 (94.0 %) SSIM 0.70 [0.60, 0.80], against PowerSGD rank 1 (92.0 %) SSIM 0.31 [0.21, 0.41]: the "
        "compressor protects better.",
        "noise 0.001 (94.0 %) SSIM 0.35 [0.25, 0.45], against PowerSGD rank 1 (92.0 %) SSIM 0.31 [0.21, 0.41]: no "
        "difference is shown.",
        "noise 0.1 (60.0 %) SSIM 0.05 [-0.05, 0.15], against signSGD (70.0 %) SSIM 0.10 [0.00, 0.20]: no difference is "
        "shown.",
    ]
    text = page(rows, FrontierContext("Title"))  # type: ignore[arg-type]
    assert "A compressor or noise?" in text
    assert lines[0] in text


def test_noise_may_be_better_and_may_be_alone() -> None:
    rows = [PLAIN, noise("noise 0.1", 0.94, 0.05), finished("PowerSGD rank 4", 0.94, 0.5)]
    (line,) = noise_or_compression(judge_rows(rows))  # type: ignore[arg-type]
    assert line.endswith(": noise protects better.")
    (line,) = noise_or_compression(judge_rows([PLAIN, noise("noise 0.1", 0.94, 0.05), finished("sign", 0.5, 0.1)]))  # type: ignore[arg-type]
    assert line.endswith(": no compressor here keeps that accuracy.")


def test_nothing_is_said_without_noise_or_where_the_attack_fails() -> None:
    assert noise_or_compression(judge_rows([PLAIN, finished()])) == []
    weak = finished("none", 0.95, 0.15, compressor="none", naive_ssim=0.15)
    rows = [weak, noise("noise 0.1", 0.9, 0.05), finished()]
    assert noise_or_compression(judge_rows(rows)) == []  # type: ignore[arg-type]
    assert "A compressor or noise?" not in page(rows, FrontierContext("Title"))  # type: ignore[arg-type]
