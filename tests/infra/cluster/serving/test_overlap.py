"""Two micro-batches in turn: worked examples, bounds that no order can break, published speeds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.cluster.serving.deployment import Deployment
from infra.cluster.serving.overlap import ORDERS, Phases, overlap_decode, overlap_prefill, replay
from infra.errors import ConfigError
from model.config import ModelConfig
from tests.infra.cluster.serving.h800 import H800
from tests.infra.cluster.serving.units import DECODE_PRODUCTION, DECODE_REPORT, PREFILL_PRODUCTION

V3 = ModelConfig()
SECONDS = st.floats(0, 10)


@pytest.mark.parametrize("sparse", [1, 2, 5])
def test_four_equal_phases_leave_one_gap(sparse: int) -> None:
    """Drawn by hand: a layer takes four units for both micro-batches, and the last combine sticks out."""
    assert replay(Phases(1, 1, 1, 1), dense=0, sparse=sparse, order="alternating") == 4 * sparse + 1


def test_attention_as_long_as_the_rest_hides_it() -> None:
    """Attention 6, dispatch 2, experts 1, combine 4, drawn by hand: turns of 2 + 1 + 4."""
    found = replay(Phases(6, 2, 1, 4), dense=0, sparse=10, order="attention in two")
    # Twenty turns of 7; the first has no experts of the other yet; the last one's own way is still to go.
    assert found == 20 * 7 - 1 + (2 + 1 + 4)
    # In turns a combine waits for the other's, and attention for it: never less.
    assert replay(Phases(6, 2, 1, 4), dense=0, sparse=10, order="alternating") >= found


@given(SECONDS, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS, st.integers(0, 3), st.integers(0, 6))
def test_no_order_beats_its_resources(
    a: float, d: float, e: float, c: float, dense: float, head: float, layers: int, sparse: int
) -> None:
    phases = Phases(a, d, e, c, dense, head)
    computation, communication = phases.computation(layers, sparse), phases.communication(sparse)
    for order in ORDERS:
        found = replay(phases, layers, sparse, order)
        assert found >= 2 * computation * (1 - 1e-9)
        assert found >= 2 * communication * (1 - 1e-9)
        assert found >= (computation + communication) * (1 - 1e-9)
        assert found <= 2 * (computation + communication) * (1 + 1e-9) + 1e-9


def test_without_communication_there_is_nothing_to_hide() -> None:
    phases = Phases(3, 0, 2, 0, dense=4, head=1)
    for order in ORDERS:
        assert replay(phases, 2, 3, order) == pytest.approx(2 * phases.computation(2, 3))


def test_orders_have_names_and_phases_are_not_negative() -> None:
    with pytest.raises(ConfigError, match="did you mean alternating"):
        replay(Phases(1, 1, 1, 1), 0, 1, "alternate")
    with pytest.raises(ConfigError, match=r"phases\.dispatch is -1"):
        Phases(1, -1, 1, 1)


def test_large_batches_gain_and_small_ones_lose() -> None:
    """Two micro-batches read the weights twice: a step that only reads weights had better stay whole."""
    small = overlap_decode(V3, H800, DECODE_PRODUCTION, 8, 4096)
    large = overlap_decode(V3, H800, DECODE_PRODUCTION, 128, 4096)
    assert small.gain < 1 < large.gain
    assert small.best == small.alone
    assert large.best == large.overlapped
    assert 0 <= large.hidden <= 1
    assert large.overlapped >= max(large.computation, large.communication)


def test_a_faster_network_moves_the_bound() -> None:
    assert overlap_decode(V3, H800, DECODE_PRODUCTION, 256, 2048).bound == "communication"
    assert overlap_decode(V3, H800, DECODE_REPORT, 256, 8192).bound == "computation"


def test_prefill_is_near_what_is_published() -> None:
    """73,700 prompt tokens a second and node in production, part of them cached; 52,300 measured by SGLang on
    96 H100 without. The model leaves out all but products, bytes and links, so it is faster."""
    step = overlap_prefill(V3, H800, PREFILL_PRODUCTION, 16384, prompt=4096)
    per_node = 8 * step.tokens / step.best
    assert 52_300 < per_node < 1.6 * 52_300
    assert step.gain > 1.5


def test_decode_is_above_what_is_published_and_not_far() -> None:
    """22,300 output tokens a second and node, measured by SGLang on 72 H100 with 256 requests a GPU and 2,000
    tokens of prompt."""
    unit = Deployment("EP72", gpus=72, tensor_parallel=1, slots_per_gpu=4)
    step = overlap_decode(V3, H800, unit, 256, 2050)
    assert 22_300 < 8 * step.tokens / step.best < 1.5 * 22_300


def test_an_uneven_placement_costs_time() -> None:
    even = overlap_decode(V3, H800, DECODE_PRODUCTION, 128, 4096)
    uneven = overlap_decode(V3, H800, DECODE_PRODUCTION, 128, 4096, imbalance=1.3)
    assert even.best < uneven.best < 1.3 * even.best
