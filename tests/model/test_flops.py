"""Parameter and operation counts against the report's figures and against models that exist."""

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.flops import attention_flops, peak_flops, sizes, training_flops
from model.transformer import Transformer, count_parameters
from tests.model.tiny import TINY, tiny

V3 = ModelConfig()


def test_the_reports_model_has_its_published_sizes():
    size = sizes(V3)
    assert size.total == 671_026_404_352
    assert size.active == 36_625_603_584  # the report's 37B
    assert size.mtp == 11_610_067_968
    with torch.device("meta"):
        model = Transformer(V3)
    main = {name: p.numel() for name, p in model.named_parameters() if not name.startswith("mtp.")}
    assert sum(main.values()) == size.total
    assert count_parameters(model) - size.total == size.mtp
    # The published files hold the routing biases of 58 layers too, which are buffers.
    biases = sum(b.numel() for name, b in model.named_buffers() if not name.startswith("mtp."))
    assert size.total + biases == 671_026_419_200


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_k_dense_replace": 0, "n_shared_experts": 0},
        {"first_k_dense_replace": 3, "num_nextn_predict_layers": 2},
    ],
)
def test_sizes_are_those_of_a_model_that_exists(changes):
    config = replace(TINY, **changes)
    with torch.device("meta"):
        model = Transformer(config)
    size = sizes(config)
    assert size.total + size.mtp == count_parameters(model)


def test_a_token_of_the_reports_model_takes_250_gflop():
    assert training_flops(V3, 4096) / 1e9 == pytest.approx(250.5, abs=0.05)
    assert 3 * attention_flops(V3, 4096) / 1e9 == pytest.approx(30.7, abs=0.05)
    # One module more: its active weights and the shared head once more.
    assert training_flops(V3, 4096, mtp=True) / training_flops(V3, 4096) == pytest.approx(1.0407, abs=2e-4)


def test_operations_are_those_that_the_matrix_products_do():
    """Counted by torch itself over a forward and a backward pass, attention apart."""
    from torch.utils.flop_counter import FlopCounterMode

    model, length = tiny(num_nextn_predict_layers=0).train(), 16
    tokens = torch.randint(TINY.vocab_size, (2, length))
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens).states_BTD[0]).sum().backward()
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    counted = (counter.get_total_flops() - attention) / tokens.numel()
    expected = training_flops(replace(TINY, num_nextn_predict_layers=0), length)
    expected -= 3 * attention_flops(TINY, length)
    assert counted == pytest.approx(expected, rel=0.02)


def test_no_peak_is_known_for_a_cpu():
    assert peak_flops(torch.device("cpu"), "bf16") == 0.0
