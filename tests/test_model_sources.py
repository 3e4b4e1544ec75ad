"""Where weights come from: files without pickle, hubs, downloads that break off."""

import argparse
import collections
import functools
import hashlib
import multiprocessing
import pathlib
import threading
import time
import types
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from test_model_weights import Hub, backbone, same
from torch import nn

from neco.model import load_backbone, sources, trained_model
from neco.model.weights import load
from neco.utils import download
from neco.utils.errors import NecoError


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_runs_only_when_trusted(tmp_path: Path, legacy: bool) -> None:
    path, touched = tmp_path / "old.ckpt", tmp_path / "touched"
    torch.save({"model": Hub().w, "args": Evil(touched)}, path, _use_new_zipfile_serialization=not legacy)
    for use in (
        lambda: load(backbone(), path),
        lambda: load_backbone(str(path)),
        lambda: trained_model(str(path)),
    ):
        with pytest.raises(NecoError, match=r"old\.ckpt needs pickle.* (builtins\.)?getattr.*trust_pickle=true"):
            use()
        assert not touched.exists()
    net = backbone()
    load(net, path, trust_pickle=True)
    assert touched.exists() and same(net, Hub())


def old_run() -> dict[str, Any]:
    from omegaconf import OmegaConf

    config = OmegaConf.create({"lr": 1e-3, "crops": [1, None, True, "x"], "out": {"dir": "${oc.env:HOME}"}})
    return {
        "args": argparse.Namespace(lr=1e-3, out=Path("runs"), nested=types.SimpleNamespace(a=1)),
        "hyper_parameters": config,
        "lists": config.crops,
        "best": np.float64(0.5),
        "numbers": [np.float32(1), np.int64(2), np.bool_(True), np.dtype("float16")],
        "log": collections.defaultdict(list, {"loss": [1.0]}),
        "order": collections.OrderedDict(a=1),
        "torch": torch.__version__,
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_what_old_checkpoints_hold_needs_no_trust(tmp_path: Path, legacy: bool) -> None:
    content = {"model": Hub().w, **old_run()}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=not legacy)
    net = backbone()
    report = load(net, tmp_path / "old.pth")
    assert same(net, Hub()) and report.outside == 0
    held = sources.contents(tmp_path / "old.pth")
    assert held["args"] == content["args"] and held["numbers"] == content["numbers"]


