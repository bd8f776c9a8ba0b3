"""Layouts: the report's own, refusals with values that are then accepted, and how layers lie on stages."""

import itertools
import re
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.cluster.counts.weights import all_mtp_weights, main_weights
from infra.cluster.training.layout import Layout
from infra.cluster.training.stages import (
    imbalance,
    notes,
    rank_weights,
    stage_layers,
    stage_weights,
    stage_work,
)
from infra.errors import ConfigError
from model.config import ModelConfig
from tests.model.tiny import TINY

V3 = ModelConfig()
REPORT = Layout()
SMALL = Layout(gpus=8, pipeline=2, expert=4, global_batch=64, length=128)


def test_the_reports_layout():
    REPORT.check(V3)
    assert (REPORT.data, REPORT.rank_gpus, REPORT.expert_replicas) == (128, 128, 2)
    assert REPORT.micro_batches == 120
    assert REPORT.micro_tokens == 4096
    assert REPORT.held(0) == (0, 15)
    assert REPORT.held(15) == (15, 0)
    assert [len(layers) for layers in stage_layers(V3, REPORT)] == [4] * 15 + [1]


def test_a_step_has_the_same_tokens_in_all_three_contexts():
    phases = [
        REPORT,
        replace(REPORT, length=32768, global_batch=1920, tensor=4),
        replace(REPORT, length=131072, global_batch=480, tensor=16),
    ]
    assert [phase.step_tokens for phase in phases] == [62_914_560] * 3
    assert [phase.micro_tokens for phase in phases] == [4096, 8192, 8192]


WRONG = {
    "pipeline": ({"pipeline": 7}, "layout.pipeline is 7: 2048 GPUs .* nearest that fits is 8"),
    "odd pipeline": (
        {"pipeline": 1, "global_batch": 2048 * 4},
        "DualPipe pairs each rank .* nearest that fits is 2",
    ),
    "tensor": ({"tensor": 3}, "layout.tensor is 3: the 128 GPUs .* nearest that fits is 2"),
    "odd micro-batches": (
        {"global_batch": 128 * 33},
        "layout.global_batch is 4224: DualPipe wants an even number .* nearest that fits is 4096",
    ),
    "few micro-batches": (
        {"global_batch": 128 * 30},
        "layout.global_batch is 3840: dualpipe wants at least 2 x pipeline = 32 .* nearest that fits is 4096",
    ),
    "batch": ({"global_batch": 15361}, "layout.global_batch is 15361: .* nearest that fits is 15360"),
    "zero": ({"zero": 4}, "layout.zero is 4: choose one of 0, 1, 2, 3"),
    "schedule": ({"schedule": "gpipe"}, "layout.schedule is gpipe: choose one of dualpipe"),
    "recompute": ({"recompute": {"norm"}}, r"layout.recompute is \['norm'\]: norm is unknown"),
    "layers": ({"layers": (4,) * 15}, "layout.layers .* 15 numbers for 16 stages"),
    "no layer": ({"layers": (4,) * 15 + (0,)}, "each stage needs a layer"),
    "no GPU": ({"gpus": 0}, "layout.gpus is 0: it must be a whole number"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_run_is_refused_with_the_nearest_that_can(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        Layout(**changes)
    nearest = re.search(r"^layout\.(\w+) is .*the nearest that fits is (\d+)$", str(error.value))
    if nearest is not None and "gpus" not in changes:
        Layout(**changes | {nearest[1]: int(nearest[2])})


WRONG_WITH = {
    "more ranks than layers": (
        {"pipeline": 64, "expert": 32},
        8,
        "layout.pipeline is 64: 64 stages want a layer each, and there are 61; the nearest that fits is 32",
    ),
    "more stages than layers": (
        {"pipeline": 32, "schedule": "dualpipev"},
        8,
        "layout.pipeline is 32: 64 stages want",
    ),
    "experts": ({"gpus": 16 * 96, "expert": 6, "global_batch": 96 * 40}, 8, "256 experts do not divide"),
    "heads": (
        {"gpus": 16 * 768, "tensor": 768, "global_batch": 192, "expert": 1, "length": 768},
        8,
        "layout.tensor is 768: 128 attention heads .* nearest that fits is 128",
    ),
    "expert and the GPUs": (
        {"expert": 48},
        8,
        "layout.expert is 48: the 128 GPUs of a pipeline rank .* nearest that fits is 32",
    ),
    "more experts than GPUs": ({"expert": 256}, 8, "layout.expert is 256: the 128 GPUs .* fits is 128"),
    "experts and GPUs that share few divisors": (
        {"gpus": 16 * 72, "expert": 64, "global_batch": 72 * 40},
        72,
        "layout.expert is 64: the 72 GPUs of a pipeline rank .* nearest that fits is 8",
    ),
    "layers": ({"layers": (4,) * 15 + (2,)}, 8, "they are 62 in all, and the model has 61"),
}


@pytest.mark.parametrize(("changes", "node", "message"), WRONG_WITH.values(), ids=WRONG_WITH)
def test_what_does_not_fit_the_model_is_refused_with_the_nearest_that_does(changes, node, message):
    layout = Layout(**changes)
    with pytest.raises(ConfigError, match=message) as error:
        layout.check(V3, node)
    nearest = re.search(r"^layout\.(\w+) is .*the nearest that fits is (\d+)$", str(error.value))
    if nearest is not None:
        replace(layout, **{nearest[1]: int(nearest[2])}).check(V3, node)


def test_where_no_value_is_enough_the_nearest_that_mends_the_fault_itself_is_named():
    with pytest.raises(ConfigError, match=r"layout.pipeline is 7: .*; the nearest that mends this is 8$"):
        Layout(pipeline=7, zero=1, expert=384)


@pytest.mark.parametrize("expert", [1, 8, 32, 64, 128])
@pytest.mark.parametrize("node", [8, 24, 72])
def test_experts_lie_on_any_nodes(expert, node):
    """Whole nodes, parts of one, half a routing group a node: all of it can run, at its price."""
    Layout(expert=expert).check(V3, node)


@pytest.mark.parametrize(
    "changes",
    [
        {"gpus": 10**8},
        {"gpus": 10**8 + 7},
        {"gpus": 2**40, "pipeline": 3},
        {"global_batch": 10**12 + 1},
        {"length": 10**12 + 1, "tensor": 2},
        {"gpus": 10**12, "expert": 7, "schedule": "1f1b", "global_batch": 10**12},
    ],
)
def test_the_nearest_is_found_at_once_whatever_the_size(changes):
    began = time.perf_counter()
    with pytest.raises(ConfigError):
        Layout(**changes).check(V3)
    assert time.perf_counter() - began < 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 96), st.integers(1, 12), st.integers(1, 100), st.integers(1, 9), st.integers(1, 400))
def test_the_nearest_is_that_of_all_values(gpus, pipeline, expert, tensor, batch):
    """Against every value of the field that is named, one by one."""
    given_ = {"gpus": gpus, "pipeline": pipeline, "expert": expert, "tensor": tensor, "global_batch": batch}
    fixed = {"schedule": "dualpipe", "length": 2520}

    def fits(**values: int) -> bool:
        try:
            Layout(**fixed | values).check(V3)
        except ConfigError:
            return False
        return True

    try:
        layout = Layout(**fixed | given_)
    except ConfigError:
        return
    try:
        layout.check(V3)
    except ConfigError as error:
        named = re.search(r"^layout\.(\w+) is (\d+): .*?(?:the nearest that fits is (\d+))?$", str(error))
        assert named is not None
        field, value = named[1], int(named[2])
        fitting = [other for other in range(1, 801) if fits(**given_ | {field: other})]
        if named[3] is None:
            assert fitting == []
        else:
            assert abs(int(named[3]) - value) == min(abs(other - value) for other in fitting)
            assert int(named[3]) in fitting


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 64),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 200),
    st.sampled_from(["dualpipe", "dualpipev", "1f1b", "zb1p"]),
)
def test_a_layout_adds_up_or_is_refused(gpus, pipeline, expert, batch, schedule):
    try:
        layout = Layout(
            gpus=gpus, pipeline=pipeline, expert=expert, global_batch=batch, schedule=schedule, length=8
        )
    except ConfigError:
        return
    assert layout.pipeline * layout.data == gpus
    if layout.rank_gpus % expert:
        # Judged with the model, whose experts they must divide too.
        with pytest.raises(ConfigError, match=r"layout\.expert"):
            layout.check(replace(V3, n_routed_experts=256 * expert))
        return
    assert layout.pipeline * layout.expert_replicas * layout.expert == gpus
    assert layout.micro_batches * layout.data == batch
    held = [stage for rank in range(pipeline) for stage in layout.held(rank)]
    copies = 2 if schedule == "dualpipe" else 1
    assert sorted(held) == sorted(list(range(layout.stages)) * copies)
    if schedule in ("dualpipe", "dualpipev"):
        assert layout.held(0) == (0, layout.stages - 1)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("modules", [0, 1])
