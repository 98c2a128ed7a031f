"""Evidence that must not be read as protection: of few images, of batches, of an attack beside the strongest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from frontier_rows import control, finished

from raytrust.cli.options import given
from raytrust.config import Defence, DGCConfig, SweepConfig, TopKConfig
from raytrust.metrics.verdict import FEWEST, Control, image_evidence, judge
from raytrust.reports.frontier_report import Call
from raytrust.studies.comparison import Floors
from raytrust.studies.frontier.verdicts import judge_rows

WORKS = Control(True, "it does")


@pytest.mark.parametrize(("n", "verdict"), [(2, "undecided"), (FEWEST - 1, "undecided"), (FEWEST, "resists")])
def test_few_images_call_nothing_resistant(n: int, verdict: str) -> None:
    ssim, floor = [0.1 + 0.01 * i for i in range(n)], [0.4] * n
    assert judge(image_evidence(ssim, floor, None, [False] * n, 100), WORKS).verdict == verdict


def test_a_leak_that_the_naive_attack_shows_is_a_leak() -> None:
    """The strongest by SSIM may identify nothing where the other identifies all."""
    row = finished("private", leakage=0.15) | {"identified": 0, "naive_ssim": 0.149, "naive_identified": 8}
    row |= {"naive_excess_interval": [-0.2, -0.1], "excess_interval": [-0.2, -0.1]}
    judged = judge_rows([control(), row])[1]
    assert judged["verdict"] == "leaks"
    assert judged["verdict_reason"].startswith("ignoring the compressor: ")
    assert judge_rows([control(), row | {"naive_identified": 0}])[1]["verdict"] == "resists"


def test_images_of_a_batch_are_no_independent_evidence() -> None:
    """Two batches of four, one far above the floor and one below: between batches nothing is certain."""
    ssim, floor = [0.9] * 4 + [0.2] * 4, [0.4] * 8
    alone, batched = (image_evidence(ssim, floor, None, [True, True, True, *[False] * 5], 100, b) for b in (1, 4))
    assert alone.interval is not None
    assert batched.interval is not None
    assert batched.interval[1] - batched.interval[0] > alone.interval[1] - alone.interval[0]
    assert (alone.candidates, batched.candidates) == (100, 25)  # each had four chances


def test_the_floor_of_a_batch_is_assigned_as_reconstructions_are() -> None:
    """Else random other images would lie above it, the more so the larger the batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(80, 1, 8, 8, generator=generator).numpy()
    originals, references = images[:16], images[16:]
    means = [np.mean(Floors(np.split(originals, 16 // size), references).other_image) for size in (1, 2, 4, 8)]
    assert means == sorted(means)
    assert means[3] > means[0] + 0.02


def test_defences_that_share_a_name_are_refused() -> None:
    pairs = [
        (TopKConfig(level=0.05), TopKConfig(level=0.05001)),
        (DGCConfig(0.01), DGCConfig(0.01, momentum=0.5)),
    ]
    for one, other in pairs:
        with pytest.raises(ValueError, match="to have names that tell them apart"):
            SweepConfig(defences=(Defence(one), Defence(other)), trials=2)


def test_the_next_commands_keep_what_was_given() -> None:
    arguments = [
        "--width",
        "4",
        "--defence=none",
        "--defence",
        "topk:0.1",
        "--minimise-bytes",
        "--output",
        "my results",
    ]
    options = given(arguments)
    assert options["--defence"] == ["none", "topk:0.1"]
    program = Call("python s.py", options, {}, 0.0)
    commands = dict(program.next_commands(__import__("pathlib").Path("/a b"), SweepConfig()))
    assert commands["report on more images"] == (
        "python s.py --width 4 --defence none --defence topk:0.1 --minimise-bytes --images 12"
    )
    assert "--resume '/a b' " in next(c for what, c in commands.items() if "again" in what)
