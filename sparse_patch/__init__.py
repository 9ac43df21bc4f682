"""Training-free sparse attention for the prefill of Hugging Face models, in one line.

import sparse_patch
sparse_patch.patch(model, "flexprefill", gamma=0.9)   # and sparse_patch.unpatch(model)
"""

from sparse_patch_kernels import BackendUnavailable, BlockPlan, RunList

from .diagnostics import recall
from .inspection import HeadView, Inspection, LayerView, inspect
from .patching import Patch, patch, report, unpatch
from .profiles import Profile
from .registry import Knob, Method, MethodInfo, describe, get_method, list_methods, param, register
from .reporting import LayerReport, Report
from .routing import SparsePatchWarning
from .version import __version__

__all__ = [
    "BackendUnavailable",
    "BlockPlan",
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