@pytest.mark.parametrize(
    ("extra", "culprit"),
    [
        (np.zeros(2), r"numpy\.ndarray"),
        (functools.partial(print, 1), r"functools\.partial"),
        (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        ({NecoError: 1}, r"neco\.utils\.errors\.NecoError"),  # as old Lightning keeps its callbacks
        (np.dtype([("a", "O")]), r"numpy\.dtypes?\.\w+"),
    ],
)
def test_everything_else_needs_trust(saved: Any, extra: Any, culprit: str) -> None:
    with pytest.raises(NecoError, match=f"needs pickle.*{culprit}.*trust_pickle=true"):
        load(backbone(), saved({"model": Hub().w, "extra": extra}))


def test_nothing_harmless_is_a_function_that_does_something() -> None:
    """A new entry has to be thought about: what can a file make of it that chooses the arguments?"""
    for kind in sources._harmless():
        thing = kind[0] if isinstance(kind, tuple) else kind
        assert isinstance(thing, type) or thing in (np.float64().__reduce__()[0], sources._forget_default), kind
    assert {name.partition(".")[0] for name in sources.HARMLESS} <= {
        "argparse", "builtins", "numpy", "omegaconf", "pathlib", "torch", "types", "typing"
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_a_program(tmp_path: Path) -> None:
    """As OpenAI publishes CLIP."""
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "ViT-B-16.pt")
    with pytest.raises(NecoError, match=r"ViT-B-16\.pt needs pickle.*TorchScript.*trust_pickle=true"):
        sources.read(tmp_path / "ViT-B-16.pt")
    assert set(sources.read(tmp_path / "ViT-B-16.pt", trust_pickle=True)) == {"weight", "bias"}


@pytest.mark.parametrize("trust", [False, True])
def test_damaged_files_are_named(tmp_path: Path, trust: bool) -> None:
    path = tmp_path / "cut.pth"
    torch.save(Hub().w, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(NecoError, match=r"cut\.pth cannot be read as weights"):
        load(backbone(), path, trust_pickle=trust)


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_files_that_are_no_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(NecoError, match=name):
        load(backbone(), str(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "which", "message"),
    [
        (Hub().w, "teacher", "weights=teacher: .*one plain network.*weights=auto"),
        ({"teacher": Hub().w}, "student", "weights=student: .*the teacher only"),
        ({"model": Hub().w, "module": Hub().w}, "auto", "several networks"),
        ({"features.0.weight": torch.ones(1)}, "auto", r"no layout.*features\.0\.weight"),
        ({"epoch": 3}, "auto", "no tensors"),
        ({"a": Hub().w, "b": Hub().w}, "auto", r"several networks that could be meant, a and b: .*weights=a$"),
        (
            {"a": Hub().w, "b": Hub().w},
            "c",
            r"weights=c: .*holds no network of that name, but a and b; there is: auto, ",
        ),
        ({"a": Hub().w, "b": Hub().w}, "techer", r"weights=techer: .*; did you mean 'teacher'\?$"),
    ],
)
def test_files_without_the_network_asked_for(saved: Any, content: Any, which: Any, message: str) -> None:
    with pytest.raises(NecoError, match=f"(?s){message}"):
        load(backbone(), saved(content), which)


def test_no_such_file() -> None:
    with pytest.raises(NecoError, match=r"weights /nowhere/x\.pth: no such file"):
        load(backbone(), "/nowhere/x.pth")


# -- downloads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A web server over a folder with `hub.pth`, and an empty cache for what is downloaded.

    Its `wanted` lists the range of each request. A path with `short` breaks off in the middle of its first answer.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "PAUSE", 0.001)
    (tmp_path / "www").mkdir()
    torch.save(Hub().w, tmp_path / "www" / "hub.pth")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            httpd.wanted.append(wanted)
            path = Path(self.translate_path(self.path))
            if not path.is_file():
                return self.send_error(404)
            body = path.read_bytes()
            begin = int(wanted[6:-1]) if wanted and self.headers.get("If-Range") == '"1"' else 0
            self.send_response(206 if begin else 200)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(body) - begin))
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            time.sleep(0.2 * ("slow" in self.path))
            broken = "broken" in self.path or ("short" in self.path and not begin)
            self.wfile.write(body[begin : len(body) // 2 if broken else None])

    httpd: Any = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "www")))
    httpd.wanted, httpd.url = [], f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name[8:] for path in (tmp_path / "home" / "hub" / "checkpoints").glob("[!.]*"))


def test_url_is_downloaded_once(server: Any, tmp_path: Path) -> None:
    hub, net = Hub(), backbone()
    load(net, f"{server.url}/hub.pth?download=true")
    assert same(net, hub)
    load(net, f"{server.url}/hub.pth?download=true")
    assert cached(tmp_path) == ["-hub.pth"] and server.wanted == [None]


def test_interrupted_download_goes_on(server: Any, tmp_path: Path) -> None:
    path, net = tmp_path / "www" / "short.pth", backbone()
    torch.save(Hub().w, path)
    load(net, f"{server.url}/short.pth")
    assert same(net, Hub()) and cached(tmp_path) == ["-short.pth"]
    assert server.wanted == [None, f"bytes={path.stat().st_size // 2}-"]


