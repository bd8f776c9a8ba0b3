"""The benchmark's table of shapes is that of the published model, and its counts of bytes and operations."""

import itertools

import pytest

from kernels.bench import (
    adamw,
    attention,
    cross_entropy,
    decode,
    e5m6,
    gemm,
    grouped,
    grouped_quantize,
    linear,
    mlp,
    norm,
    permute,
    quantize,
    shapes,
    swiglu,
    transpose,
)
from kernels.formats.quantize import BLOCKS, TILES
from model.config import ModelConfig


def test_shapes_are_those_of_the_configuration() -> None:
    c = ModelConfig()
    heads = c.num_attention_heads
    assert {
        "q_a_proj": (c.q_lora_rank, c.hidden_size),
        "q_b_proj": (heads * c.qk_head_dim, c.q_lora_rank),
        "kv_a_proj": (c.latent_dim, c.hidden_size),
        "kv_b_proj": (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        "o_proj": (c.hidden_size, heads * c.v_head_dim),
        "dense gate_up": (2 * c.intermediate_size, c.hidden_size),
        "dense down": (c.hidden_size, c.intermediate_size),
        "shared gate_up": (2 * c.n_shared_experts * c.moe_intermediate_size, c.hidden_size),
        "shared down": (c.hidden_size, c.n_shared_experts * c.moe_intermediate_size),
    } == shapes.DENSE
    assert {
        "experts gate_up": (2 * c.moe_intermediate_size, c.hidden_size),
        "experts down": (c.hidden_size, c.moe_intermediate_size),
    } == shapes.ROUTED
    assert (c.hidden_size, c.vocab_size) == (shapes.HIDDEN, shapes.VOCABULARY)
    assert (c.intermediate_size, c.moe_intermediate_size) == (shapes.DENSE_WIDTH, shapes.EXPERT_WIDTH)
    assert (c.num_experts_per_tok, c.n_routed_experts) == (shapes.EXPERTS_PER_TOKEN, shapes.ROUTED_EXPERTS)
    assert (heads, c.qk_head_dim, c.v_head_dim) == (shapes.HEADS, shapes.QK_WIDTH, shapes.V_WIDTH)
    assert (c.kv_lora_rank, c.qk_rope_head_dim) == (shapes.LATENT, shapes.ROTARY)
    assert c.original_max_position_embeddings == shapes.LENGTH


def test_every_product_of_a_layer_is_timed() -> None:
    fprop = {shape.layer: shape.sizes for shape in shapes.FPROP[: len(shapes.DENSE)]}
    dgrad = {shape.layer: shape.sizes for shape in shapes.DGRAD[: len(shapes.DENSE)]}
    wgrad = {shape.layer: shape.sizes for shape in shapes.WGRAD[: len(shapes.DENSE)]}
    assert fprop["o_proj"] == (4096, 7168, 16384)
    assert dgrad["o_proj"] == (4096, 16384, 7168)
    assert wgrad["o_proj"] == (7168, 16384, 4096)
    assert len(shapes.FPROP) == len(shapes.DGRAD) == len(shapes.WGRAD) == 2 * len(shapes.DENSE)
    sizes = {shape.sizes for shape in shapes.GROUPED_FPROP}
    assert (4 * 8192, 4096, 7168, 4) in sizes
    assert (8 * 4096, 7168, 2048, 8) in sizes


@pytest.mark.parametrize(("tokens", "experts"), [(32768, 8), (16384, 4), (7, 8), (0, 3), (1, 1)])
def test_tokens_are_spread_unevenly(tokens: int, experts: int) -> None:
    offsets = shapes.uneven(tokens, experts)
    counts = [end - begin for begin, end in itertools.pairwise(offsets)]
    assert (offsets[0], offsets[-1], len(counts)) == (0, tokens, experts)
    assert min(counts) >= 0
    if tokens > 1000:
        assert counts[0] > 1.5 * tokens / experts
        assert counts == sorted(counts, reverse=True)
        assert any(count % 128 for count in counts)
    if tokens == 7:
        assert 0 in counts


# Worked by hand: M = 3 or rows = 3; widths of 256 are two tiles of 128.
@pytest.mark.parametrize(
    ("counted", "by_hand"),
    [
        (gemm.flops(3, 5, 256), 2 * 3 * 5 * 256),
        # Codes of a and b; two scales for each of 3 rows, two blocks for the 5 rows of b; a BF16 output.
        (gemm.moved(3, 5, 256, BLOCKS, 2), 3 * 256 + 5 * 256 + 4 * (3 * 2 + 2) + 2 * 3 * 5),
        (gemm.moved(3, 5, 256, TILES, 4), 3 * 256 + 5 * 256 + 4 * (3 * 2 + 5 * 2) + 4 * 3 * 5),
        # The same operands; FP32 sums, read and written.
        (gemm.moved_add(3, 5, 256), 3 * 256 + 5 * 256 + 4 * (3 * 2 + 5 * 2) + 2 * 4 * 3 * 5),
        (grouped.flops(3, 5, 256, 2), 2 * 3 * 5 * 256),
        (grouped.moved_rows(3, 5, 256, 2), (3 + 2 * 5) * 256 + 4 * (3 * 2 + 2 * 2) + 8 * 3 + 2 * 3 * 5),
        # Two experts with 300 tokens can fill 4 groups of 128; the sums are read and written.
        (grouped.moved_sums(300, 5, 7, 2), (5 + 7) * 4 * 128 + 4 * (5 + 7) * 4 + 8 * 3 + 2 * 4 * 2 * 5 * 7),
        (linear.flops(3, 5, 256), 3 * 2 * 3 * 5 * 256),
        # x and dx [3, 256], y and dy [3, 5], two weights [5, 256] and their gradients.
        (linear.moved(3, 5, 256, 2), 2 * (2 * 3 * 256 + 2 * 3 * 5 + 2 * 2 * 5 * 256)),
        # Gate and up [2 * 50, 7] and down [7, 50]; x, y and their gradients [3, 7]; two experts.
        (mlp.flops(3, 7, 50, 2), 3 * (2 * 3 * 7 * 100 + 2 * 3 * 50 * 7)),
        (mlp.moved(3, 7, 50, 2), 2 * (4 * 3 * 7 + 2 * 2 * (100 * 7 + 7 * 50))),
        (quantize.moved(3, 256, TILES, 2), 3 * 256 * 2 + 3 * 256 + 4 * 3 * 2),
        (quantize.moved(3, 256, BLOCKS, 4), 3 * 256 * 4 + 3 * 256 + 4 * 2),
        # Values once, codes twice; along rows two scales a row, along columns one a column.
        (transpose.moved_both(3, 256, TILES, 2), 3 * 256 * 2 + 2 * 3 * 256 + 4 * (3 * 2 + 256 * 1)),
        (transpose.moved_both(3, 256, BLOCKS, 2), 3 * 256 * 2 + 2 * 3 * 256 + 4 * (2 + 2)),
        (transpose.moved_turned(3, 256), 2 * 3 * 256 + 4 * (3 * 2 + 256 * 1)),
        (transpose.moved_from_e5m6(3, 256), 3 * 384 + 3 * 256 + 4 * (3 * 2 + 256 * 1)),
        # 300 tokens of 256 channels can fill 4 groups of 128 for two experts; three offsets.
        (grouped_quantize.moved_tokens(300, 256, 2, 2, False), 300 * 512 + 24 + 4 * 256 * 132),
        # Codes with two scales a row instead; then values, and tiles along the channels besides.
        (grouped_quantize.moved_tokens(300, 256, 2, 1, False), 300 * (256 + 8) + 24 + 4 * 256 * 132),
        (grouped_quantize.moved_tokens(300, 256, 2, 2, True), 300 * (512 + 264) + 24 + 4 * 256 * 132),
        # Two experts [3, 256] in BF16: codes and two scales each, once or both ways.
        (grouped_quantize.moved_experts(2, 3, 256, False), 2 * (3 * 256 * 3 + 4 * 2)),
        (grouped_quantize.moved_experts(2, 3, 256, True), 2 * (3 * 256 * 4 + 4 * 2 * 2)),
        # FP32 weight and gradient, BF16 mean and square; back all but the gradient; a BF16 copy.
        (adamw.moved_step(10, 2), 10 * (4 + 4 + 2 + 2 + 4 + 2 + 2)),
        (adamw.moved_copy(10, 2), 10 * (4 + 4 + 2 + 2 + 4 + 2 + 2 + 2)),
        (adamw.moved_norm(10, 2), 40),
        # 256 gates and 256 ups in BF16; 256 codes, two scales.
        (swiglu.moved_forward(3, 256, False, False), 3 * (512 * 2 + 256 + 4 * 2)),
        # The inputs as 512 codes with four scales, and a routing weight.
        (swiglu.moved_forward(3, 256, True, True), 3 * (512 + 4 * 4 + 4 + 256 + 4 * 2)),
        # dy and both gradients in BF16 besides; the gradient of the routing weight.
        (swiglu.moved_backward(3, 256, True, True), 3 * (512 + 4 * 4 + 4 + 256 * 2 + 512 * 2 + 4)),
        (norm.moved_forward(3, 256), 3 * 256 * 2 + 256 * 2 + 3 * 256 + 4 * 3 * 2 + 4 * 3),
        (norm.moved_backward(3, 256), 3 * 256 * 2 * 3 + 256 * 2 * 2 + 4 * 3),
        # Packed: 384 bytes for 256 columns.
        (e5m6.moved(3, 256, 2), 3 * (256 * 2 + 384 + 4 * 2)),
        # 3 tokens and 24 rows of 256 in BF16; 24 positions, 24 weights.
        (permute.moved(3, 256, 8, 2, True), (3 + 24) * 256 * 2 + 24 * 8 + 24 * 4),
        (permute.moved_gradient(3, 256, 8), (3 + 24) * 256 * 2 + 24 * 8 + 24 * 4),
        # Of 4 positions 1 + 2 + 3 + 4 pairs, in 2 rows of 3 heads; scores 24 wide and values 5.
        (attention.flops(2, 4, 3, 16, 8, 5), 2 * 3 * 10 * 2 * (24 + 5)),
        (attention.flops_both(2, 4, 3, 16, 8, 5), 2 * 3 * 10 * 2 * (24 + 5 + 24 + 5 + 5 + 24 + 24)),
        # Queries, content keys with values, and outputs of 8 positions and 3 heads; one rotary key.
        (attention.moved(2, 4, 3, 16, 8, 5, 2), 2 * (8 * 3 * (24 + 16 + 5 + 5) + 8 * 8)),
        (attention.moved_both(2, 4, 3, 16, 8, 5, 2), 2 * 2 * (8 * 3 * (24 + 16 + 5 + 5) + 8 * 8)),
        # 4 rows of 20 positions in 2 pages, 3 heads; latents of 16 and a rotary key of 8.
        (decode.flops(4, 20, 3, 16, 8), 4 * 20 * 3 * 2 * (24 + 16)),
        (decode.moved(4, 20, 3, 16, 8, 2), 4 * (20 * 24 * 2 + 4 * 2 + 4 + 3 * (24 + 16) * 2)),
        (cross_entropy.flops(3, 256, 50), 3 * 2 * 3 * 256 * 50),
        (cross_entropy.moved(3, 256, 50, 2), 2 * 2 * (3 * 256 + 50 * 256) + 3 * 8),
    ],
)
def test_counts_of_one_case_by_hand(counted: int, by_hand: int) -> None:
    assert counted == by_hand
