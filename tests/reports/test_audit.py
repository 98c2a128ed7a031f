"""`raytrust.audit`: any module in memory, any loss, and what can't be audited in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torchvision.models import VisionTransformer

import raytrust
from raytrust.compress import HookCompressor, build
from raytrust.config import InversionConfig, LocalConfig, parse_defence
from raytrust.metrics.verdict import LEAKS, RESISTS, UNDECIDED
from raytrust.studies.frontier.row import load_rows

QUICK = InversionConfig(iterations=60, step_size=2.0)
N = 24


def smooth(n: int = N, channels: int = 1, size: int = 12, seed: int = 0) -> Tensor:
    """Blobs that differ from each other, (n, channels, size, size) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, channels, 4, 4), generator=generator)
    return F.interpolate(coarse, size, mode="bilinear").clamp(0, 1)


def labels(n: int = N, classes: int = 4) -> Tensor:
    return torch.arange(n) % classes


def convnet(channels: int = 1, outputs: int = 4, seed: int = 0, last: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(channels, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, outputs), *([] if last is None else [last]))


def audited(model: nn.Module, y: Any = None, **options: Any) -> raytrust.AuditResult:
    settings = {"defences": ["powersgd:1"], "attack": QUICK, "evaluation": 4, "tuning": 1, "progress": False}
    return raytrust.audit(model, smooth(), labels() if y is None else y, **{**settings, **options})


def plain(result: raytrust.AuditResult) -> dict[str, Any]:
    return dict(next(row for row in result.rows if row["name"] == "none"))


def test_an_attacker_with_images_of_the_kind() -> None:
    """He tries a prior on the batch's statistics, a regression, a start from it and a denoiser, too; what is attacked
    he must not have."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 4))
    extra = smooth(8, seed=1)
    quick = replace(QUICK, iterations=4)
    granted = audited(model, defences=[], attack=quick, batch_size=2, auxiliary=extra)
    without = audited(model, defences=[], attack=quick, batch_size=2)
    assert plain(granted)["attacks_tried"] == plain(without)["attacks_tried"] + 4
    assert {r.attack.bn > 0 for r in granted.defences[0].tuned} == {True, False}
    threat = plain(granted)["threat"]
    assert (threat["batch_statistics"], threat["auxiliary"]) == ("proxy", 8)
    for capture in granted.defences[0].captures[0]:
        assert capture.seen.auxiliary is not None
        assert torch.equal(capture.seen.auxiliary, extra)
    assert without.defences[0].captures[0][0].seen.auxiliary is None
    # Five batches of two are attacked, and the twelfth image is none of them.
    audited(model, defences=[], attack=quick, batch_size=2, auxiliary=smooth()[11:])
    with pytest.raises(ValueError, match=r"^Expected auxiliary images without the private .* at 1\.$"):
        audited(model, batch_size=2, auxiliary=torch.cat([extra[:1], smooth()[9:]]))
    with pytest.raises(ValueError, match=r"^Expected auxiliary=1 to be at least the size of the private batch, 2, for"):
        audited(model, batch_size=2, auxiliary=extra[:1])
    with pytest.raises(ValueError, match=r"^Expected auxiliary of shape"):
        audited(model, auxiliary=smooth(channels=3))


def test_it_says_what_leaks_and_writes_it(tmp_path: Path) -> None:
    model, said = convnet(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = raytrust.audit(
        model, smooth(), labels(), ["none", "powersgd:1"], attack=QUICK, evaluation=6, tuning=1, progress=said.append
    )
    assert [row["name"] for row in result.rows] == ["none", "PowerSGD rank 1"]
    assert plain(result)["verdict"] == LEAKS
    assert plain(result)["n_images"] == 6
    # 4 bytes for each of the parameters, as the wire had them.
    assert plain(result)["bytes_per_step"] == 4 * sum(p.numel() for p in model.parameters())
    assert result.rows[1]["bytes_per_step"] < plain(result)["bytes_per_step"] / 3
    text = str(result)
    assert "PowerSGD rank 1" in text
    assert "accuracy" not in text.lower()
    assert "Control: the attack works" in text
    assert {path.name for path in result.save(tmp_path)} == {
        "report.html", "results.json", "audit.txt", "audit.png", "reconstructions.png"
    }  # fmt: skip
    assert load_rows(tmp_path / "results.json") == json.loads(json.dumps(result.rows))
    page = (tmp_path / "report.html").read_text()
    assert "Sequential" in page
    assert "accuracy %" not in page
    assert result._repr_html_().startswith("<iframe srcdoc=")
    assert len(said) == 4  # two defences, tuned and evaluated
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_control_is_audited_unasked() -> None:
    assert audited(convnet(), defences=["signsgd"]).rows[0]["name"] == "none"


def test_without_a_working_attack_nothing_looks_private() -> None:
    rows = audited(convnet(), attack=InversionConfig(iterations=1, step_size=1e-6), evaluation=6).rows
    assert {row["verdict"] for row in rows} <= {UNDECIDED, LEAKS}
    assert not any(row["control"] for row in rows)


def test_local_steps_are_audited_in_every_way_through_them() -> None:
    """Of a model with a frozen layer, in batches of which each step takes a part."""
    local = LocalConfig(3, 0.5, 1)
    model = frozen()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = audited(model, local=local, batch_size=2, evaluation=2, attack=replace(QUICK, iterations=4))
    assert {row["threat"]["local"] for row in result.rows} == {"3 local steps of 1 images, learning rate 0.5"}
    assert result.settings["local steps"] == local.title
    control = result.defences[0]
    assert {r.attack.through for r in control.tuned} == {"steps", "surrogate", "gradient"}
    assert all(c.seen.local == local for c in control.captures[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    given = audited(convnet(), local=LocalConfig(2, 0.1), attack=replace(QUICK, iterations=2, through="surrogate"))
    assert {r.attack.through for r in given.defences[0].tuned} == {"surrogate"}


def test_local_steps_are_trained_by_and_take_each_private_image() -> None:
    loader = [(smooth(6), labels(6))] * 2
    training = raytrust.Training(loader, steps=(0, 2), optimiser=lambda p: torch.optim.SGD(p, 0.2))
    few = replace(QUICK, iterations=2)
    model = convnet()
    result = audited(model, local=LocalConfig(2, 0.1, 3), training=training, attack=few, defences=[])
    trained = result.defences[0].captures[2][0].seen
    # By hand: two rounds, in each of which the server steps along the mean of two local gradients.
    for _ in range(2):
        start = [p.detach().clone() for p in model.parameters()]
        for part in (slice(0, 3), slice(3, 6)):
            grads = torch.autograd.grad(F.cross_entropy(model(loader[0][0][part]), labels(6)[part]), model.parameters())
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads, strict=True):
                    p -= 0.1 * g
        with torch.no_grad():
            for p, w in zip(model.parameters(), start, strict=True):
                p.copy_(w - 0.2 * (w - p) / 0.2)
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained.weights[name], p.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"^Expected 2 local steps of batch_size=1 to take each of the 4 images"):
        audited(convnet(), local=LocalConfig(2, 0.1, 1), batch_size=4, evaluation=2)


class Two(nn.Module):
    """Takes an image and a number, and gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = convnet(outputs=6), nn.Linear(7, 4)

    def forward(self, age: Tensor, picture: Tensor) -> dict[str, Tensor]:
        features = self.body(picture)
        return {"logits": self.head(torch.cat([features, age[:, None]], 1)), "features": features}


