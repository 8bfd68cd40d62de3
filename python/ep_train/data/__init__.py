"""Image classification datasets as uint8 tensors, and the batches made from them.

>>> from ep_train.data import Batches, load_dataset
>>> digits = load_dataset("digits", train_limit=1000)
>>> batches = Batches(digits, "train", batch_size=64, seed=0)
>>> for images, labels in batches.epoch(0):
...     pass
"""

from ep_train.data.dataset import DataError, Dataset
from ep_train.data.loader import Batches, default_normalise
from ep_train.data.registry import DATASET_SPECS, default_cache_dir, load_dataset

__all__ = [
    "DATASET_SPECS",
    "Batches",
    "DataError",
    "Dataset",
    "default_cache_dir",
    "default_normalise",
    "load_dataset",
]
