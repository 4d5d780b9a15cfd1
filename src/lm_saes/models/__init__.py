"""Sparse dictionaries: parameters, equations, folding, files. A variant is one final class in one file and one entry here."""

from lm_saes.config import SAEConfig
from lm_saes.models.sae import SparseAutoEncoder
from lm_saes.models.sparse_dictionary import Forward, SparseDictionary

VARIANTS = {"sae": (SAEConfig, SparseAutoEncoder)}
"""Configuration and class by `sae_type`."""

__all__ = ["VARIANTS", "Forward", "SparseAutoEncoder", "SparseDictionary"]
