"""Compressed layers in other tensor-network libraries, and back; these are imported where they are used."""

from tncompress.interop.einsum import Einsum, to_einsum
from tncompress.interop.quimb import from_quimb, to_quimb
from tncompress.interop.tensornetwork import KernelNodes, from_tensornetwork, to_tensornetwork
from tncompress.interop.tltorch import from_tltorch, to_tltorch

__all__ = [
    "Einsum",
    "KernelNodes",
    "from_quimb",
    "from_tensornetwork",
    "from_tltorch",
    "to_einsum",
    "to_quimb",
    "to_tensornetwork",
    "to_tltorch",
]
