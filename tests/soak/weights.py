"""Weights from strangers: files with code in them, tensors that do not fit, downloads that are not what they should be.

A file with code never runs it unless it is trusted; what is wrong with a tensor is said by its name; a download is
whole and has its checksum, or is not there.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import http.server
import io
import json
import pickle
import random
import shutil
import subprocess
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch

from neco.config import validate
from neco.model import load_backbone, sources, trained_model
from neco.model.weights import load
from neco.runs.provenance import model_of
from neco.training.run import find
from neco.utils import download
from neco.utils.errors import NecoError
from soak import Outcome, trial
from soak.inputs import network


class Reduced:
    """Unpickled, it calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.told = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.told


def gadgets(canary: Path) -> dict[str, Any]:
    """Objects, or whole pickles as bytes, that make the file `canary` when they are read by pickle."""
    import os

    told, code = f"touch '{canary}'", f"open({str(canary)!r}, 'w').close()"
    text = told.encode().replace(b"'", b"")
    return {
        "os.system": Reduced(os.system, told),
        "eval": Reduced(eval, code),
        "exec": Reduced(exec, code),
        "subprocess": Reduced(subprocess.check_call, ["touch", str(canary)]),
        "open": Reduced(open, str(canary), "w"),
        "Path.touch": Reduced(Path.touch, canary),
        "partial": Reduced(functools.partial(os.system, told)),
        "map": Reduced(list, map(os.system, [told])),
        "state of a Namespace": Reduced(argparse.Namespace, state={"a": Reduced(os.system, told)}),
        "key of a dictionary": {Reduced(os.mkdir, str(canary)): 1},
        "part of an OrderedDict": OrderedDict(a=[(Reduced(os.system, told),)]),
        "opcode GLOBAL": b"cposix\nsystem\n(S'" + text + b"'\ntR.",
        "opcode INST": b"(S'" + text + b"'\niposix\nsystem\n.",
        "opcode OBJ": b"(cposix\nsystem\nS'" + text + b"'\no.",
        "opcode STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(text)]) + text + b"\x85R.",
        "name with dots": b"\x80\x04\x8c\x08builtins\x8c\x0edict.__class__\x93)\x81cposix\nsystem\n(S'"
        + text
        + b"'\ntR.",
        "persistent id": b"\x80\x02(X\x07\x00\x00\x00storagecposix\nsystem\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        b"K\x01tQcposix\nsystem\n(S'" + text + b"'\ntR.",
    }


FOR_TORCH = ("persistent id", "name with dots")  # what only a reader of its kind would fall for


def planted(path: Path, gadget: Any, rng: random.Random) -> str:
    """A file of weights with it, in one of the forms that torch reads; which."""
    state, form = network().net.state_dict(), rng.choice(("zip", "legacy", "plain pickle"))
    if isinstance(gadget, bytes):
        if form == "zip":
            torch.save(state, path)
            with zipfile.ZipFile(path) as old:
                held = {name: old.read(name) for name in old.namelist()}
            with zipfile.ZipFile(path, "w") as new:
                for name, data in held.items():
                    new.writestr(name, gadget if name.endswith("data.pkl") else data)
        elif form == "legacy":
            torch.save(state, path, _use_new_zipfile_serialization=False)
            data = path.read_bytes()  # magic number, protocol, system, then the object: four pickles
            path.write_bytes(data[: data.index(b"ccollections")] + gadget)
        else:
            path.write_bytes(gadget)
        return form
    for _ in range(rng.randrange(3)):
        gadget = rng.choice(([gadget], {"a": gadget}, (1, gadget), argparse.Namespace(a=gadget)))
    content = {"model": state, "args": gadget} if rng.random() < 0.5 else {"args": gadget, "state_dict": state}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return form


def entries(path: Path) -> dict[str, Callable[[bool], object]]:
    """All ways by which a file of weights comes in; each is told whether it is trusted."""
    wanted, options = _settings()
    resumed, saved = dataclasses.replace(options, resume=str(path)), {"config": {}, "files": "", "classes": []}
    return {
        "checkpoint=": lambda trust: load(network(), path, trust_pickle=trust),
        "load_backbone": lambda trust: load_backbone(str(path), trust_pickle=trust),
        "the model of a checkpoint": lambda trust: trained_model(str(path), trust),
        "task=eval": lambda trust: model_of(wanted, str(path)),
        "train.resume=": lambda trust: find(resumed, path.parent / "last.ckpt", saved),
    }


@functools.cache
def _settings() -> tuple[validate.Settings, Any]:
    return validate.load("task=eval"), validate.load("task=train").spine["train"]


@trial(small=60, full=1000)
def code(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    """Pickles that run code: none does."""
    canary = folder / "canary"
    for name, gadget in gadgets(canary).items():  # they are no blanks
        with contextlib.suppress(Exception):  # after the deed
            pickle.loads(gadget if isinstance(gadget, bytes) else pickle.dumps(gadget))
        assert canary.exists() or name in FOR_TORCH, f"{name} does nothing, even to pickle"
        shutil.rmtree(canary) if canary.is_dir() else canary.unlink(missing_ok=True)
    for number in range(count):
        shutil.rmtree(folder)
        folder.mkdir()
        name, gadget = rng.choice(list(gadgets(canary).items()))
        path = folder / f"w{number}{rng.choice(('.pth', '.pt', '.ckpt', '.bin'))}"
        form = planted(path, gadget, rng)
        way, use = rng.choice(list(entries(path).items()))
        try:
            use(False)
            result = "it was not looked at"
        except NecoError as error:
            assert path.name in str(error), f"{name} by {way}: no file is named: {error}"
            result = "refused, nothing ran"
        assert not canary.exists(), f"{name} in a {form} file ran by {way}"
        yield Outcome(f"pickle with code: {name}", result)


@trial(small=1, full=1)
def targets(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    """What a file notes of its own network is code by another name: `_target_` names any function."""
    canary = folder / "canary"
    nodes: list[Any] = [
        {"_target_": "os.system", "command": f"touch {canary}"},
        {"_target_": "pathlib.Path.touch", "self": str(canary)},
        {"_target_": "neco.model.backbone.Backbone", "name": "hf-hub:a/b", "size": 32}, {}, [], "os.system", 3,
        {"_target_": ["os.system"]}, {"_target_": "neco.model.backbone.Backbone", "size": "${oc.env:HOME}"},
    ]  # fmt: skip
    for node in nodes:
        for suffix in (".safetensors", ".ckpt"):
            path = folder / f"w{suffix}"
            state = network().net.state_dict()
            if suffix == ".ckpt":
                torch.save({"state_dict": state, "neco": {"config": {"model": node}}}, path)
            else:
                safetensors.torch.save_file(state, path, {"neco": json.dumps({"model": node})})
            try:
                load_backbone(str(path))
                raise AssertionError(f"{node} was taken")
            except NecoError as error:
                assert path.name in str(error) or "model" in str(error), str(error)
            assert not canary.exists(), f"{node} ran"
            yield Outcome("model node that a file brings: not Backbone, or with what it does not take", "refused")
    for noted in ("[]", "3", "{", "[" * 100_000, '{"model": NaN}', "\0"):
        safetensors.torch.save_file(network().net.state_dict(), folder / "w.safetensors", {"neco": noted})
        load(network(), folder / "w.safetensors")
        with_error = noted == '{"model": NaN}'
        try:
            assert trained_model(str(folder / "w.safetensors")) is None and not with_error
        except NecoError:
            assert with_error
        yield Outcome("note in a file that is no note", "its weights are loaded")


def faults(rng: random.Random, state: dict[str, torch.Tensor]) -> tuple[str, str]:
    """One fault in a random tensor, in place: which, and the tensor's name."""
    name = rng.choice(list(state))
    value = state[name].clone()
    kind = rng.choice((
        "NaN", "inf", "-inf", "missing", "more", "twice", "another shape", "transposed", "one row less", "empty",
        "scalar", "complex", "sparse", "text instead",
    ))  # fmt: skip
    if kind in ("NaN", "inf", "-inf"):
        value.view(-1)[rng.randrange(value.numel())] = float(kind)
        state[name] = value
    elif kind == "missing":
        del state[name]
    elif kind == "more":
        name = f"blocks.{rng.randrange(9)}.extra{rng.randrange(9)}.weight"
        state[name] = value
    elif kind == "twice":
        name = "pos_embed"
        state["embeddings.position_embeddings"] = state[name]
    elif kind == "text instead":
        state[name] = name  # type: ignore[assignment]
    elif kind == "sparse":
        state[name] = value.to_sparse()
    else:
        state[name] = {
            "another shape": lambda: value.new_zeros(*value.shape, 2),
            "transposed": lambda: value.new_zeros(*value.shape[::-1], 1),
            "one row less": lambda: value.narrow(-1, 0, value.shape[-1] - 1),
            "empty": lambda: value.new_zeros(0, *value.shape),
            "scalar": lambda: value.new_zeros(()),
            "complex": lambda: value.to(torch.complex64),
        }[kind]()
    return kind, name


@trial(small=80, full=2000)
def tensors(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    """One wrong tensor: the message names it."""
    for number in range(count):
        torch.manual_seed(number)
        state = dict(network().net.state_dict())
        kind, name = faults(rng, state)
        # complex: safetensors before 0.6 has no such numbers
        safe = kind not in ("sparse", "text instead", "twice", "complex") and rng.random() < 0.5
        path = folder / f"w{number % 9}.{'safetensors' if safe else 'pth'}"
        if safe:
            safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
        else:
            torch.save(
                rng.choice((state, {"model": state}, {"state_dict": {f"module.{k}": v for k, v in state.items()}})),
                path,
            )
        try:
            load(network(), path)
            raise AssertionError(f"{name}, {kind}, was taken")
        except NecoError as error:
            said = str(error)
        lost = name.startswith("patch_embed.proj.weight") and kind in ("missing", "text instead")  # the landmark
        assert path.name in said and (name in said or lost), f"{name}, {kind}: {said}"
        yield Outcome(f"a tensor: {kind}", "named" if name in said else "the file has no known layout, named")


@trial(small=12, full=300)
def downloads(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    """A server that breaks off, lies about lengths, changes the file or sends something else."""
    state = io.BytesIO()
    torch.save(network().net.state_dict(), state)
    right, other = state.getvalue(), bytes(reversed(state.getvalue()))
    digest = hashlib.sha256(right).hexdigest()
    plan: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None: ...

        def do_GET(self) -> None:
            fault = plan.pop(0) if plan else "none"
            if fault in ("500", "404"):
                return self.send_error(int(fault))
            body = {"another file": other, "cut file": right[:-9], "web page": b"<html>"}.get(fault, right)
            begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            begin = begin if begin < len(body) and fault != "ignores ranges" else 0
            length = len(body) - begin + {"longer than said": -5, "shorter than said": 5}.get(fault, 0)
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(length))
            self.send_header("Content-Type", "text/html" if fault == "web page" else "application/octet-stream")
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            part = body[begin:]
            self.wfile.write(part[: rng.randrange(len(part))] if fault == "breaks off" else part)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    kinds = ("none", "500", "404", "another file", "cut file", "web page", "ignores ranges", "breaks off",
             "longer than said", "shorter than said")  # fmt: skip
    try:
        with mock.patch.object(download, "PAUSE", 1e-3), mock.patch.dict("os.environ", TORCH_HOME=str(folder)):
            for number in range(count):
                plan[:] = rng.choices(kinds, k=rng.choice((1, 1, 2, 3)))
                first, url = plan[0], f"http://127.0.0.1:{server.server_address[1]}/{number}-{digest[:8]}.pth"
                try:
                    path = sources.locate(url, "")
                    assert path.read_bytes() == right, f"{plan}: another file was taken"
                    result = "the right file, after all"
                except NecoError as error:
                    assert url in str(error), str(error)
                    assert not sources.cache_of(url).exists(), f"{first}: a wrong file was kept"
                    result = "refused, nothing is kept as if it was right"
                yield Outcome(f"download, first answer: {first}", result)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
