"""Logits and gradients against transformers' DeepseekV3ForCausalLM."""

import pytest
import torch
from torch.nn import functional as F

from model.hf import write_hf
from model.loss import next_token_losses
from tests.model.oracle import gradient, oracle
from tests.model.tiny import relative, tiny, tokens

CASES = {
    "plain": {},
    "extended": {"rope_factor": 4.0},
    "another mscale": {"rope_factor": 8.0, "mscale": 0.7, "beta_fast": 16.0, "beta_slow": 0.5},
    "no groups": {"n_group": 1, "topk_group": 1},
    "all dense": {"first_k_dense_replace": 3},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_and_gradients_are_those_of_transformers(changes):
    model = tiny(**changes).train()
    twin = oracle(model)
    length = model.config.max_position_embeddings - 3
    tokens_BT = tokens(2, length)
    output = model(tokens_BT)
    logits = twin(tokens_BT).logits
    assert (model.logits(output.states_BTD[0]) - logits).abs().max() < 1e-5 * logits.abs().max().clamp(min=1)

    counted = torch.ones_like(tokens_BT, dtype=torch.bool)
    losses = next_token_losses(model, output, tokens_BT, counted)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    mean = losses.main / counted[:, 1:].sum()
    mean.backward()
    expected.backward()
    assert float(mean.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    checked = 0
    for name, parameter in model.named_parameters():
        if not name.startswith("mtp."):
            assert relative(parameter.grad, gradient(twin, name)) < 1e-4, name
            checked += 1
    assert checked == len([n for n, _ in model.named_parameters() if not n.startswith("mtp.")]) > 30


def test_the_routing_that_the_parity_runs_through_is_really_limited():
    """In the parity model the bias and the group limit each change which experts are chosen."""
    model = tiny().eval()
    gate = model.gates()[0]
    x = torch.randn(1, 64, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    scores = F.linear(x[0], gate.weight).sigmoid()
    limited = gate(x).experts_SK.sort(-1).values
    free = (scores + gate.e_score_correction_bias).topk(3).indices.sort(-1).values
    unbiased = gate.select(scores).sort(-1).values
    assert (limited != free).any(-1).float().mean() > 0.1
    assert (limited != unbiased).any(-1).float().mean() > 0.1


def test_the_prediction_module_is_that_of_transformers(tmp_path, tokenizer_json, tokenizer_config):
    """Names, order of the joined halves and the shared ends, through a folder of the released depth."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    small = {"num_hidden_layers": 61, "first_k_dense_replace": 60, "intermediate_size": 8, "vocab_size": 64}
    model = tiny(**small).eval()
    write_hf(model, tmp_path, tokenizer_json, tokenizer_config)
    twin = MtpModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path)).eval()
    length = 17
    tokens_BT = tokens(2, length + 1, vocab_size=64)
    hidden = torch.randn(2, length, model.config.hidden_size, generator=torch.Generator().manual_seed(4))
    cos, sin = model.rotation(length)
    embedded = F.embedding(tokens_BT[:, 1:], model.embed_tokens)
    module = model.mtp[0]
    with torch.no_grad():
        found = model.logits(module.norm(module(hidden, embedded, cos, sin, None, None)[0]))
        expected = twin.shared_head(
            twin.layers[0](
                twin.embed_tokens(tokens_BT[:, 1:]),
                hidden,
                position_embeddings=twin.rotary_emb(hidden, torch.arange(length)[None]),
                attention_mask=torch.full((length, length), -torch.inf).triu(1)[None, None],
                position_ids=None,
                past_key_values=None,
            )
        )
    assert relative(found, expected) < 1e-5
