"""Real compositions: what is composed, what comes back from a saved configuration, and each fault with its message."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from pathlib import Path

import pytest
import yaml

from harness.compose import CONF, choices, compose, flat, from_yaml, to_yaml
from harness.config import FAMILIES, PRECISIONS, ROOT, ConfigError, RunConfig
from harness.schema import check
from methods.catalogue import CATALOGUE

POOL = """\
# Three experts.
family: clip
base: base
root: /somewhere
experts:
  a: first
  b: second
  c: org/third@main
"""

TASKS = """\
# Two tasks.
tasks:
  a:
    path: a
    splits: {train: "train[:90%]", validation: "train[90%:]", test: test}
    labels: ["no", "yes"]
    templates: ["a {}."]
  b:
    path: b
    splits: {test: test}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's own configuration directory."""
    for group, text in (("pool", POOL), ("tasks", TASKS)):
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "half.yaml").write_text(
        "defaults:\n  - override /method: ties\nmethod: {density: 0.5}\nseed: 4\n"
    )
    return tmp_path


@pytest.fixture
def small(mine: Path):
    """Compose with the user's pool and tasks."""
    return lambda *overrides: compose(["pool=mine", "tasks=mine", *overrides], config_dir=mine)


def faults(composing, *overrides: str) -> str:
    """The message of a configuration that is refused."""
    with pytest.raises(ConfigError) as caught:
        composing(*overrides)
    return str(caught.value)


# -- composing ---------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_primary_configuration() -> None:
    config = compose()
    entries = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    primary = {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()}
    chosen = (config.method_name, config.pool_name, config.tasks_name)
    assert chosen == (primary["method"], primary["pool"], primary["tasks"])
    assert isinstance(config.method, CATALOGUE[config.method_name].load_params())
    assert config.pool.root == str(ROOT / "pools" / "mini_clip8")


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_method_composes_to_the_defaults_of_its_dataclass_and_has_a_file(name: str) -> None:
    few = ["sun397", "dtd"][: CATALOGUE[name].n_experts[1]] if CATALOGUE[name].n_experts[1] else []
    chosen = [f"experts=[{','.join(few)}]"] if few else []
    config = compose([f"method={name}", "pool=clip_vit_b32_ta8", *chosen])
    assert config.method == CATALOGUE[name].load_params()()


def test_methods_of_configuration_and_catalogue_are_the_same() -> None:
    assert set(choices("method")) == set(CATALOGUE)


@pytest.mark.parametrize("group", ["pool", "tasks", "debug", "experiment"])
def test_every_packaged_choice_composes(group: str) -> None:
    for name in choices(group):
        members = ["pool.base=base", "+pool.experts.a=a"] if group == "pool" and name in FAMILIES else []
        compose([f"{group}={name}", *members])


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_begins_with_the_command_that_runs_it(path: Path) -> None:
    assert path.read_text().splitlines()[0] == f"# crucible run experiment={path.stem}"


def test_no_composed_value_is_a_node_of_the_configuration_library(small) -> None:
    def kinds(value):
        if dataclasses.is_dataclass(value):
            value = vars(value)
        if isinstance(value, dict):
            return {kind for entry in value.values() for kind in kinds(entry)} | {dict}
        if isinstance(value, list):
            return {kind for entry in value for kind in kinds(entry)} | {list}
        return {type(value)}

    assert kinds(small()) <= {dict, list, str, int, float, bool, type(None)}


def test_values_are_converted_to_the_types_of_the_dataclasses(small) -> None:
    config = small("method=ties", "method.scale=1", "tracking.run_name=12", "fabric.devices=auto", "evaluation.limit=7")
    assert type(config.method.scale) is float
    assert config.tracking.run_name == "12"
    assert config.fabric.devices == "auto"
    assert config.evaluation.limit == 7


def test_an_expert_is_added_and_another_removed(small) -> None:
    config = small("+pool.experts.d=runs:/ab12/model", "~pool.experts.a")
    assert config.pool.experts == {"b": "second", "c": "org/third@main", "d": "runs:/ab12/model"}


def test_experts_restricts_the_pool_and_keeps_the_given_order(small) -> None:
    config = small("method=slerp", "experts=[c,a]")
    assert list(config.pool.experts) == ["c", "a"]


def test_an_experiment_changes_method_and_values_and_overrides_win(small) -> None:
    config = small("experiment=half", "seed=5")
    assert (config.method_name, config.method.density, config.seed) == ("ties", 0.5, 5)


