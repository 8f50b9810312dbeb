"""How models are trained: what the training stages have in common."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainingConfig(BaseModel):
    """How lists become updates, in every training stage alike."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epochs: float = Field(1.0, ge=0, description="Passes over the lists; a fraction stops early, 0 skips the stage.")
    batch_lists: int = Field(16, ge=1, description="Lists per optimiser step.")
    micro_tokens: int = Field(
        8192,
        ge=1,
        description="Tokens in memory at once (about 0.7 GB for 6 layers of 384), in parts of 2048 at most; what "
        "does not fit of a list is computed twice. Same gradient for any but for the rounding, and for dropout, "
        "which falls otherwise.",
    )
    retriever_rate: float = Field(5e-5, ge=0, description="Peak learning rate of the retriever.")
    reranker_rate: float = Field(1e-4, ge=0, description="Peak learning rate of the re-ranker's encoder.")
    head_rate: float = Field(1e-3, ge=0, description="Peak learning rate of the re-ranker's linear layer.")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Rate after its warm-up.")
    warmup_share: float = Field(0.1, ge=0, le=1, description="Share of the steps in which the rate rises from 0.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW decay, on matrices only.")
    clip_norm: float = Field(1.0, gt=0, description="Limit of the gradient's norm.")
    clip: Literal["global", "per_model"] = Field(
        "global", description="Whether the limit holds for both models together (paper) or for each."
    )
    precision: Literal["auto", "fp32"] = Field(
        "auto", description='"auto": bfloat16 products where the processor has them, weights and losses in float32.'
    )
    grad_keep: float = Field(
        1.0,
        gt=0,
        le=1,
        description="For long lists: 1 carries all of the loss's gradient back; 0.99 that of the candidates that "
        "hold 99 % of its squares, and of a sample that stands for the others.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Keep only each layer's input and compute the rest again: less memory, a third slower."
    )
    tensorboard: bool = Field(
        False, description="Write the numbers of log.jsonl for TensorBoard too (needs the extra `tensorboard`)."
    )
