"""The form in which stages hand models to each other."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import HeadwaterError
from model.checkpoint import CheckpointError, load_model, save_model
from tests.model.tiny import TINY, tiny, tokens


@pytest.fixture
def folder(tmp_path):
    save_model(tiny(), tmp_path / "model")
    return tmp_path / "model"


def test_a_round_trip_keeps_every_bit(folder, tmp_path):
    back = load_model(folder)
    assert back.config == TINY
    expected = tiny().state_dict()
    assert list(back.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in back.state_dict().items())
    assert all(parameter.requires_grad for parameter in back.parameters())
    assert back.logits(back(tokens(1, 9)).states_BTD[0]).requires_grad
    save_model(back, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_context_can_be_extended_when_loading(folder):
    extended = load_model(folder, config=TINY.extended(4.0))
    assert extended.config.max_position_embeddings == 128
    assert extended.layers[0].self_attn.scale != load_model(folder).layers[0].self_attn.scale


def test_precision_is_chosen_when_loading(folder):
    model = load_model(folder, "bf16")
    assert model.precision.name == "bf16"
    assert model.embed_tokens.dtype == torch.float32


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("mtp.0.eh_proj"), r"missing tensors: mtp\.0\.eh_proj"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.2" in name], "and 7 more"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected tensors: extra"),
        (
            lambda t: t.update(lm_head=torch.ones(70, 36)),
            r"lm_head has shape \(70, 36\), the configuration makes it \(71, 36\)",
        ),
        (lambda t: t["norm.weight"].fill_(torch.inf), r"norm\.weight holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    assert isinstance(caught.value, HeadwaterError)


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden": 3}', json.dumps(TINY.to_dict() | {"n_group": 5})])
def test_a_configuration_that_cannot_be_read_is_a_checkpoint_error(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_model(folder)


def test_files_that_are_missing_or_torn_are_a_checkpoint_error(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    for _ in range(2):
        with pytest.raises(CheckpointError, match="not a readable checkpoint"):
            load_model(folder)
        weights.unlink(missing_ok=True)


def test_initialisation_is_the_report_s():
    model = tiny(hidden_size=64, initializer_range=0.006).initialize(7)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            # Four standard errors of a standard deviation, at the number of elements there are.
            error = 4 / (2 * parameter.numel()) ** 0.5
            assert float(parameter.detach().std()) == pytest.approx(0.006, rel=error), name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    assert not any(gate.e_score_correction_bias.any() for gate in model.gates())
    first, again, other = (tiny().initialize(seed) for seed in (7, 7, 8))
    assert torch.equal(first.embed_tokens, again.embed_tokens)
    assert not torch.equal(first.embed_tokens, other.embed_tokens)
