"""What a process of a stage does."""

from __future__ import annotations

import argparse
import importlib
import sys

import torch
from sparse_patch_kernels import dispatch

from gpu_checks.device import Device
from gpu_checks.process import LOST
from gpu_checks.scale import FULL, TOY
from gpu_checks.stage import COMPARING, DeviceLost, Stage, Work


def work(options: argparse.Namespace) -> int:
    """Do part i of n, `--part i/n`: every n-th item of the stage, from i on. The exit code."""
    part, parts = map(int, options.part.split("/"))
    scale = TOY if options.dry_run else FULL
    if parts > 1:  # side by side, they leave the cores to one another
        torch.set_num_threads(1)
    name = options.stage if parts == 1 else f"{options.stage} {part + 1}/{parts}"
    stage = Stage(
        name, options.rows, options.deadline, Device(scale.on_gpu), scale, quiet=parts > 1
    )
    launch = importlib.import_module("sparse_patch_kernels.triton.launch")
    if not scale.on_gpu:
        setattr(dispatch, "uses_triton", lambda x: True)  # noqa: B010 - mypy forbids to assign it
    try:
        with launch.watching() as chosen:
            for item, do in _items(options.stage, stage)[part::parts]:
                stage.run(item, do)
    except DeviceLost as error:
        print(error, file=sys.stderr)
        return LOST
    if options.stage not in COMPARING:  # those force configurations
        for shape, config in chosen.items():
            stage.add("chosen", kernel=shape.kernel, values=shape.values, config=str(config))
    return 0


def _items(name: str, stage: Stage) -> list[tuple[str, Work]]:
    """The items of a stage, the most important first. Each imports no more than it needs."""
    listed: list[tuple[str, Work]]
    if name in COMPARING:
        importlib.import_module("gpu_checks.parity").poison()
    if name != "parity":
        module = {"op": "op_speed"}.get(name, name)
        listed = importlib.import_module(f"gpu_checks.{module}").items(stage)
        return listed
    parity = importlib.import_module("gpu_checks.parity")
    listed = parity.items(stage)
    first = len(parity.cases(stage.scale))  # so many are of the most important dtype
    estimators = importlib.import_module("gpu_checks.estimators").items(stage)
    return [*listed[:first], *estimators, *listed[first:]]