def test_debug_is_one_batch_on_the_cpu(small) -> None:
    config = small("debug=batch")
    assert config.fabric.accelerator == "cpu"
    assert config.evaluation.limit == config.evaluation.batch_size


def test_files_outside_the_configuration_are_taken_as_pool_tasks_and_experiment(mine: Path) -> None:
    config = compose([
        f"pool={mine}/pool/mine.yaml", f"tasks={mine}/tasks/mine.yaml", f"experiment={mine}/experiment/half.yaml",
    ])  # fmt: skip
    assert (config.pool_name, config.tasks_name, config.method_name) == ("mine", "mine", "ties")
    assert list(config.pool.experts) == ["a", "b", "c"]


def test_a_file_of_the_user_may_build_on_packaged_choices(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("defaults:\n  - backbone@_here_: clip_vit_b32\nexperts: {1: one}\nroot: /hub\n")
    config = compose([f"pool={path}"])
    assert (config.pool_name, config.pool.base) == ("own", "openai/clip-vit-base-patch32")
    assert config.pool.experts == {"1": "one"}


def test_no_experiment_is_a_choice_too(small) -> None:
    assert small("experiment=null", "debug=null") == small()


def test_a_backbone_is_chosen_apart_from_the_experts() -> None:
    config = compose(["pool=mini_clip8", "pool/backbone=clip_vit_b32"])
    assert config.pool.base == "openai/clip-vit-base-patch32"
    assert config.pool.experts == compose(["pool=mini_clip8"]).pool.experts


def test_the_standard_benchmark_has_eight_tasks_with_an_expert_each() -> None:
    config = compose(["pool=clip_vit_b32_ta8", "tasks=clip_ta8", "pool.root=/hub"])
    assert list(config.pool.experts) == list(config.tasks.tasks)
    sizes = {name: len(task.labels or range(10)) for name, task in config.tasks.tasks.items()}
    assert sizes == {
        "sun397": 397, "stanford_cars": 196, "resisc45": 45, "eurosat": 10,
        "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47,
    }  # fmt: skip
    assert all(set(task.splits) == {"train", "validation", "test"} for task in config.tasks.tasks.values())


def test_the_embedded_suite_is_configured_as_it_is_drawn() -> None:
    from tasks.draw import TASKS

    config = compose(["pool=mini_clip8", "tasks=mini_clip8"])
    assert {name: tuple(task.templates) for name, task in config.tasks.tasks.items()} == {
        name: task.templates for name, task in TASKS.items()
    }
    assert list(config.pool.experts) == list(TASKS)


def test_the_project_file_of_mlflow_has_the_same_defaults() -> None:
    points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    config = compose()
    names = {"method": config.method_name, "pool": config.pool_name, "tasks": config.tasks_name}
    data = {key: names[key] for key in ("pool", "tasks")}
    every = {"main": names, "evaluate": names | {"method": "base"}, "finetune": data, "analyse": data}
    for point, expected in every.items():
        assert {key: value["default"] for key, value in points[point]["parameters"].items()} == expected


def test_precisions_are_those_of_lightning() -> None:
    from lightning.fabric.plugins.precision import precision

    assert set(PRECISIONS) <= set(typing.get_args(precision._PRECISION_INPUT_STR))


# -- saving and repeating ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1 + 0.2, 1e-05, 1e22, 1.0, math.pi])
def test_a_saved_configuration_comes_back_exactly(small, scale: float) -> None:
    config = small("method=ties", f"method.scale={scale!r}", "+tracking.tags.on=yes", "output='/tmp/a, b: c'")
    assert from_yaml(to_yaml(config)) == config
    assert config.method.scale == scale


def test_a_saved_configuration_takes_values_choices_and_deltas_on_top(small) -> None:
    text = to_yaml(small("method=ties", "method.density=0.7", "seed=3"))
    assert from_yaml(text, ["method.density=0.8"]).method.density == 0.8
    changed = from_yaml(text, ["method=opcm", "debug=batch"])
    assert (changed.method_name, changed.method.alpha, changed.seed, changed.fabric.accelerator) == (
        "opcm", 0.5, 3, "cpu",
    )  # fmt: skip
    assert (changed.pool_name, list(changed.pool.experts)) == ("mine", ["a", "b", "c"])
    assert from_yaml(text, ["pool=clip_vit_b32_ta8"]).pool_name == "clip_vit_b32_ta8"


def test_a_saved_configuration_names_no_place_on_this_machine() -> None:
    text = to_yaml(compose())
    assert str(ROOT) not in text
    assert "${package:pools/mini_clip8}" in text


def test_a_fault_in_what_is_laid_over_a_saved_configuration_is_named(small) -> None:
    text = to_yaml(small())
    message = faults(lambda *overrides: from_yaml(text, overrides), "method=tise", "sed=1")
    assert "did you mean ties?" in message
    assert "did you mean seed?" in message


@pytest.mark.parametrize("text", ["", "[1]", "seed: 3", "{a: ["])
def test_what_crucible_did_not_write_is_refused(text: str) -> None:
    assert "saved configuration" in faults(lambda: from_yaml(text))


def test_flat_has_every_leaf_by_its_dotted_key_and_the_choices_by_name(small) -> None:
    params = flat(small("method=ties", "method.density=0.3"))
    assert params["method"] == "ties"
    assert params["pool"] == "mine"
    assert params["method.density"] == "0.3"
    assert params["pool.experts.c"] == "org/third@main"
    assert params["evaluation.limit"] == "None"
    assert all(isinstance(value, str) for value in params.values())


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method=tise", "no method is called 'tise'; did you mean ties?"),
        ("pool=mini_clip", "no pool is called 'mini_clip'; did you mean mini_clip8?"),
        ("tasks=clip_ta", "no tasks is called 'clip_ta'; did you mean clip_ta8?"),
        ("experiment=hal", "did you mean half?"),
        ("debug=btch", "did you mean batch?"),
        ("pool=no/such.yaml", "pool=no/such.yaml: the file cannot be read"),
        ("method.densty=0.3", "method.densty: there is no such key; did you mean method.density?"),
        ("density=0.3", "did you mean method.density?"),
        ("fabric.device=2", "did you mean fabric.devices?"),
        ("sed=2", "did you mean seed?"),
        ("method_name=dare", "the choice is written method=..."),
        ("tasks.tasks.a.pth=x", "did you mean tasks.tasks.a.path?"),
        ("pool.experts.d=x", "+pool.experts.d=... adds it"),
        ("~pool.experts.d", "~pool.experts.d: only a present entry"),
        ("~seed", "~seed: only a present entry"),
        ("method.density=high", "method.density=high: expected a number, got high"),
        ("method.density=true", "method.density=true: expected a number, got true"),
        ("method.density=null", "method.density=null: expected a number, got null"),
        ("seed=1.5", "seed=1.5: expected a whole number"),
        ("seed=-1", "seed=-1: seed must be from 0 to 4294967295"),
        ("evaluation.plots=3", "expected true or false"),
        ("experts=a", "expected a list, each a text or null"),
        ("pool.experts=a", "pool.experts=a: expected a mapping"),
        ("fabric=a", "fabric=a: expected a mapping"),
        ("method.density=20", "density is a share in (0, 1], got 20.0; percentages are not accepted"),
        ("method.density=0", "density is a share in (0, 1], got 0.0"),
        ("method.scope=modl", "scope is one of model, tensor; got 'modl'"),
        ("method.density=0.1,0.2", "one run takes one value"),
        ("pool.base=/tmp/a (1)", "pool.base='/tmp/a (1)'"),
        ("evaluation.split=tset", "split is one of train, validation, test; got 'tset'"),
        ("evaluation.split=train", "task b has no such split; it has test"),
        ("evaluation.batch_size=0", "batch_size must be at least 1"),
        ("evaluation.limit=0", "limit must be at least 1"),
        ("adaptation.examples=0", "examples must be at least 1"),
        ("fabric.devices=0", "devices is a whole number, at least 1, or auto, got 0"),
        ("fabric.devices=many", "or auto, got 'many'"),
        ("fabric.precision=8-true", "precision is one of 32-true"),
        ("fabric.accelerator=abacus", "accelerator is one of auto, cpu"),
        ("tracking.experiment=''", "experiment must not be empty"),
        ("pool.family=clap", "family is one of clip, causal_lm, seq2seq, "),
        ("pool.family=???", "pool.family: has no value"),
        ("pool.base=null", "ties needs a base model, the pool mine has none"),
        ("pool.root=${nothing}", "pool: "),
        ("tasks.tasks.a.templates=['a b']", "templates have one {} each"),
        ("tasks.tasks.a.kind=f1", "kind is one of image_classification, perplexity"),
        ("experts=[a,bb]", "the pool mine has no expert 'bb'; did you mean b?"),
        ("experts=[a,a]", "experts must name each one once"),
        ("experts=[[a]]", "expected a list, each a text or null"),
        ("tracking=${fabric}", "tracking.accelerator: there is no such key"),
        ("method@x=ties", "this cannot be read"),
        ("=3", "this cannot be read"),
        ("experts=[]", "ties needs at least 1 expert(s), the pool mine has 0"),
    ],
)
def test_a_fault_is_named_with_key_value_and_what_to_do(small, override: str, said: str) -> None:
    choice = [] if override.startswith("method=") else ["method=ties"]
    assert said in faults(small, *choice, override)


