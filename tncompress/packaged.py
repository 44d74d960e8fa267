"""A model compiled ahead of time: an AOTInductor package, which runs without Python's part of torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tncompress.programs import export_program, relative_error
from tncompress.running import call_model, eval_mode
from tncompress.storage import new_file
from tncompress.textfiles import one_line


def export_aoti(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    tolerance: float = 1e-4,
    overwrite: bool = True,
) -> float:
    """Write ``model`` as an AOTInductor package; return how far its output is off.

    The package takes batches of any size on the device that the model is on, and is loaded by
    ``torch._inductor.aoti_load_package`` or from C++. To compile it takes minutes, and a C++ compiler: where
    there is none, or torch has no AOTInductor, that is a ``ValueError``, as is an output that differs by more
    than ``tolerance``, relative to the largest.
    """
    path = Path(path).expanduser()
    if path.suffix != ".pt2":
        raise ValueError(f"an AOTInductor package ends in .pt2, got {path}")
    _check_compiler()
    import torch._inductor as inductor

    program = export_program(model, example_inputs)
    with new_file(path, overwrite=overwrite) as fresh, eval_mode(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            inductor.aoti_compile_and_package(program, package_path=str(fresh))
            package: Any = inductor.aoti_load_package(str(fresh))
            found = call_model(package, example_inputs)
        except Exception as error:  # of torch's compiler, or of the C++ compiler's words
            raise ValueError(
                f"torch can't compile {type(model).__name__} ahead of time ({one_line(error)}): export it as "
                "torch-export, which needs no compiler"
            ) from error
        off = relative_error(found, call_model(model, example_inputs))
        if not off <= tolerance:
            raise ValueError(f"the package's output is off by {off:.2g}, wanted at most {tolerance:.2g}")
    return off


def _check_compiler() -> None:
    """Raise ``ValueError`` unless torch can compile ahead of time here."""
    import torch._inductor as inductor
    from torch._inductor import cpp_builder

    if not all(hasattr(inductor, name) for name in ("aoti_compile_and_package", "aoti_load_package")):
        raise ValueError(f"torch {torch.__version__} has no AOTInductor packages: they came with torch 2.6")
    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:  # InvalidCxxCompiler, or what a broken compiler raises
        raise ValueError(
            f"AOTInductor needs a C++ compiler, and found none ({one_line(error, 120)}): install g++ or "
            "clang, or name one in the environment variable CXX"
        ) from None
