"""Knowledge distillation: what is asked for, terms on features, logits kept on disk."""

from .cache import CacheError, LogitCache, cache_key
from .config import Distillation
from .features import FeatureTerm, pair_features

__all__ = ["CacheError", "Distillation", "FeatureTerm", "LogitCache", "cache_key", "pair_features"]
