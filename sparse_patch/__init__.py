"""Training-free sparse attention for the prefill of Hugging Face models, in one line.

import sparse_patch
sparse_patch.patch(model)   # and sparse_patch.unpatch(model)

Public beside the names here is what these modules list in `__all__` or register, and no more:

    methods.*     the class of a method
    block_scorer  the base of methods that give blocks a score
    profiles      what a profile is made of
    serving       the same inside engines: what vLLM's plug-in did
    spelling      a method with its parameters as text
    strict_json   files of unknown origin, read as data
"""

from sparse_patch_kernels import BackendUnavailable, BlockPlan, RunList

from .diagnostics import recall
from .inspection import HeadView, Inspection, LayerView, inspect
from .patching import Patch, patch, report, unpatch
from .profiles import Profile
from .registry import (
    RECOMMENDED,
    Examples,
    Knob,
    Method,
    MethodInfo,
    check_sequence,
    describe,
    get_method,
    list_methods,
    param,
    register,
)
from .reporting import LayerReport, Report
from .routing import REASONS, SparsePatchWarning
from .version import __version__

__all__ = [
    "REASONS",
    "RECOMMENDED",
    "BackendUnavailable",
    "BlockPlan",
    "Examples",
    "HeadView",
    "Inspection",
    "Knob",
    "LayerReport",
    "LayerView",
    "Method",
    "MethodInfo",
    "Patch",
    "Profile",
    "Report",
    "RunList",
    "SparsePatchWarning",
    "__version__",
    "check_sequence",
    "describe",
    "get_method",
    "inspect",
    "list_methods",
    "param",
    "patch",
    "recall",
    "register",
    "report",
    "unpatch",
]
