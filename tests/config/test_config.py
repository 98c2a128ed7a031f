from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrust.compress import build
from raytrust.config import (
    AtomoConfig,
    CaptureConfig,
    ClipConfig,
    CompressorConfig,
    Defence,
    DenseConfig,
    DGCConfig,
    HalfConfig,
    InversionConfig,
    LocalConfig,
    ModelConfig,
    NoiseConfig,
    PowerSGDConfig,
    PruneConfig,
    QSGDConfig,
    RandKConfig,
    ScaledSignConfig,
    SignSGDConfig,
    SweepConfig,
    Threat,
    ThresholdConfig,
    TopKConfig,
    TrainConfig,
    VqSGDConfig,
    digest,
    from_dict,
    to_dict,
)
from raytrust.config.defence import compressor_types

positive = st.integers(1, 2**31)
seeds = st.integers(0, 2**31 - 1)
rates = st.floats(1e-300, 1e300)
powersgd = st.builds(PowerSGDConfig, positive, st.booleans())
levels = st.floats(0, 1, exclude_min=True)
momenta = st.floats(0, 1, exclude_max=True)
topk = st.builds(TopKConfig, level=levels, scope=st.sampled_from(["global", "layer"])) | st.builds(
    TopKConfig, equal_to_rank=positive, equal_by=st.sampled_from(["bytes", "values"])
)
fed = (
    st.sampled_from([DenseConfig(), HalfConfig(), HalfConfig("bfloat16"), ScaledSignConfig()])
    | powersgd
    | topk
    | st.builds(RandKConfig, levels)
    | st.builds(ThresholdConfig, levels, levels)
    | st.builds(QSGDConfig, st.sampled_from([2, 4, 8]), st.integers(1, 2**18), st.sampled_from(["l2", "max"]))
    | st.builds(VqSGDConfig, st.integers(1, 2**24))
    | st.builds(AtomoConfig, positive)
)
unfed = (
    st.builds(RandKConfig, levels, st.booleans())
    | st.builds(DGCConfig, levels, momenta, st.booleans(), st.none() | st.floats(1e-300, 1e300), st.integers(0, 2**31))
    | st.builds(SignSGDConfig, momenta)
)
defences = st.builds(Defence, fed, st.booleans()) | st.builds(Defence, unfed)
models = st.builds(
    ModelConfig,
    st.sampled_from(["resnet18", "convnet", "normed-convnet", "resnet20", "lenet"]),
    st.sampled_from(["cifar", "imagenet"]),
    st.integers(1, 1024),
)
threats = st.builds(
    Threat,
    st.sampled_from(["link", "peer"]),
    positive,
    st.sampled_from(["eval", "train"]),
    st.sampled_from(["known", "unknown"]),
    history=st.integers(0, 9),
)
capture_steps = st.sets(st.integers(0, 99), min_size=1).map(lambda steps: tuple(sorted(steps)))
trainings = st.builds(
    TrainConfig,
    defences,
    models,
    threats,
    st.builds(CaptureConfig, capture_steps, positive, positive),
    workers=positive,
    batch_size=positive,
    steps=st.integers(100, 10**6),
    learning_rate=rates,
    momentum=momenta,
    weight_decay=st.floats(0, 1e300),
    seed=seeds,
)
inversions = st.builds(
    InversionConfig,
    st.sampled_from(["naive", "aware"]),
    tv=st.floats(0, 1e300),
    step_size=rates,
    iterations=positive,
    restarts=positive,
    signed=st.sampled_from(["none", "hard", "soft"]),
    matching=st.sampled_from(["cosine", "tensors", "l2", "l1"]),
    bound=st.floats(0, 1e300),
    bn=st.floats(0, 1e300),
    halving=st.booleans(),
    seed=seeds,
)


@st.composite
def sweeps(draw: st.DrawFn) -> SweepConfig:
    train = draw(trainings)
    attack = replace(draw(inversions), capture_step=train.capture.steps[-1])
    known = tuple(draw(st.lists(defences, unique=True, max_size=3)))
    return SweepConfig(draw(st.text()), train, known, draw(positive), (attack,), draw(st.integers(0, 99)))