def test_what_is_of_learning_fits_the_method(small) -> None:
    assert "fabric.precision=16-mixed: adamerging learns" in faults(
        small, "method=adamerging", "fabric.precision=16-mixed"
    )
    assert "adaptation.checkpoint is where learning is saved, and ties does not" in faults(
        small, "method=ties", "adaptation.checkpoint=kept"
    )
    assert compose(["method=ties", "fabric.precision=16-mixed"]).fabric.precision == "16-mixed"


def test_nuslerp_refuses_three_experts(small) -> None:
    assert "nuslerp merges at most 2 experts, the pool mine has 3; choose with experts=[a,b]" in faults(
        small, "method=nuslerp"
    )


def test_a_pool_without_experts_is_refused(small) -> None:
    message = faults(small, "~pool.experts.a", "~pool.experts.b", "~pool.experts.c")
    assert "needs at least 1 expert(s), the pool mine has 0" in message


def test_the_base_alone_needs_no_expert(small) -> None:
    assert small("method=base", "experts=[]").pool.experts == {}


def test_an_expert_that_the_pool_lacks_is_named(small) -> None:
    pytest.importorskip("methods.expert")
    assert "method.expert=digts" in faults(small, "method=expert", "method.expert=digts", "+pool.experts.digits=x")


def test_a_list_that_does_not_fit_the_number_of_experts_is_refused(small) -> None:
    message = faults(small, "method=fisher", "method.weights=[1,2]", "adaptation.split=test")
    assert "method.weights lists 2 numbers for 3 experts" in message


