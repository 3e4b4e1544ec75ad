"""Weights in folders: shards with an index, distributed checkpoints of torch, and folders of other kinds."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_model_sources import Evil
from test_model_weights import Hub, backbone, same
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import filesystem, metadata

from neco.model import last_checkpoint, load_backbone, trained_model
from neco.model.weights import load
from neco.utils.errors import NecoError

State = dict[str, Tensor]


def shard(folder: Path, state: State, kind: str = "safetensors", count: int = 3) -> Path:
    """Write shards as transformers does; their index."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, listed = "model" if kind == "safetensors" else "pytorch_model", {}
    for i in range(count):
        name = f"{stem}-{i + 1:05d}-of-{count:05d}.{kind}"
        part = {key: value for at, (key, value) in enumerate(state.items()) if at % count == i}
        safetensors.torch.save_file(part, folder / name) if kind == "safetensors" else torch.save(part, folder / name)
        listed |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}, indent=2))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_and_their_index(tmp_path: Path, kind: str) -> None:
    hub = Hub(seed=7)
    index = shard(tmp_path / "x", hub.w, kind)
    (tmp_path / "x" / "config.json").write_text("{}")
    for source in (tmp_path / "x", index):
        assert last_checkpoint(str(source)) == str(source) and trained_model(str(source)) is None
        net = backbone()
        assert load(net, source).matched == 34 and same(net, hub)
    with pytest.raises(NecoError, match=rf"one of 3 shards; give their index, .*{index.name}"):
        load(backbone(), tmp_path / "x" / f"{index.name.split('.')[0]}-00001-of-00003.{kind}")


def spoil_index(index: Path, change: Any) -> None:
    held = json.loads(index.read_text())
    change(held["weight_map"])
    index.write_text(json.dumps(held))


FIRST = "model-00001-of-00003.safetensors"
SPOILED = {
    "above": (lambda m: m.update(cls_token=f"../y/{FIRST}"), r"names '\.\./y/.*: shards lie beside it"),
    "elsewhere": (lambda m: m.update(cls_token="/etc/passwd"), r"names '/etc/passwd': shards lie beside it"),
    "of Windows": (lambda m: m.update(cls_token="C:\\x"), "shards lie beside it"),
    "nowhere": (lambda m: m.update(cls_token=".."), "shards lie beside it"),
    "a number": (lambda m: m.update(cls_token=5), "no weight_map"),
    "lost": (lambda m: m.update(cls_token="model-00009-of-00003.safetensors"), "is not there: copy all shards"),
    "foreign": (lambda m: m.update(other=FIRST), f"{FIRST} holds no other, which .* says: a shard of something else"),
    "surplus": (lambda m: m.pop("cls_token"), "holds cls_token, which .* does not give it"),
    "twice": (lambda m: m.update(cls_token="model-00002-of-00003.safetensors"), "holds no cls_token|holds cls_token"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_an_index_that_does_not_go_with_its_shards(tmp_path: Path, what: str) -> None:
    index = shard(tmp_path / "x", Hub().w)
    shard(tmp_path / "y", Hub().w)
    change, said = SPOILED[what]
    spoil_index(index, change)
    with pytest.raises(NecoError, match=said):
        load(backbone(), tmp_path / "x")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000, '{"weight_map": {"a": {}}}'])
def test_an_index_of_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(NecoError, match="cannot be read as an index of shards"):
        load(backbone(), tmp_path)


def test_shards_that_are_pickles_run_nothing(tmp_path: Path) -> None:
    index = shard(tmp_path / "x", Hub().w, "bin")
    path = tmp_path / "x" / "pytorch_model-00001-of-00003.bin"
    torch.save({**torch.load(path), "args": Evil(tmp_path / "touched")}, path)
    for use in (lambda: load(backbone(), index), lambda: load_backbone(index, model="dinov2_vits14")):
        with pytest.raises(NecoError, match=r"needs pickle.*trust_pickle=true"):
            use()
    load(backbone(), index, trust_pickle=True)
    assert (tmp_path / "touched").exists()


# -- distributed checkpoints -----------------------------------------------------------------------------------------


def test_what_torch_writes(tmp_path: Path) -> None:
    """As FSDP's scripts do: network and optimiser, other objects."""
    hub = Hub(seed=8)
    moments = {f"state.{key}.exp_avg": value for key, value in hub.w.items()}
    content = {
        "model": {f"_orig_mod.{k}": v for k, v in hub.w.items()},
        "optim": moments,
        "step": 3,
        "x": Evil(tmp_path),
    }
    checkpoint.save(content, checkpoint_id=tmp_path / "x.ckpt", no_dist=True)
    net = backbone()
    report = load(net, tmp_path / "x.ckpt")
    assert same(net, hub) and (report.format, report.outside) == ("DINOv2 hub", len(moments))