@settings(max_examples=50)
@given(defences | models | threats | trainings | inversions | sweeps() | powersgd | topk)
def test_a_config_survives_json(config: Any) -> None:
    text = json.dumps(to_dict(config), allow_nan=False)
    again = from_dict(type(config), json.loads(text))
    assert again == config
    assert hash(again) == hash(config)
    assert digest(again) == digest(config)


METHODS = "none, half, powersgd, topk, randk, threshold, dgc, signsgd, scaledsign, qsgd, vqsgd, atomo"


def test_what_a_dict_looks_like() -> None:
    assert to_dict(Defence(PowerSGDConfig(rank=2), error_feedback=True)) == {
        "compressor": {"method": "powersgd", "rank": 2, "warm_start": True},
        "error_feedback": True,
    }
    assert to_dict(CaptureConfig(steps=(0, 5))) == {"steps": [0, 5], "tuning": 2, "evaluation": 4}


def test_keys_left_out_take_their_defaults() -> None:
    assert from_dict(TrainConfig, {}) == TrainConfig()
    assert from_dict(TrainConfig, {"model": {"width": 8}}) == TrainConfig(model=ModelConfig(width=8))
    assert from_dict(Defence, {"compressor": {"method": "powersgd"}}) == Defence(PowerSGDConfig())