def test_methods_that_look_at_data_need_the_split_they_are_fed(small) -> None:
    assert "adaptation.split=validation: task b has no such split" in faults(small, "method=adamerging")


def test_all_faults_are_gathered(mine: Path) -> None:
    message = faults(
        lambda *overrides: compose(overrides, config_dir=mine),
        "method=ties", "pool=min", "tasks=mine", "method.density=20", "method.scope=x", "method.disjoint=x",
        "fabric.device=2", "seed=x", "evaluation.batch_size=0", "evaluation.split=x",
    )  # fmt: skip
    assert message.startswith("8 faults in the configuration, nothing was started:")
    for key in (
        "pool=min", "method.density", "method.scope", "method.disjoint", "fabric.device", "seed", "evaluation.split",
    ):  # fmt: skip
        assert re.search(rf"^  - {re.escape(key)}\b", message, re.MULTILINE), key


def test_parameters_of_an_unknown_method_are_not_held_to_another(small) -> None:
    assert faults(small, "method=tise", "method.density=0.3").startswith("1 fault ")


def test_a_word_that_yaml_reads_as_something_else_is_not_taken_for_a_label(mine: Path) -> None:
    (mine / "tasks" / "words.yaml").write_text("tasks: {a: {path: a, splits: {test: test}, labels: [no, maybe]}}\n")
    message = faults(lambda: compose(["tasks=words"], config_dir=mine))
    assert "expected a list, each a text" in message


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "there is no such directory" in faults(lambda: compose(config_dir=tmp_path / "no"))


def test_a_file_that_is_no_yaml_is_refused(mine: Path) -> None:
    (mine / "pool" / "broken.yaml").write_text("experts: {a\n")
    assert "broken.yaml" in faults(lambda: compose(["pool=broken"], config_dir=mine))
    assert "broken.yaml" in faults(lambda: compose([f"pool={mine}/pool/broken.yaml"]))


def test_a_task_that_lacks_a_path_is_refused(mine: Path) -> None:
    (mine / "tasks" / "bare.yaml").write_text("tasks: {a: {splits: {test: test}}}\n")
    assert "tasks.tasks.a.path: has no value" in faults(lambda: compose(["tasks=bare"], config_dir=mine))


def test_configurations_are_values(small) -> None:
    config = small()
    assert isinstance(config, RunConfig)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_a_default_that_does_not_go_with_what_is_given_is_reported() -> None:
    @dataclasses.dataclass(frozen=True)
    class Pair:
        low: float = 0.5
        high: float = 1.0

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError(f"high must be at least low, got {self.high}")

    faults: list[str] = []
    assert check({"low": 2.0}, Pair, "method", faults) is None
    assert faults == ["method.high: high must be at least low, got 1.0"]
