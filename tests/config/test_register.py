"""Names from outside the package: what a decorator, a file, the environment and an entry point bring in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from raytrust.compress import Base, build
from raytrust.config import (
    AtomoConfig,
    CaptureConfig,
    CompressorConfig,
    Defence,
    DGCConfig,
    DPSGDConfig,
    HalfConfig,
    InversionConfig,
    LearnedInverterConfig,
    MembershipConfig,
    ModelConfig,
    PowerSGDConfig,
    QSGDConfig,
    RandKConfig,
    ScaledSignConfig,
    SignSGDConfig,
    SweepConfig,
    Threat,
    ThresholdConfig,
    TopKConfig,
    TrainConfig,
    TransformConfig,
    VqSGDConfig,
    digest,
    from_dict,
    parse_defence,
    register,
    to_dict,
)
from raytrust.config.attacks import NAMED
from raytrust.config.register import ATTACKS, COMPRESSORS, METHODS, NETWORKS, OBJECTIVES, Registry
from raytrust.networks.build import build_model, check_network

GOLDEN = [  # as they were when every method, network and distance was a Literal
    (Defence(), "920e38b234c8d759"),
    (Defence(HalfConfig("bfloat16"), True), "4324a2d1112e080e"),
    (Defence(PowerSGDConfig(2, False), True), "0280e8587b6a6251"),
    (Defence(TopKConfig(equal_to_rank=4, scope="layer"), True), "60f96f2a78e1de1a"),
    (Defence(RandKConfig(0.1, True)), "72979f808e6bfbc1"),
    (Defence(ThresholdConfig()), "2b9ba5bb1c411724"),
    (Defence(DGCConfig()), "1ef4a081396bb489"),
    (Defence(SignSGDConfig(0.9)), "0519460e6e6fdd46"),
    (Defence(ScaledSignConfig(), True), "2431ff80d8b76ab0"),
    (Defence(QSGDConfig(8, norm="max")), "b185cbcec4c98c61"),
    (Defence(VqSGDConfig()), "5dec206249419b4b"),
    (Defence(AtomoConfig()), "9d5e7b8404427309"),
    (ModelConfig(), "2a88b9ae35cb0196"),
    (ModelConfig("lenet"), "46a204e5cc052e62"),
    (Threat(), "37a886ee5f891aa1"),
    (CaptureConfig(), "1b9824ca6c987568"),
    (TrainConfig(), "cd68866d6121cd33"),
    (InversionConfig(), "240c75dfd2d3beb1"),
    (LearnedInverterConfig(), "de80e2f97367dc13"),
    (SweepConfig(), "fa38d6a4447ea1c2"),
    (MembershipConfig(), "b5ba6c38ee1b83b4"),
    (DPSGDConfig(), "f6ef7304190df27b"),
    (NAMED["geiping"], "77c84f0500daf033"),
    (NAMED["modern"], "c54748f9f2676514"),
    (NAMED["dlg"], "1866d7898a6dbe76"),
    (NAMED["idlg"], "492b56c3ac5ea66b"),
    (NAMED["gradinversion"], "dce4d912325d79f5"),
    (NAMED["analytic"], "3bcbd53f2deee45e"),
]


@pytest.mark.parametrize(("config", "expected"), GOLDEN)
def test_a_digest_is_what_it_always_was(config: Any, expected: str) -> None:
    """It names the results that there are."""
    assert digest(config) == expected
    assert from_dict(type(config), to_dict(config)) == config


@pytest.fixture(autouse=True)
def _names_of_a_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers, loads and imports is gone after it."""
    registries = (NETWORKS, COMPRESSORS, METHODS, OBJECTIVES, ATTACKS)
    before = [dict(registry._things) for registry in registries]
    monkeypatch.setenv(register.PLUGINS, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(register, "_loaded", set())
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("plugin_"):
            del sys.modules[name]
    for registry, things in zip(registries, before, strict=True):
        registry._things = things


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from torch import nn
from raytrust.compress import Base
from raytrust.config import CompressorConfig, register

@dataclass(frozen=True)
class Options(CompressorConfig):
    method: ClassVar[str] = "NAME"
    level: float = 0.5
    other: int = 1

@register.compressor(Options)
class Method(Base):
    pass

@register.network("NAME")
def net(channels, classes, depth=1):
    return nn.Sequential(nn.Flatten(), *(nn.Linear(64 * channels, 64 * channels) for _ in range(depth - 1)),
                         nn.Linear(64 * channels, classes))
"""


def plugin(folder: Path, name: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(PLUGIN.replace("NAME", name))
    return str(path)


def test_a_file_brings_in_a_method_and_a_network(tmp_path: Path) -> None:
    register.load_plugins([plugin(tmp_path, "plugin_file")])
    defence = parse_defence("plugin_file:0.25:other=3:ef")
    assert (defence.compressor.level, defence.compressor.other) == (0.25, 3)  # type: ignore[attr-defined]
    assert defence.name == "plugin_file 0.25 other=3 + EF"
    assert to_dict(defence)["compressor"] == {"method": "plugin_file", "level": 0.25, "other": 3}
    assert from_dict(Defence, to_dict(defence)) == defence
    assert digest(defence) != digest(parse_defence("plugin_file:0.25"))
    assert build(defence, [torch.Size((3,))]).layout.entries == 3
    train = TrainConfig(defence=defence, model=ModelConfig("plugin_file", options=(("depth", 2),)))
    assert from_dict(TrainConfig, to_dict(train)) == train
    assert len(list(build_model(train.model, 1, 4, seed=0).parameters())) == 4
    assert os.environ[register.PLUGINS] == str(tmp_path / "plugin_file.py")  # for processes that this one starts
    with pytest.raises(ValueError, match=r"to be METHOD.*plugin_file \(LEVEL\)"):
        parse_defence("gzip")


def test_an_unknown_name_is_looked_for_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker does that another process started."""
    monkeypatch.setenv(register.PLUGINS, plugin(tmp_path, "plugin_inherited"))
    assert parse_defence("plugin_inherited").compressor.method == "plugin_inherited"
    assert ModelConfig("plugin_inherited").title == "plugin_inherited"


def test_an_unknown_name_is_looked_for_among_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(tmp_path, "plugin_installed")
    info = tmp_path / "another-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: another\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[raytrust.compressors]\nplugin_installed = plugin_installed\nabsent = plugin_installed:Method\n"
    )
    sys.path.append(str(tmp_path))
    assert build(parse_defence("plugin_installed:0.1"), [torch.Size((3,))]).layout.entries == 3
    with pytest.raises(ValueError, match=r"^Expected plugin_installed:Method to register 'absent' in raytrust\.comp"):
        parse_defence("absent")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise RuntimeError('no')", r"to be imported, but RuntimeError: no$"),
        ("import nowhere_at_all", r"to be imported, but ModuleNotFoundError: No module named 'nowhere_at_all'$"),
        ("1 +", r"to be imported, but SyntaxError: "),
        (None, r"to be a file, but there is none\.$"),
    ],
)
def test_a_file_that_can_not_be_imported(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "plugin_broken.py"
    if text is not None:
        path.write_text(text)
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as raised:
            register.load_plugins([str(path)])
        assert str(raised.value).startswith(f"Expected plugin={str(path)!r} ")
    assert register.active_plugins() == []


@pytest.mark.parametrize("name", ["json", "sys", "numpy"])
def test_a_file_may_not_hide_another_module(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.py"
    path.write_text("")
    with pytest.raises(ValueError, match=rf"to have a name of its own, but {name} is another module\.$"):
        register.load_plugins([str(path)])


def test_a_module_is_loaded_by_its_name(tmp_path: Path) -> None:
    plugin(tmp_path, "plugin_module")
    sys.path.append(str(tmp_path))
    register.load_plugins(["plugin_module"])
    assert "plugin_module" in COMPRESSORS
    with pytest.raises(ValueError, match="Expected plugin='plugin_nowhere' to be imported, but ModuleNotFound"):
        register.load_plugins(["plugin_nowhere"])


@dataclass(frozen=True)
class Powers(CompressorConfig):
    method: ClassVar[str] = "powersgd"
    rank: int = 1


@dataclass
class Changing(CompressorConfig):
    method: ClassVar[str] = "changing"


@dataclass(frozen=True)
class Nameless(CompressorConfig):
    rank: int = 1


@dataclass(frozen=True)
class Foreign:
    method: ClassVar[str] = "foreign"


@dataclass(frozen=True)
class Colon(CompressorConfig):
    method: ClassVar[str] = "a:b"


@pytest.mark.parametrize("options", [Changing, Nameless, Foreign, 3])
def test_options_that_are_no_frozen_dataclass_of_a_method(options: Any) -> None:
    with pytest.raises(ValueError, match=r"to be a frozen dataclass of CompressorConfig with a `method`\.$"):
        register.compressor(options)


def test_a_compressor_and_a_transform_have_different_names() -> None:
    """On command lines both stand where a method may, and the one would be taken for the other."""
    for decorator, base, name in (
        (register.compressor, CompressorConfig, "noise"),
        (register.transform, TransformConfig, "topk"),
    ):
        options = dataclass(frozen=True)(type("Options", (base,), {"method": name}))
        with pytest.raises(ValueError, match=f"^Expected method='{name}' to be new, but it is one of raytrust"):
            decorator(options)


def test_a_name_belongs_to_one_thing() -> None:
    with pytest.raises(ValueError, match=r"^Expected name='powersgd' to be new in raytrust\.compressors, but .*Power"):
        register.compressor(Powers)(Base)
    for registry, name in ((NETWORKS, "resnet18"), (OBJECTIVES, "cosine"), (ATTACKS, "analytic")):
        with pytest.raises(ValueError, match=f"^Expected name={name!r} to be new in {registry.group}, but "):
            registry.add(name, len)
    with pytest.raises(ValueError, match=r"^Expected name='a:b' of letters, digits"):
        register.compressor(Colon)(Base)
    assert build(Defence(PowerSGDConfig()), [torch.Size((3, 4))]).layout.entries == 12


def test_a_cell_of_a_notebook_may_run_again() -> None:
    registry = Registry("raytrust.tests")
    made = []
    for _ in range(2):

        def cell() -> None: ...

        registry.add("mine", cell)
        made.append(cell)
    assert registry["mine"] is made[1] is not made[0]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^Expected name='x' in raytrust\.networks to be one of 'resnet18', 'conv"):
        NETWORKS["x"]
    for field, registry in (("matching", OBJECTIVES), ("method", ATTACKS)):
        with pytest.raises(ValueError, match=f"^Expected {field}='x' to be one of {', '.join(map(repr, registry))}"):
            InversionConfig(**{field: "x"})  # type: ignore[arg-type]


def test_all_that_is_shipped_is_where_it_is_said_to_be() -> None:
    for registry in (NETWORKS, COMPRESSORS, METHODS, OBJECTIVES, ATTACKS):
        for name in registry:
            assert callable(registry[name])
    assert list(COMPRESSORS) == [kind.method for kind in map(COMPRESSORS.__getitem__, COMPRESSORS)]
    assert set(METHODS) == set(COMPRESSORS)


def tiny(channels: int, classes: int, width: int = 1, bias: bool = True) -> nn.Module:
    """A network by an import path."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, width), nn.Linear(width, classes, bias=bias))


PATH = f"{__name__}:tiny"


def test_a_network_by_its_import_path() -> None:
    register.load_plugins([__name__])
    config = ModelConfig(PATH, width=5, options=(("bias", False),))
    assert from_dict(ModelConfig, to_dict(config)) == config
    assert config.title == f"{PATH} of width 5 (bias False)"
    model = build_model(config, 1, 3, seed=1)
    assert [tuple(p.shape) for p in model.parameters()] == [(5, 64), (5,), (3, 5)]
    again, other = (build_model(config, 1, 3, seed) for seed in (1, 2))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert not all(map(torch.equal, model.parameters(), other.parameters()))
    check_network(config, (1, 8, 8), 3)
    assert digest(replace(config, options=())) != digest(config) != digest(replace(config, width=None))
    two = (("width", 2), ("bias", True))
    assert ModelConfig(PATH, options=two) == ModelConfig(PATH, options=two[::-1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ModelConfig("os:kill"),
            r"^Expected 'os:kill' to be of a plugin: give --plugin os, or register\.load_plugins\.$",
        ),
        (ModelConfig(f"{__name__}:absent"), r"to be imported, but module .* has no attribute 'absent'\.$"),
        (
            ModelConfig(PATH, options=(("depth", 3),)),
            r"to take channels, classes, depth, but got an unexpected keyword argument 'depth'\.$",
        ),
        (ModelConfig("torch.nn:Linear"), r"^Expected network='torch.nn:Linear' to take images \(2, 1, 9, 9\), but "),
        (ModelConfig("torch.nn:Identity"), r"to give logits \(2, 3\), got \(2, 1, 9, 9\)\.$"),
        (ModelConfig(PATH), r"to take images \(2, 1, 9, 9\), but mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_a_network_that_does_not_fit(config: ModelConfig, message: str) -> None:
    register.load_plugins([__name__, "torch.nn"])
    with pytest.raises(ValueError, match=message):
        check_network(config, (1, 9, 9), 3)


def test_options_of_a_network_are_checked() -> None:
    with pytest.raises(ValueError, match=r"to be empty for resnet18, which has stem and width\.$"):
        ModelConfig(options=(("depth", 3),))
    with pytest.raises(ValueError, match=r"to give each option once\.$"):
        ModelConfig(PATH, options=(("depth", 3), ("depth", 4)))


@pytest.mark.parametrize("name", ["resnet34", "mobilenet_v3_small", "squeezenet1_1"])
def test_a_network_of_torchvision_takes_images_of_one_channel(name: str) -> None:
    check_network(ModelConfig(f"torchvision:{name}"), (1, 32, 32), 7)
    assert build_model(ModelConfig(f"torchvision:{name}"), 3, 7, 0)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_names_are_checked_before_any_library_is_imported() -> None:
    program = (
        "import sys\nfrom raytrust.config import *\n"
        "ModelConfig('a.b:c'); InversionConfig(matching='l2', method='analytic'); parse_defence('topk:0.1:ef')\n"
        "print([n for n in ('torch', 'numpy', 'ray', 'importlib.metadata') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
