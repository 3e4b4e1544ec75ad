"""Where weights are, on this machine or elsewhere, and what their files hold, never through pickle."""

import contextlib
import errno
import functools
import hashlib
import importlib
import io
import itertools
import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from pickle import UnpicklingError
from typing import IO, Any
from urllib.parse import urlparse

import numpy as np
import safetensors.torch
import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from torch import Tensor

from neco.model import sharded
from neco.model.sharded import Damaged
from neco.model.state_dict_formats import begins, unwrap_name
from neco.utils import atomic_files, signals
from neco.utils.download import alone, fetch
from neco.utils.errors import NecoError
from neco.utils.masking import MASK
from neco.utils.progress import transfers

# What old checkpoints hold beside tensors. A file chooses the arguments, so that here stands only what merely keeps
# them: nothing that imports, opens or calls. Of NumPy no arrays and no structured types either, whose state a file
# could forge to point anywhere in memory. Interpolations of OmegaConf are resolved when read, and nobody reads them.
HARMLESS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "typing.Any",
    "torch.torch_version.TorchVersion",
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath")),
    *(f"pathlib._local.{kind}" for kind in ("PosixPath", "PurePosixPath", "PureWindowsPath")),  # Python 3.13
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.base.{kind}" for kind in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Integer", "Float", "Boolean", "String", "Path", "Bytes")),
    "numpy.dtype",
)


EXPANSION = 10  # an archive's parts may be so many times its size: weights hardly compress, and torch compresses none
MOST = 10**6  # entries of nested dictionaries


def locate(source: str, name: str) -> Path:
    """The local file that `source` means, downloaded (once) if need be; `name` is what `hub` stands for.

    Of a folder with shards it is their index, of a distributed checkpoint the folder.
    """
    path = Path(source).expanduser()
    if source.startswith("package:"):
        path = Path(__file__).parent / source.removeprefix("package:")
    elif found := re.fullmatch(r"https://huggingface\.co/([^/]+/[^/]+)/(?:resolve|blob)/([^/]+)/([^?]+).*", source):
        return _from_hugging_face(found[1], found[3], found[2])
    elif source.startswith(("http://", "https://")):
        return _download(source)
    elif source == "hub" or (timm.is_model(source) and not path.exists()):
        return _from_hub(name if source == "hub" else source)
    if path.is_dir():
        return sharded.find_weights(path)
    if not path.is_file():
        raise NecoError(f"weights {source}: no such file ({path.absolute()}) and no hub name that timm knows")
    sharded.check_no_shard(path)
    return path


