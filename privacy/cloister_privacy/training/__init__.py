"""Differentially private training: Poisson sampling, clipping, noise, checkpoints. Its caller charges."""

from cloister_privacy.training.engine import train
from cloister_privacy.training.guard import guard

__all__ = ["guard", "train"]
