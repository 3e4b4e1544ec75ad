"""Files that claim more than they hold are refused before memory is taken: measured, in a process of its own."""

import gzip
import json
import pickle
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_model_weights import Hub, backbone, same
from torch.distributed.checkpoint import filesystem, metadata

from neco.model import sources
from neco.model.backbone import DEEPEST, Backbone
from neco.model.weights import load
from neco.utils.errors import NecoError

NODE = {"_target_": "neco.model.backbone.Backbone", "name": "vit_small_patch14_dinov2.lvd142m", "size": 518}
WIDE = {"embed_dim": 2880, "depth": 1, "num_heads": 1, "patch_size": 14}  # 400 MB of weights
MB = 100  # what refusing may take; each file here claims four times as much
MEASURE = """
import resource, sys
from neco.eval.common.heads import load_head
from neco.model import load_backbone
from neco.utils.errors import NecoError
load_backbone({small!r})  # imports and caches of all kinds

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

for path in sys.argv[1:]:
    before = peak()
    try:
        load_head(path) if "head" in path else load_backbone(path, weights="none" if "random" in path else "auto")
        said = "accepted"
    except NecoError as error:
        said = str(error).replace(chr(10), " ")
    print(path.rpartition("/")[2], round(peak() - before), said, sep="\\t")
"""


def wide() -> dict[str, torch.Tensor]:
    """The state of a wide network on the meta device."""
    with torch.device("meta"):
        return Backbone(**{k: v for k, v in NODE.items() if k[0] != "_"}, arch=WIDE).net.state_dict()  # type: ignore[arg-type]


def own(path: Path, state: dict[str, torch.Tensor], arch: Any = WIDE) -> None:
    """A checkpoint of neco that says that it holds a wide network."""
    held = {f"student.backbone.net.{key}": value for key, value in state.items()}
    torch.save({"state_dict": held, "neco": {"config": {"model": {**NODE, "arch": arch}}}}, path)


def note(path: Path, arch: Any) -> None:
    """An exported file that says so."""
    noted = {"neco": json.dumps({"model": {**NODE, "arch": arch}, "weights": "0"})}
    safetensors.torch.save_file({"patch_embed.proj.weight": torch.zeros(1)}, path, noted)


def thin(path: Path) -> None:
    """Adapters of which two thin factors claim a whole matrix."""
    key, width = "blocks.0.attn.proj.", 10_000
    parts = {"original": (1, 1), "0.up": (width, 1), "0.down": (1, width), "0.scale": ()}
    state = {f"{key}parametrizations.weight.{part}": torch.ones(shape) for part, shape in parts.items()}
    own(path, {**state, "patch_embed.proj.weight": torch.ones(1)})


def repeated(path: Path) -> None:
    """A network whose every tensor repeats one number."""
    own(path, {key: torch.zeros(1).expand(value.shape) for key, value in wide().items()})


def shared(path: Path) -> None:
    """A network whose tensors are all parts of one."""
    whole = torch.zeros(max(value.numel() for value in wide().values()))
    own(path, {key: whole[: value.numel()].view(value.shape) for key, value in wide().items()})


def head(path: Path) -> None:
    about = {"trained": "x", "kind": "fcn", "dim": "20000", "classes": '["a", "b"]', "size": "448", "patch": "14"}
    safetensors.torch.save_file({"0.weight": torch.zeros(1)}, path, {**about, "weights": "0"})


