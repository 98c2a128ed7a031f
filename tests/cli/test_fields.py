"""Options that follow from dataclasses: every field is one, says what it is, and reaches the configuration."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from torch import nn
from toys import synthetic

from raytrust.cli import options as cli
from raytrust.cli.fields import Field, Fields, field_help
from raytrust.cli.options import Parser
from raytrust.config import Choice, InversionConfig, MembershipConfig, ModelConfig, SweepConfig, TrainConfig
from raytrust.config.threats import ThreatMapConfig
from raytrust.config.values import registry_of, type_hints
from raytrust.studies.paper.plan import BUDGETS, Budget

ROOT = Path(__file__).resolve().parents[2]


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"program_{name}", ROOT / "sweeps" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = ("privacy_frontier", "membership", "paper_tables", "threats")
FRONTIER, MEMBERSHIP, PAPER, THREATS = map(program, NAMES)
TABLES: list[tuple[ModuleType, Fields, Any]] = [
    (FRONTIER, FRONTIER.TRAIN, TrainConfig()),
    (FRONTIER, FRONTIER.ATTACK, InversionConfig()),
    (MEMBERSHIP, MEMBERSHIP.AUDIT, MembershipConfig()),
    (PAPER, PAPER.BUDGET, BUDGETS["quick"]),
    (THREATS, THREATS.MAP, ThreatMapConfig()),
]
OPTIONS = [(module, table, config, option) for module, table, config in TABLES for option in table.options]
each_option = pytest.mark.parametrize(
    ("module", "table", "config", "option"), OPTIONS, ids=[f"{m.RUN.program} {o.name}" for m, _, _, o in OPTIONS]
)


def paths(kind: type, prefix: str = "") -> set[str]:
    found = set()
    for field in fields(kind):
        hint = type_hints(kind)[field.name]
        found |= paths(hint, f"{prefix}{field.name}.") if is_dataclass(hint) else {prefix + field.name}  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(("module", "table", "config"), TABLES)
def test_every_field_is_an_option_or_says_why_not(module: ModuleType, table: Fields, config: Any) -> None:
    left_out = {
        p for p in paths(table.kind) for without in table.without if p == without or p.startswith(f"{without}.")
    }
    assert {option.path for option in table.options} == paths(table.kind) - left_out
    assert all(len(reason) > 5 for reason in table.without.values())
    assert len(set(table.names)) == len(table.names)


@pytest.mark.parametrize("module", [FRONTIER, MEMBERSHIP, PAPER, THREATS])
def test_help_is_in_groups_and_shows_every_default(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = capsys.readouterr().out
    for of, table, _ in TABLES:
        for option in table.options if of is module else ():
            flag = "--" + option.name.replace("_", "-")
            lines = text.split(f"\n  {flag} ", 1) if f"\n  {flag} " in text else text.split(f"\n  {flag}, ", 1)
            described = " ".join(lines[1].split("\n  -")[0].split())
            assert option.help, f"{option.path} has no line in its docstring"
            assert " ".join(option.help.split()) in described
            assert "(default: " in described
    expected = {FRONTIER: ("model:", "threat:", "capture:", "training:", "attacks:", "places:"),
                MEMBERSHIP: ("model:", "threat:", "capture:", "train:", "audit:", "places:"),
                PAPER: ("budget:", "places:"),
                THREATS: ("model:", "threats:", "train:", "places:")}[module]  # fmt: skip
    assert set(expected) <= set(text.splitlines())


def another(option: Field, value: Any) -> str:
    """Another value of this option, as it is typed."""
    hint = option.hint
    if get_origin(hint) in (Union, UnionType):
        hint = get_args(hint)[0]
    if registry := registry_of(hint):
        return next(name for name in registry if name != value)
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if option.path.endswith("model.options"):
        return "bias=False,depth=3,name=x"
    if get_origin(hint) is tuple and get_origin(get_args(hint)[0]) is Literal:
        return get_args(get_args(hint)[0])[-1]
    if get_origin(hint) is tuple:
        return {"stems": "cifar", "norms": "train"}.get(option.name, "1,7")
    if hint is float:
        return "0.0625"
    if hint is str:
        return "elsewhere"
    return str(value // 2 if option.name == "property_models" else (value or 0) * 2 + 2)


@each_option
def test_an_option_changes_its_field_alone(module: ModuleType, table: Fields, config: Any, option: Field) -> None:
    parser = module._parser()
    before = table.values(config)
    text = another(option, before[option.name])
    flag = "--" + option.name.replace("_", "-")
    given = vars(parser.parse_args([flag] if option.hint is bool else [flag, text]))
    assert set(given) == {option.name}
    also = {"network": "torch.nn:Identity", "width": 4} if option.path.endswith("model.options") else {}
    also |= {"training": 10**4} if option.name == "states" else {}
    also |= {"network": "resnet18", "width": 8} if option.name == "norm" else {}
    also |= {"local_steps": 3} if option.name == "local_batch_size" and module is FRONTIER else {}
    fixed = {p: getattr(config, p) for p in table.without if hasattr(config, p)} if table.kind is Budget else {}
    also |= {"workers": 4} if option.name == "vantages" else {}
    fixed |= {"train.workers": 1} if table.kind is MembershipConfig else {}
    fixed |= {"train.local.steps": 7} if table.kind is ThreatMapConfig else {}
    if option.name == "steps":
        also["capture_steps"] = (0,)
    made = table.make({**before, **also, **given}, fixed)
    after = table.values(made)
    assert after[option.name] == given[option.name] != before[option.name]
    assert {name for name in after if after[name] != before[name]} <= {option.name, *also}
    kept = json.loads(json.dumps(given))  # as a directory keeps it for --resume
    assert table.make({**before, **also, **kept}, fixed) == made


def test_the_network_is_called_a_model_too() -> None:
    assert vars(FRONTIER._parser().parse_args(["--model", "torchvision:vgg11"])) == {"network": "torchvision:vgg11"}


def test_a_configuration_is_its_options() -> None:
    for train in (TrainConfig(), replace(TrainConfig(), steps=9, momentum=0.0)):
        assert FRONTIER.TRAIN.make(FRONTIER.TRAIN.values(train)) == train


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"private_batch": 0}, "Expected private_batch=0 to be at least 1."),
        ({"images": 0}, "Expected images=0 to be at least 1."),
        ({"batch_size": 0}, "Expected batch_size=0 to be at least 1."),
        ({"local_steps": 0}, "Expected local_steps=0 to be at least 1."),
        ({"local_learning_rate": 0.0}, "Expected local_learning_rate=0.0 to be positive and finite."),
        (
            {"local_batch_size": 2},
            "Expected local_batch_size=2 to be given with local steps of 2 and more: one step takes the whole batch.",
        ),
        (
            {"local_steps": 3, "local_batch_size": 2, "private_batch": 8},
            "Expected 3 local steps of batch_size=2 to take each of the 8 images of a private batch.",
        ),
        ({"capture_steps": (300,)}, "Expected capture_steps=(300,) to lie below steps=200, the length of training."),
        ({"capture_steps": (3, 1)}, "Expected capture_steps=(3, 1) in increasing order, each once."),
        (
            {"network": "vgg"},
            "Expected network='vgg' to be one of 'resnet18', 'convnet', 'normed-convnet', 'resnet20', 'lenet'.",
        ),
        ({"labels": "some"}, "Expected labels='some' to be one of 'known', 'unknown'."),
        ({"learning_rate": "fast"}, "Expected learning_rate='fast' to be of type float."),
    ],
)
def test_refusals_name_the_option(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        FRONTIER.TRAIN.make(FRONTIER.TRAIN.values(TrainConfig()) | values)
    # Other tests of the process may have registered more networks, which then stand behind the shipped ones.
    assert str(error.value).startswith(message.removesuffix("."))


@pytest.mark.parametrize("text", ["1,x", "1.5"])
def test_a_list_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        FRONTIER._parser().parse_args(["--capture-steps", text])
    assert capsys.readouterr().err.endswith(f"argument --capture-steps: invalid list value: {text!r}\n")


@dataclass(frozen=True)
class Small:
    """A few fields.

    first: one sentence. And another, of 50 % more
        on two lines.
    second: it ends at an empty line,
        on its second

    third: not this one, but it is no field.
    """

    first: int = 1
    second: bool = True


def test_the_help_is_the_first_sentence_of_the_docstring() -> None:
    assert field_help(Small) == {"first": "one sentence", "second": "it ends at an empty line, on its second"}


def test_a_table_names_fields_that_there_are() -> None:
    for arguments in ({"names": {"frist": "x"}, "without": {}}, {"names": {}, "without": {"train.first": "no"}}):
        with pytest.raises(ValueError, match=r"^Expected '\S+' to be a field of Small\.$"):
            Fields(Small, "small", **arguments)  # type: ignore[arg-type]


def test_a_flag_has_an_opposite() -> None:
    parser = Parser("small", "")
    Fields(Small, "small", {}, {}).add_to(parser, {"first": 1, "second": True})
    assert vars(parser.parse_args([])) == {}
    assert vars(parser.parse_args(["--no-second"])) == {"second": False}


# What is given sets what a search would vary


def portfolio(*arguments: str) -> Any:
    options, _ = FRONTIER.RUN.resolve(
        FRONTIER._parser().parse_args(list(arguments)), FRONTIER.DEFAULTS, FRONTIER._with_preset
    )
    train = FRONTIER.TRAIN.make(vars(options), {"capture.steps": tuple(options.capture_steps)})
    attacks = FRONTIER._portfolio(options, train)
    sweep = SweepConfig(train=train, portfolio=attacks)
    return attacks, FRONTIER._attack_space(options, sweep)


def test_an_attack_option_sets_all_attacks_and_leaves_the_search_the_rest() -> None:
    attacks, space = portfolio()
    assert set(space) == {*FRONTIER.ATTACK_SPACE, "capture_step"}
    given, narrower = portfolio("--matching", "l2", "--tv", "0.5", "--restarts", "3", "--attack", "dlg")
    *strong, dlg = given
    assert {(a.objective, a.matching, a.tv, a.restarts) for a in strong} == {
        (o, "l2", 0.5, 3) for o in ("naive", "aware")
    }
    assert {a.iterations for a in given} == {100}
    assert (dlg.tv, dlg.restarts) == (0.0, 1)
    assert set(space) - set(narrower) == {"matching", "tv", "restarts"}
    with_history, wider = portfolio("--history", "2")
    assert with_history[:-1] == attacks
    assert (with_history[-1].residual, with_history[-1].capture_step) == ("avoid", 20)
    assert set(wider) - set(space) == {"residual"}
    assert len(portfolio("--history", "2", "--capture-step", "0")[0]) == len(attacks)


def test_local_steps_are_met_in_every_way() -> None:
    one, space = portfolio()
    few, wider = portfolio("--local-steps", "2", "--attack", "geiping")
    *ours, published = few
    ways = ("steps", "surrogate", "gradient")
    assert {a.through for a in one} == {"steps"}
    assert [replace(a, through="steps") for a in ours] == [*one, *one, *(a for a in one if a.matching == "cosine")]
    assert [a.through for a in ours] == ["steps"] * 4 + ["surrogate"] * 4 + ["gradient"] * 2
    assert published.through == "gradient"
    assert wider == {**space, "through": Choice(ways)}
    many, narrower = portfolio("--local-steps", "6")
    assert {a.through for a in many} == set(narrower["through"].values) == {"surrogate", "gradient"}
    # Recovered labels have no order, and don't tell which step each belongs to.
    unordered = ("--private-batch", "2", "--labels", "unknown")
    assert {a.through for a in portfolio("--local-steps", "2", *unordered)[0]} == set(ways)
    parts, _ = portfolio("--local-steps", "2", "--local-batch-size", "1", *unordered)
    assert {a.through for a in parts} == {"surrogate", "gradient"}
    given, left = portfolio("--local-steps", "2", "--through", "gradient")
    assert {a.through for a in given} == {"gradient"}
    assert set(left) == set(space)


def test_the_width_of_a_preset_is_of_the_networks_that_are_shipped() -> None:
    for arguments, width in (
        (["--network", "lenet"], 16),
        (["--network", "torchvision:resnet34"], None),
        (["--network", "torchvision:resnet34", "--width", "8"], 8),
    ):
        given = FRONTIER._parser().parse_args(arguments)
        options, _ = FRONTIER.RUN.resolve(given, FRONTIER.DEFAULTS, FRONTIER._with_preset)
        cli.drop_width(options)
        assert FRONTIER.TRAIN.make(vars(options)).model.width == width


# At once


WRONG = [
    ("privacy_frontier", "--width 0"),
    ("privacy_frontier", "--private-batch 0"),
    ("privacy_frontier", "--network vgg"),
    ("privacy_frontier", "--matching near"),
    ("privacy_frontier", "--defence gzip"),
    ("privacy_frontier", "--tv -1"),
    ("privacy_frontier", "--capture-step 3"),
    ("privacy_frontier", "--capture-steps 0,999"),
    ("privacy_frontier", "--attack unknown"),
    ("privacy_frontier", "--help"),
    ("membership", "--models 3"),
    ("membership", "--message-batch 0"),
    ("membership", "--momentum 2"),
    ("membership", "--dp-sgd=-1:1"),
    ("membership", "--controls 1"),
    ("membership", "--help"),
    ("paper_tables", "--images 1"),
    ("paper_tables", "--stems leaf"),
    ("paper_tables", "--states 0,999"),
    ("paper_tables", "--help"),
]


def test_options_are_refused_before_any_library_is_imported() -> None:
    lines = [
        f"""
