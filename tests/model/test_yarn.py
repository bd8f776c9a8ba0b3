"""Rotary frequencies and YaRN at the published points."""

import math

import pytest
import torch

from model.config import ModelConfig
from model.yarn import (
    correction_range,
    inverse_frequencies,
    rotate,
    rotation_table,
    softmax_scale,
)
from tests.model.tiny import TINY

V3 = ModelConfig(rope_factor=40.0)


def test_the_published_points():
    assert correction_range(V3) == (10, 23)
    assert softmax_scale(ModelConfig()) == pytest.approx(0.072169, abs=5e-7)
    assert softmax_scale(V3) == pytest.approx(0.135234, abs=5e-7)
    assert math.sqrt(softmax_scale(V3) / softmax_scale(ModelConfig())) == pytest.approx(1.368888, abs=5e-7)
    assert V3.max_position_embeddings == 163840


def test_fast_pairs_keep_their_frequency_and_slow_ones_are_interpolated():
    plain, extended = inverse_frequencies(ModelConfig()), inverse_frequencies(V3)
    assert torch.equal(extended[:11], plain[:11])
    assert torch.allclose(extended[23:], plain[23:] / 40, rtol=1e-6)
    between = (extended / plain)[11:23]
    assert (between.diff() < 0).all()
    # Halfway through the ramp it is halfway between the two.
    assert float(between[16 - 11]) == pytest.approx(1 - 6 / 13 * (1 - 1 / 40), rel=1e-6)
    assert float(plain[1]) == pytest.approx(10000 ** (-1 / 32), rel=1e-6)


def test_rotation_is_of_pairs_and_depends_on_distance_alone():
    cos, sin = rotation_table(TINY, 40)
    x = torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    turned = rotate(x, cos[3], sin[3])
    first, second = 3.0, 3.0 * 10000 ** (-1 / 4)
    expected = [math.cos(first), math.sin(first), -2 * math.sin(second), 2 * math.cos(second)]
    assert turned[:4].tolist() == pytest.approx(expected, abs=1e-6)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    near = rotate(q, cos[9], sin[9]) @ rotate(k, cos[4], sin[4])
    far = rotate(q, cos[35], sin[35]) @ rotate(k, cos[30], sin[30])
    assert float(near) == pytest.approx(float(far), rel=1e-4)
    assert float(near) != pytest.approx(float(q @ k), rel=1e-2)


@pytest.mark.parametrize("content", [5, 6])
def test_the_end_of_a_wider_dimension_is_turned_and_the_gradient_turned_back(content):
    cos, sin = (table[:4].unsqueeze(-2) for table in rotation_table(TINY, 4))
    generator = torch.Generator().manual_seed(1)
    x, aim = (torch.randn(2, 4, 3, content + 8, generator=generator) for _ in range(2))
    leaf = x.clone().requires_grad_()
    found = rotate(leaf, cos, sin)
    (found * aim).sum().backward()
    even, odd = x[..., content:].unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    assert torch.allclose(found, torch.cat((x[..., :content], pairs), dim=-1), atol=1e-6)
    # A turn is orthogonal: what goes back is turned by the opposite angle.
    assert torch.allclose(rotate(aim, cos, -sin), leaf.grad, atol=1e-6)
