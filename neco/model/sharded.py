"""Weights that lie in a folder: shards with an index, and distributed checkpoints (DCP) of torch, which FSDP writes.

A folder of someone else chooses names, sizes and pickled objects: names must be those of files beside, sizes are
compared with what the files hold before memory is taken, and of pickled objects nothing is imported or called.
"""

import io
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neco.utils.errors import NecoError

METADATA = ".metadata"  # in the folder of a distributed checkpoint
INDEX = ".index.json"
SINGLE = ("model.safetensors", "pytorch_model.bin")  # as transformers writes them
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


class Damaged(NecoError):
    """A file that cannot be read as weights."""


def find_weights(folder: Path) -> Path:
    """The file in a folder that holds its weights or lists their shards; of a distributed checkpoint the folder itself.

    Raises NecoError, which says what the folder is, where it holds none or several.
    """
    if (folder / METADATA).is_file():
        return folder
    names = sorted(path.name for path in folder.iterdir())
    known = [name for name in names if name in SINGLE] or [name for name in names if name.endswith(INDEX)]
    if len(known) == 1 or known == [*SINGLE][::-1] or known == [*SINGLE]:
        return folder / known[0]
    raise NecoError(f"weights {folder}: {_describe(names)}")


def _describe(names: list[str]) -> str:
    """What a folder with these files is, and what to do with it."""
    files = [name for name in names if name.endswith(SUFFIXES)]
    if any(name.endswith(".distcp") for name in names):
        return f"a distributed checkpoint without its {METADATA} file; copy the whole folder, hidden files included"
    if any(name.startswith(("zero_pp_rank_", "mp_rank_", "global_step")) for name in names):
        return "a checkpoint of DeepSpeed: make one file of it with its own zero_to_fp32.py"
    if indices := [name for name in names if name.endswith(INDEX)]:
        return f"a folder with several indices of shards, {', '.join(indices)}: name the one"
    if "data.pkl" in names:
        return "an unpacked .pth file: give the file as it was downloaded"
    if "adapter_config.json" in names:
        return "adapters of peft without their network: merge them there first (merge_and_unload)"
    if any(re.search(r"-\d+-of-\d+\.", name) for name in files):
        return f"shards without their index (a file *{INDEX}); copy that, too"
    if files:
        return f"a folder with {', '.join(files[:5])}{' ...' * (len(files) > 5)}: name the file"
    held = ", ".join(names[:5]) + " ..." * (len(names) > 5)
    return f"a folder without weights (*.safetensors, .pth, .pt, .ckpt, .bin or .distcp); it holds {held or 'nothing'}"


def check_no_shard(path: Path) -> None:
    """Raise NecoError for one of several shards, of which the index is wanted."""
    if found := re.fullmatch(r"(.+)-\d+-of-0*(\d+)(\.\w+)", path.name):
        index = path.with_name(f"{found[1]}{found[3]}{INDEX}")
        if int(found[2]) > 1 and index.is_file():
            raise NecoError(f"weights {path}: one of {found[2]} shards; give their index, {index}")


