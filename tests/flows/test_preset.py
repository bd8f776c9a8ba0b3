"""Presets: what is read, what is refused, and how the refusal helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flows.preset import load, read_settings, shipped
from infra.config import split
from infra.errors import ConfigError

TOY = Path(__file__).parent / "toy" / "pipeline.yaml"


def written(tmp_path: Path, **changes: object) -> str:
    """The toy preset with parts replaced, as a file; its stages are still found."""
    document = yaml.safe_load(TOY.read_text())
    document["stages"] = [str(TOY.parent)]
    document.update(changes)
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return str(path)


def nodes(**changes: object) -> dict[str, object]:
    """The toy preset's nodes with some replaced."""
    return {**yaml.safe_load(TOY.read_text())["nodes"], **changes}


def test_a_preset_is_typed_and_sorted() -> None:
    preset = load(str(TOY))
    assert list(preset.nodes) == ["left", "right", "train", "control", "last"]
    assert preset.nodes["train"].inputs == {"numbers": ("left", "right")}
    assert preset.nodes["left"].config.seed == 1
    assert preset.nodes["right"].config.shape.sign == "minus"
    assert preset.ancestors(["control"]) == {"left", "control"}
    assert preset.descendants(["control"]) == {"control", "last"}


def test_a_partial_nested_value_keeps_the_default_of_the_stage() -> None:
    # The stage's default shape is width 2, the class's own default is 3.
    assert load(str(TOY)).nodes["right"].config.shape.width == 2
    assert load(str(TOY), ["left.shape.sign=minus"]).nodes["left"].config.shape.width == 2


def test_settings_are_yaml_and_validated() -> None:
    preset = load(str(TOY), ["train.pause=1e-2", "left.count=7", "left.note='a: b'", "defaults.seed=5"])
    assert preset.nodes["train"].config.pause == 0.01
    assert preset.nodes["left"].config.count == 7
    assert preset.nodes["right"].config.seed == 5
    assert split(preset.nodes["last"].config)[1]["pause"] == 0.0


def test_a_nodes_own_config_wins_over_the_defaults(tmp_path: Path) -> None:
    changed = nodes(left={"stage": "source", "config": {"seed": 9}})
    assert load(written(tmp_path, nodes=changed)).nodes["left"].config.seed == 9
    assert load(written(tmp_path, nodes=changed), ["defaults.seed=4"]).nodes["left"].config.seed == 9