def test_an_integer_will_do_for_a_float() -> None:
    parsed = from_dict(TrainConfig, {"learning_rate": 1})
    assert parsed.learning_rate == 1.0
    assert type(parsed.learning_rate) is float


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            PowerSGDConfig,
            {"rang": 3},
            "Expected the keys of PowerSGDConfig to be among rank, warm_start, min_compression_rate, got 'rang'.",
        ),
        (
            Defence,
            {"compressor": {"method": "powersgd", "levle": 3}},
            "Expected the keys of compressor to be among rank, warm_start, min_compression_rate, got 'levle'.",
        ),
        (
            TrainConfig,
            {"threat": {"batchsize": 3}},
            "Expected the keys of threat to be among vantage, batch_size, batch_norm, labels, batch_statistics, "
            "history, auxiliary, got 'batchsize'.",
        ),
        (
            Defence,
            {"compressor": {"method": "gzip"}},
            f"Expected compressor={{'method': 'gzip'}} to have a method among {METHODS}.",
        ),
        (
            Defence,
            {"compressor": {"method": []}},
            f"Expected compressor={{'method': []}} to have a method among {METHODS}.",
        ),
        (Defence, {"compressor": "topk"}, f"Expected compressor='topk' to have a method among {METHODS}."),
        (Defence, {"compressor": {}}, f"Expected compressor={{}} to have a method among {METHODS}."),
        (TrainConfig, [1], "Expected TrainConfig=[1] to be a mapping."),
        (TrainConfig, {"model": 3}, "Expected model=3 to be a mapping."),
        (TrainConfig, {"workers": 2.0}, "Expected workers=2.0 to be of type int."),
        (TrainConfig, {"workers": True}, "Expected workers=True to be of type int."),
        (TrainConfig, {"workers": "2"}, "Expected workers='2' to be of type int."),
        (TrainConfig, {"workers": None}, "Expected workers=None to be of type int."),
        (TrainConfig, {"learning_rate": "0.1"}, "Expected learning_rate='0.1' to be of type float."),
        (TrainConfig, {"learning_rate": True}, "Expected learning_rate=True to be of type float."),
        (Defence, {"error_feedback": 1}, "Expected error_feedback=1 to be of type bool."),
        (SweepConfig, {"name": 1}, "Expected name=1 to be of type str."),
        (CaptureConfig, {"steps": 0}, "Expected steps=0 to be a list."),
        (CaptureConfig, {"steps": ["0"]}, "Expected steps='0' to be of type int."),
        (TopKConfig, {"level": "all"}, "Expected level='all' to be of type float."),
        (
            ModelConfig,
            {"name": "vgg"},
            "Expected name='vgg' to be one of 'resnet18', 'convnet', 'normed-convnet', 'resnet20', 'lenet'.",
        ),
        (ModelConfig, {"width": 0}, "Expected width=0 in [1, 1024]."),
    ],
)
def test_from_dict_refuses(kind: type, values: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        from_dict(kind, values)
    assert str(error.value) == message


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (PowerSGDConfig, {"rank": 0}, "Expected rank=0 to be at least 1."),
        (TopKConfig, {"level": 0.0}, "Expected level=0.0 in (0, 1], the fraction of entries that is sent."),
        (TopKConfig, {"level": 1.01}, "Expected level=1.01 in (0, 1], the fraction of entries that is sent."),
        (TopKConfig, {"level": NAN}, "Expected level=nan in (0, 1], the fraction of entries that is sent."),
        (TopKConfig, {"equal_to_rank": 0}, "Expected equal_to_rank=0 to be at least 1."),
        (TopKConfig, {}, "Expected exactly one of level=None and equal_to_rank=None to be given."),
        (
            TopKConfig,
            {"level": 0.1, "equal_to_rank": 2},
            "Expected exactly one of level=0.1 and equal_to_rank=2 to be given.",
        ),
        (
            TopKConfig,
            {"equal_to_rank": 1, "equal_by": "bits"},
            "Expected equal_by='bits' to be one of 'bytes', 'values'.",
        ),
        (TopKConfig, {"level": 1, "scope": "tensor"}, "Expected scope='tensor' to be one of 'global', 'layer'."),
        (HalfConfig, {"dtype": "float32"}, "Expected dtype='float32' to be one of 'float16', 'bfloat16'."),
        (RandKConfig, {"level": 0.0}, "Expected level=0.0 in (0, 1], the fraction of entries that is sent."),
        (ThresholdConfig, {"level": 1.1}, "Expected level=1.1 in (0, 1], the fraction of entries that is sent."),
        (ThresholdConfig, {"sample": 0.0}, "Expected sample=0.0 in (0, 1], a fraction of the entries."),
        (DGCConfig, {"level": NAN}, "Expected level=nan in (0, 1], the fraction of entries that is sent."),
        (DGCConfig, {"momentum": 1.0}, "Expected momentum=1.0 in [0, 1)."),
        (DGCConfig, {"clip": 0.0}, "Expected clip=0.0 to be positive and finite, or None."),
        (DGCConfig, {"clip": INF}, "Expected clip=inf to be positive and finite, or None."),
        (DGCConfig, {"warmup_steps": -1}, "Expected warmup_steps=-1 to be at least 0."),
        (SignSGDConfig, {"momentum": 1.0}, "Expected momentum=1.0 in [0, 1)."),
        (QSGDConfig, {"bits": 3}, "Expected bits=3 to be one of 2, 4, 8."),
        (QSGDConfig, {"bucket": 0}, "Expected bucket=0 in [1, 262144]."),
        (QSGDConfig, {"norm": "l1"}, "Expected norm='l1' to be one of 'l2', 'max'."),
        (VqSGDConfig, {"samples": 0}, "Expected samples=0 in [1, 16777216]."),
        (AtomoConfig, {"rank": 0}, "Expected rank=0 to be at least 1."),
        (
            Defence,
            {"compressor": DGCConfig(), "error_feedback": True},
            "Expected error_feedback=True to be False with DGCConfig(level=0.001, momentum=0.9, masking=True, "
            "clip=None, warmup_steps=0).",
        ),
        (
            Defence,
            {"compressor": RandKConfig(unbiased=True), "error_feedback": True},
            "Expected error_feedback=True to be False with RandKConfig(level=0.01, unbiased=True).",
        ),
        (
            Defence,
            {"compressor": SignSGDConfig(momentum=0.9), "error_feedback": True},
            "Expected error_feedback=True to be False with SignSGDConfig(momentum=0.9).",
        ),
        (
            ModelConfig,
            {"name": "resnet50"},
            "Expected name='resnet50' to be one of 'resnet18', 'convnet', 'normed-convnet', 'resnet20', 'lenet'.",
        ),
        (ModelConfig, {"stem": "mnist"}, "Expected stem='mnist' to be one of 'cifar', 'imagenet'."),
        (ModelConfig, {"width": 1025}, "Expected width=1025 in [1, 1024]."),
        (Threat, {"vantage": "lnik"}, "Expected vantage='lnik' to be one of 'link', 'peer'."),
        (Threat, {"batch_norm": "test"}, "Expected batch_norm='test' to be one of 'eval', 'train'."),
        (Threat, {"auxiliary": -1}, "Expected auxiliary=-1 to be at least 0."),
        (
            Threat,
            {"batch_statistics": "proxy", "batch_size": 4, "auxiliary": 3},
            "Expected auxiliary=3 to be at least the size of the private batch, 4, for batch_statistics='proxy'.",
        ),
        (Threat, {"labels": "none"}, "Expected labels='none' to be one of 'known', 'unknown'."),
        (Threat, {"batch_size": 0}, "Expected batch_size=0 to be at least 1."),
        (Threat, {"history": -1}, "Expected history=-1 to be at least 0."),
        (CaptureConfig, {"steps": ()}, "Expected steps=() to name at least one step."),
        (CaptureConfig, {"steps": (-1, 0)}, "Expected steps=(-1, 0) to be at least 0."),
        (CaptureConfig, {"steps": (1, 0)}, "Expected steps=(1, 0) in increasing order, each once."),
        (CaptureConfig, {"steps": (0, 0)}, "Expected steps=(0, 0) in increasing order, each once."),
        (CaptureConfig, {"tuning": 0}, "Expected tuning=0 to be at least 1."),
        (CaptureConfig, {"evaluation": 0}, "Expected evaluation=0 to be at least 1."),
        (TrainConfig, {"workers": 0}, "Expected workers=0 to be at least 1."),
        (TrainConfig, {"batch_size": 0}, "Expected batch_size=0 to be at least 1."),
        (TrainConfig, {"steps": -1}, "Expected steps=-1 to be at least 0."),
        (
            TrainConfig,
            {"capture": CaptureConfig((0, 1)), "steps": 0},
            "Expected capture.steps=(0, 1) to lie below steps=0, the length of training.",
        ),
        (TrainConfig, {"learning_rate": 0.0}, "Expected learning_rate=0.0 to be positive and finite."),
        (TrainConfig, {"learning_rate": INF}, "Expected learning_rate=inf to be positive and finite."),
        (TrainConfig, {"learning_rate": NAN}, "Expected learning_rate=nan to be positive and finite."),
        (TrainConfig, {"momentum": 1.0}, "Expected momentum=1.0 in [0, 1)."),
        (TrainConfig, {"momentum": -0.1}, "Expected momentum=-0.1 in [0, 1)."),
        (TrainConfig, {"weight_decay": -1.0}, "Expected weight_decay=-1.0 to be at least 0 and finite."),
        (TrainConfig, {"weight_decay": INF}, "Expected weight_decay=inf to be at least 0 and finite."),
        (TrainConfig, {"seed": -1}, "Expected seed=-1 in [0, 2**31)."),
        (TrainConfig, {"seed": 2**31}, "Expected seed=2147483648 in [0, 2**31)."),
        (
            TrainConfig,
            {"capture": CaptureConfig((0, 9)), "steps": 9},
            "Expected capture.steps=(0, 9) to lie below steps=9, the length of training.",
        ),
        (InversionConfig, {"objective": "blind"}, "Expected objective='blind' to be one of 'naive', 'aware'."),
        (InversionConfig, {"residual": "keep"}, "Expected residual='keep' to be one of 'ignore', 'avoid', 'weigh'."),
        (InversionConfig, {"tv": -1.0}, "Expected tv=-1.0 to be at least 0 and finite."),
        (InversionConfig, {"tv": NAN}, "Expected tv=nan to be at least 0 and finite."),
        (InversionConfig, {"step_size": 0.0}, "Expected step_size=0.0 to be positive and finite."),
        (InversionConfig, {"step_size": INF}, "Expected step_size=inf to be positive and finite."),
        (InversionConfig, {"iterations": 0}, "Expected iterations=0 to be at least 1."),
        (InversionConfig, {"restarts": 0}, "Expected restarts=0 to be at least 1."),
        (InversionConfig, {"capture_step": -1}, "Expected capture_step=-1 to be at least 0."),
        (InversionConfig, {"seed": 2**31}, "Expected seed=2147483648 in [0, 2**31)."),
        (SweepConfig, {"trials": 0}, "Expected trials=0 to be at least 1."),
        (SweepConfig, {"portfolio": ()}, "Expected portfolio=() to hold at least one attack."),
        (SweepConfig, {"attack_trials": -1}, "Expected attack_trials=-1 to be at least 0."),
        (
            SweepConfig,
            {"portfolio": (InversionConfig(capture_step=3),)},
            "Expected capture_step=3 to be a captured step (0,).",
        ),
    ],
)
def test_values_out_of_range(kind: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        kind(**arguments)
    assert str(error.value) == message


def test_a_sweep_refuses_the_same_defence_twice() -> None:
    with pytest.raises(ValueError, match=r"^Expected defences=\(Defence\(.*\) to differ from each other\.$"):
        SweepConfig(defences=(Defence(), Defence()))


def test_values_at_the_ends_of_the_ranges() -> None:
    TopKConfig(level=1.0)
    TrainConfig(momentum=0.0, weight_decay=0.0, seed=2**31 - 1, steps=1)
    InversionConfig(tv=0.0)
    ModelConfig(width=1)
    ModelConfig(width=1024)


@pytest.mark.parametrize(
    ("defence", "name"),
    [
        (Defence(), "none"),
        (Defence(DenseConfig(), error_feedback=True), "none + EF"),
        (Defence(PowerSGDConfig(rank=4), error_feedback=True), "PowerSGD rank 4 + EF"),
        (Defence(PowerSGDConfig(rank=4, warm_start=False)), "PowerSGD rank 4 cold"),
        (Defence(TopKConfig(level=0.01)), "Top-K 1 %"),
        (Defence(TopKConfig(level=1)), "Top-K 100 %"),
        (Defence(TopKConfig(level=0.01, scope="layer")), "Top-K 1 % per layer"),
        (Defence(TopKConfig(equal_to_rank=4)), "Top-K (bytes of rank 4)"),
        (Defence(TopKConfig(equal_to_rank=4, equal_by="values"), True), "Top-K (values of rank 4) + EF"),
        (Defence(HalfConfig()), "fp16"),
        (Defence(HalfConfig("bfloat16"), error_feedback=True), "bf16 + EF"),
        (Defence(RandKConfig(0.05)), "Rand-K 5 %"),
        (Defence(RandKConfig(unbiased=True)), "Rand-K 1 % unbiased"),
        (Defence(ThresholdConfig(), error_feedback=True), "Threshold 1 % + EF"),
        (Defence(DGCConfig()), "DGC 0.1 %"),
        (Defence(SignSGDConfig()), "signSGD"),
        (Defence(SignSGDConfig(0.9)), "Signum 0.9"),
        (Defence(ScaledSignConfig()), "scaled sign"),
        (Defence(ScaledSignConfig(), error_feedback=True), "EF-signSGD"),
        (Defence(QSGDConfig()), "QSGD 4 bits"),
        (Defence(QSGDConfig(2, 64, "max")), "QSGD 2 bits bucket 64 max"),
        (Defence(VqSGDConfig()), "vqSGD 1000"),
        (Defence(AtomoConfig()), "ATOMO 3"),
    ],
)
def test_name_of_a_defence(defence: Defence, name: str) -> None:
    assert defence.name == name


def test_a_level_is_named_by_what_it_is_once_that_is_known() -> None:
    assert Defence(TopKConfig(equal_to_rank=4), True).name_with(0.0141) == "Top-K 1.4 % (bytes of rank 4) + EF"
    assert Defence(TopKConfig(level=0.01)).name_with(0.01) == "Top-K 1 %"
    assert Defence(PowerSGDConfig(4)).name_with(None) == "PowerSGD rank 4"


def test_names_of_equally_large_defences_differ() -> None:
    compressors: list[CompressorConfig] = [
        PowerSGDConfig(rank=4),
        PowerSGDConfig(rank=4, warm_start=False),
        TopKConfig(equal_to_rank=4),
        TopKConfig(equal_to_rank=4, equal_by="values"),
        TopKConfig(level=0.04),
        TopKConfig(level=0.04, scope="layer"),
        RandKConfig(0.04),
        ThresholdConfig(0.04),
        SignSGDConfig(),
        ScaledSignConfig(),
        *(QSGDConfig(2, bucket, norm) for bucket in (64, 512) for norm in ("l2", "max")),  # type: ignore[arg-type]
    ]
    assert len({Defence(c, ef).name for c in compressors for ef in (False, True)}) == 2 * len(compressors)


def variations(config: Any) -> list[Any]:
    """The config with one leaf changed, for each leaf."""
    found = []
    for field in fields(config):
        value = getattr(config, field.name)
        others: list[Any]
        if is_dataclass(value):
            others = variations(value)
        elif (type(config), field.name) == (ModelConfig, "options"):
            others = []  # a network that is shipped has none
        elif field.name == "transforms":
            others = [(*value, t) for t in (ClipConfig(), NoiseConfig(), PruneConfig())]
        elif (type(config), field.name) == (LocalConfig, "batch_size") and value is None:
            others = []  # one step takes the whole batch
        elif isinstance(value, bool):
            others = [not value]
        elif isinstance(value, int):
            others = [value + 1]
        elif isinstance(value, float):
            others = [value / 2 or 0.5]
        elif isinstance(value, tuple):
            others = [(*value, 7)]
        else:
            others = [v for v in _choices(type(config), field.name) if v != value]
        found += [replace(config, **{field.name: other}) for other in others]
    return found


def _choices(kind: type, name: str) -> tuple[str, ...]:
    return {
        (ModelConfig, "name"): ("resnet18", "convnet", "normed-convnet", "resnet20", "lenet"),
        (ModelConfig, "stem"): ("cifar", "imagenet"),
        (ModelConfig, "norm"): ("batch", "group"),
        (ModelConfig, "checkpoint"): ("", "/model.pt#0123456789abcdef"),
        (Threat, "vantage"): ("link", "peer"),
        (Threat, "batch_norm"): ("eval", "train"),
        (Threat, "labels"): ("known", "unknown"),
        (Threat, "batch_statistics"): ("unknown", "known"),
        (InversionConfig, "objective"): ("naive", "aware"),
        (InversionConfig, "signed"): ("none", "hard", "soft"),
        (InversionConfig, "method"): ("optimise", "analytic", "regression"),
        (InversionConfig, "start"): ("noise", "regression"),
        (InversionConfig, "matching"): ("cosine", "tensors", "l2", "l1"),
        (InversionConfig, "optimiser"): ("adam", "lbfgs"),
        (InversionConfig, "precision"): ("float32", "bfloat16"),
        (InversionConfig, "through"): ("steps", "surrogate", "gradient"),
        (InversionConfig, "residual"): ("ignore", "avoid", "weigh"),
        (InversionConfig, "schedule"): ("steps", "cosine", "constant"),
        (InversionConfig, "label_recovery"): ("counts", "bias_sign", "idlg", "joint"),
    }[kind, name]


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(defence=Defence(PowerSGDConfig())),
        TrainConfig(local=LocalConfig(3, batch_size=2)),
        InversionConfig(),
    ],
)
def test_every_setting_enters_the_digest(config: Any) -> None:
    leaves = variations(config)
    assert len(leaves) >= 8
    assert len({digest(c) for c in [config, *leaves]}) == len(leaves) + 1


