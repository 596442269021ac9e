"""Differentially private training: Poisson sampling, clipping, noise, checkpoints. Its caller charges."""

from cloister_privacy.training.adapters import LoRALinear, merged, with_lora
from cloister_privacy.training.clipping import ClippedGradients
from cloister_privacy.training.engine import train
from cloister_privacy.training.guard import guard
from cloister_privacy.training.sampler import PoissonSampler, UserSampler, sampler_of
from cloister_privacy.training.steps import GUARD_EXAMPLES, PrivateSteps

__all__ = [
    "GUARD_EXAMPLES",
    "ClippedGradients",
    "LoRALinear",
    "PoissonSampler",
    "PrivateSteps",
    "UserSampler",
    "guard",
    "merged",
    "sampler_of",
    "train",
    "with_lora",
]
