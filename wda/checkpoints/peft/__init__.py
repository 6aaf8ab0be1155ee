"""Adapters as Hugging Face PEFT writes them."""

from wda.checkpoints.peft.layout import MergedPeftCheckpoint, PeftCheckpoint

__all__ = ["MergedPeftCheckpoint", "PeftCheckpoint"]
