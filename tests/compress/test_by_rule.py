"""Steps by a rule: the mean's are the compressor's own, and a robust rule sees what each worker sent."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import COMPRESSORS, DEFENCES, SHAPES, distance, gradients, is_gathered

from raytrust.compress import build
from raytrust.compress.by_rule import gathers, reduce_by
from raytrust.config import SignSGDConfig
from raytrust.defend.robust import RULES
from raytrust.wire.channel import Channel, Tap
from raytrust.wire.threads import in_threads

WORKERS = 5


def by_rule(name: str, rule: str, channel: Channel, liar: float = 0.0) -> dict[str, Any]:
    """Two steps; the last worker's gradient is that of others plus a large one."""
    compressor, mean_of = build(DEFENCES[name], SHAPES, seed=5), build(DEFENCES[name], SHAPES, seed=5)
    for step in range(2):
        grads = [1.0 + 0.05 * g for g in gradients(10 * step + channel.rank)]
        if channel.rank == WORKERS - 1:
            grads = [g - liar for g in grads]
        ruled, plain = Tap(channel), Tap(channel)
        taken = [m.clone() for m in reduce_by(partial(RULES[rule], malicious=1), compressor, grads, ruled)]
        reduced = mean_of.reduce(grads, plain)
        mean, own = [m.clone() for m in reduced.mean], [o.clone() for o in reduced.decoded_own]
    return {"taken": taken, "mean": mean, "own": own, "sent": (ruled.sent_bytes, plain.sent_bytes),
            "received": (ruled.received_bytes, plain.received_bytes)}  # fmt: skip


@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_rule_mean_is_the_compressors_own(name: str) -> None:
    found = in_threads(partial(by_rule, name, "mean"), WORKERS)
    for worker in found:
        assert all(map(torch.equal, worker["taken"], found[0]["taken"])), "replicas drift apart"
        sent = torch.stack([flat(other["own"]) for other in found]).mean(0)
        # The vote of signs is no mean, and under a rule it is this rule's.
        expected = sent if isinstance(COMPRESSORS[name], SignSGDConfig) else flat(worker["mean"])
        tolerance = 0.05 if name in ("fp16", "bf16") else 1e-4
        assert torch.allclose(flat(worker["taken"]), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_messages_are_gathered_where_they_were_summed(name: str) -> None:
    worker = in_threads(partial(by_rule, name, "median"), WORKERS)[0]
    assert gathers(build(DEFENCES[name], SHAPES)) == is_gathered(COMPRESSORS[name])
    (sent, plain_sent), (received, plain_received) = worker["sent"], worker["received"]
    assert sent == plain_sent, "a rule makes nobody say more"
    if is_gathered(COMPRESSORS[name]):
        assert received == plain_received
    else:
        assert (received, plain_received) == (WORKERS * sent, sent)


@pytest.mark.parametrize("name", ["dense", "powersgd-3", "powersgd-full", "topk-full", "qsgd-8", "fp16", "randk-full"])
@pytest.mark.parametrize("rule", ["median", "trimmed", "krum", "multi-krum"])
def test_a_robust_rule_takes_no_notice_of_a_liar(name: str, rule: str) -> None:
    honest = flat([torch.ones(shape) for shape in SHAPES])
    lied = in_threads(partial(by_rule, name, rule, liar=1000.0), WORKERS)[0]
    assert distance([flat(lied["taken"])], [honest]) < 0.15
    assert distance([flat(lied["mean"])], [honest]) > 100, "the mean does"


def flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in grads])
