"""How many private labels each method recovers from compressed messages, in % of the labels of a batch (as multisets).

    python benchmarks/label_recovery.py --data cifar10.npz --width 8 --step 0

Random batches of training images, of an untrained ResNet-18 (CIFAR stem) or of one after --step steps of training; no
label is granted to the attack. One line a compressor, one column a batch size: counts / bias_sign, and idlg for one.
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import islice

import numpy as np

from raytrust.attacks.inversion import recover_labels
from raytrust.config import CaptureConfig, ModelConfig, Threat, TrainConfig, parse_defence
from raytrust.data import load
from raytrust.leak.observation import Capture
from raytrust.train.loop import train
from raytrust.wire.channel import LocalChannel

DEFENCES = ("none", "topk:0.01", "topk:0.001", "powersgd:1", "powersgd:4", "randk:0.01", "qsgd:4", "signsgd")
BATCHES = (1, 2, 4, 8, 16)


def overlap(capture: Capture, method: str) -> float:
    recovered = Counter(recover_labels(capture.seen, method).tolist())
    true = Counter(capture.truth.labels.tolist())
    return (recovered & true).total() / true.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--captures", type=int, default=12)
    parser.add_argument("--batch-norm", choices=["eval", "train"], default="eval")
    options = parser.parse_args()
    data = load(options.data)
    print(f"{'':14s}" + "".join(f"{f'B = {b}':>14s}" for b in BATCHES))
    for name in DEFENCES:
        cells = []
        for batch in BATCHES:
            config = TrainConfig(
                defence=parse_defence(name),
                model=ModelConfig(width=options.width),
                threat=Threat(batch_size=batch, batch_norm=options.batch_norm, labels="unknown"),
                capture=CaptureConfig((options.step,), tuning=1, evaluation=options.captures - 1),
                workers=1,
                batch_size=32,
                steps=options.step + 1,
            )
            records = (r for r in train(config, data, LocalChannel()) if isinstance(r, Capture))
            captures = list(islice(records, options.captures))
            methods = ("counts", "bias_sign", "idlg")[: 3 if batch == 1 else 2]
            cells.append("/".join(f"{100 * np.mean([overlap(c, m) for c in captures]):.0f}" for m in methods))
        print(f"{name:14s}" + "".join(f"{cell:>14s}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
