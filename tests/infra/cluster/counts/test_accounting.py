"""Counts against models that exist (on the meta device), the papers' figures, and sums by hand."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from infra.cluster.counts.accounting import (
    attention_core,
    by_part,
    cache_bytes,
    forward_operations,
    layer_operations,
    layer_parameters,
    parameters,
    training_operations,
)
from infra.cluster.counts.shapes import DEEPSEEK_V2, LLAMA_405B, QWEN_72B, uncompressed
from infra.cluster.counts.weights import Part, all_mtp_weights, main_weights
from model.config import ModelConfig
from model.transformer import Transformer
from tests.model.tiny import TINY

V3 = ModelConfig()
SHAPES = {
    "the report's": V3,
    "no MTP": replace(TINY, num_nextn_predict_layers=0),
    "two modules, no dense layers": replace(TINY, num_nextn_predict_layers=2, first_k_dense_replace=0),
    "only dense layers, no shared expert": replace(TINY, first_k_dense_replace=3, n_shared_experts=0),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_every_weight_is_one_of_the_model_by_name_and_shape(config):
    with torch.device("meta"):
        model = Transformer(config)
    listed = main_weights(config) + all_mtp_weights(config)
    assert len({w.name for w in listed}) == len(listed)
    assert {w.name: w.shape for w in listed if w.trained} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }
    assert {w.name: w.shape for w in listed if not w.trained} == {
        name: tuple(b.shape) for name, b in model.named_buffers()
    }


def test_the_reports_model_has_its_published_sizes():
    size = parameters(V3)
    assert size.total == 671_026_404_352
    assert size.checkpoint == 671_026_419_200
    assert size.parts[Part.BIASES].total == 14_848
    assert size.parts[Part.EMBEDDING].total == size.parts[Part.HEAD].total == 926_679_040
    assert size.mtp.total == 11_610_067_968
    assert size.active == 36_625_603_584  # the report's 37B
    assert size.active_with_embedding / 1e9 == pytest.approx(37.55, abs=0.005)
    assert size.active_without_head / 1e9 == pytest.approx(35.70, abs=0.005)


def test_a_layer_by_projection():
    dense, sparse = layer_parameters(V3, 0), layer_parameters(V3, 3)
    attention = {name: e.total for name, e in sparse.items() if name.startswith("self_attn.")}
    assert attention == {
        "self_attn.q_a_proj": 1536 * 7168,
        "self_attn.q_a_layernorm.weight": 1536,
        "self_attn.q_b_proj": 128 * 192 * 1536,
        "self_attn.kv_a_proj": 576 * 7168,
        "self_attn.kv_a_layernorm.weight": 512,
        "self_attn.kv_b_proj": 128 * 256 * 512,
        "self_attn.o_proj": 7168 * 16384,
    }
    assert sum(attention.values()) == 187_107_328
    assert dense["mlp.gate_up_proj"].total + dense["mlp.down_proj"].total == 396_361_728
    experts = [sparse["mlp.experts.gate_up_proj"], sparse["mlp.experts.down_proj"]]
    assert sum(e.total for e in experts) == 256 * 44_040_192
    assert sum(e.active for e in experts) == 8 * 44_040_192
    assert sparse["mlp.gate.e_score_correction_bias"].active == 0


def test_components_are_all_there_is():
    size = parameters(V3)
    assert size.checkpoint == sum(w.elements for w in main_weights(V3))
    assert by_part(())[Part.DENSE].total == 0
    assert size.parts[Part.ROUTED].total == 58 * 256 * 44_040_192
    assert size.parts[Part.EMBEDDING].active == 7168


def test_deepseek_v2_has_its_published_sizes():
    """236B and 21B activated; 155 GFLOP a token (ISCA'25 table 2)."""
    size = parameters(DEEPSEEK_V2)
    assert size.total / 1e9 == pytest.approx(236, abs=0.5)
    assert size.active_with_embedding / 1e9 == pytest.approx(21, abs=0.5)
    assert training_operations(DEEPSEEK_V2, 4096).total / 1e9 == pytest.approx(155.3, abs=0.05)


def test_a_token_of_the_reports_model_takes_250_gflop():
    causal, whole = training_operations(V3, 4096), training_operations(V3, 4096, causal=False)
    assert causal.total / 1e9 == pytest.approx(250.5, abs=0.05)
    assert whole.total / 1e9 == pytest.approx(281.2, abs=0.05)
    assert causal.attention_core == 3 * 61 * 2 * 128 * (192 + 128) * 2048.5
    assert replace(whole, attention_core=0.0) == replace(causal, attention_core=0.0)
    assert causal.total == 3 * forward_operations(V3, 4096).total
    # 62.91M tokens in 19.926 s on 2048 GPUs: the published 385 and 432 TFLOPS a GPU (ISCA'25 table 4).
    for work, published in ((causal, 385), (whole, 432)):
        rate = work.total * 15360 * 4096 / 19.926 / 2048 / 1e12
        assert rate == pytest.approx(published, rel=0.005)


def test_operations_by_component():
    work = forward_operations(V3, 4096)
    assert work.attention_projections == 61 * 2 * 187_105_280
    assert work.dense == 3 * 2 * 396_361_728
    assert work.router == 58 * 2 * 256 * 7168
    assert work.routed_experts == 58 * 2 * 8 * 44_040_192
    assert work.shared_experts == 58 * 2 * 44_040_192
    assert work.head == 2 * 926_679_040
    assert work.mtp == 0
    # One module more: a layer, the matrix that joins, and the shared head once more.
    module = layer_operations(V3, 61, 4096).total + 2 * 2 * 7168**2 + work.head
    assert forward_operations(V3, 4096, mtp=True).mtp == pytest.approx(module)


def test_the_core_is_the_mean_over_a_row():
    pairs = sum(position + 1 for position in range(7))
    width = 2 * TINY.num_attention_heads * (10 + 8 + 14)
    assert 7 * attention_core(TINY, 7) == pairs * width
    assert 7 * attention_core(TINY, 7, causal=False) == 49 * width


def test_caches_of_isca_table_1():
    """The ratio printed for LLaMA-3.1-405B is 7.28; the bytes printed beside it give 7.34."""
    ours = cache_bytes(V3)
    assert ours == 70_272
    assert cache_bytes(QWEN_72B) == 327_680
    assert cache_bytes(QWEN_72B) / ours == pytest.approx(4.66, abs=0.005)
    assert cache_bytes(LLAMA_405B) == 516_096
    assert cache_bytes(LLAMA_405B) / ours == pytest.approx(7.344, abs=0.0005)
    assert cache_bytes(uncompressed(V3)) == 3_997_696
    assert cache_bytes(V3, "fp8") == 61 * 576
    assert cache_bytes(V3, "fp32") == 2 * ours


def test_counting_needs_no_torch():
    code = (
        "import sys, infra.cluster.counts.accounting, infra.cluster.training.levers; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
