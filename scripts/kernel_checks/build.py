"""Compile a recorded launch for a chip that is not there."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import triton
from sparse_patch_kernels.triton import launch as door
from triton import knobs
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from kernel_checks.binary import Facts
from kernel_checks.chips import Chip


@dataclass(frozen=True)
class Build:
    """A kernel with the types, constants and options of one launch on one chip.

    Attributes:
        constants: by name, those of the configuration included.
        key: differs where the binary could, or what is asked of it: source, types, constants,
            options, chip, compiler, names of facts.
    """

    kernel: str
    chip: Chip
    constants: Mapping[str, Any]
    key: str
    _source: Any
    _options: Mapping[str, Any]

    @classmethod
    def of(cls, launch: door.Launch, config: triton.Config, chip: Chip) -> Build:
        """What `launch` would run on `chip`: the same specialization as in the JIT."""
        backend = make_backend(chip.target())
        function = launch.kernel
        # As `JITFunction.run` has it; fusing multiply and add is what the JIT does by default.
        arguments = {
            **launch.arguments,
            **config.all_kwargs(),
            "enable_fp_fusion": True,
            "debug": False,
        }
        bind = create_function_from_signature(function.signature, function.params, backend)
        bound, specialization, options = bind(**arguments)
        options, signature, constants, attributes = function._pack_args(
            backend, arguments, bound, specialization, options
        )
        source = ASTSource(function, signature, constants, attributes)
        known = [field.name for field in fields(Facts)]
        parts = (source.hash(), options.hash(), chip.name, triton.__version__, *known)
        names = [parameter.name for parameter in function.params if parameter.is_constexpr]
        return cls(
            kernel=function.__name__,
            chip=chip,
            constants={name: bound[name] for name in names},
            key=hashlib.sha256("-".join(parts).encode()).hexdigest()[:20],
            _source=source,
            _options=dict(options.__dict__),
        )

    def compile(self) -> Compiled:
        """What comes of it."""
        start = time.perf_counter()
        # In a cache of its own: found there, it would take no time, and nobody wants it later.
        with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
            knobs.cache.dir = folder
            knobs.nvidia.dump_ptxas_log = True
            with contextlib.redirect_stdout(io.StringIO()) as log:
                kernel = triton.compile(
                    self._source, target=self.chip.target(), options=self._options
                )
        return Compiled(kernel, log.getvalue(), time.perf_counter() - start)


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel, as `triton.compile` gives it.

    Attributes:
        log: what ptxas said.
        seconds: it took.
    """

    kernel: Any
    log: str
    seconds: float


def assembler(chip: Chip) -> str:
    """Which ptxas, and of which version, Triton has assemble the code of an NVIDIA chip."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(chip.target().arch).version)


def door_chip(chip: Chip) -> door.Chip:
    """The chip as the launchers see it when they choose configurations."""
    target = chip.target()
    arch = target.arch if target.backend == "cuda" else 0
    return door.Chip(target.backend, chip.block_shared, arch)