class Reduced:
    """Pickled as a call of `function` with `given`."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.called = function, given

    def __reduce__(self) -> Any:
        return self.called


def called(path: Path) -> None:
    torch.save({"a": Reduced(list, Reduced(bytes, 50_000_000))}, path)


def array(path: Path, zipped: bool) -> None:
    torch.save({"a": Reduced(bytearray, 400_000_000)}, path, _use_new_zipfile_serialization=zipped)


FILES = {
    "head.safetensors": (head, "holds no head that eval=linear wrote: Error(s) in loading state_dict"),
    "wide.safetensors": (lambda path: note(path, WIDE), "does not fit vit_small_patch14_dinov2"),
    "random.safetensors": (lambda path: note(path, WIDE), "does not fit vit_small_patch14_dinov2"),
    "wide.ckpt": (lambda path: own(path, {"patch_embed.proj.weight": torch.zeros(1)}), "does not fit vit_small"),
    "deep.safetensors": (lambda path: note(path, {"depth": 60_000}), f"at most {DEEPEST} blocks"),
    "repeated.ckpt": (repeated, "its tensors repeat what is there"),
    "shared.ckpt": (shared, "its tensors repeat what is there"),
    "thin.ckpt": (thin, "the adapters of blocks.0.attn.proj.weight do not fit"),
    "called.pth": (called, "say which network it is"),
    "array.pth": (lambda path: array(path, True), "needs pickle, which can run any code, for: builtins.bytearray"),
    "legacy.pth": (lambda path: array(path, False), "needs pickle, which can run any code, for: builtins.bytearray"),
}


def test_what_files_claim_takes_no_memory(tmp_path: Path) -> None:
    for name, (make, _) in FILES.items():
        make(tmp_path / name)
        assert (tmp_path / name).stat().st_size < (200_000 if name != "shared.ckpt" else 150_000_000)
    state = backbone().net.state_dict()
    small = tmp_path / "small.ckpt"
    own(small, state, {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 14})
    program = textwrap.dedent(MEASURE).format(small=str(small))
    names = [str(tmp_path / name) for name in FILES]
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t", 2) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [*FILES]
    for name, megabytes, said in rows:
        assert FILES[name][1] in said, (name, said)
        assert int(megabytes) < MB, (name, megabytes)


@pytest.mark.parametrize("repeat", [1, 2000])
def test_archives_that_were_compressed(tmp_path: Path, repeat: int) -> None:
    """torch maps what is compressed as if it were numbers; and a small archive may unpack to any size."""
    hub = Hub(seed=5)
    torch.save({"model": hub.w, "optimizer": torch.zeros(repeat, 10_000)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as old, zipfile.ZipFile(tmp_path / "y.pth", "w", 8) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    if repeat == 1:
        net = backbone()
        load(net, tmp_path / "y.pth")
        assert same(net, hub)
    else:
        with pytest.raises(
            NecoError, match=r"y\.pth cannot be read as weights .*: its parts claim \d+ bytes, the file"
        ):
            load(backbone(), tmp_path / "y.pth")


@pytest.mark.parametrize("pack", ["zip", "gzip"])
def test_what_is_packed_once_more_is_told(tmp_path: Path, pack: str) -> None:
    torch.save(Hub().w, tmp_path / "x.pth")
    if pack == "zip":
        with zipfile.ZipFile(tmp_path / "y.pth", "w") as archive:
            archive.write(tmp_path / "x.pth", "x.pth")
    else:
        (tmp_path / "y.pth").write_bytes(gzip.compress((tmp_path / "x.pth").read_bytes(), 1))
    with pytest.raises(NecoError, match=r"it is (an archive of x\.pth|compressed with gzip): unpack it first"):
        load(backbone(), tmp_path / "y.pth")


def test_dictionaries_within_each_other_end(tmp_path: Path) -> None:
    """Each holds the next a hundred times: the file is small, its names would be 100^20."""
    tree: dict[str, Any] = {}
    for _ in range(20):
        tree = {str(i): tree for i in range(100)}
    torch.save(tree, tmp_path / "x.pth")
    with pytest.raises(NecoError, match="nested too deep"):
        sources.read(tmp_path / "x.pth")


def test_a_distributed_checkpoint_that_claims_more_than_its_files(tmp_path: Path) -> None:
    name, size = "patch_embed.proj.weight", torch.Size((10**5, 10**5))
    torch.save(torch.zeros(1).expand(size), tmp_path / "__0_0.distcp")
    length = (tmp_path / "__0_0.distcp").stat().st_size
    place = filesystem._StorageInfo("__0_0.distcp", 0, length)
    chunk = metadata.ChunkStorageMetadata(torch.Size((0, 0)), size)
    entry = metadata.TensorStorageMetadata(metadata.TensorProperties(), size, [chunk])
    index = metadata.MetadataIndex(name, (0, 0))
    for count, said in ((1, "its tensors repeat what is there"), (100, r"it claims \d+ bytes, and its files have")):
        entry.chunks = [chunk] * count
        held = metadata.Metadata({name: entry}, None, {index: place})
        (tmp_path / ".metadata").write_bytes(pickle.dumps(held))
        with pytest.raises(NecoError, match=said):
            sources.read(tmp_path)
