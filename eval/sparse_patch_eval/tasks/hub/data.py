"""Where the data of a hub benchmark comes from: a local folder, or the Hugging Face hub.

A local folder has the files as the hub has them (`hf download`, or a snapshot of the hub's cache),
in parquet, jsonl or json; an official zip of jsonl files need not be unpacked. It is read with the
`datasets` library's own readers, by file name, so nothing is fetched. From the hub the data is read
as by lm-eval; errors there become one `FetchError` that says how to get the data.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_patch_eval.base.fetch import FetchError

_HUB_SECONDS = 10  # the hub usually answers in well under one


@dataclass(frozen=True)
class Source:
    """One split of one configuration of a hub dataset.

    Attributes:
        dataset: its id on the hub, "org/name".
        config: name of the configuration, or None.
        split: name of the split.
        file: name of the single file on the hub to read, where a dataset has no configurations.
    """

    dataset: str
    config: str | None
    split: str
    file: str | None = None

    def download_command(self) -> str:
        """The download command for a machine that reaches the hub."""
        folder = f"DATA_DIR/{self.dataset.replace('/', '__')}"
        return f"hf download {self.dataset} --repo-type dataset --local-dir {folder}"

    def how_to_get(self) -> str:
        """Two sentences for an error message."""
        return (
            f"On a machine with network run\n  {self.download_command()}\n"
            "then bring DATA_DIR here and add --data-dir DATA_DIR."
        )


def read(source: Source, data_dir: Path | None) -> Any:
    """The documents of a source, as a `datasets.Dataset`.

    Raises:
        FetchError: `data_dir` has no matching file; says which files were looked for.
        OSError: a file there cannot be read, or is empty; names it.
        Other errors of `datasets` on the hub, which `hub_errors` explains, as it does an OSError.
    """
    import datasets

    if data_dir is None:
        files = None if source.file is None else {source.split: source.file}
        return datasets.load_dataset(
            source.dataset, source.config, data_files=files, split=source.split
        )
    # load_dataset("json") would report every use to a server of the hub, even of local files.
    paths = _local(source, data_dir)
    kind = "parquet" if paths[0].endswith(".parquet") else "json"
    reader = getattr(datasets.Dataset, f"from_{kind}")
    try:
        return reader(paths, split=source.split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, StopIteration) as error:
        # StopIteration: `datasets` reads the first line of an empty file.
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or "no documents in it"
        raise OSError(f"{', '.join(paths)}: {reason}") from error


@contextmanager
def hub_errors(
    task: str, source: Source, data_dir: Path | None, advice: str | None = None
) -> Iterator[None]:
    """Turn errors with a task's data inside the block into one kind of error.

    Args:
        task, source: what is read, for the message.
        data_dir: folder of the data; None: the hub, which is asked first.
        advice: how to get the data, if not in the usual way.

    Raises:
        FetchError: the data cannot be reached or read, or lacks a column that the task needs.
    """
    from datasets.exceptions import DatasetsError
    from jinja2 import UndefinedError

    where, advice = f"{task}: dataset {source.dataset}", advice or source.how_to_get()
    if data_dir is not None:
        where += f" in --data-dir {data_dir}"
    try:
        if data_dir is None:
            _ask_hub(source)
        yield
    except FetchError:
        raise
    except (DatasetsError, OSError) as error:
        verb = "be fetched from the hub" if data_dir is None else "be read"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FetchError(f"{where} cannot {verb} ({reason}). {advice}") from error
    except (UndefinedError, LookupError, ValueError) as error:
        # Raised by lm-eval and datasets for a missing configuration, split or column.
        raise FetchError(
            f"{where}, configuration {source.config!r}, split {source.split!r}: not in the form "
            f"this task reads ({type(error).__name__}: {error}). {advice}"
        ) from error


def local_folder(data_dir: Path) -> Path:
    """The folder of `--data-dir`; a FetchError if there is none."""
    folder = Path(os.path.expanduser(data_dir))
    if not folder.is_dir():
        raise FetchError(f"--data-dir {folder} is not a folder")
    return folder


def _local(source: Source, data_dir: Path) -> list[str]:
    """The files of a source, all of one kind."""
    data_dir = local_folder(data_dir)
    looked_for = []
    for root in _roots(source.dataset, data_dir):
        for pattern in _patterns(source):
            looked_for.append(str(root / pattern))
            files = sorted(str(path) for path in root.glob(pattern))
            if files:
                return files
        looked_for.append(str(root / "data.zip"))
        packed = _packed(root / "data.zip", source)
        if packed is not None:
            return [packed]
    listed = "\n  ".join(looked_for)
    raise FetchError(
        f"no file of dataset {source.dataset} (configuration {source.config!r}, split "
        f"{source.split!r}) is in --data-dir {data_dir}; looked for\n  {listed}\n"
        f"{source.how_to_get()}"
    )


def _roots(dataset: str, data_dir: Path) -> list[Path]:
    """Possible folders of a dataset: ours, by plain name, and the snapshots of a hub cache."""
    org, name = dataset.split("/")
    snapshots = (data_dir / f"datasets--{org}--{name}" / "snapshots").glob("*")
    newest = sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True)
    return [data_dir / f"{org}__{name}", data_dir / name, data_dir / org / name, *newest]


def _patterns(source: Source) -> list[str]:
    """File names of a split below a dataset's folder: those of `push_to_hub`, then plain ones."""
    config, split = source.config, source.split
    endings = (".parquet", ".jsonl", ".json")
    if config is None:
        return [
            f"{split}-*.parquet",
            *(f"{at}{split}{end}" for at in ("", "data/") for end in endings),
        ]
    patterns = []
    for at in ("", "data/"):
        patterns.append(f"{at}{config}/{split}-*.parquet")
        patterns += [f"{at}{config}/{split}{end}" for end in endings]
        patterns += [f"{at}{split}/{config}{end}" for end in endings]  # BABILong's first dataset
        patterns += [f"{at}{config}{end}" for end in endings]  # LongBench's own files
    return patterns


def _packed(archive: Path, source: Source) -> str | None:
    """The address of a split's jsonl inside an official zip, as `datasets` reads it."""
    if not archive.is_file():
        return None
    names = {
        f"data/{source.config or source.split}.jsonl",
        f"{source.config or source.split}.jsonl",
    }
    try:
        with zipfile.ZipFile(archive) as opened:
            members = sorted(names.intersection(opened.namelist()))
    except zipfile.BadZipFile as error:
        raise OSError(f"{archive}: {error}") from error
    return f"zip://{members[0]}::{archive}" if members else None


def _ask_hub(source: Source) -> None:
    """Ask the hub once, because `load_dataset` retries for half a minute, for every task.

    Nothing is asked when the hub is switched off, or when `datasets` has cached something of that
    organisation, which it then uses.

    Raises:
        ConnectionError: the hub is not reachable, or has no such dataset.
    """
    import datasets
    from huggingface_hub import HfApi, constants

    cached = Path(datasets.config.HF_DATASETS_CACHE).glob(source.dataset.split("/")[0] + "___*")
    if constants.HF_HUB_OFFLINE or any(cached):
        return
    try:
        HfApi().dataset_info(source.dataset, timeout=_HUB_SECONDS)
    except Exception as error:  # the HTTP library's error types change with its version
        raise ConnectionError(str(error)) from error
