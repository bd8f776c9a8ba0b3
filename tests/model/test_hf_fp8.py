"""Published folders in bfloat16 and in FP8 blocks, decoded here a second time."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import CheckpointError
from model.hf import read_hf, write_weights
from tests.model.tiny import tiny

# More than a block of 128, and ragged, in both directions.
WIDE = {"hidden_size": 144, "intermediate_size": 200, "q_lora_rank": 130}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def export(tmp_path):
    def run(model, weights, max_shard_bytes=10**9):
        write_weights(model, tmp_path / weights, 0, 1, max_shard_bytes, weights)
        return tmp_path / weights

    return run


def tensors(folder):
    """Every tensor of a folder, and which file it is in."""
    held, placed = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        found = load_file(file)
        held |= found
        placed |= dict.fromkeys(found, file.name)
    return held, placed


def decode(codes, factors):
    """Codes times the factor of their block, one row of blocks at a time (released README_WEIGHTS)."""
    out = codes.float()
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            out[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= factors[i, j]
    return out


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000])
def test_projections_are_codes_with_factors_and_the_rest_is_bfloat16(export, max_shard_bytes):
    model = tiny(**WIDE)
    folder = export(model, "fp8", max_shard_bytes)
    held, placed = tensors(folder)
    plain, _ = tensors(export(model, "float32"))
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    codes = {name for name, tensor in held.items() if tensor.dtype == torch.float8_e4m3fn}
    assert codes == {n for n in plain if "_proj" in n and "eh_proj" not in n}
    for name, weight in plain.items():
        if name not in codes:
            kept = weight if name.endswith("e_score_correction_bias") else weight.bfloat16()
            assert held[name].dtype == kept.dtype, name
            assert torch.equal(held[name], kept), name
            continue
        factors = held[f"{name}_scale_inv"]
        assert factors.dtype == torch.float32
        assert placed[f"{name}_scale_inv"] == placed[name]
        # Half a step of three bits of mantissa, or of the smallest code where that is more.
        error = (decode(held[name], factors) - weight).abs()
        assert (error <= weight.abs() / 16 + weight.abs().max() / 448 / 2**10).all(), name
        assert error.max() > 0
    assert set(held) == set(plain) | {f"{name}_scale_inv" for name in codes}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        stated = json.loads(index.read_text())
        main = {name for name, file in placed.items() if file.startswith("model-")}
        assert set(stated["weight_map"]) == main
        size = sum(held[name].numel() * held[name].element_size() for name in main)
        assert stated["metadata"]["total_size"] == size


def test_what_is_read_is_the_decoded_weights(export):
    model = tiny(**WIDE)
    folder = export(model, "fp8", 60_000)
    held, _ = tensors(folder)
    back = read_hf(folder)
    assert back.config == model.config
    up = decode(held[UP], held[f"{UP}_scale_inv"])
    assert torch.equal(back.layers[0].mlp.gate_up_proj.detach()[200:], up)
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    kv = back.layers[1].self_attn.kv_a_proj.detach()
    assert torch.equal(kv, decode(held[name], held[f"{name}_scale_inv"]))
    # Quantising what was quantised changes nothing: the largest value of a block is its own code.
    again, _ = tensors(export(back, "fp8", 60_000))
    assert all(torch.equal(again[n].float(), held[n].float()) for n in held if not n.endswith("_scale_inv"))


def test_bfloat16_comes_back_rounded(export):
    model = tiny()
    folder = export(model, "bfloat16")
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    back = read_hf(folder).state_dict()
    for name, tensor in model.state_dict().items():
        exact = name.endswith("e_score_correction_bias")
        assert torch.equal(back[name], tensor if exact else tensor.bfloat16().float()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}_scale_inv"), f"missing tensors: {UP}_scale_inv$"),
        (lambda t: t.update({UP: torch.ones(200, 144)}), f"unexpected tensors: {UP}_scale_inv$"),
        (
            lambda t: t.update({f"{UP}_scale_inv": torch.ones(1, 2)}),
            rf"{UP}_scale_inv has shape \(1, 2\), the configuration makes it \(2, 2\)",
        ),
        (
            lambda t: t[f"{UP}_scale_inv"].fill_(torch.inf),
            f"{UP}_scale_inv holds values that are not finite",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int32)}),
            "lm_head.weight is stored as I32",
        ),
        (
            lambda t: t.update({f"{UP}_scale_inv": torch.ones(2, 2, dtype=torch.float8_e8m0fnu)}),
            f"{UP}_scale_inv is stored as F8_E8M0",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(144).to(torch.float8_e4m3fn)}),
            "model.norm.weight is stored as F8_E4M3",
        ),
    ],
)
def test_what_does_not_fit_is_named(export, change, message):
    folder = export(tiny(**WIDE), "fp8")
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_hf(folder)


def test_a_weight_that_is_not_finite_is_not_quantised(export):
    model = tiny()
    with torch.no_grad():
        model.layers[0].mlp.down_proj[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.down_proj.weight holds values"):
        export(model, "fp8")
    with pytest.raises(CheckpointError, match="weights is 'int4': it must be one of float32, bfloat16, fp8"):
        export(model, "int4")
