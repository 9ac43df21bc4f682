"""Runs of one model setting, with distinct labels, and their dense partners."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sparse_patch_eval.runs.format import Key, Sample
from sparse_patch_eval.runs.reading import Run


@dataclass(frozen=True)
class Section:
    """Runs of one model setting, by label; dense ones first."""

    model: str
    dtype: str
    device: str
    seed: int
    chat_template: bool
    runs: Mapping[str, Run]

    @property
    def settings(self) -> str:
        prompt = "chat template" if self.chat_template else "plain prompts"
        return f"{self.dtype}, {self.device}, seed {self.seed}, {prompt}"

    @property
    def dense(self) -> list[str]:
        return [label for label, run in self.runs.items() if run.is_dense]


def sections(runs: Iterable[Run]) -> list[Section]:
    """Runs by model setting, in the order given, with distinct labels."""
    by_setting: dict[tuple[str, str, str, int, bool], list[Run]] = {}
    for run in runs:
        setting = (run.model, run.dtype, run.device, run.seed, run.chat_template)
        by_setting.setdefault(setting, []).append(run)
    return [Section(*setting, _labels(members)) for setting, members in by_setting.items()]


def _labels(runs: list[Run]) -> dict[str, Run]:
    """Runs by method as written; equal ones also with their differing settings, or the folder."""
    named: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: not run.is_dense):
        named.setdefault(run.method, []).append(run)
    labels = {}
    for method, same in named.items():
        settings = [{**run.params, **run.patch} for run in same]
        names = dict.fromkeys(name for values in settings for name in values)
        missing = object()
        differing = [
            name
            for name in names
            if len({repr(values.get(name, missing)) for values in settings}) > 1
        ]
        tags = [
            ", ".join(f"{name}={values.get(name)}" for name in differing) for values in settings
        ]
        for number, (run, tag) in enumerate(zip(same, tags, strict=True)):
            if tags.count(tag) > 1:
                # Two runs with the same settings differ only in their folder.
                tag = ", ".join(filter(None, [tag, str(run.folder)]))
            label = f"{method} [{tag}]" if len(same) > 1 else method
            labels[label if label not in labels else f"{label} ({number + 1})"] = run
    return labels


def dense_partners(section: Section, label: str) -> dict[Key, Sample]:
    """Dense's samples by key; of several dense runs, the one beside this run takes precedence."""
    beside = section.runs[label].folder.parent
    dense = [section.runs[name] for name in section.dense]
    dense.sort(key=lambda run: run.folder.parent == beside)  # later ones win
    return {sample.key: sample for run in dense for sample in run.samples}
