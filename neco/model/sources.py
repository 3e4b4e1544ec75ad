"""Where weights are, on this machine or elsewhere, and what their files hold, never through pickle."""

import contextlib
import errno
import functools
import hashlib
import importlib
import json
import re
import zipfile
from collections import OrderedDict
from pathlib import Path, PureWindowsPath
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse

import numpy as np
import safetensors.torch
import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from torch import Tensor

from neco import files, interrupt
from neco.download import alone, fetch
from neco.errors import NecoError
from neco.progress import transfers

# What old checkpoints hold beside tensors. A file chooses the arguments, so that here stands only what merely keeps
# them: nothing that imports, opens or calls. Of NumPy no arrays and no structured types either, whose state a file
# could forge to point anywhere in memory. Interpolations of OmegaConf are resolved when read, and nobody reads them.
HARMLESS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "typing.Any",
    "torch.torch_version.TorchVersion",
    *(f"builtins.{kind}" for kind in ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes")),
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath")),
    *(f"pathlib._local.{kind}" for kind in ("PosixPath", "PurePosixPath", "PureWindowsPath")),  # Python 3.13
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.base.{kind}" for kind in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Integer", "Float", "Boolean", "String", "Path", "Bytes")),
    "numpy.dtype",
)


class Damaged(NecoError):
    """A file that cannot be read as weights."""


def locate(source: str, name: str) -> Path:
    """The local file that `source` means, downloaded (once) if need be; `name` is what `hub` stands for."""
    path = Path(source).expanduser()
    if source.startswith("package:"):
        path = Path(__file__).parent / source.removeprefix("package:")
    elif found := re.fullmatch(r"https://huggingface\.co/([^/]+/[^/]+)/(?:resolve|blob)/([^/]+)/([^?]+).*", source):
        return _from_hugging_face(found[1], found[3], found[2])
    elif source.startswith(("http://", "https://")):
        return _download(source)
    elif source == "hub" or (timm.is_model(source) and not path.exists()):
        return _from_hub(name if source == "hub" else source)
    if not path.is_file():
        raise NecoError(f"weights {source}: no such file ({path.absolute()}) and no hub name that timm knows")
    return path


def read(path: Path, trust_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of a file, keys of nested dictionaries joined by dots, memory-mapped where the format allows it."""
    try:
        return _flatten(contents(path, trust_pickle))
    except RecursionError as error:
        raise NecoError(f"{path} holds itself, or is nested too deep") from error


def contents(path: Path, trust_pickle: bool = False) -> dict[str, Any]:
    """What a weights file or checkpoint holds. Raises NecoError for one that is damaged, of another kind or unsafe."""
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            status = path.stat()
            _check(path, status.st_ino, status.st_size, status.st_mtime_ns)
        if is_safetensors(path):
            return safetensors.torch.load_file(path)
        if zipped and _is_program(path):
            if not trust_pickle:
                raise UnpicklingError("GLOBAL TorchScript")
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        with torch.serialization.safe_globals(_harmless()):
            try:
                held = torch.load(
                    path, map_location="cpu", weights_only=not trust_pickle, mmap=zipped and files.can_be_mapped(path)
                )
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
def _check(path: Path, *state: int) -> None:
    """Raises BadZipFile where a part of an archive is not what its checksum says; torch never looks. 3 GB a second."""
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.CRC:  # else written without
                with archive.open(part) as file:
                    while file.read(1 << 22):
                        pass


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


@functools.cache
def _harmless() -> list[Any]:
    scalar = np.float64().__reduce__()[0]
    known: list[Any] = [type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]]
    known += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    known += [(PureWindowsPath, "pathlib.WindowsPath"), (_forget_default, "collections.defaultdict")]
    for name in HARMLESS:
        module, _, attribute = name.rpartition(".")
        with contextlib.suppress(ImportError, AttributeError):  # not installed, or not in this version
            known.append((getattr(importlib.import_module(module), attribute), name))
    return known


def _flatten(tree: Any, path: str = "", depth: int = 0) -> dict[str, Tensor]:
    if isinstance(tree, Tensor):
        return {path: tree}
    if depth > 30:
        raise RecursionError
    items = tree.items() if isinstance(tree, dict) else ()  # no other mapping: OmegaConf's would resolve what it holds
    flat: dict[str, Tensor] = {}
    for key, value in items:
        found = _flatten(value, f"{path}.{key}".lstrip("."), depth + 1)
        if twice := flat.keys() & found.keys():
            raise NecoError(f"a file of weights holds {min(twice)} twice")
        flat |= found
    return flat


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
    digest = re.search(r"[^-]-(?!\d+\.)([0-9a-f]{8,64})\.\w+$", path.name[9:])  # digits alone are a date
    try:
        with alone(path), transfers() as bar:
            report = bar(path.name, None)

            def show(done: int, total: int | None) -> None:
                interrupt.check()
                report(done, total)

            if path.exists():  # another process was at it
                return path
            part = fetch(url, path, show, pinned=digest is not None, tries=2)
            with part.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if digest and not found.startswith(digest[1]):
                part.unlink()
                raise NecoError(f"its SHA-256 is {found} instead of {digest[1]}...")
            files.rename(part, path)
    except (NecoError, OSError) as error:
        raise _unreachable(url, error) from error
    return path
