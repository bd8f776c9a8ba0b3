"""The model card that travels with an exported checkpoint: what it is, from what, and how it scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml

from infra.artifact import Artifact

if TYPE_CHECKING:
    from model.transformer import Transformer

_SCORES = ("pass_at_1", "pass_at_1_system", "format", "reasoned", "text_loss", "bits_per_byte")


def model_card(name: str, checkpoint: Artifact, evaluations: Sequence[Artifact], model: Transformer) -> str:
    """Markdown with a YAML header as the Hugging Face hub reads it; depends on contents alone."""
    config = model.config
    mine = [e for e in evaluations if any(ref.digest == checkpoint.digest for ref in e.record.inputs)]
    metrics = [
        {"type": key, "value": round(float(evaluation.metrics[key]), 4)}
        for evaluation in mine
        for key in _SCORES
        if key in evaluation.metrics
    ]
    header: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["deepseek_v3", "headwater", "mla", "mixture-of-experts"],
    }
    if metrics:
        task = {"type": "text-generation"}
        dataset = {"name": "held-out problems and text of this run", "type": "headwater"}
        results = [{"task": task, "dataset": dataset, "metrics": metrics}]
        header["model-index"] = [{"name": name, "results": results}]
    rows = "\n".join(f"| {m['type']} | {m['value']} |" for m in metrics)
    table = f"\n| figure | value |\n|---|---|\n{rows}\n" if rows else "\nNo evaluation was given.\n"
    return f"""---
{yaml.safe_dump(header, sort_keys=True).strip()}
---

# {name}

A `deepseek_v3` model trained from scratch with Headwater: Multi-head Latent Attention, DeepSeekMoE and
multi-token prediction; {config.num_hidden_layers} layers of width {config.hidden_size},
{config.n_routed_experts} routed experts ({config.num_experts_per_tok} a token), vocabulary
{config.vocab_size}, context {config.max_position_embeddings} tokens.

Made from the `{checkpoint.stage}` checkpoint with payload digest `{checkpoint.digest}`. Its lineage back to
the source documents is in `logs/provenance.json`, an in-toto statement with SLSA provenance.

## Scores
{table}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""
