"""A teacher's logits of a fixed set of images, kept on disk in float32."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import durable
from ..data import Batches, Dataset
from ..distributed import Processes
from ..signals import Stopped
from ..teachers import Normalisation, Teacher

ALONE = Processes()
BATCH = 256  # images of a pass at a time


class CacheError(ValueError):
    """A cache is damaged, or holds the logits of something else."""


class LogitCache:
    """Logits [count, classes] of images 0 .. count - 1, in memory, and in one file once all of them are there.

    The file is an .npz of the key, the logits and their sha256. It is written to a temporary name first, so a reader
    sees all of it or nothing.

    Attributes:
        complete: every image has its logits.
    """

    def __init__(self, path: Path, count: int, classes: int, key: str) -> None:
        """
        Args:
            path: the file; read if it is there.
            key: digest of all that the logits depend on: the teacher's weights and the images.

        Raises:
            CacheError: the file is damaged, of another key or of another size. It is left as it is.
        """
        self.path, self.key = path, key
        self.logits = torch.zeros(count, classes)
        self.known = torch.zeros(count, dtype=torch.bool)
        self.complete = False  # kept here: a batch does not wait for a GPU to be told
        if path.exists():
            self._take(self._read())

    def get(self, indices: Tensor) -> Tensor | None:
        """Logits [B, classes], on the device of ``indices`` (int64 [B]); None if one of them is not known."""
        self._moved(indices.device)
        if not self.complete and not bool(self.known[indices].all()):
            return None
        return self.logits[indices]

    def put(self, indices: Tensor, logits: Tensor) -> None:
        """Keep logits [B, classes] of these images; the file is written when the last ones have come."""
        self._moved(indices.device)
        self.logits[indices] = logits.to(self.logits)
        self.known[indices] = True
        self.complete = bool(self.known.all())
        if self.complete:
            self._write()

    def fill(self, teacher: Teacher, dataset: Dataset, device: torch.device, processes: Processes = ALONE) -> None:
        """Complete it: one pass of the teacher over the training images, in their order and normalised as batches are.

        The images stay on the host: a device holds one batch of them at a time. Of several processes, all of which call
        this, the first does it, and the others wait for it batch by batch. They read its file then; where that is on
        another machine, they are sent the logits.

        Raises:
            CacheError, OSError: the file is another one by now, or cannot be written or read.
            FirstFailed: any of this in the first process.
            LostContact: another process is gone.
            Stopped: in all processes, as the first one was asked to stop; nothing is written.
        """
        if not processes.first_does(lambda: self.complete):
            work = self._pass(teacher, dataset, device)
            for _ in range(0, len(self.logits), BATCH):
                if processes.first_does(lambda: processes.stopping() or next(work)):
                    raise Stopped
        if not self.complete and self.path.exists():
            self._take(self._read())
        if int(processes.sum(torch.tensor(int(not self.complete)))):
            logits = processes.first_does(lambda: self.logits.cpu())
            if not self.complete:
                self._take(logits)

    def _pass(self, teacher: Teacher, dataset: Dataset, device: torch.device) -> Iterator[None]:
        batches = Batches(
            dataset, "train", batch_size=BATCH, shuffle=False, drop_last=False, device=device, resident=False
        )
        place = 0
        for images, _ in batches.epoch():
            self.put(torch.arange(place, place + len(images), device=device), teacher.outputs(images)[0])
            place += len(images)
            yield

    def _take(self, logits: Tensor) -> None:
        self.logits = logits
        self.known = torch.ones(len(logits), dtype=torch.bool)
        self.complete = True

    def _moved(self, device: torch.device) -> None:
        self.logits, self.known = self.logits.to(device), self.known.to(device)

    def _refuse(self, why: str) -> CacheError:
        return CacheError(f"the cache of teacher logits {self.path} {why}: remove it, or name another file")

    def _read(self) -> Tensor:
        damaged = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                key, digest, logits = str(stored["key"]), str(stored["sha256"]), stored["logits"]
        except damaged as error:
            raise self._refuse(f"is damaged ({error})") from error
        if key != self.key:
            raise self._refuse("is of another teacher, other images or another normalisation")
        shape = tuple(self.logits.shape)
        if logits.dtype != np.float32 or logits.shape != shape or _digest(logits.tobytes()) != digest:
            raise self._refuse("is damaged (its numbers are not those that were written)")
        return torch.from_numpy(logits)

    def _write(self) -> None:
        logits = self.logits.cpu().numpy()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with durable.replacing(self.path) as temporary, temporary.open("wb") as file:
            np.savez(file, key=np.array(self.key), sha256=np.array(_digest(logits.tobytes())), logits=logits)


def cache_key(teacher: Teacher, dataset: Dataset) -> str:
    """Digest of a teacher and of the training images that it is shown, with their normalisation."""
    total = hashlib.sha256(f"{teacher.digest()}|{Normalisation.of(dataset)}|{dataset.train_images.shape}|".encode())
    total.update(dataset.train_images.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