def per_pixel(outputs: Tensor, masks: Tensor) -> Tensor:
    return F.cross_entropy(outputs, masks)


def frozen() -> nn.Module:
    model = convnet()
    model[0].requires_grad_(False)
    return model


TASKS: dict[str, tuple[nn.Module, Any, dict[str, Any]]] = {
    "binary cross-entropy": (
        convnet(outputs=1), torch.rand(N, 1, generator=torch.Generator().manual_seed(1)).round(),
        {"loss": F.binary_cross_entropy_with_logits},
    ),
    "label smoothing": (convnet(), labels(), {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}),
    "regression": (convnet(outputs=2), torch.linspace(-1, 1, 2 * N).view(N, 2), {"loss": F.mse_loss}),
    "segmentation": (
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1)),
        (smooth()[:, 0] * 2.99).long(), {"loss": per_pixel},
    ),
    "two inputs and a dict": (
        Two(), labels(),
        {"loss": lambda out, y: F.cross_entropy(out["logits"], y), "argument": "picture",
         "inputs": {"age": torch.linspace(0, 1, N)}},
    ),
    "frozen first layer": (frozen(), labels(), {}),
    "dropout": (nn.Sequential(convnet(outputs=16), nn.Dropout(0.5), nn.Linear(16, 4)), labels(), {}),
    "batches of two": (convnet(), labels(), {"batch_size": 2, "evaluation": 3}),
    "labels withheld": (convnet(), labels(), {"labels_known": False}),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_the_attack_works_on_whatever_is_trained(task: str) -> None:
    """The uncompressed gradient gives the image away, which it only does to an attacker with the victim's own loss."""
    model, target, options = TASKS[task]
    row = plain(audited(model, target, **options))
    assert row["status"] == "finished", row["reason"]
    assert row["excess"] > 0.05
    assert row["verdict"] == LEAKS


