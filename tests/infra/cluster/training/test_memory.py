"""Memory by rank: sums by hand at the report's shape, and what must add up over all GPUs of any layout."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.cluster.counts.accounting import parameters
from infra.cluster.training.layout import MODEL_RECOMPUTES, Layout
from infra.cluster.training.levers import fit
from infra.cluster.training.memory import RESERVED, memory
from infra.errors import ConfigError
from model.config import ModelConfig
from tests.model.tiny import TINY

V3 = ModelConfig()
REPORT = Layout()
H800 = 80 * 2**30
EXPERTS, SHARED, ATTENTION = 4 * 44_040_192, 44_040_192, 187_105_280
"""Elements of linear layers of one MoE layer on a GPU at EP64."""
SMALL = ModelConfig(**TINY.to_dict() | {"num_hidden_layers": 8, "n_routed_experts": 16})


def live(layout: Layout) -> list[tuple[float, ...]]:
    """Micro-batches of each stage of a rank at the fullest moment of 1F1B and DualPipe, from their programs:
    the more the nearer a stage is to the start of its pipeline; PP + 1 on each rank of DualPipe."""
    assert layout.schedule in ("1f1b", "dualpipe")
    return [
        tuple(float(layout.pipeline - stage) for stage in layout.held(rank))
        for rank in range(layout.pipeline)
    ]


def test_a_middle_rank_of_the_report_by_hand():
    """Two stages of four MoE layers, each stage on two ranks of 128 GPUs."""
    rank = memory(V3, REPORT, [17.0] * 16)[5]
    linear, router, norms = EXPERTS + SHARED + ATTENTION, 256 * 7168, 2 * 7168 + 1536 + 512
    # 128x128 blocks of q_a, q_b, kv_a (its 576 rows are 4.5 blocks), kv_b, o; of five experts.
    blocks = 12 * 56 + 192 * 12 + 5 * 56 + 256 * 4 + 56 * 128 + 5 * (32 * 56 + 56 * 16)
    assert rank.weights == 8 * (2 * (linear + 4 * blocks) + 4 * (router + norms + 256))
    assert rank.gradients == 8 * 4 * (linear + router + norms)
    # Four GPUs hold a copy of an expert, 256 one of what is no expert.
    assert rank.master == 8 * 4 * (EXPERTS / 4 + (SHARED + ATTENTION) / 256)
    assert rank.moments == 8 * 4 * (EXPERTS / 4 + (linear - EXPERTS + router + norms) / 256)
    assert rank.loss == 0
    row, state = 8 * (7168 + 4 * 56 + 2 * 7168), 2 * 2 * 7168
    assert rank.exchange == 2 * 4096 * (row + state)
    assert rank.total == sum(rank.by_component().values())
    assert rank.reserved == RESERVED


def test_the_rank_with_embedding_and_head_by_hand():
    ranks = memory(V3, REPORT, [17.0] * 16)
    table = 129280 * 7168
    # Three dense layers, an MoE layer, and at the other end an MoE layer, the MTP module's and what joins.
    linear = 6 * ATTENTION + 3 * 396_361_728 + 3 * (EXPERTS + SHARED) + 2 * 7168**2
    others = 3 * 256 * 7168 + 6 * (2 * 7168 + 2048) + 4 * 7168
    assert ranks[0].gradients == 4 * (2 * table + linear + others)
    assert ranks[0].loss == 2048 * 129280 * 2 + 2 * 4 * table
    assert ranks[15] == ranks[0]


def test_the_reports_layout_fits_its_gpus_and_not_by_far():
    """It was trained so. `model/` keeps two tensors more than the report, and would not fit."""
    found = fit(V3, REPORT, H800, live)
    assert found.fits
    assert found.fullest in (0, 15)
    assert 0 < found.spare < 0.15 * H800
    assert found.explanation().startswith(f"fits: rank {found.fullest} takes 7")
    assert found.levers == ()
    ours = fit(V3, replace(REPORT, recompute=MODEL_RECOMPUTES), H800, live)
    assert not ours.fits
    assert {lever.change for lever in ours.levers} >= {
        "layout.recompute with attention_output",
        "layout.recompute with router",
    }


def test_orders_of_magnitude():
    """671B in 16 pieces and 64 of experts, on both ends: 3.3B weights a GPU, of which 2 bytes are read and 4
    added to; three quarters of the rest are activations."""
    rank = memory(V3, REPORT, live(REPORT))[5]
    assert rank.weights / 1e9 == pytest.approx(2 * 3.27, rel=0.02)
    assert rank.gradients / 1e9 == pytest.approx(4 * 3.27, rel=0.02)
    assert rank.activations / rank.total == pytest.approx(0.6, abs=0.1)
    one = memory(V3, replace(REPORT, schedule="1f1b"), live(replace(REPORT, schedule="1f1b")))[5]
    assert one.weights == pytest.approx(rank.weights / 2)
    assert one.master == pytest.approx(rank.master)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        [("dualpipe", 2), ("dualpipe", 4), ("dualpipev", 2), ("1f1b", 1), ("1f1b", 3), ("zb1p", 4)]
    ),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from(["fp8", "bf16", "fp32"]),
    st.integers(0, 2),
)
def test_what_replicas_share_is_there_once(ends, expert, tensor, zero, precision, modules):
    """Over all GPUs: moments, and under ZeRO 2 gradients, are those of each weight once."""
    schedule, pipeline = ends
    shape = replace(SMALL, num_nextn_predict_layers=modules)
    layout = Layout(
        gpus=pipeline * 12,
        pipeline=pipeline,
        expert=expert,
        tensor=tensor,
        zero=zero,
        schedule=schedule,
        global_batch=12 * 8,
        length=12,
        precision=precision,
    )
    ranks = memory(shape, layout, [1.0] * pipeline)
    size = parameters(shape)
    trained = size.total + size.mtp.total
    assert sum(rank.moments for rank in ranks) * layout.rank_gpus == pytest.approx(4 * trained)
    gradients = sum(rank.gradients for rank in ranks) * layout.rank_gpus
    if zero >= 2:
        assert gradients == pytest.approx(4 * trained)
    else:
        assert gradients > 4 * trained
    master = sum(rank.master for rank in ranks) * layout.rank_gpus
    assert master < 4 * trained
    assert (master == 0) == (precision == "fp32")
    if zero == 3 and precision == "fp32":
        biases = 16 * (8 - 1 + modules)
        weights = sum(rank.weights for rank in ranks) * layout.rank_gpus
        assert weights == pytest.approx(4 * (trained + biases))


def test_one_gpu_holds_the_whole_model():
    layout = Layout(
        gpus=1, pipeline=1, expert=1, zero=0, schedule="1f1b", global_batch=4, precision="fp32", length=16
    )
    (rank,) = memory(SMALL, layout, [1.0])
    size = parameters(SMALL)
    trained, biases = size.total + size.mtp.total, 16 * 8
    assert rank.weights == 4 * (trained + biases)
    assert rank.gradients == 4 * trained
    assert rank.moments == 4 * trained
    assert rank.master == rank.exchange == 0


def test_activations_are_those_of_the_live_micro_batches_of_each_stage():
    one, ten = (memory(V3, REPORT, [count] * 16)[0] for count in (1.0, 10.0))
    assert ten.activations == pytest.approx(10 * one.activations)
    first, last = (memory(V3, REPORT, [counts] * 16)[0].activations for counts in ((1, 0), (0, 1)))
    both = memory(V3, REPORT, [(3.0, 2.0)] * 16)[0].activations
    assert both == pytest.approx(3 * first + 2 * last)
    # A sum alone is taken as of the larger stage.
    assert one.activations == pytest.approx(max(first, last))
    with pytest.raises(ConfigError, match=r"live has 4 numbers, and layout.pipeline is 16"):
        memory(V3, REPORT, [1.0] * 4)


def test_less_of_each_with_each_lever():
    start = replace(REPORT, moments="fp32", zero=0)
    full = memory(V3, start, [17.0] * 16)[5]
    shared = [memory(V3, replace(start, zero=zero), [17.0] * 16)[5] for zero in (1, 2, 3)]
    assert full.moments > shared[0].moments
    assert full.gradients == shared[0].gradients > shared[1].gradients
    assert shared[1].weights > shared[2].weights
    assert shared[2].working > shared[1].working > shared[0].working
    assert memory(V3, replace(start, moments="bf16"), [17.0] * 16)[5].moments == full.moments / 2
    again = memory(V3, replace(start, recompute={"full"}), [17.0] * 16)[5]
    assert again.activations < full.activations / 4
    assert again.working > full.working
    busy = memory(V3, start, [17.0] * 16, load=1.3)[5]
    assert busy.activations > full.activations
    assert busy.exchange > full.exchange


TIGHT = {
    "BF16": replace(REPORT, precision="bf16"),
    "two sequences": replace(REPORT, micro_batch=2),
    "no ZeRO": replace(REPORT, zero=0, moments="fp32", recompute=MODEL_RECOMPUTES),
    "few experts a group": replace(REPORT, expert=16),
}


@pytest.mark.parametrize("layout", TIGHT.values(), ids=TIGHT)
def test_the_largest_lever_frees_what_is_said_and_no_other_frees_more(layout):
    found = fit(V3, layout, H800, live)
    assert not found.fits

    def fullest(other: Layout) -> float:
        return max(rank.total for rank in memory(V3, other, live(other)))

    first = found.levers[0]
    assert first.frees == pytest.approx(fullest(layout) - fullest(first.layout))
    text = found.explanation()
    assert text.startswith("does not fit: ")
    assert f"{first.change} frees most, {first.frees / 2**30:.1f} GiB" in text
    assert ("not enough alone" in text) == (fullest(first.layout) > H800)
    tried = [
        replace(layout, pipeline=32),
        replace(layout, zero=layout.zero + 1),
        replace(layout, expert=64),
        replace(layout, micro_batch=1),
        replace(layout, moments="bf16"),
        *(replace(layout, recompute=layout.recompute | {item}) for item in ("router", "full")),
    ]
    assert min(fullest(other) for other in tried) >= fullest(first.layout) - 1


def test_levers_keep_to_what_can_run():
    """EP128 has every GPU of a rank hold two of 256 experts, and no more GPUs are there; one sequence is the
    least."""
    found = fit(V3, replace(REPORT, precision="bf16"), H800, live)
    experts = [lever.change for lever in found.levers if "expert" in lever.change]
    assert experts == ["layout.expert 64 -> 128"]
    most = fit(V3, replace(REPORT, precision="bf16", expert=128), H800, live)
    assert not [lever.change for lever in most.levers if "expert" in lever.change]
    assert not [lever.change for lever in found.levers if "micro_batch" in lever.change]
    for lever in found.levers:
        lever.layout.check(V3)
        assert lever.frees > 0


def test_a_model_that_does_not_fit_the_layout_is_refused():
    with pytest.raises(ConfigError, match=r"layout.expert is 64: 160 experts"):
        fit(replace(V3, n_routed_experts=160), REPORT, H800, live)