def test_parents_come_first_whatever_the_order_in_the_file(tmp_path: Path) -> None:
    turned = dict(reversed(list(nodes().items())))
    order = list(load(written(tmp_path, nodes=turned)).nodes)
    assert order.index("left") < order.index("train") < order.index("last")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"node": {}}, ["changed.yaml.node", "nodes"]),
        ({"nodes": {}}, ["at least one node"]),
        ({"nodes": nodes(left={"stage": "sorce"})}, ["nodes.left.stage", "'sorce'", "source"]),
        ({"nodes": nodes(left={"stage": "source", "confg": {}})}, ["nodes.left.confg", "config"]),
        ({"nodes": nodes(left={"stage": "source", "config": {"cuont": 1}})}, ["left.config.cuont", "count"]),
        (
            {"nodes": nodes(left={"stage": "source", "config": {"shape": {"widht": 1}}})},
            ["left.config.shape.widht", "width"],
        ),
        ({"nodes": nodes(left={"stage": "source", "config": {"count": 0}})}, ["left.config.count", "0"]),
        ({"nodes": nodes(left={"stage": "source", "config": [1]})}, ["nodes.left.config", "mapping"]),
        (
            {"nodes": nodes(control={"stage": "slow", "inputs": {"number": "left"}})},
            ["nodes.control.inputs.number", "numbers"],
        ),
        ({"nodes": nodes(control={"stage": "slow"})}, ["nodes.control.inputs.numbers", "missing", "source"]),
        (
            {"nodes": nodes(control={"stage": "slow", "inputs": {"numbers": "lef"}})},
            ["nodes.control.inputs.numbers", "'lef'", "left"],
        ),
        (
            {"nodes": nodes(control={"stage": "slow", "inputs": {"numbers": "left", "earlier": "left"}})},
            ["nodes.control.inputs.earlier", "stage source", "slow"],
        ),
        (
            {
                "nodes": nodes(
                    last={"stage": "slow", "inputs": {"numbers": "left", "earlier": ["train", "control"]}}
                )
            },
            ["nodes.last.inputs.earlier", "one input, got 2"],
        ),
        (
            {"nodes": nodes(control={"stage": "slow", "inputs": {"numbers": ["left", "left"]}})},
            ["nodes.control.inputs.numbers", "twice"],
        ),
        (
            {"nodes": nodes(control={"stage": "slow", "inputs": {"numbers": "last"}})},
            ["cycle", "control -> last -> control"],
        ),
        ({"nodes": nodes(**{"a b": {"stage": "source"}})}, ["nodes.a b", "letters"]),
        ({"defaults": {"sede": 1}}, ["defaults.sede", "seed"]),
        ({"parallel": -1}, ["parallel"]),
        ({"promote": {"name": "answer"}}, ["promote.node"]),
        ({"promote": {"name": "answer", "node": "lst"}}, ["promote.node", "last"]),
        ({"gates": [{"value": "train.score"}]}, ["gates.0", "at_least"]),
        ({"gates": [{"value": "train", "at_least": 1}]}, ["gates.0.value", "node.metric"]),
        ({"gates": [{"value": "trin.score", "at_least": 1}]}, ["gates.0.value", "train"]),
        ({"gates": [{"value": "train.score", "at_least": "much"}]}, ["gates.0.at_least", "'much'"]),
        ({"stages": ["nowhere"]}, ["nowhere", "folder"]),
        ({"stages": 5}, ["changed.yaml: stages", "list"]),
        ({"stages": [3]}, ["changed.yaml: stages", "list"]),
        ({"stages": "."}, ["changed.yaml: stages", "list"]),
        ({"nodes": nodes(left={"stage": [1]})}, ["nodes.left.stage", "no stage named [1]"]),
        ({"nodes": nodes(left={"stage": "source", "config": {5: 1}})}, ["left.config.5"]),
        ({"nodes": 3}, ["nodes", "mapping"]),
        ({"promote": 5}, ["promote", "mapping"]),
        ({"promote": {"name": "answer", "node": "last", "gates": 5}}, ["promote.gates", "list"]),
        ({"promote": {"name": "answer", "node": "last", "gates": [5]}}, ["promote.gates.0", "mapping"]),
        ({"promote": {"name": "an answer", "node": "last"}}, ["promote.name", "'an answer'", "letters"]),
        ({"promote": {"name": "runs/x", "node": "last"}}, ["promote.name", "runs/"]),
        ({"name": "a/b"}, ["changed.yaml: name", "'a/b'", "letters"]),
        ({"gates": {}}, ["gates", "list"]),
    ],
)
def test_errors_name_the_place_and_what_would_be_right(
    tmp_path: Path, changes: dict[str, object], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, **changes))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("trian.seed=1", ["--set trian.seed=1", "train"]),
        ("train.sede=1", ["--set train.sede=1", "train.sede", "seed"]),
        ("left.shape.widht=2", ["left.shape.widht", "width"]),
        ("left.count=many", ["--set left.count=many", "left.count"]),
        ("train=1", ["--set train=1", "node.field=value"]),
        ("train.seed", ["--set train.seed", "node.field=value"]),
        ("left.count=true", ["--set left.count=true", "left.count", "a number is expected"]),
        ("left.shape.width=true", ["left.shape.width", "a number is expected"]),
        ("left.note={", ["--set left.note={", "YAML"]),
    ],
)
def test_wrong_settings_say_so(setting: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(str(TOY), [setting])
    for part in parts:
        assert part in str(caught.value)


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no preset named 'nosuch'"):
        load("nosuch")
    with pytest.raises(ConfigError, match=r"cannot read the preset"):
        load("/nowhere/at.yaml")


def test_a_name_given_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("nodes:\n  a: {stage: tasks}\n  a: {stage: tasks}\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml.*'a' is given twice"):
        load(str(path))


def test_a_list_is_no_name(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("nodes:\n  ? [a]\n  : {stage: tasks}\n")
    with pytest.raises(ConfigError, match=r"odd\.yaml: .*cannot be a name"):
        load(str(path))


def test_what_one_node_holds_out_no_other_may_train_on() -> None:
    with pytest.raises(
        ConfigError, match=r"nodes\.prompts and nodes\.problems: held_out_share is 0\.1 and 0\.05"
    ):
        load("smoke", ["problems.held_out_share=0.05"])
    shares = {
        node.config.held_out_share
        for node in load("smoke", ["defaults.held_out_share=0.05"]).nodes.values()
        if node.stage.name == "tasks"
    }
    assert shares == {0.05}


def test_yaml_tags_do_not_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("nodes: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(str(path))


def test_every_shipped_preset_loads() -> None:
    assert shipped()
    for name in shipped():
        preset = load(name)
        assert preset.name == name
        assert preset.description


def test_settings_split_at_the_first_equals_sign() -> None:
    assert read_settings(["a.b=c=d"]) == [(["a", "b"], "c=d", "a.b=c=d")]


def test_a_relative_path_in_a_setting_is_kept_as_an_absolute_one(tmp_path, monkeypatch):
    """So that a run can be taken up again from another folder."""
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    taken = load("smoke", ["ingest.sources=corpus", "sft.epochs=3"])
    assert taken.sets == (f'ingest.sources="{tmp_path / "corpus"}"', "sft.epochs=3")
    monkeypatch.chdir("/")
    assert load("smoke", taken.sets).nodes["ingest"].config == taken.nodes["ingest"].config
