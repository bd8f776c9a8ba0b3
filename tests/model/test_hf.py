"""The published `deepseek_v3` folder: what transformers makes of it, and the way back."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import CheckpointError
from model.engine.engine import Engine
from model.engine.request import Request
from model.engine.sampling import Sampling
from model.hf import read_hf, write_hf
from model.transformer import Transformer
from tests.model.tiny import TINY, tiny, tokens


@pytest.fixture
def export(tmp_path, tokenizer_json, tokenizer_config):
    """Exports a model into a fresh folder."""

    def run(model: Transformer, name: str = "export", max_shard_bytes: int = 10**9):
        write_hf(model, tmp_path / name, tokenizer_json, tokenizer_config, max_shard_bytes)
        return tmp_path / name

    return run


def same_weights(a: Transformer, b: Transformer) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


def load(folder, caplog):
    """What transformers makes of a folder, its report, and what it warned of."""
    import transformers

    transformers.utils.logging.enable_propagation()
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    finally:
        transformers.utils.logging.disable_propagation()
    return model, report, [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def load_cleanly(folder, caplog):
    """What transformers makes of a folder, without a word."""
    model, report, warned = load(folder, caplog)
    assert not any(report.values()), report
    assert warned == []
    return model


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000])
@pytest.mark.parametrize("rope_factor", [1.0, 4.0])
def test_transformers_loads_it_cleanly_and_computes_the_same(export, caplog, rope_factor, max_shard_bytes):
    model = tiny(rope_factor=rope_factor).eval()
    folder = export(model, max_shard_bytes=max_shard_bytes)
    assert (folder / "model.safetensors.index.json").exists() == (max_shard_bytes < 10**9)
    twin = load_cleanly(folder, caplog)
    assert type(twin).__name__ == "DeepseekV3ForCausalLM"
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    assert (twin.config.bos_token_id, twin.config.eos_token_id) == (0, 1)
    assert twin.config.max_position_embeddings == 32 * rope_factor
    tokens_BT = tokens(2, model.config.max_position_embeddings)
    with torch.no_grad():
        ours = model.logits(model(tokens_BT).states_BTD[0])
        assert (ours - twin(tokens_BT).logits).abs().max() < 1e-5 * ours.abs().max()


def test_transformers_answers_as_the_engine_does(export, caplog):
    model = tiny(vocab_size=64).eval()
    folder = export(model)
    twin = load_cleanly(folder, caplog)
    prompt = (0, 9, 33, 21)
    answer = twin.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20, do_sample=False
    )
    ours = Engine(model, [1]).generate([Request(prompt, Sampling(max_tokens=20, temperature=0.0))])
    assert answer[0, len(prompt) :].tolist() == ours[0].tokens
    # The end token is the configuration's: with it in reach, both stop at it.
    with torch.no_grad():
        model.lm_head[1] = model.lm_head[ours[0].tokens[5]] * 1.5
    twin = load_cleanly(export(model, "ending"), caplog)
    answer = twin.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20, do_sample=False
    )
    ours = Engine(model, [1]).generate([Request(prompt, Sampling(max_tokens=20, temperature=0.0))])
    assert ours[0].finish == "stop"
    assert answer[0, len(prompt) :].tolist() == ours[0].tokens


def test_tokenizer_is_the_one_given(export, tokenizer_json):
    import transformers

    folder = export(tiny(vocab_size=64))
    assert (folder / "tokenizer.json").read_bytes() == tokenizer_json.read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("AB<eos>").input_ids == [35, 36, 1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.decode([35, 36]) == "AB"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000, 1])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_factor": 4.0, "mscale": 0.7, "beta_fast": 20.0},
        {"num_nextn_predict_layers": 0},
        {"num_nextn_predict_layers": 2},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 3},
    ],
)
def test_a_round_trip_keeps_every_bit_and_every_field(export, changes, max_shard_bytes):
    model = tiny(**changes)
    back = read_hf(export(model, max_shard_bytes=max_shard_bytes))
    assert back.config == model.config
    assert same_weights(model, back)


def test_the_layout_is_the_published_one(export):
    folder = export(tiny())
    names = set(load_file(folder / "model.safetensors")) | set(load_file(folder / "mtp.safetensors"))
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_b_proj", "o_proj"]
    attention += ["kv_a_proj_with_mqa", "kv_a_layernorm"]
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    expected |= {f"model.layers.3.{leaf}.weight" for leaf in ("enorm", "hnorm", "eh_proj", "embed_tokens")}
    expected |= {"model.layers.3.shared_head.norm.weight", "model.layers.3.shared_head.head.weight"}
    for layer in range(4):
        p = f"model.layers.{layer}."
        expected |= {f"{p}self_attn.{leaf}.weight" for leaf in attention}
        expected |= {f"{p}input_layernorm.weight", f"{p}post_attention_layernorm.weight"}
        mlps = ["mlp."]
        if layer > 0:
            expected |= {f"{p}mlp.gate.weight", f"{p}mlp.gate.e_score_correction_bias"}
            mlps = ["mlp.shared_experts.", *(f"mlp.experts.{e}." for e in range(12))]
        expected |= {f"{p}{mlp}{leaf}_proj.weight" for mlp in mlps for leaf in ("gate", "up", "down")}
    assert names == expected
    assert not any(name.startswith("model.layers.3.") for name in load_file(folder / "model.safetensors"))


def test_at_the_released_depth_the_mtp_layer_is_in_the_index_where_transformers_skips_it(export, caplog):
    small = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 4, "vocab_size": 16}
    model = tiny(num_hidden_layers=61, first_k_dense_replace=60, **small)
    folder = export(model, max_shard_bytes=200_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert "model.layers.61.eh_proj.weight" in index["weight_map"]
    assert not list(folder.glob("mtp*"))
    load_cleanly(folder, caplog)
    assert same_weights(model, read_hf(folder))


def test_in_the_main_set_of_another_depth_they_would_be_reported_at_every_load(export, caplog):
    folder = export(tiny())
    edit(folder / "model.safetensors", lambda t: t.update(load_file(folder / "mtp.safetensors")))
    _, report, warned = load(folder, caplog)
    assert "model.layers.3.eh_proj.weight" in report["unexpected_keys"]
    assert any("model.layers.3.eh_proj.weight" in message for message in warned)


def test_shards_respect_their_size_and_the_index_lists_every_tensor(export):
    model = tiny()
    folder = export(model, max_shard_bytes=40_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert [s.name for s in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    total = 0
    for shard in shards:
        sizes = [t.numel() * t.element_size() for t in load_file(shard).values()]
        assert sum(sizes) <= 40_000
        total += sum(sizes)
        assert {n for n, f in index["weight_map"].items() if f == shard.name} == set(load_file(shard))
    assert index["metadata"]["total_size"] == total


def test_bytes_depend_on_the_model_alone(export):
    first, second = export(tiny(), "a", 40_000), export(tiny(), "b", 40_000)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_an_export_over_another_one_leaves_nothing_of_it(export):
    export(tiny(), "same", 40_000)
    folder = export(tiny(seed=5, num_nextn_predict_layers=0), "same")
    assert [path.name for path in sorted(folder.glob("*.safetensors*"))] == ["model.safetensors"]
    assert same_weights(tiny(seed=5, num_nextn_predict_layers=0), read_hf(folder))


def test_reads_what_transformers_saves(export, caplog, tmp_path):
    model = tiny(rope_factor=4.0, num_nextn_predict_layers=0)
    twin = load_cleanly(export(model), caplog)
    twin.save_pretrained(tmp_path / "saved")
    back = read_hf(tmp_path / "saved")
    assert back.config == model.config
    assert same_weights(model, back)


def test_reads_bfloat16_and_the_copies_need_not_be_there(export):
    model = tiny()
    folder = export(model)
    for file in ("model.safetensors", "mtp.safetensors"):
        held = load_file(folder / file)
        held.pop("model.layers.3.embed_tokens.weight", None)
        held.pop("model.layers.3.shared_head.head.weight", None)
        save_file({name: tensor.bfloat16() for name, tensor in held.items()}, folder / file)
    back = read_hf(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor.bfloat16().float()), name


def test_groups_of_one_expert_become_no_groups_with_the_same_logits(export, caplog):
    model = tiny(n_group=12, topk_group=3).eval()
    folder = export(model)
    twin = load_cleanly(folder, caplog)
    tokens_BT = tokens(2, 30)
    with torch.no_grad():
        ours = model.logits(model(tokens_BT).states_BTD[0])
        assert (ours - twin(tokens_BT).logits).abs().max() < 1e-5 * ours.abs().max()
        back = read_hf(folder).eval()
        assert torch.equal(back.logits(back(tokens_BT).states_BTD[0]), ours)


def edit(file, change):
    """Rewrite a weight file or a JSON file through `change`, which alters what it holds in place."""
    if file.suffix == ".json":
        held = json.loads(file.read_text())
        change(held)
        file.write_text(json.dumps(held))
    else:
        held = load_file(file)
        change(held)
        save_file(held, file)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", lambda t: t.pop("lm_head.weight"), "missing tensors: lm_head.weight$"),
        (
            "model.safetensors",
            lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(2)}),
            "unexpected tensors: model.layers.1.self_attn.rotary_emb.inv_freq",
        ),
        (
            "model.safetensors",
            lambda t: t.update({"model.norm.weight": torch.ones(35)}),
            r"model.norm.weight has shape \(35,\), the configuration makes it \(36,\)",
        ),
        (
            "model.safetensors",
            lambda t: t["model.layers.2.mlp.experts.7.up_proj.weight"].fill_(torch.nan),
            "model.layers.2.mlp.experts.7.up_proj.weight holds values that are not finite",
        ),
        (
            "mtp.safetensors",
            lambda t: t.pop("model.layers.3.eh_proj.weight"),
            "num_nextn_predict_layers to 0",
        ),
        (
            "mtp.safetensors",
            lambda t: t["model.layers.3.shared_head.head.weight"].mul_(2),
            "shared_head.head.weight differs from the main model's",
        ),
        ("config.json", lambda c: c.update(scoring_func="softmax"), "scoring_func is 'softmax'"),
        ("config.json", lambda c: c.update(model_type="llama"), "model_type is 'llama'"),
        (
            "config.json",
            lambda c: c.update(quantization_config={"quant_method": "awq"}),
            "quantization_config.quant_method is 'awq'",
        ),
        ("config.json", lambda c: c.pop("kv_lora_rank"), "no value for kv_lora_rank"),
        ("config.json", lambda c: c.update(q_lora_rank=None), "no value for q_lora_rank"),
        ("config.json", lambda c: c.update(num_key_value_heads=1), "num_key_value_heads is 1"),
        ("config.json", lambda c: c.update(rms_norm_eps=1e-5), "rms_norm_eps is 1e-05"),
        ("config.json", lambda c: c.update(topk_group=9), "topk_group"),
        ("config.json", lambda c: c["rope_scaling"].update(type="linear"), "rope_scaling.type is 'linear'"),
        ("config.json", lambda c: c["rope_scaling"].update(mscale_all_dim=0.5), "mscale_all_dim"),
        ("config.json", lambda c: c["rope_scaling"].pop("factor"), "rope_scaling has no value for factor"),
        ("config.json", lambda c: c["rope_scaling"].update(truncate=False), "rope_scaling.truncate is False"),
    ],
)
def test_what_does_not_fit_is_named(export, file, change, message):
    folder = export(tiny(rope_factor=4.0))
    edit(folder / file, change)
    with pytest.raises(CheckpointError, match=message):
        read_hf(folder)


def test_files_that_cannot_be_read_are_named(export):
    folder = export(tiny(), max_shard_bytes=40_000)
    second = sorted(folder.glob("model-*"))[1]
    second.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=second.name):
        read_hf(folder)
    second.unlink()
    with pytest.raises(CheckpointError, match=second.name):
        read_hf(folder)
    edit(folder / "model.safetensors.index.json", lambda index: index.pop("weight_map"))
    with pytest.raises(CheckpointError, match="weight_map does not map"):
        read_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        read_hf(folder)


def test_what_has_no_published_form_is_refused_before_anything_is_written(
    tmp_path, tokenizer_json, tokenizer_config
):
    cases = [
        ({"rms_norm_eps": 1e-5}, {}, {}, "model.rms_norm_eps is 1e-05"),
        ({"n_shared_experts": 0}, {}, {}, "model.n_shared_experts is 0"),
        ({}, {"eos_token": "<stop>"}, {}, "eos_token of the tokenizer configuration is '<stop>'"),
        ({}, {}, {"max_shard_bytes": 0}, "max_shard_bytes is 0"),
    ]
    for changes, tokens_changed, arguments, message in cases:
        with pytest.raises(CheckpointError, match=message):
            write_hf(
                Transformer(replace(TINY, **changes)),
                tmp_path / "out",
                tokenizer_json,
                tokenizer_config | tokens_changed,
                **arguments,
            )
    assert not (tmp_path / "out").exists()