def read_index(path: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all shards that an index of transformers lists, each read by `read`.

    Raises NecoError for an index of something else, shards elsewhere or missing, and shards that hold other tensors.
    """
    try:
        listed = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(text, str) for pair in listed.items() for text in pair):
            raise TypeError("its weight_map names no files")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read as an index of shards: no weight_map ({error})") from error
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(listed.values()):
        shard = _beside(path.parent, name, path)
        if not shard.is_file():
            raise NecoError(f"{path} lists {name}, which is not there: copy all shards beside it")
        tensors, wanted = read(shard), {key for key, file in listed.items() if file == name}
        for lost in sorted(wanted - tensors.keys())[:1]:
            raise Damaged(f"{shard} holds no {lost}, which {path.name} says: a shard of something else")
        for surplus in sorted(tensors.keys() - wanted)[:1]:
            raise Damaged(f"{shard} holds {surplus}, which {path.name} does not give it: a shard of something else")
        found |= tensors
    return found


def _beside(folder: Path, name: Any, source: Path) -> Path:
    """A file that `source` names in `folder`. Raises NecoError for a name that leads elsewhere."""
    if not isinstance(name, str) or not name or re.search(r"[/\\:\0]", name) or name in (".", ".."):
        raise NecoError(f"{source} names {str(name)!r:.60}: shards lie beside it, other places are not read")
    return folder / name


class _Record:
    """Stands for whatever a pickle names: keeps what it is given and does nothing."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


# Python's own in place of the one in C, which takes memory for any number that a pickle says (LONG_BINPUT).
class _Reader(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Reads records, imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        return tuple if (module, name) == ("torch", "Size") else type(name, (_Record,), {})

    def persistent_load(self, name: Any) -> Any:
        raise pickle.UnpicklingError(f"refers to {name!r:.40}")


def read_distributed(
    folder: Path, read: Callable[[io.BytesIO], Any], needs: Callable[[list[str]], set[str]]
) -> dict[str, Tensor]:
    """The tensors of a distributed checkpoint, under their names there; other objects are left out.

    Args:
        folder: with `.metadata` and `*.distcp`.
        read: the tensor in a file of torch.
        needs: given all names, those to read; the other tensors come on the meta device. Optimisers are large.

    Raises:
        NecoError: files that are missing, elsewhere or damaged, or sizes that the files do not bear out.
    """
    try:
        held = _Reader(io.BytesIO((folder / METADATA).read_bytes())).load()
        entries = {name: entry for name, entry in held.state_dict_metadata.items() if hasattr(entry, "chunks")}
        places = {
            (key.fqn, tuple(getattr(key, "offset", None) or ())): place for key, place in held.storage_data.items()
        }
        needed = needs([*entries])
        wanted = {name: [places[name, chunk.offsets] for chunk in entries[name].chunks] for name in needed}
        claimed = sum(place.length for found in wanted.values() for place in found)
        there = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        if claimed > there:
            raise ValueError(f"it claims {claimed} bytes, and its files have {there}")
        found: dict[str, Tensor] = {}
        for name, entry in entries.items():
            shape = torch.Size(entry.size)
            if name in needed:
                chunks = [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]
                found[name] = _assemble(folder, shape, chunks, wanted[name], read)
            else:
                found[name] = torch.empty(shape, device="meta")
    except NecoError:
        raise
    except Exception as error:  # of a pickle that holds anything
        raise Damaged(f"{folder} cannot be read as a distributed checkpoint: {error!r:.200}") from error
    return found


def _assemble(
    folder: Path,
    shape: torch.Size,
    chunks: list[tuple[Any, Any]],
    places: list[Any],
    read: Callable[[io.BytesIO], Any],
) -> Tensor:
    """A tensor from its chunks, (offsets, sizes) each, and where these are stored."""
    parts = []
    for (offsets, sizes), place in zip(chunks, places, strict=True):
        if getattr(place, "transform_descriptors", None):
            raise ValueError("its chunks are transformed (compressed), which is not read here")
        with _beside(folder, place.relative_path, folder / METADATA).open("rb") as file:
            file.seek(place.offset)
            chunk = read(io.BytesIO(file.read(place.length)))
        if not isinstance(chunk, Tensor) or chunk.shape != torch.Size(sizes):
            raise ValueError(f"a chunk is no tensor {tuple(sizes)}")
        parts.append((tuple(slice(start, start + n) for start, n in zip(offsets, sizes, strict=True)), chunk))
    if not parts or sum(chunk.numel() for _, chunk in parts) != math.prod(shape):
        raise ValueError(f"its chunks do not make up {tuple(shape)}")
    if len(parts) == 1 and parts[0][1].shape == shape:
        return parts[0][1]
    first = parts[0][1]
    whole = first.new_full(shape, math.nan if first.is_floating_point() else 0)  # what no chunk fills shows
    for place, chunk in parts:
        whole[place] = chunk
    return whole
