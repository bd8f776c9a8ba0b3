"""Operators against counts made independently: model operations, bytes by hand, and the published profile."""

from collections import Counter as Multiset

import pytest

from infra.cluster.counts.accounting import forward_operations, training_operations
from infra.cluster.counts.shapes import DEEPSEEK_V2, DEEPSEEK_V3, Sizes
from infra.cluster.machines import MACHINES
from infra.cluster.training.layout import REPORT_RECOMPUTES
from infra.cluster.training.operators import Counter, Operator, Work, seconds

SMALL = Sizes(
    name="small",
    vocab_size=50,
    hidden_size=12,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=20,
    moe_intermediate_size=7,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    num_attention_heads=3,
    q_lora_rank=9,
    kv_lora_rank=5,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=6,
    num_nextn_predict_layers=2,
)
NOTHING: tuple[str, ...] = ()
PRECISIONS = ("fp8", "bf16", "fp32")


def model(shape, counter: Counter) -> Work:
    """The whole model with its MTP modules."""
    work = counter.embedding() + counter.head()
    for layer in range(shape.num_hidden_layers):
        work += counter.block(layer >= shape.first_k_dense_replace)
    for _ in range(shape.num_nextn_predict_layers):
        work += counter.mtp(True)
    return work


def flops(operators) -> float:
    return sum(operator.flops for operator in operators)