def read(path: Path, trust_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of a file, keys of nested dictionaries joined by dots, memory-mapped where the format allows it."""
    try:
        return dict(_flatten(contents(path, trust_pickle), itertools.count()))
    except RecursionError as error:
        raise NecoError(f"{path} holds itself, or is nested too deep") from error


def contents(path: Path, trust_pickle: bool = False) -> dict[str, Any]:
    """What a weights file, an index of shards, a distributed checkpoint (a folder) or a checkpoint holds.

    Raises NecoError for one that is damaged, of another kind or unsafe.
    """
    if path.is_dir():
        return sharded.read_distributed(path, _tensor, _of_networks)
    if path.name.endswith(sharded.INDEX):
        return sharded.read_index(path, functools.partial(read, trust_pickle=trust_pickle))
    zipped, stored = zipfile.is_zipfile(path), False
    try:
        if zipped:
            status = path.stat()
            stored = _check(path, status.st_ino, status.st_size, status.st_mtime_ns)
        if is_safetensors(path):
            return safetensors.torch.load_file(path)
        _check_pickle(path, zipped, trust_pickle)
        if zipped and _is_program(path):
            if not trust_pickle:
                raise UnpicklingError("GLOBAL TorchScript")
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        with torch.serialization.safe_globals(_harmless()):
            try:
                mapped = stored and atomic_files.can_be_mapped(path)
                held = torch.load(path, map_location="cpu", weights_only=not trust_pickle, mmap=mapped)
            except UnpicklingError as error:  # it names the first class; of most files all can be had
                if zipped and (unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(path)):
                    raise UnpicklingError("".join(f"GLOBAL {name} " for name in unsafe)) from error
                raise
    except Exception as error:  # torch raises just anything for files that are something else
        found = re.findall(r"(?:GLOBAL|got <class) '?([\w.]+)", str(error))
        if found and isinstance(error, UnpicklingError) and not trust_pickle:
            raise NecoError(
                f"{path} needs pickle, which can run any code, for: {', '.join(found)}. If you trust where it comes "
                "from: trust_pickle=true"
            ) from error
        told = trust_pickle or isinstance(error, safetensors.SafetensorError)
        told = told or isinstance(error, zipfile.BadZipFile)
        told = told or (isinstance(error, OSError) and error.errno != errno.EINVAL)  # of mapping what is too short
        raise Damaged(
            f"{path} cannot be read as weights (.pth, .pt, .ckpt, .safetensors): "
            f"{(told and str(error).partition(chr(10))[0]) or 'it is damaged or something else'}"
        ) from error
    if not isinstance(held, dict):
        raise NecoError(f"{path} cannot be read as weights: it holds a {type(held).__name__}, no tensors by name")
    return held


@functools.lru_cache(maxsize=64)
def _check(path: Path, *state: int) -> bool:
    """Whether no part of an archive is compressed, so that torch may map it; of others it would map what is compressed.

    Raises BadZipFile where a part is not what its checksum says, which torch never looks at (3 GB a second), or where
    the parts are far larger than the file.
    """
    with path.open("rb") as file:
        return _check_archive(file)


def _check_archive(file: IO[bytes]) -> bool:
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
        if (unpacked := sum(part.file_size for part in parts)) > size * (1 if stored else EXPANSION):
            raise zipfile.BadZipFile(f"its parts claim {unpacked} bytes, the file has {size}")
        for part in parts:
            if part.CRC:  # else written without
                with archive.open(part) as opened:
                    while opened.read(1 << 22):
                        pass
    return stored


def _check_pickle(path: Path, zipped: bool, trust_pickle: bool) -> None:
    """Raise BadZipFile for what is packed once more, UnpicklingError for bytearray: a few bytes take any memory by it.

    torch calls it for whoever names it, and its unpickler knows only names that stand in the file as text.
    """
    name, found, before = b"\nbytearray\n", False, b""
    if zipped:
        with zipfile.ZipFile(path) as archive:
            pickles = [part for part in archive.namelist() if part.endswith(".pkl")]
            if not pickles:
                raise zipfile.BadZipFile(f"it is an archive of {', '.join(archive.namelist()[:3])}: unpack it first")
            found = any(name in archive.read(part) for part in pickles)
    else:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                if not before and block.startswith(b"\x1f\x8b"):
                    raise zipfile.BadZipFile("it is compressed with gzip: unpack it first")
                found, before = found or name in before + block, block[-len(name) :]
    if found and not trust_pickle:
        raise UnpicklingError("GLOBAL builtins.bytearray")


def _tensor(file: io.BytesIO) -> Any:
    """What a file of torch in memory holds, if that is harmless and backed by the file."""
    _check_archive(file)
    file.seek(0)
    held = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(held, Tensor):
        check_backed({"a chunk": held}, "the checkpoint")
    return held


def _of_networks(keys: list[str]) -> set[str]:
    """Those of the keys that belong to networks."""
    prefixes = {prefix for key in keys if (prefix := begins(unwrap_name(key))) is not None}
    return {key for key in keys if unwrap_name(key).startswith((*prefixes,))}


def check_backed(held: Mapping[str, Tensor], where: str) -> None:
    """Raise Damaged where tensors claim more bytes than the file holds for them: repeated, whoever copies them pays."""
    # Twice is let pass: small parts are now and then stored as one number.
    plain = [value for value in held.values() if value.layout == torch.strided and not value.is_meta]
    storages = [value.untyped_storage() for value in plain]
    there = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if (claimed := sum(value.numel() * value.element_size() for value in plain)) > 2 * there:
        raise Damaged(f"{where} claims {claimed} bytes of weights, and holds {there}: its tensors repeat what is there")


def header(path: Path) -> dict[str, Any]:
    """What `task=export` noted in a `.safetensors` file: its `model` node and the hash of its `weights`. Or nothing."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            noted = json.loads((file.metadata() or {}).get("neco", "{}"))
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError):  # `contents` says what is wrong
        return {}
    return noted if isinstance(noted, dict) else {}


