"""What layers keep, against what torch has allocated between a forward and a backward pass.

On a CPU, with attention in the form that a GPU runs (`kernels.attention`), in all three precisions. Numbers
are differences between batches of one and three rows, which rids them of what no token takes: weights that
were cast, tables, gradients of the head.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from infra.cluster.training.activations import e5m6, head_kept, layer_kept, mtp_kept, tiles, value_bytes
from infra.cluster.training.layout import MODEL_RECOMPUTES, PRECISIONS, RECOMPUTED, Layout
from infra.cluster.training.memory import network_working
from model import attention, mla
from model.allocations import allocations
from model.config import ModelConfig
from model.experts import RoutedExperts
from model.loss import next_token_losses
from model.precision import Precision, steady_weights
from model.recompute import recomputing
from model.transformer import Transformer, build
from tests.model.tiny import tokens

V3 = ModelConfig()
SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=256,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    intermediate_size=600,
    moe_intermediate_size=136,
    n_routed_experts=16,
    n_shared_experts=2,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    num_attention_heads=3,
    q_lora_rank=384,
    kv_lora_rank=120,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=128,
    original_max_position_embeddings=64,
)
LENGTH = 32
BALANCE = 4 * SMALL.n_routed_experts / LENGTH
"""Bytes a token that the balance loss keeps of a sequence: a number for each expert, nothing at real
lengths."""


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention, mla):
        monkeypatch.setattr(module, "fused", lambda device: True)


def held_a_token(precision: str, forward: Callable[[Transformer, int], Any]) -> float:
    """Bytes a token that `forward` of so many rows leaves behind, beyond its output."""
    model = build(SMALL, 0, precision).train()
    held = []
    with steady_weights([model.precision]):
        forward(model, 1)
        for rows in (1, 3):
            output, size, _ = allocations(lambda rows=rows: forward(model, rows))
            held.append(size - output[0].untyped_storage().nbytes())
    return (held[1] - held[0]) / (2 * LENGTH)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "experts"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_keeps_what_torch_holds(precision, layer, recompute):
    def forward(model: Transformer, rows: int) -> Any:
        x = torch.randn(rows, LENGTH, SMALL.hidden_size).to(model.precision.activation_dtype)
        with recomputing(recompute):
            return model.layers[layer](x.requires_grad_(), *model.rotation(LENGTH), None, None)

    kept = layer_kept(SMALL, layer, precision, MODEL_RECOMPUTES if recompute else ())
    assert held_a_token(precision, forward) == pytest.approx(sum(kept.values()) + BALANCE * layer, abs=0.01)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_keeps_what_torch_holds(precision, recompute):
    def forward(model: Transformer, rows: int) -> Any:
        ids = tokens(rows, LENGTH, vocab_size=SMALL.vocab_size)
        with recomputing(recompute):
            output = model(ids, mtp=True)
            losses = next_token_losses(model, output, ids, torch.ones_like(ids, dtype=torch.bool))
        return (losses.main + losses.mtp[0] + losses.balance,)

    again = MODEL_RECOMPUTES if recompute else frozenset()
    layers = sum(sum(layer_kept(SMALL, layer, precision, again).values()) for layer in (0, 1))
    head, module = (
        sum(kept.values()) for kept in (head_kept(SMALL, precision), mtp_kept(SMALL, 0, precision, again))
    )
    # Nothing is predicted from a row's last token, nor by the module from the last two.
    predicted = (LENGTH - 1) / LENGTH
    # Here the module reads the embeddings that the first layer keeps, at a pipeline's other end.
    embedding = value_bytes(precision) * SMALL.hidden_size
    expected = layers + predicted * (head + module) - embedding + 2 * BALANCE
    assert held_a_token(precision, forward) == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_work_in_what_torch_takes_at_its_peak(precision):
    kind = torch.float32 if precision == "fp32" else torch.bfloat16
    experts, hidden, width = 4, 256, 128
    network = RoutedExperts(experts, hidden, width, Precision(precision))
    peaks = []
    for rows in (256, 768):
        x = torch.randn(rows, hidden, dtype=kind, requires_grad=True)
        output, _, forward = allocations(
            lambda x=x, rows=rows: network(x, [rows // experts] * experts, torch.rand(len(x), 1))
        )
        incoming = torch.randn_like(output)
        _, _, backward = allocations(lambda output=output, incoming=incoming: output.backward(incoming))
        peaks.append((forward, backward + incoming.untyped_storage().nbytes()))
        network.zero_grad()
    found = [(more - less) / 512 for less, more in zip(*peaks, strict=True)]
    shape = ModelConfig(hidden_size=hidden)
    expected = network_working(shape, Layout(precision=precision), width, 1.0)
    assert found == pytest.approx(expected, rel=0.1)


def test_a_layer_of_the_report_by_hand():
    """16,384 outputs of attention, 8 rows of experts of 7,168 values with 4,096 inputs of SwiGLU."""
    kept = layer_kept(V3, 3, "fp8", MODEL_RECOMPUTES)
    assert kept["output projection's input"] == 16384 * 1.5 + 128 * 4
    assert kept["attention output"] == 16384 * 2
    assert kept["rows of experts"] == 8 * (7168 + 56 * 4)
    assert kept["experts' SwiGLU inputs"] == 8 * (4096 + 32 * 4)
    assert kept["router input"] == 7168 * 4
    assert kept["layer input"] == 7168 * 2 + 4
    assert "queries" not in kept
    report = layer_kept(V3, 3, "fp8", MODEL_RECOMPUTES | {"router", "attention_output"})
    assert sum(kept.values()) - sum(report.values()) == 7168 * 4 + 16384 * 2
    assert layer_kept(V3, 3, "fp8", ()).keys() > {"queries", "keys and values"}
    assert layer_kept(V3, 3, "fp8", {"full"}) == {"layer input": 7168 * 2}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layer", [0, 3])
def test_making_more_again_keeps_less(precision, layer):
    sizes, again = [], set()
    for item in (None, *RECOMPUTED):
        again |= {item} - {None}
        sizes.append(sum(layer_kept(V3, layer, precision, again).values()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 4


def test_a_busy_gpu_keeps_more_rows():
    even, busy = (layer_kept(V3, 3, "fp8", MODEL_RECOMPUTES, load) for load in (1.0, 1.5))
    grown = {name for name in even if busy[name] != even[name]}
    assert grown == {"rows of experts", "experts' SwiGLU inputs", "routing"}
    assert busy["rows of experts"] == 1.5 * even["rows of experts"]


def test_formats():
    assert tiles(128) == 132
    assert tiles(129) == 137
    assert e5m6(256) == 392
