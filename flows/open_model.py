"""Opening a checkpoint for use, whatever stage made it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.artifact import Artifact
from infra.errors import HeadwaterError
from infra.store import Store
from infra.verify import require_unchanged

if TYPE_CHECKING:
    from data.chat import ChatTokenizer
    from model.transformer import Transformer


def open_model(artifact: Artifact) -> tuple[Transformer, ChatTokenizer]:
    """Model and tokenizer of a training stage's checkpoint or of an exported `deepseek_v3` folder.

    HeadwaterError when the artifact holds no model, CorruptArtifact when its files are not what was
    published; CheckpointError when its tensors do not fit.
    """
    from data.chat import ChatTokenizer
    from model.checkpoint import load_model
    from model.device import pick_device
    from model.hf import read_hf

    if "tokenizer.json" not in artifact.names() or "config.json" not in artifact.names():
        raise HeadwaterError(
            f"{artifact.ref} holds no model: give a checkpoint (a run's sft or grpo node, say) or an export"
        )
    # A flipped bit in a weight gives answers all the same.
    require_unchanged(Store().around(artifact), artifact)
    tokenizer = ChatTokenizer(artifact.file("tokenizer.json"))
    model = read_hf(artifact.path) if artifact.stage == "export" else load_model(artifact.path)
    require_fit(artifact.ref, model, tokenizer)
    return model.to(pick_device()), tokenizer


def require_fit(ref: str, model: Transformer, tokenizer: ChatTokenizer) -> None:
    """HeadwaterError when the tokenizer has ids that the model does not know."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise HeadwaterError(
            f"{ref}: tokenizer.json has {tokenizer.vocab_size} tokens and the model's embedding "
            f"{model.config.vocab_size} rows: they do not belong together"
        )