def test_hash_in_the_name_is_checked(server: Any, tmp_path: Path) -> None:
    body = (tmp_path / "www" / "hub.pth").read_bytes()
    right, wrong = f"dino-{hashlib.sha256(body).hexdigest()[:8]}.pth", "dino-0123456f.pth"
    for name in (right, wrong):
        (tmp_path / "www" / name).write_bytes(body)
    load(backbone(), f"{server.url}/{right}")
    with pytest.raises(NecoError, match=rf"cannot download .*SHA-256 is {right[5:13]}\w+ instead of 0123456f"):
        load(backbone(), f"{server.url}/{wrong}")
    (tmp_path / "www" / "dino-20241201.pth").write_bytes(body)  # a date
    load(backbone(), f"{server.url}/dino-20241201.pth")
    (tmp_path / "www" / "half.pth").write_bytes(body[:1000])
    with pytest.raises(NecoError, match=r"damaged.*The download was removed"):
        load(backbone(), f"{server.url}/half.pth")
    assert sorted(cached(tmp_path)) == sorted([f"-{right}", "-dino-20241201.pth"])


def test_of_two_processes_one_downloads(server: Any, tmp_path: Path) -> None:
    url, context = f"{server.url}/slow.pth", multiprocessing.get_context("fork")
    (tmp_path / "www" / "slow.pth").write_bytes(b"x" * 1000)
    both = [context.Process(target=sources.locate, args=(url, "")) for _ in range(2)]
    with download.alone(sources.cache_of(url)):  # so that both have started before one goes on
        for process in both:
            process.start()
        both[0].join(0.3)
        assert server.wanted == [] and all(process.is_alive() for process in both)
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert server.wanted == [None] and cached(tmp_path) == ["-slow.pth"]


@pytest.mark.parametrize(("name", "left"), [("absent.pth", []), ("broken.pth", ["-broken.pth.part"])])
def test_failed_download_says_what_to_do(server: Any, tmp_path: Path, name: str, left: list[str]) -> None:
    torch.save(Hub().w, tmp_path / "www" / "broken.pth")
    with pytest.raises(NecoError, match=rf"cannot download http.*{name}.*checkpoint=PATH.*\(weights=none"):
        load(backbone(), f"{server.url}/{name}")
    assert [name for name in cached(tmp_path) if not name.endswith("version")] == left


def test_cache_that_cannot_be_written(server: Any, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where a folder should be")
    with pytest.raises(NecoError, match=r"cannot download http.*home.*checkpoint=PATH"):
        load(backbone(), f"{server.url}/hub.pth")


@pytest.mark.parametrize("source", ["hub", "vit_small_patch14_dinov2.lvd142m"])
def test_hub_without_a_connection_fails_at_once(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda *place, revision: None)
    monkeypatch.setattr(sources, "get_hf_file_metadata", offline)
    start = time.monotonic()
    with pytest.raises(NecoError, match=r"timm/vit_small_patch14_dinov2\.lvd142m.*Give a local file"):
        load(backbone(), source)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("source", "place"),
    [
        (None, ("timm/vit_small_patch14_dinov2.lvd142m", "model.safetensors", "main")),
        ("https://huggingface.co/FunAILab/NeCo/resolve/v1/a/b.ckpt?download=true", ("FunAILab/NeCo", "a/b.ckpt", "v1")),
        ("https://huggingface.co/facebook/dinov2-small/blob/main/x.bin", ("facebook/dinov2-small", "x.bin", "main")),
    ],
)
def test_hugging_face_reads_its_cache_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None, place: tuple[str, ...]
) -> None:
    hub, net, asked = Hub(), backbone(weights="hub"), []
    safetensors.torch.save_file(hub.w, tmp_path / "model.safetensors")

    def cached(*place: str, revision: str) -> str:
        asked.append((*place, revision))
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr(sources, "try_to_load_from_cache", cached)
    load(net, source)
    assert asked == [place] and same(net, hub)


def test_hub_name_without_published_weights() -> None:
    with pytest.raises(NecoError, match="no published weights for vit_small_patch16_18x2_224"):
        load(backbone(), "vit_small_patch16_18x2_224")