def test_a_digest_is_of_the_content() -> None:
    assert len(digest(TrainConfig())) == 16
    assert set(digest(TrainConfig())) <= set("0123456789abcdef")
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": [2, 3]}) != digest({"a": [3, 2]})
    assert digest("a", "b") != digest("b", "a") != digest("ba") != digest("b", "a", "")
    assert digest(Defence(PowerSGDConfig())) != digest(Defence(TopKConfig(level=0.1))) != digest(Defence())
    assert digest(TrainConfig(learning_rate=1)) == digest(TrainConfig(learning_rate=1.0))
    assert digest(TrainConfig(learning_rate=0.1)) != digest(TrainConfig(learning_rate=0.1 + 1e-16))
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest(INF)


def test_a_digest_is_the_same_in_another_process() -> None:
    program = "from raytrust.config import *; print(digest(TrainConfig(seed=3), {'x': 1, 'y': [2.5]}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == digest(TrainConfig(seed=3), {"y": [2.5], "x": 1})


def test_an_attack_as_it_applies_to_a_defence() -> None:
    aware, naive = InversionConfig("aware"), InversionConfig("naive")
    assert aware.against(Defence()) == naive
    assert aware.against(Defence(PowerSGDConfig())) == aware
    sweep = SweepConfig(portfolio=(aware, naive))
    assert sweep.portfolio_against(Defence()) == [naive]
    assert sweep.portfolio_against(Defence(PowerSGDConfig())) == [aware, naive]
    avoid = replace(aware, residual="avoid")  # takes a residual, and an attack that knows of it
    for defence in (Defence(PowerSGDConfig(), error_feedback=True), Defence(DGCConfig())):
        assert avoid.against(defence) == avoid
        assert replace(avoid, objective="naive").against(defence) == naive
    assert avoid.against(Defence(PowerSGDConfig())) == aware
    assert avoid.against(Defence(error_feedback=True)) == naive