import sys, importlib, io, contextlib
sys.path.insert(0, {str(ROOT / "sweeps")!r})
for name, arguments in {WRONG!r}:
    error, out = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(out):
            importlib.import_module(name).main(arguments.split())
    except SystemExit as stopped:
        assert stopped.code == (0 if "--help" in arguments else 2), (name, arguments)
    assert error.getvalue().count(chr(10)) <= 1, error.getvalue()
    loaded = [n for n in ("torch", "numpy", "ray", "mlflow", "optuna") if n in sys.modules]
    assert not loaded, (name, arguments, loaded, error.getvalue())
print("done")
"""
    ]
    done = subprocess.run([sys.executable, "-c", *lines], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "done\n", done.stderr


def test_a_map_from_before_statistics_were_an_axis_goes_on(tmp_path: Path) -> None:
    """Its options hold the one value that they had."""
    root, run = tmp_path / "map", THREATS.RUN
    given = THREATS._parser().parse_args(["--output", str(root), "--steps", "0", "--states", "untrained"])
    options, _ = run.resolve(given, THREATS.DEFAULTS, THREATS._with_preset)
    THREATS._begin(options, root)
    kept = json.loads((root / "threats.json").read_text())
    assert kept["options"]["batch_statistics"] == ["unknown"]
    kept["options"]["batch_statistics"] = "unknown"
    (root / "threats.json").write_text(json.dumps(kept))
    again, _ = run.resolve(THREATS._parser().parse_args(["--resume", str(root)]), THREATS.DEFAULTS)
    THREATS._begin(again, root)


def test_dp_sgd_is_searched_where_no_norm_mixes_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every fourth trial would fail: of networks that are not ours the modules tell."""
    data, owned = synthetic(), ModuleType("owned")
    for name, norms in (("normed", [nn.BatchNorm2d(3)]), ("plain", [])):
        model = nn.Sequential(*norms, nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
        setattr(owned, name, lambda channels, classes, model=model: model)
    monkeypatch.setitem(sys.modules, "owned", owned)
    monkeypatch.setenv("RAYTRUST_PLUGINS", "owned")
    for name, steps, searched in (
        ("convnet", 1, True), ("resnet18", 1, False), ("resnet18", 0, True),
        ("owned:normed", 1, False), ("owned:normed", 0, True), ("owned:plain", 1, True),
    ):  # fmt: skip
        train = TrainConfig(model=ModelConfig(name, width=None), steps=steps)
        assert ("dp-sgd" in FRONTIER._defence_space(train, data)["transform"].values) is searched, (name, steps)