def is_safetensors(path: Path) -> bool:
    """Whether a file is one, whatever its name: the length of a header, and that."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _is_program(path: Path) -> bool:
    """Whether an archive is one of TorchScript."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _forget_default(*default: Any) -> dict[Any, Any]:
    """A defaultdict without what it would call; the type is one that torch fills."""
    return OrderedDict()


class _Type:
    """In the place of one of Python's types, which files name as one; called, list(bytes(10**10)) would take memory."""

    def __init__(self, *given: Any) -> None: ...


@functools.cache
def _harmless() -> list[Any]:
    scalar = np.float64().__reduce__()[0]
    known: list[Any] = [type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]]
    known += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    types = ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes")
    known += [(type(kind, (_Type,), {}), f"builtins.{kind}") for kind in types]
    known += [(PureWindowsPath, "pathlib.WindowsPath"), (_forget_default, "collections.defaultdict")]
    for name in HARMLESS:
        module, _, attribute = name.rpartition(".")
        with contextlib.suppress(ImportError, AttributeError):  # not installed, or not in this version
            known.append((getattr(importlib.import_module(module), attribute), name))
    return known


def _flatten(tree: Any, count: Iterator[int], path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries with their dotted names, each once. `count` counts what was visited."""
    if isinstance(tree, Tensor):
        yield path, tree
    if depth > 30 or next(count) > MOST:
        raise RecursionError
    seen: set[str] = set()
    items = tree.items() if isinstance(tree, dict) else ()  # no other mapping: OmegaConf's would resolve what it holds
    for key, value in items:
        for name, tensor in _flatten(value, count, f"{path}.{key}".lstrip("."), depth + 1):
            if name in seen:
                raise NecoError(f"a file of weights holds {name} twice")
            seen.add(name)
            yield name, tensor


def _unreachable(what: str, error: Exception) -> NecoError:
    return NecoError(
        f"cannot download {what}: {error}. Give a local file (checkpoint=PATH or model.weights=PATH), "
        "or start from random weights (weights=none)"
    )


def _from_hub(name: str) -> Path:
    """The weights file of timm's model `name`."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise NecoError(f"weights hub: timm knows no published weights for {name}; give its name with a tag, or a file")
    return _from_hugging_face(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")


def _from_hugging_face(repository: str, file: str, revision: str = "main") -> Path:
    """A file of a repository, from the cache of its client or through it, with the token of whoever is logged in."""
    cached = try_to_load_from_cache(repository, file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    try:  # one look first: the download itself retries for half a minute
        get_hf_file_metadata(hf_hub_url(repository, file, revision=revision), timeout=10)
        return Path(hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # of the client's HTTP library, which it has changed
        raise _unreachable(f"{file} from {repository}", error) from error


def cache_of(url: str) -> Path:
    """Where the file behind a URL is kept: in torch's hub folder, under its name and a hash of the URL."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(urlparse(url).path).name}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _download(url: str) -> Path:
    """The file behind a URL, downloaded once.

    A name that ends in the beginning of its SHA-256, as torch's hub has it (`name-0123abcd.pth`), is checked.
    """
    path = cache_of(url)
    if path.exists():
        return path
    if MASK in url:
        raise NecoError(
            f"{url}: what was secret in this address was masked ({MASK}) where it was noted; give all of it"
        )
    digest = re.search(r"[^-]-(?!\d+\.)([0-9a-f]{8,64})\.\w+$", path.name[9:])  # digits alone are a date
    try:
        with alone(path), transfers() as bar:
            report = bar(path.name, None)

            def show(done: int, total: int | None) -> None:
                signals.check()
                report(done, total)

            if path.exists():  # another process was at it
                return path
            part = fetch(url, path, show, pinned=digest is not None, tries=2)
            with part.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if digest and not found.startswith(digest[1]):
                part.unlink()
                raise NecoError(f"its SHA-256 is {found} instead of {digest[1]}...")
            atomic_files.rename(part, path)
    except (NecoError, OSError) as error:
        raise _unreachable(url, error) from error
    return path