def products(operators) -> Multiset[tuple[str, float]]:
    """Matrix products by name and operations, attention left out."""
    return Multiset((o.name, o.flops) for o in operators if o.flops and not o.name.startswith("attention"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [DEEPSEEK_V3, DEEPSEEK_V2, SMALL], ids=lambda shape: shape.name)
def test_forward_operations_are_those_that_the_accounting_counts(shape, precision):
    tokens, length = 256, 64
    work = model(shape, Counter(shape, tokens, length, precision))
    expected = forward_operations(shape, length, mtp=True)
    assert flops(work.forward) == pytest.approx(tokens * expected.total, rel=1e-12)
    router = flops(o for o in work.forward if o.name == "router")
    assert router / tokens == pytest.approx(
        expected.router + 2 * shape.num_nextn_predict_layers * shape.hidden_size * shape.n_routed_experts
    )
    heads = [o for o in work.forward if o.name == "head"]
    assert len(heads) == 1 + shape.num_nextn_predict_layers
    assert flops(heads) == len(heads) * 2 * tokens * shape.hidden_size * shape.vocab_size


@pytest.mark.parametrize("shape", [DEEPSEEK_V3, SMALL], ids=lambda shape: shape.name)
def test_a_step_has_the_operations_of_training_and_the_scores_once_more(shape):
    tokens, length = 128, 32
    work = model(shape, Counter(shape, tokens, length, recompute=NOTHING))
    qk = shape.qk_nope_head_dim + shape.qk_rope_head_dim
    blocks = shape.num_hidden_layers + shape.num_nextn_predict_layers
    # Scores are made again going back: one more product of queries and keys.
    again = blocks * tokens * 2 * shape.num_attention_heads * qk * (length + 1) / 2
    assert flops(work.forward + work.inputs + work.weights) == pytest.approx(
        tokens * training_operations(shape, length, mtp=True).total + again, rel=1e-12
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_product_comes_back_twice(precision):
    work = model(SMALL, Counter(SMALL, 32, 16, precision, NOTHING))
    assert products(work.inputs) == products(work.forward) == products(work.weights)


def test_attention_takes_2_6_times_as_much_going_back():
    work = Counter(DEEPSEEK_V3, 4096, 4096).attention()
    (there,) = (o for o in work.forward if o.rate == "attention")
    (back,) = (o for o in work.inputs if o.rate == "attention_backward")
    assert back.flops / there.flops == pytest.approx(2.6, rel=1e-12)
    # 128 heads, 192 + 128 wide, half of 4,096 x 4,097 pairs, two operations each.
    assert there.flops == 128 * 320 * 4096 * 4097


def moved(operators) -> dict[str, float]:
    """Bytes by name."""
    sums: dict[str, float] = {}
    for o in operators:
        if o.bytes:
            sums[o.name] = sums.get(o.name, 0.0) + o.bytes
    return sums


def test_bytes_by_hand_in_bf16():
    """Two tokens of `SMALL`: hidden 12, latents 9 + 5, 3 heads, rotary width 2, dense width 20."""
    work = Counter(SMALL, 2, 2, "bf16", NOTHING).block(False)
    assert moved(work.forward) == {
        # Read and written: both norms of the hidden state, one of each latent.
        "norm": 2 * (2 * 2 * (12 + 9 + 5) + 2 * 2 * 12),
        # Rotary parts of 3 queries and the shared key, read and written.
        "rotary": 2 * (2 * 2 * (3 + 1) * 2),
        # Two addends read, the sum written, twice a layer.
        "residual": 2 * 2 * (3 * 2 * 12),
        # Gate and up read, their product written.
        "mlp SwiGLU": 2 * (2 * 2 * 20 + 2 * 20),
    }
    assert moved(work.inputs) == {
        "norm backward": 2 * (4 * 2 * (9 + 5 + 12) + 4 * 2 * 12),
        "rotary": 2 * (2 * 2 * (3 + 1) * 2),
        "residual": 2 * 2 * (3 * 2 * 12),
        # Gate, up and the gradient read, two gradients written.
        "mlp SwiGLU backward": 2 * 2 * 5 * 20,
    }
    assert moved(work.weights) == {}


def test_bytes_of_experts_by_hand_in_fp8():
    """Two tokens to 3 of the experts, 7 wide, on 2 nodes."""
    work = Counter(SMALL, 2, 2, "fp8", NOTHING).experts()
    rows = 2 * 3
    assert moved(work.forward) == {
        # Codes of a byte, read and written.
        "permute": rows * 2 * 12,
        # BF16: rows added up, then a sum of each node read and written.
        "unpermute": 2 * 2 * 12 * (3 + 2 * 2),
        # Gate and up in BF16, the product as a code.
        "experts SwiGLU": rows * (2 * 2 * 7 + 7),
    }
    assert moved(work.inputs) == {
        # Of the gradient in 2 bytes a code of 1, then of both halves of the experts' gradient.
        "quantise": 2 * 3 * 12 + rows * 3 * 14,
        "permute": rows * 2 * 12,
        "experts SwiGLU backward": rows * 2 * 5 * 7,
        "unpermute": 2 * 2 * 12 * (3 + 2 * 2),
    }
    assert moved(work.weights) == {
        # No FP8 network keeps the product of gate and up.
        "experts SwiGLU": rows * (2 * 2 * 7 + 7),
        # Both operands of both products: [12, 14] and [7, 12], a code read and one written.
        "requantise": rows * 2 * ((12 + 14) + (7 + 12)),
    }


def test_the_head_writes_reads_and_overwrites_its_logits():
    work = Counter(SMALL, 2, 2, "fp32", NOTHING).head()
    assert moved(work.forward) == {"norm": 2 * 2 * 4 * 12, "loss": 2 * 3 * 4 * 50}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_only_fp8_casts(precision):
    casts = {"quantise", "requantise"}
    eight, other = (
        {o.name for part in (w.forward, w.inputs, w.weights) for o in part}
        for w in (model(SMALL, Counter(SMALL, 8, 8, name)) for name in ("fp8", precision))
    )
    assert casts <= eight
    assert not casts & other
    assert eight - casts == other


def added(precision: str, moe: bool, *names: str) -> Multiset[Operator]:
    """Operators of a block's way back that recomputing `names` adds; the way there must not change."""
    with_them, without = (Counter(SMALL, 8, 8, precision, given).block(moe) for given in (names, NOTHING))
    assert with_them.forward == without.forward
    more = Multiset(with_them.inputs + with_them.weights)
    assert not Multiset(without.inputs + without.weights) - more
    return more - Multiset(without.inputs + without.weights)


def named(precision: str, moe: bool, *names: str) -> Multiset[Operator]:
    """Those of a block's way there that are called so."""
    return Multiset(o for o in Counter(SMALL, 8, 8, precision).block(moe).forward if o.name in names)


NETWORKS = {True: ("shared expert SwiGLU", "experts SwiGLU"), False: ("mlp SwiGLU",)}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("moe", [False, True])
def test_recomputing_adds_exactly_what_it_names(precision, moe):
    norms, networks = named(precision, moe, "norm"), named(precision, moe, *NETWORKS[moe])
    assert len(list(norms.elements())) == 2
    assert len(list(networks.elements())) == len(NETWORKS[moe])
    assert added(precision, moe, "norms") == norms
    assert added(precision, moe, "swiglu") == networks
    assert added(precision, moe, "norms", "swiglu") == norms + networks
    # Both are read from copies that something else keeps.
    assert not added(precision, moe, "router", "attention_output")


@pytest.mark.parametrize("moe", [False, True])
def test_recomputing_in_fp8_adds_what_no_codes_hold(moe):
    """Norms' outputs wait as the codes that products read; only the router reads one in high precision."""
    assert not added("fp8", moe, "norms", "attention_output")
    # SwiGLU is made again in any case.
    assert not added("fp8", moe, "swiglu")
    back = Multiset(Counter(SMALL, 8, 8, "fp8", NOTHING).block(moe).weights)
    networks = named("fp8", moe, *NETWORKS[moe])
    assert networks
    assert networks <= back
    # A dense layer has no router. One norm is read and written: 8 tokens, 12 values of 2 bytes.
    router = Multiset([Operator("norm", "memory", bytes=8 * 2 * 2 * 12)] if moe else [])
    assert added("fp8", moe, "router") == added("fp8", moe, "router", "norms", "swiglu") == router


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("moe", [False, True])
def test_recomputing_up_projections_and_whole_layers(precision, moe):
    lifted = named(precision, moe, "q_b_proj", "kv_b_proj", "rotary")
    assert len(list(lifted.elements())) == 3
    assert added(precision, moe, "mla_up") == lifted
    # A layer of which only the input is kept is made again as a whole, whatever else is named.
    forward = Multiset(Counter(SMALL, 8, 8, precision).block(moe).forward)
    assert added(precision, moe, "full") == added(precision, moe, "full", "norms", "router") == forward


def test_the_reports_policy_is_the_default():
    given, default = Counter(SMALL, 8, 8, recompute=REPORT_RECOMPUTES), Counter(SMALL, 8, 8)
    assert default.block(True) == given.block(True) != Counter(SMALL, 8, 8, recompute=NOTHING).block(True)


def test_imbalance_scales_the_rows_of_experts_and_nothing_else():
    even, uneven = (
        Counter(SMALL, 8, 8, imbalance=factor, recompute=("swiglu",)).block(True) for factor in (1.0, 1.5)
    )
    routed = ("experts gate and up", "experts down", "experts SwiGLU", "experts SwiGLU backward", "permute")
    for part in ("forward", "inputs", "weights"):
        for one, other in zip(getattr(even, part), getattr(uneven, part), strict=True):
            if one.name in routed:
                assert other.flops == pytest.approx(1.5 * one.flops)
                assert other.bytes == pytest.approx(1.5 * one.bytes)
            elif one.name == "unpermute":
                # The rows added up are more, the sums sent to other nodes are not.
                assert other.bytes - one.bytes == pytest.approx(8 * 2 * 12 * 0.5 * 3)
            elif one.name in ("quantise", "requantise"):
                assert other.bytes >= one.bytes
            else:
                assert other == one


def test_seconds_of_an_operator():
    h800 = MACHINES["h800"]
    assert Operator("x", "memory", bytes=3.35e12).seconds(h800, "fp8", 1) == pytest.approx(1 / 0.452)
    for rate, precision, peak, share in (
        ("gemm", "fp8", 1979e12, 0.535),
        ("wgrad", "fp8", 1979e12, 0.348),
        ("grouped", "bf16", 989.5e12, 0.75),
        ("attention", "fp8", 989.5e12, 0.661),
        ("plain", "fp8", 989.5e12, 0.75),
        ("plain", "fp32", 67e12, 0.75),
    ):
        operator = Operator("x", rate, flops=1e15)
        assert operator.seconds(h800, precision) == pytest.approx(1e15 / peak / share)
        assert operator.seconds(h800, precision, 66) == pytest.approx(2e15 / peak / share)


def test_the_published_profile():
    """A pair of four MoE layers, 4,096 tokens, on the 112 SMs of an H800 that communication leaves.

    The sums of the profile's kernels by class, in ms (deepseek-ai/profile-data at 4496024, train.json, read
    with `pipeline.kernel_trace`). The rates come from the same profile, so what this holds is that shapes,
    recomputation and classes are those of its kernels: within 1%, the rounding of the rates.
    """
    block = Counter(DEEPSEEK_V3, 4096, 4096, "fp8", REPORT_RECOMPUTES).block(True)
    operators = 4 * (block.forward + block.inputs + block.weights)
    assert sum(o.bytes for o in operators) == pytest.approx(41.8e9, rel=1e-3)

    def milliseconds(*rates: str) -> float:
        chosen = (o for o in operators if not rates or o.rate in rates)
        return 1e3 * seconds(chosen, MACHINES["h800"], "fp8", 112)

    assert milliseconds("gemm", "wgrad", "plain") == pytest.approx(52.1, rel=0.01)
    assert milliseconds("grouped") == pytest.approx(22.9, rel=0.01)
    assert milliseconds("attention", "attention_backward") == pytest.approx(22.0, rel=0.01)
    assert milliseconds("memory") == pytest.approx(27.6, rel=0.01)
    assert milliseconds() == pytest.approx(124.3, rel=0.01)
