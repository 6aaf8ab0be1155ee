"""Adapters as Hugging Face PEFT writes them."""

from wda.checkpoints.peft.layout import PeftCheckpoint

__all__ = ["PeftCheckpoint"]
