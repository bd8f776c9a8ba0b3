"""The model card that travels with an exported checkpoint: what it is, from what, and how it scores."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import yaml

from infra import lineage
from infra.artifact import Artifact
from infra.store import Store

if TYPE_CHECKING:
    from model.transformer import Transformer

# A data set of the hub as ingest takes it; a folder (datasets:./mine) is nobody else's.
_HUB = re.compile(r"datasets:([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)")
_SCORES = ("pass_at_1", "pass_at_1_system", "format", "reasoned", "text_loss", "bits_per_byte")


def model_card(name: str, checkpoint: Artifact, evaluations: Sequence[Artifact], model: Transformer) -> str:
    """Markdown with a YAML header as the Hugging Face hub reads it; depends on contents alone.

    It names no licence of the model: what the documents' licences mean for it is for people to say.
    """
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
    data, names = _training_data(checkpoint)
    if names:
        header["datasets"] = sorted(names)
    if metrics:
        task = {"type": "text-generation"}
        dataset = {"name": "held-out problems and text of this run", "type": "headwater"}
        results = [{"task": task, "dataset": dataset, "metrics": metrics}]
        header["model-index"] = [{"name": name, "results": results}]
    rows = "\n".join(f"| {m['type']} | {m['value']} |" for m in metrics)
    documents = "\n".join(
        f"| {_cell(source)} | {sum(found.values()):,} | {_cell(', '.join(sorted(found)))} |"
        for source, found in sorted(data.items())
    )
    told = f"\n| source | documents | licences |\n|---|---|---|\n{documents}\n" if data else "\nNot known.\n"
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

## Training data
{told}
## Scores
{table}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""


def _training_data(checkpoint: Artifact) -> tuple[dict[str, Mapping[str, int]], set[str]]:
    """Kind of source -> licence -> documents that were read, of every ingested corpus behind a checkpoint;
    and the names of data sets on the hub among them.

    Empty where no corpus is left in the store: a checkpoint can be exported without its past.
    """
    import pyarrow.parquet

    store = Store().around(checkpoint)
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    names: set[str] = set()
    for node in lineage.back(store, checkpoint).nodes.values():
        if node.stage != "ingest" or node.record is None:
            continue
        corpus = store.artifact(node.stage, node.id)
        given = str(node.record.config["placement"].get("sources", "")).split(",")
        hub = (_HUB.fullmatch(one.strip()) for one in given)
        names |= {match[1] for match in hub if match}
        for name in corpus.names("documents/*.parquet"):
            table = pyarrow.parquet.read_table(corpus.file(name), columns=["source", "licence"])
            for row in table.group_by(["source", "licence"]).aggregate([([], "count_all")]).to_pylist():
                counts[row["source"]][row["licence"] or "unknown"] += row["count_all"]
    return dict(counts), names


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
