"""Tensor-network formats, one to a file; each registers itself under its name."""

from tncompress.formats.base import (
    FORMATS,
    Fit,
    Format,
    Stage,
    all_contenders,
    make_format,
    register_format,
)
from tncompress.formats.cp import CP
from tncompress.formats.mps import MPS
from tncompress.formats.svd import SVD
from tncompress.formats.tucker import Tucker

__all__ = [
    "CP",
    "FORMATS",
    "MPS",
    "SVD",
    "Fit",
    "Format",
    "Stage",
    "Tucker",
    "all_contenders",
    "make_format",
    "register_format",
]