def test_the_split_is_the_best_of_all(stages, modules):
    shape = replace(V3, num_hidden_layers=9, num_nextn_predict_layers=modules)
    layout = Layout(gpus=stages, pipeline=stages, expert=1, schedule="1f1b", global_batch=8)
    chosen = [len(layers) for layers in stage_layers(shape, layout)]
    assert sum(chosen) == 9
    assert min(chosen) > 0

    def spread(counts: tuple[int, ...]) -> float:
        return sum(work**2 for work in stage_work(shape, replace(layout, layers=counts)))

    everything = [c for c in itertools.product(range(1, 10), repeat=stages) if sum(c) == 9]
    assert spread(tuple(chosen)) == pytest.approx(min(spread(counts) for counts in everything))


def test_an_uneven_split_is_allowed_and_said():
    assert imbalance(V3, REPORT) == pytest.approx(1.21, abs=0.01)
    (note,) = notes(V3, REPORT)
    assert "61 layers lie unevenly on 16 stages (15 x 4, 1 x 1)" in note
    assert "stage 15 has 1.21 times" in note
    assert notes(V3, Layout(gpus=64, pipeline=1, schedule="1f1b", global_batch=64)) == ()


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "1f1b"])
def test_stages_hold_the_whole_model(schedule):
    shape = replace(TINY, num_hidden_layers=5)
    layout = replace(SMALL, schedule=schedule)
    stages = [stage_weights(shape, layout, stage) for stage in range(layout.stages)]
    names = [w.name for weights in stages for w in weights]
    # The MTP module at the end reads the embedding too.
    assert sorted(names) == sorted(
        ["embed_tokens"] + [w.name for w in main_weights(shape) + all_mtp_weights(shape)]
    )
    tables = [sum(w.name == "embed_tokens" for w in rank_weights(shape, layout, rank)) for rank in range(2)]
    assert tables == ([1, 0] if schedule == "dualpipev" else [1, 1])
