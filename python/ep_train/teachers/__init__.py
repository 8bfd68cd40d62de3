"""Teachers for distillation: networks that we train, those of torchvision and timm, and runs of ``ep-train``."""

from .load import load_teacher
from .nets import TEACHERS, build_teacher
from .teacher import Normalisation, Teacher

__all__ = ["TEACHERS", "Normalisation", "Teacher", "build_teacher", "load_teacher"]
