"""Adapters of image and video models, and the pipelines that diffusers puts such models into."""

from wda.checkpoints.diffusion.layouts import DiffusersCheckpoint, KohyaCheckpoint
from wda.checkpoints.diffusion.pipeline import PipelineCheckpoint

__all__ = ["DiffusersCheckpoint", "KohyaCheckpoint", "PipelineCheckpoint"]