def test_the_name_of_an_attack_says_what_is_not_default() -> None:
    assert InversionConfig().name == "aware tv=0.01 lr=1 r=1 s=0"
    attack = InversionConfig(matching="l2", optimiser="lbfgs", bn=0.25, label_recovery="joint", residual="avoid")
    assert attack.name == "aware tv=0.01 lr=1 r=1 s=0 l2 lbfgs bn=0.25 joint avoid"


@pytest.mark.parametrize("weight", ["tv", "bound", "l2", "colour", "bn", "group"])
def test_weights_of_priors_are_finite_and_not_negative(weight: str) -> None:
    for value in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"^Expected {weight}={value!r} to be at least 0 and finite"):
            InversionConfig(**{weight: value})
    with pytest.raises(ValueError, match=r"^Expected warmup=-1 to be at least 0\.$"):
        InversionConfig(warmup=-1)


@dataclass(frozen=True)
class Registered:
    """Options of a method that `Defence` does not know."""

    method: ClassVar[str] = "registered"


@pytest.mark.parametrize(
    "compressor", ["powersgd:4", None, PowerSGDConfig, Registered(), Defence(), {"method": "none"}]
)
def test_a_defence_of_what_is_no_method_is_refused_when_it_is_made(compressor: Any) -> None:
    with pytest.raises(ValueError, match=r"^Expected compressor=.* to be one of AtomoConfig, DGCConfig, ") as raised:
        Defence(compressor)
    assert str(raised.value).startswith(f"Expected compressor={compressor!r} to be one of ")
    assert "\n" not in str(raised.value)


