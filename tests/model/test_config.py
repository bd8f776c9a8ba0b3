"""The configuration checks itself; the V3 defaults are the published model."""

import math
from dataclasses import fields, replace

import pytest
import torch

from infra.errors import HeadwaterError
from model.config import ModelConfig, ModelConfigError
from model.transformer import Transformer
from tests.model.tiny import TINY


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *((f.name, -1, "must be positive") for f in fields(ModelConfig)),
        ("vocab_size", 0, "must be positive"),
        ("hidden_size", 8.5, "whole number"),
        ("hidden_size", "36", "whole number"),
        ("hidden_size", True, "whole number"),
        ("rope_theta", math.nan, "a number"),
        ("rope_factor", math.inf, "a number"),
        ("rope_factor", 0.5, "must be >= 1"),
        ("qk_rope_head_dim", 7, "8 fits"),
        ("first_k_dense_replace", 4, "3 layers"),
        ("n_group", 5, "model.n_routed_experts"),
        ("topk_group", 5, "model.n_group"),
        ("num_experts_per_tok", 7, "only 6"),
        ("beta_fast", 1.0, "model.beta_slow"),
    ],
)
def test_an_error_names_the_field(field, value, message):
    with pytest.raises(ModelConfigError, match=rf"model\.{field}\b") as caught:
        replace(TINY, **{field: value})
    assert message in str(caught.value)
    assert isinstance(caught.value, HeadwaterError)


def test_zero_is_allowed_where_it_means_none():
    config = replace(TINY, num_nextn_predict_layers=0, first_k_dense_replace=0, n_shared_experts=0)
    model = Transformer(config).initialize(0)
    tokens_BT = torch.arange(8)[None]
    assert torch.isfinite(model.logits(model(tokens_BT, mtp=True).states_BTD[0])).all()


def test_dict_form_round_trips_and_refuses_unknown_fields():
    assert ModelConfig.from_dict(TINY.to_dict()) == TINY
    with pytest.raises(ModelConfigError, match="head_dim"):
        ModelConfig.from_dict(TINY.to_dict() | {"head_dim": 4})


def test_extension_multiplies_the_context():
    assert TINY.extended(4.0).max_position_embeddings == 4 * TINY.max_position_embeddings
    assert replace(TINY.extended(4.0), rope_factor=1.0) == TINY


def test_the_default_is_the_published_model_to_the_last_element():
    """671,026,419,200 elements without MTP, from the published configuration (routing biases included)."""
    with torch.device("meta"):
        model = Transformer(ModelConfig())
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    assert sum(size for name, size in sizes.items() if not name.startswith("mtp.")) == 671_026_419_200
    assert sum(size for name, size in sizes.items() if name.startswith("layers.5.self_attn.")) == 187_107_328
    assert sum(size for name, size in sizes.items() if name.startswith("layers.0.mlp.")) == 396_361_728
    experts = sum(size for name, size in sizes.items() if name.startswith("layers.5.mlp.experts."))
    assert experts == 256 * 44_040_192
    assert sizes["embed_tokens"] == sizes["lm_head"] == 926_679_040
    # One expert layer, the projection and three norms; embedding and head are the main model's.
    assert sum(size for name, size in sizes.items() if name.startswith("mtp.")) == pytest.approx(
        11.61e9, rel=1e-3
    )
