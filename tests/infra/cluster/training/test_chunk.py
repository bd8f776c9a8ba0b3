"""Times of a pipeline's stages: their layers, what is exposed, what a pair hides."""

from dataclasses import replace
from itertools import product

import pytest

from infra.cluster.counts.shapes import DEEPSEEK_V3
from infra.cluster.machines import MACHINES
from infra.cluster.network.all_to_all import all_to_all
from infra.cluster.network.gate_reach import gate_reach
from infra.cluster.training.chunk import stage_times, stage_works
from infra.cluster.training.layout import Layout
from infra.cluster.training.operators import Counter, seconds
from infra.cluster.training.stages import stage_layers

H800 = MACHINES["h800"]
REPORT = Layout()
STAGES = range(16)


@pytest.fixture(scope="module")
def times():
    return stage_times(DEEPSEEK_V3, REPORT, H800)


def exchange(tokens: int = 4096):
    where = gate_reach(DEEPSEEK_V3, 64, 8)
    return all_to_all(DEEPSEEK_V3, tokens, 64, H800, where=where)


def test_stages_hold_every_operator_of_the_model_once():
    counter = Counter(DEEPSEEK_V3, 4096, 4096)
    works = stage_works(DEEPSEEK_V3, REPORT, counter)
    dense, moe = counter.block(False), counter.block(True)
    whole = counter.embedding() + counter.head() + counter.mtp(True)
    for layer in range(61):
        whole += moe if layer >= 3 else dense
    for part in ("forward", "inputs", "weights"):
        spread = [operator for work, _, _ in works for operator in getattr(work, part)]
        assert sorted(spread, key=repr) == sorted(getattr(whole, part), key=repr)
    # The MTP module's layer is one more, and it has experts.
    assert [layers for _, layers, _ in works] == [4] * 15 + [2]
    assert [exchanges for _, _, exchanges in works] == [1, *[4] * 14, 2]


def test_passes_alone_compute_on_112_sms_and_exchange_in_the_open(times):
    counter = Counter(DEEPSEEK_V3, 4096, 4096, "fp8", REPORT.recompute)
    block = counter.block(True)
    found = exchange()
    for row, part, exposed in (
        (times.forward, "forward", 4 * found.forward_seconds),
        (times.inputs, "inputs", 4 * found.backward_seconds),
        (times.weights, "weights", 0.0),
    ):
        computed = 4 * seconds(getattr(block, part), H800, "fp8", 112)
        for stage in range(1, 15):
            assert row[stage].exposed == pytest.approx(exposed)
            assert row[stage].seconds == pytest.approx(computed + exposed)


def test_a_pair_takes_as_long_as_the_longer_of_both_kinds_and_a_last_combine(times):
    found = exchange()
    for ahead, back in product(STAGES, STAGES):
        computed = sum(
            row[stage].seconds - row[stage].exposed
            for row, stage in ((times.forward, ahead), (times.inputs, back), (times.weights, back))
        )
        exchanged = times.forward[ahead].exposed + times.inputs[back].exposed
        pair = times.pairs[ahead, back]
        assert pair.seconds == pytest.approx(max(computed, exchanged) + found.combine.seconds)
        assert pair.exposed == pytest.approx(pair.seconds - computed)
        alone = times.forward[ahead].seconds + times.backward[back].seconds
        assert pair.seconds < alone


def test_the_pair_of_the_published_profile(times):
    """Four MoE layers, forward beside backward: 129.0 ms in the profile (deepseek-ai/profile-data). Computing
    is the profile's by the rates; that all-to-all hides but for its end is the prediction, within 2%."""
    assert 1e3 * times.pairs[7, 8].seconds == pytest.approx(129.0, rel=0.02)


def test_a_slow_network_is_exposed_even_in_pairs():
    slow = replace(H800, network=4e9)
    found = all_to_all(DEEPSEEK_V3, 4096, 64, slow, where=gate_reach(DEEPSEEK_V3, 64, 8))
    pair = stage_times(DEEPSEEK_V3, REPORT, slow).pairs[7, 8]
    both = 4 * (found.forward_seconds + found.backward_seconds)
    assert pair.seconds == pytest.approx(both + found.combine.seconds)


def test_experts_of_ones_own_exchange_nothing_and_leave_all_sms():
    layout = replace(REPORT, expert=1, precision="bf16")
    times = stage_times(DEEPSEEK_V3, layout, H800)
    block = Counter(DEEPSEEK_V3, 4096, 4096, "bf16", layout.recompute).block(True)
    assert {each.exposed for each in (*times.forward, *times.inputs, *times.pairs.values())} == {0.0}
    assert times.forward[7].seconds == pytest.approx(4 * seconds(block.forward, H800, "bf16"))


def test_values_of_16_bits_are_dispatched_as_such():
    """In BF16 a token is sent in 2 bytes a value, in FP8 in 1 and a scale of 4 bytes for 128."""
    low, high = (
        stage_times(DEEPSEEK_V3, replace(REPORT, precision=name), H800).forward[7].exposed / 4
        for name in ("fp8", "bf16")
    )
    sent = gate_reach(DEEPSEEK_V3, 64, 8).network_copies * 4096 * 7168 / H800.network
    assert high - low == pytest.approx(sent * (2 - 1 - 4 / 128), rel=1e-9)


def test_a_layer_made_again_as_a_whole_sends_its_tokens_again():
    once, twice = (
        stage_times(DEEPSEEK_V3, replace(REPORT, recompute=names), H800) for names in ((), ("full",))
    )
    found = exchange()
    assert twice.forward == once.forward
    assert twice.weights == once.weights
    assert twice.inputs[7].exposed - once.inputs[7].exposed == pytest.approx(4 * found.forward_seconds)
    assert twice.inputs[7].seconds - once.inputs[7].seconds == pytest.approx(once.forward[7].seconds)


def test_uneven_experts_lengthen_computation_alone():
    even, uneven = (stage_times(DEEPSEEK_V3, REPORT, H800, factor) for factor in (1.0, 1.2))
    assert uneven.forward[7].exposed == even.forward[7].exposed
    assert uneven.forward[7].seconds > even.forward[7].seconds
    # Stage 0 has three dense layers and one with experts.
    more = [uneven.forward[stage].seconds - even.forward[stage].seconds for stage in (0, 7)]
    assert more[1] == pytest.approx(4 * more[0])


def test_gpus_that_share_a_row_wait_for_each_other():
    long = replace(REPORT, length=32768, global_batch=1920, tensor=4)
    alone = replace(long, tensor=1, global_batch=15360, length=8192)
    shared, whole = (stage_times(DEEPSEEK_V3, layout, H800) for layout in (long, alone))
    # Two gathers and two scatters a layer of a row in BF16, of which a GPU has a quarter.
    row = 32768 * 7168 * 2
    waits = 4 * 4 * (row * 3 / 4 / H800.nvlink + 3 * H800.nvlink_latency)
    assert shared.forward[7].exposed - whole.forward[7].exposed == pytest.approx(waits)
    assert shared.weights[7].exposed == 0
    assert shared.pairs[7, 8].exposed - whole.pairs[7, 8].exposed == pytest.approx(2 * waits)


def test_dualpipev_has_two_stages_a_rank():
    layout = replace(REPORT, schedule="dualpipev")
    times = stage_times(DEEPSEEK_V3, layout, H800)
    assert times.stages == 32
    assert len(times.pairs) == 32 * 32
    assert sum(len(layers) for layers in stage_layers(DEEPSEEK_V3, layout)) == 61