def test_options_that_build_would_drop_are_refused() -> None:
    """Those of a subclass: it would be built, hashed and saved as what it is derived from."""

    @dataclass(frozen=True)
    class Mine(PowerSGDConfig):
        power_iterations: int = 3

    with pytest.raises(
        ValueError, match=r"^Expected compressor=.*Mine\(rank=4, warm_start=True, .*power_iterations=3\)"
    ):
        Defence(Mine())


@pytest.mark.parametrize("error_feedback", ["ef", 1, None])
def test_error_feedback_is_a_bool(error_feedback: Any) -> None:
    with pytest.raises(ValueError, match=rf"^Expected error_feedback={error_feedback!r} to be True or False\.$"):
        Defence(PowerSGDConfig(), error_feedback)


def test_every_method_of_the_config_is_built() -> None:
    for kind in compressor_types():
        config = TopKConfig(level=0.5) if kind is TopKConfig else kind()
        assert build(Defence(config), [torch.Size((3, 4))]).layout.entries == 12


def test_what_is_no_defence_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("powersgd:4", PowerSGDConfig(), None):
        with pytest.raises(ValueError, match=r"^Expected defence=.* to be a Defence, which config.parse_defence makes"):
            build(value, [torch.Size((3,))])  # type: ignore[arg-type]
    known = compressor_types()
    monkeypatch.setattr("raytrust.config.defence.compressor_types", lambda: (*known, Registered))
    unknown = Defence(Registered())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^Expected compressor=.*Registered\(\) to be of a method that can be built"):
        build(unknown, [torch.Size((3,))])