@pytest.mark.parametrize("defence", ["soteria:0.8", "mixup:2+powersgd:4"])
def test_what_is_done_to_images_is_known_to_the_attacker(defence: str) -> None:
    """Named, or handed over as a compressor, in the training before a capture and in the capture itself."""
    steps = raytrust.Training(
        [(smooth(8, seed=1), labels(8))], steps=(0, 2), optimiser=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    for batch_size in (1, 2):
        named = audited(convnet(), defences=[defence], batch_size=batch_size, training=steps)
        row = next(row for row in named.rows if row["name"] != "none")
        assert row["naive_ssim"] < row["aware_ssim"]
        assert row["understood"]
    built = build(parse_defence(defence), convnet(), private_seed=0)
    (_, row) = audited(convnet(), defences=[built]).rows
    assert row["naive_ssim"] < row["aware_ssim"]


def test_captures_of_a_training_of_ones_own() -> None:
    x, y = smooth(), labels()
    loader = [(x[i : i + 4], y[i : i + 4]) for i in range(0, N, 4)]
    training = raytrust.Training(loader, steps=(0, 8), optimiser=lambda p: torch.optim.SGD(p, 0.1))
    result = audited(convnet(), defences=["topk:0.1:ef"], training=training)
    assert all(row["status"] == "finished" for row in result.rows)
    # The portfolio met both steps.
    assert plain(result)["attacks_tried"] == 2 * 2
    ended = raytrust.Training(iter(loader[:1]), steps=(0, 8), optimiser=training.optimiser)
    with pytest.raises(ValueError, match="Expected a loader with batches up to step 8, but it has come to its end"):
        audited(convnet(), training=ended)
    diverging = raytrust.Training(loader, steps=(0, 8), optimiser=lambda p: torch.optim.SGD(p, 1e38))
    result = audited(convnet(), training=diverging)
    assert [row["status"] for row in result.rows] == ["failed", "failed"]
    assert "not finite at step" in str(plain(result)["reason"])


def test_a_vision_transformer_is_solved_where_optimisers_fail() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(
        image_size=12, patch_size=4, num_layers=1, num_heads=2, hidden_dim=48, mlp_dim=48, num_classes=4
    )
    nn.init.normal_(vit.heads[0].weight, std=0.1)  # torchvision's zeros send no signal to any other layer
    images = smooth(channels=3, size=12)
    result = raytrust.audit(
        vit,
        images,
        labels(),
        ["powersgd:4"],
        attack=InversionConfig(iterations=10),
        evaluation=3,
        tuning=1,
        progress=False,
    )
    assert plain(result)["leakage_ssim"] > 0.99
    assert plain(result)["attack"]["method"] == "analytic"
    assert result.rows[1]["verdict"] == LEAKS


def test_a_hook_of_torch_is_one_more_defence() -> None:
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    result = audited(convnet(), defences=["powersgd:1:ef"], hook=powerSGD_hook.powerSGD_hook, state=state)
    ours, theirs = result.rows[1:]
    assert theirs["name"] == "powerSGD_hook rank 1"
    assert theirs["status"] == "finished", theirs["reason"]
    assert 0 < theirs["bytes_per_step"] < plain(result)["bytes_per_step"] / 3
    # Knowing what the hook sends is worth as much as knowing what our own method sends.
    assert theirs["aware_ssim"] == pytest.approx(ours["aware_ssim"], abs=0.15)
    assert state.iter == 0


def test_a_hook_of_ones_own() -> None:
    def halves(state: Any, bucket: Any) -> Any:
        sent = bucket.buffer().half()
        return dist.all_reduce(sent, async_op=True).get_future().then(lambda f: f.value()[0].float())

    row = audited(convnet(), defences=[], hook=halves).rows[1]
    assert (row["name"], row["status"]) == ("halves", "finished")
    assert row["compression_ratio"] == 2
    assert row["verdict"] == LEAKS


def test_dropout_is_the_victims_alone() -> None:
    """Its masks are in the message, so that the attack is worse by them; the generator is left as it was."""
    model = nn.Sequential(convnet(outputs=16), nn.Dropout(0.9), nn.Linear(16, 4))
    before = torch.random.get_rng_state()
    without, dropping = (audited(model, defences=[], dropout=d) for d in (False, True))
    assert torch.equal(before, torch.random.get_rng_state())
    assert model[1].training
    assert "Dropout is switched off." in str(without)
    assert "Dropout" not in str(dropping)
    assert plain(dropping)["leakage_ssim"] < plain(without)["leakage_ssim"] - 0.1


def test_our_own_hook_is_audited_as_its_compressor() -> None:
    model = convnet()
    hook = raytrust.ddp_comm_hook(raytrust.build(raytrust.parse_defence("powersgd:1:ef"), model))
    with pytest.raises(ValueError, match="give the compressor of ours among the defences"):
        audited(model, hook=hook, state=model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_in_other_precisions(dtype: torch.dtype) -> None:
    assert plain(audited(convnet().to(dtype), evaluation=3))["verdict"] == LEAKS


def test_compressors_in_memory_are_all_there() -> None:
    model = convnet()
    kept, coarse, fed = (
        raytrust.build(raytrust.parse_defence(d), model) for d in ("topk:0.25", "topk:0.1", "topk:0.1:ef")
    )
    coarse.name = "none"  # type: ignore[attr-defined]
    rows = audited(model, defences=[kept, kept, coarse, fed], evaluation=2).rows
    assert [row["name"] for row in rows] == ["none", "TopK", "TopK (2)", "none (2)", "TopK + EF"]
    assert len({row["bytes_per_step"] for row in rows[1:3]}) == 1
    assert rows[0]["bytes_per_step"] > rows[1]["bytes_per_step"] > rows[3]["bytes_per_step"]


class RankOne:
    """A hook that keeps a residual in itself, and that nobody knows."""

    def __init__(self) -> None:
        self.residual: dict[int, Tensor] = {}

    def __call__(self, state: Any, bucket: Any) -> Any:
        x = bucket.buffer() + self.residual.get(bucket.index(), torch.zeros(()))
        sent = x * (x.abs() >= x.abs().quantile(0.9))
        self.residual[bucket.index()] = x - sent
        return dist.all_reduce(sent.clone(), async_op=True).get_future().then(lambda f: f.value()[0])


def test_what_nobody_knows_is_never_said_to_resist() -> None:
    hook = RankOne()
    result = audited(
        convnet(), defences=[], hook=hook, attack=InversionConfig(iterations=1, step_size=1e-6), evaluation=6
    )
    row = result.rows[1]
    assert hook.residual == {}  # neither of the user's, nor from one private batch to the next
    assert row["understood"] is False
    assert row["verdict"] != RESISTS
    assert row["aware_ssim"] is None
    assert any("no attack here knows this method" in remark for remark in row["remarks"])
    assert "no attack here knows this method" in str(result)


def remembered(compressor: Any) -> bool:
    state = compressor.state_dict().items()
    return any(bool(v.any()) for k, v in state if isinstance(v, Tensor) and k.startswith("residual"))


def captured(result: raytrust.AuditResult, name: str, step: int = 0) -> list[Any]:
    (audited,) = (a for a in result.defences if a.name == name)
    return [capture.seen for capture in audited.captures[step]]


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return self.body(x)


def test_the_observation_holds_neither_images_nor_residuals() -> None:
    x, y = smooth(), labels()
    loader = [(x[i : i + 4], y[i : i + 4]) for i in range(0, N, 4)]
    training = raytrust.Training(loader, steps=(0, 3), optimiser=lambda p: torch.optim.SGD(p, 0.1))
    model = Remembers()
    own = raytrust.build(raytrust.parse_defence("topk:0.1:ef"), model)
    result = audited(model, defences=[own], training=training, evaluation=2)
    for seen in captured(result, "TopK + EF", 3):
        assert not hasattr(seen.network, "last")
        assert not hasattr(seen.build_model(), "last")
        assert not remembered(seen.build_compressor())
    assert remembered(result.defences[1].method)  # the worker's own, which trained


def test_all_defences_meet_one_training() -> None:
    class Shuffled:
        def __iter__(self) -> Any:
            for i in torch.randperm(N).split(4):
                yield smooth()[i], labels()[i]

    training = raytrust.Training(Shuffled(), steps=(0, 2), optimiser=lambda p: torch.optim.SGD(p, 0.1))
    result = audited(convnet(), defences=["topk:1.0"], training=training, evaluation=2)
    first, second = (captured(result, name, 2)[0].weights for name in ("none", "Top-K 100 %"))
    assert all(torch.allclose(first[k], second[k], atol=1e-6) for k in first)
    for steps in ((8, 0), (-1,), (), 8):
        with pytest.raises(
            ValueError, match=r"Expected steps=.* to be a tuple of steps from 0 on, in increasing order"
        ):
            raytrust.Training([], steps=steps, optimiser=None)  # type: ignore[arg-type]


def test_hooks_on_parameters_are_refused() -> None:
    model = convnet()
    model[0].weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    with pytest.raises(ValueError, match="Expected parameters without hooks of their own"):
        audited(model)


def test_private_images_are_no_references() -> None:
    """Beside its own copy nothing could be identified, and the attack would seem to fail."""
    result = audited(convnet(), references=smooth())
    assert plain(result)["candidates"] == 1 + N - 4
    assert plain(result)["identified"] >= 3


def test_what_fails_beside_what_works_is_said() -> None:
    row = audited(convnet(), defences=["signsgd"], attack=replace(QUICK, matching="l2")).rows[1]
    assert row["status"] == "finished"
    assert any("of the attacks failed" in remark for remark in row["remarks"])


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + 0.1 * torch.randn_like(x))


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.body(x)


REFUSED: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "no gradient": (Dead(), {"loss": lambda out, y: out.sum()}, "Expected a gradient of these images, got zero"),
    "two answers": (Noisy(), {}, "Expected a model that answers twice alike"),
    "float labels": (convnet(), {"y": torch.rand(N)}, "Expected labels of shape \\(n,\\) and integers"),
    "labels of other classes": (convnet(), {"y": labels(classes=9)}, "Expected labels in \\[0, 4\\), the classes"),
    "too few labels": (convnet(), {"y": labels(5)}, "Expected labels for 24 images"),
    "no logits": (nn.Sequential(nn.Conv2d(1, 2, 3)), {}, "Expected logits \\(n, classes\\) from the model, got shape"),
    "other channels": (convnet(channels=3), {}, "Expected the model .*take images \\(1, 1, 12, 12\\)"),
    "a loss for each": (
        convnet(),
        {"loss": lambda out, y: out.sum(1), "batch_size": 2},
        "Expected the loss to be one number",
    ),
    "frozen throughout": (convnet().requires_grad_(False), {}, "Expected a model with parameters that are trained"),
    "too many": (convnet(), {"evaluation": 30}, "Expected at least 31 images for evaluation=30"),
    "no defence": (convnet(), {"defences": ["powersgd:0"]}, "Expected rank=0"),
    "withheld": (convnet(), {"loss": F.cross_entropy, "labels_known": False}, "Expected labels_known=True"),
    "mean": (convnet(), {"mean": [0.5, 0.5], "std": [1.0]}, "Expected mean=\\[0.5, 0.5\\] of 1 numbers, one a channel"),
    "bytes": (convnet(), {"mean": [127.0], "std": [60.0]}, "one a channel of images in \\[0, 1\\]"),
    "mean alone": (convnet(), {"mean": [0.5]}, "std=None to be given together"),
    "a column": (convnet(), {"y": labels()[:, None]}, "of a column labels\\[:, 0\\]|labels\\[:, 0\\] of a column"),
    "a class": (convnet(), {"defences": [HookCompressor]}, "to be a name such as 'powersgd:4', or a compressor"),
    "references": (convnet(), {"references": smooth(1)}, "Expected at least 2 references that are not private"),
    "sizes": (convnet(), {"references": smooth(9, size=10)}, "Expected references of shape \\(1, 12, 12\\)"),
    "device": (convnet(), {"device": "gpu"}, "Expected device='gpu' to be cpu, or cuda where torch can use it"),
    "history": (convnet(), {"attack": InversionConfig(residual="avoid")}, "an audit grants no history"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_audited_is_refused_in_a_line(what: str) -> None:
    model, options, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as error:
        audited(model, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("images", [smooth() * 2, smooth() - 1, smooth()[0], torch.full((24, 1, 12, 12), torch.nan)])
def test_images_out_of_range_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="Expected images") as error:
        raytrust.audit(convnet(), images, labels(), progress=False)
    assert "\n" not in str(error.value)


def test_it_takes_arrays_and_bytes() -> None:
    x = (255 * smooth()).round().to(torch.uint8).numpy()
    result = raytrust.audit(
        convnet(), x, labels().numpy().astype("int32"), ["none"], attack=QUICK, evaluation=3, tuning=1, progress=False
    )
    assert plain(result)["verdict"] == LEAKS


def test_a_compressor_s_private_seed_stays_with_its_owner() -> None:
    """By it an attacker would draw the same noise, or the same shares of mixed images."""
    x, y = torch.rand((12, 1, 8, 8), generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    compressor = build(parse_defence("noise:0.1"), model, private_seed=12345)
    result = raytrust.audit(
        model, x, y, [compressor], evaluation=1, tuning=1, attack=InversionConfig(iterations=1), progress=False
    )
    (captures,) = result.defences[1].captures.values()
    assert all(c.seen.method is not None and c.seen.method.seed != 12345 for c in captures)  # type: ignore[attr-defined]
