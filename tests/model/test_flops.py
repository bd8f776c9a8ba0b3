"""Operations against those that torch counts in a model that exists, and the peaks of machines."""

from dataclasses import replace

import pytest
import torch

from infra.cluster.counts.accounting import training_operations
from model.flops import peak_flops
from tests.model.tiny import TINY, tiny


def test_operations_are_those_that_the_matrix_products_do():
    """Counted by torch itself over a forward and a backward pass, attention apart."""
    from torch.utils.flop_counter import FlopCounterMode

    model, length = tiny(num_nextn_predict_layers=0).train(), 16
    tokens = torch.randint(TINY.vocab_size, (2, length))
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens).states_BTD[0]).sum().backward()
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    counted = (counter.get_total_flops() - attention) / tokens.numel()
    expected = training_operations(replace(TINY, num_nextn_predict_layers=0), length)
    assert counted == pytest.approx(expected.total - expected.attention_core, rel=0.02)


def test_no_peak_is_known_for_a_cpu():
    assert peak_flops(torch.device("cpu"), "bf16") == 0.0


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12, 1979e12),
        ("NVIDIA H100 PCIe", 756e12, 1513e12),
        ("NVIDIA H800", 989.5e12, 1979e12),
        ("NVIDIA H200", 989.5e12, 1979e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 0.0),
        ("NVIDIA GeForce RTX 4090", 0.0, 0.0),
    ],
)
def test_peaks_are_those_of_the_data_sheets(monkeypatch, name, bf16, fp8):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda", 0)
    assert [peak_flops(gpu, precision) for precision in ("bf16", "fp8", "fp32")] == [bf16, fp8, 0.0]
