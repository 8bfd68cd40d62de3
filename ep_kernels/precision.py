"""Precisions of a relaxation: of the operands of its products, and of its states in memory. Arithmetic has neither."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Operands = torch.dtype | Literal["tf32"] | None
OPERANDS: tuple[Operands, ...] = (None, "tf32", torch.float16, torch.bfloat16)  # an index is the ops' code
STORAGES: tuple[torch.dtype | None, ...] = (None, torch.float16)  # likewise


def rounded(x: Tensor, operands: Operands) -> Tensor:
    """``x`` with the digits that it has as an operand, in its own dtype: what products that accumulate in it read.

    tf32 is a mode of tensor cores, no dtype: here its products are those of ``x`` itself.
    """
    return x.to(operands).to(x.dtype) if isinstance(operands, torch.dtype) else x
