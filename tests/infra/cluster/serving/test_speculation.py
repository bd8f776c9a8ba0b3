"""Speculative decoding: expected tokens against simulation, the published speed-up, and where it ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from infra.cluster.serving.speculation import expected_tokens, speculate
from infra.errors import ConfigError
from model.config import ModelConfig
from tests.infra.cluster.serving.h800 import H800
from tests.infra.cluster.serving.units import DECODE_PRODUCTION, DECODE_REPORT

V3 = ModelConfig()


def test_expected_tokens_by_drawing() -> None:
    rng = np.random.default_rng(0)
    for acceptance, drafts in ((0.85, 1), (0.6, 3)):
        accepted = rng.random((200_000, drafts)) < acceptance
        drawn = 1 + np.cumprod(accepted, axis=1).sum(1).mean()
        assert expected_tokens(acceptance, drafts) == pytest.approx(drawn, rel=0.005)
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.0, 4) == 1


def test_the_published_speed_up_at_small_batches() -> None:
    """1.8 times the tokens a second with 85 to 90% of second tokens accepted (report §5.4.3)."""
    for batch in (1, 4, 8):
        low, high = (speculate(V3, H800, DECODE_REPORT, batch, 4096, a) for a in (0.85, 0.9))
        assert low.speedup < high.speedup < high.tokens == pytest.approx(1.9)
        assert 1.65 < low.speedup < 1.8 < 1.05 * high.speedup
        assert low.products < 0.1


def test_it_shrinks_as_products_bind() -> None:
    found = [speculate(V3, H800, DECODE_PRODUCTION, batch, 4096, 0.9) for batch in (4, 16, 64, 256)]
    speedups = [one.speedup for one in found]
    assert speedups == sorted(speedups, reverse=True)
    assert [one.products for one in found] == sorted(one.products for one in found)
    # Twice the products for less than twice the tokens.
    assert found[-1].products > 0.9
    assert speedups[-1] < 1


def test_drafts_cost_their_runs() -> None:
    one, two = (speculate(V3, H800, DECODE_REPORT, 4, 4096, 0.9, drafts=n) for n in (1, 2))
    assert two.draft > one.draft
    assert two.verify > one.verify
    assert one.plain == two.plain
    assert one.draft < 0.1 * one.plain
    assert speculate(V3, H800, DECODE_REPORT, 4, 4096, 0.0).speedup < 1


def test_communication_grows_with_the_tokens() -> None:
    without = speculate(V3, H800, DECODE_REPORT, 64, 4096, 0.85)
    with_it = speculate(V3, H800, DECODE_REPORT, 64, 4096, 0.85, communication=True)
    assert with_it.plain > without.plain
    assert with_it.draft > without.draft
    assert with_it.speedup < without.speedup


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match="no MTP module"):
        speculate(replace(V3, num_nextn_predict_layers=0), H800, DECODE_REPORT, 1, 100, 0.9)
    with pytest.raises(ConfigError, match=r"acceptance is 1\.2"):
        speculate(V3, H800, DECODE_REPORT, 1, 100, 1.2)
    with pytest.raises(ConfigError, match="drafts is 0"):
        speculate(V3, H800, DECODE_REPORT, 1, 100, 0.9, drafts=0)
