"""Attention: document boundaries, and the absorbed form against the expanded one."""

import pytest
import torch

from model.attention import attend, boundary_mask
from model.mla import MultiHeadLatentAttention
from model.yarn import softmax_scale
from tests.model.tiny import TINY, relative, tiny, tokens


def test_attend_is_softmax_attention_with_values_narrower_or_wider_than_keys():
    generator = torch.Generator().manual_seed(0)
    for width in (4, 9):
        q, k = torch.randn(2, 2, 3, 5, 6, generator=generator)
        v = torch.randn(2, 3, 5, width, generator=generator)
        scores = (q @ k.mT * 0.3).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
        assert torch.allclose(attend(q, k, v, 0.3), scores.softmax(-1) @ v, atol=1e-6)


def test_the_mask_is_causal_inside_segments_and_no_row_is_empty():
    mask = boundary_mask(torch.tensor([[0, 0, 1, 1, -1, -1]]))[0, 0]
    seen = [[j for j in range(6) if mask[i, j]] for i in range(6)]
    assert seen == [[0], [0, 1], [2], [2, 3], [4], [4, 5]]


def test_with_segments_a_sample_is_independent_of_its_neighbours_and_without_them_it_is_not():
    model = tiny().eval()
    tokens_BT = tokens(1, 24)
    segments = torch.tensor([[0] * 7 + [1] * 9 + [2] * 5 + [-1] * 3])
    other = tokens_BT.clone()
    other[0, :7] = (other[0, :7] + 1) % TINY.vocab_size
    other[0, 16:] = (other[0, 16:] + 1) % TINY.vocab_size
    middle = slice(7, 16)
    with torch.no_grad():
        for first, second, equal in (
            (model(tokens_BT, segments), model(other, segments), True),
            (model(tokens_BT), model(other), False),
        ):
            difference = relative(first.states_BTD[0][:, middle], second.states_BTD[0][:, middle])
            assert (difference < 1e-6) == equal, difference
        # Positions are relative, so a sample in the middle of a row is the sample on its own.
        alone = model(tokens_BT[:, middle]).states_BTD[0]
        assert relative(model(tokens_BT, segments).states_BTD[0][:, middle], alone) < 1e-4


def test_nothing_later_is_seen():
    model = tiny().eval()
    tokens_BT = tokens(1, 20)
    other = tokens_BT.clone()
    other[0, 11:] = (other[0, 11:] + 1) % TINY.vocab_size
    with torch.no_grad():
        first, second = model(tokens_BT, mtp=True), model(other, mtp=True)
    assert relative(first.states_BTD[0][:, :11], second.states_BTD[0][:, :11]) < 1e-6
    # The prediction module sees one token more: position i stands for i + 1.
    assert relative(first.states_BTD[1][:, :10], second.states_BTD[1][:, :10]) < 1e-6
    assert relative(first.states_BTD[1][:, 10:11], second.states_BTD[1][:, 10:11]) > 1e-3


@pytest.mark.parametrize("rope_factor", [1.0, 4.0])
def test_absorbed_decoding_gives_what_the_expanded_form_gives(rope_factor):
    model = tiny(rope_factor=rope_factor).eval()
    attention: MultiHeadLatentAttention = model.layers[1].self_attn
    assert attention.scale == softmax_scale(model.config)
    length = 19
    x = torch.randn(3, length, TINY.hidden_size, generator=torch.Generator().manual_seed(1))
    cos, sin = model.rotation(length)
    with torch.no_grad():
        expanded = attention(x, cos, sin)
        cache = attention.latents(x, cos, sin)
        assert cache.shape == (3, length, model.config.latent_dim)
        # The cache is longer than what a row may see, and full of what it must not see.
        for position in range(length):
            query = attention.queries(x[:, position], cos[position], sin[position])
            blocked = (torch.arange(length) > position).expand(3, -1)
            found = attention.absorbed(query, cache, blocked)
            assert relative(found, expanded[:, position]) < 1e-6, position
