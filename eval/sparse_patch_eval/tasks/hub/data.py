"""Where the data of a hub benchmark comes from: a local folder, or the Hugging Face hub.

A local folder has the files as the hub has them (`hf download`, or a snapshot of the hub's cache),
in parquet, jsonl or json; an official zip of jsonl files need not be unpacked. It is read with the
`datasets` library's own readers, by file name, so nothing is fetched. From the hub the data is read
as lm-eval does; what can go wrong there becomes one `FetchError` that says how to get it here.
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

_HUB_SECONDS = 10  # an answer of the hub takes well under one


@dataclass(frozen=True)
class Source:
    """One split of one configuration of a hub dataset.

    Attributes:
        dataset: its id on the hub, "org/name".
        config: name of the configuration, or None.
        split: name of the split.
        file: name of the file on the hub to read alone, where a dataset has no configurations.
    """

    dataset: str
    config: str | None
    split: str
    file: str | None = None

    def download_command(self) -> str:
        """What to run on a machine that reaches the hub."""
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
        FetchError: nothing that looks like it is in `data_dir`; says which files were looked for.
        OSError: a file there that cannot be read, or is empty; names it.
        Whatever `datasets` raises of the hub: `hub_errors` explains it, as it does an OSError.
    """
    import datasets

    if data_dir is None:
        files = None if source.file is None else {source.split: source.file}
        return datasets.load_dataset(
            source.dataset, source.config, data_files=files, split=source.split
        )
    # load_dataset("json") would tell a server of the hub about every use, local files or not.
    found = _local(source, data_dir)
    kind = "parquet" if found[0].endswith(".parquet") else "json"
    reader = getattr(datasets.Dataset, f"from_{kind}")
    try:
        return reader(found, split=source.split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, StopIteration) as error:
        # StopIteration: `datasets` looks for the first line of a file that has none.
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or "no documents in it"
        raise OSError(f"{', '.join(found)}: {reason}") from error


@contextmanager
def hub_errors(
    task: str, source: Source, data_dir: Path | None, advice: str | None = None
) -> Iterator[None]:
    """Turn what goes wrong inside the block with a task's data into one kind of error.

    Args:
        task, source: what is read, for the message.
        data_dir: where from; None asks the hub first whether it is there.
        advice: how to get the data, where it is not the usual way.

    Raises:
        FetchError: the data cannot be reached, read, or lacks a column the task needs.
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
        verb = "be had from the hub" if data_dir is None else "be read"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FetchError(f"{where} cannot {verb} ({reason}). {advice}") from error
    except (UndefinedError, LookupError, ValueError) as error:
        # How lm-eval and datasets take a configuration, a split or a column that is not there.
        raise FetchError(
            f"{where}, configuration {source.config!r}, split {source.split!r}: not in the form "
            f"this task reads ({type(error).__name__}: {error}). {advice}"
        ) from error


def local_folder(data_dir: Path) -> Path:
    """The folder that `--data-dir` means; a FetchError where it is none."""
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
    """Folders a dataset may be in: ours, by plain name, and the snapshots of a hub cache."""
    org, name = dataset.split("/")
    snapshots = (data_dir / f"datasets--{org}--{name}" / "snapshots").glob("*")
    newest = sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True)
    return [data_dir / f"{org}__{name}", data_dir / name, data_dir / org / name, *newest]


def _patterns(source: Source) -> list[str]:
    """File names of a split, below a dataset's folder: what `push_to_hub` writes, then plain."""
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
    wanted = {
        f"data/{source.config or source.split}.jsonl",
        f"{source.config or source.split}.jsonl",
    }
    try:
        with zipfile.ZipFile(archive) as opened:
            found = sorted(wanted.intersection(opened.namelist()))
    except zipfile.BadZipFile as error:
        raise OSError(f"{archive}: {error}") from error
    return f"zip://{found[0]}::{archive}" if found else None


def _ask_hub(source: Source) -> None:
    """One quick question, because `load_dataset` retries for half a minute, and per task.

    Nothing is asked when the hub is switched off, or when `datasets` has something of that
    organisation in its cache: it then answers by itself.

    Raises:
        ConnectionError: no hub, or no such dataset there.
    """
    import datasets
    from huggingface_hub import HfApi, constants

    cached = Path(datasets.config.HF_DATASETS_CACHE).glob(source.dataset.split("/")[0] + "___*")
    if constants.HF_HUB_OFFLINE or any(cached):
        return
    try:
        HfApi().dataset_info(source.dataset, timeout=_HUB_SECONDS)
    except Exception as error:  # the HTTP library's own kinds, which change with its version
        raise ConnectionError(str(error)) from error