def write_chunks(folder: Path, state: State, spoil: Any = None) -> None:
    """A distributed checkpoint of two processes, written down by torch's own classes."""
    files = [(folder / f"__{rank}_0.distcp").open("wb") for rank in (0, 1)]
    held = metadata.Metadata({}, {}, {})
    for key, value in state.items():
        cut = (len(value) + 1) // 2
        chunks = []
        for rank, part in enumerate(value.split(cut)):
            offsets = torch.Size((rank * cut, *[0] * (value.ndim - 1)))
            begin = files[rank].tell()
            torch.save(part.clone(), files[rank])
            place = filesystem._StorageInfo(files[rank].name.rpartition("/")[2], begin, files[rank].tell() - begin)
            held.storage_data[metadata.MetadataIndex(key, offsets, rank)] = place
            chunks.append(metadata.ChunkStorageMetadata(offsets, part.shape))
        entry = metadata.TensorStorageMetadata(metadata.TensorProperties(value.dtype), value.shape, chunks)
        held.state_dict_metadata[key] = entry
    if spoil:
        spoil(held)
    (folder / ".metadata").write_bytes(pickle.dumps(held))
    for file in files:
        file.close()


def test_chunks_of_several_processes_are_put_together(tmp_path: Path) -> None:
    hub, net = Hub(seed=9), backbone()
    write_chunks(tmp_path, {f"state_dict.teacher.backbone.{key}": value for key, value in hub.w.items()})
    assert load(net, tmp_path).which == "teacher" and same(net, hub)


NORM = "norm.weight"


def places(held: Any) -> list[Any]:
    return [place for key, place in held.storage_data.items() if key.fqn == NORM]


def moved(held: Any) -> None:
    entry = held.state_dict_metadata[NORM]
    entry.chunks[1] = metadata.ChunkStorageMetadata(torch.Size((7,)), entry.chunks[1].sizes)
    held.storage_data[metadata.MetadataIndex(NORM, (7,), 1)] = places(held)[1]


WRONG = {
    "above": (lambda held: setattr(places(held)[0], "relative_path", "../x"), r"names '\.\./x': shards lie beside it"),
    "lost": (lambda held: setattr(places(held)[0], "relative_path", "__7_0.distcp"), "No such file"),
    "cut": (lambda held: setattr(places(held)[0], "length", 100), "cannot be read as a distributed checkpoint"),
    "other": (lambda held: setattr(held.state_dict_metadata[NORM], "size", torch.Size((99,))), "do not make up"),
    "gap": (moved, r"not finite in 1 tensors: norm\.weight"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_distributed_checkpoint_with_a_fault(tmp_path: Path, what: str) -> None:
    spoil, said = WRONG[what]
    write_chunks(tmp_path, Hub().w, spoil)
    with pytest.raises(NecoError, match=said):
        load(backbone(), tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"x", pickle.dumps([1]), pickle.dumps({"a": 1}), b"\x80\x04r\xff\xff\xff\xff."]
)
def test_metadata_of_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(NecoError, match="cannot be read as a distributed checkpoint"):
        load(backbone(), tmp_path)


def test_metadata_runs_nothing(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(touched)))
    for trust in (False, True):
        with pytest.raises(NecoError, match="cannot be read as a distributed checkpoint"):
            load(backbone(), tmp_path, trust_pickle=trust)
    assert not touched.exists()


# -- other folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_one_file_of_a_folder(tmp_path: Path, name: str) -> None:
    hub, net = Hub(seed=3), backbone()
    safetensors.torch.save_file(hub.w, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    load(net, tmp_path)
    assert same(net, hub)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "a folder without weights .*it holds nothing"),
        (["README.md"], r"a folder without weights .*it holds README\.md"),
        (["a.pth", "b.pth"], r"a folder with a\.pth, b\.pth: name the file"),
        (["__0_0.distcp"], r"a distributed checkpoint without its \.metadata file"),
        (["mp_rank_00_model_states.pt", "latest"], r"DeepSpeed: .*zero_to_fp32\.py"),
        (["data.pkl", "version"], r"an unpacked \.pth file"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapters of peft without their network"),
        (["model-00001-of-00002.safetensors"], "shards without their index"),
        (
            ["a.safetensors.index.json", "b.safetensors.index.json"],
            "several indices of shards, a.safetensors.index.json, b",
        ),
    ],
)
def test_a_folder_says_what_it_is(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    for use in (lambda: load(backbone(), tmp_path), lambda: load_backbone(tmp_path, model="dinov2_vits14")):
        with pytest.raises(NecoError, match=said):
            use()
