"""Secrets reach no file, log, tracker or message; what steers a terminal is shown as an escape."""

import http.server
import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import ROOT, SMALL

from neco.runs import results
from neco.sweep.launcher import name, resume_command
from neco.utils import masking
from neco.utils.masking import make_printable, mask_nested, mask_secrets

SHOWN = {
    "checkpoint=https://me:SECRET@host/a.pth": "checkpoint=https://***@host/a.pth",
    "postgresql://me:SEC/RET@host/studies": "postgresql://***@host/studies",
    "ssh://SECRET@host:22/a": "ssh://***@host:22/a",
    "hydra.sweeper.storage=mysql://host/SECRET seed=1": "hydra.sweeper.storage=*** seed=1",
    "https://b.s3.com/a.pth?X-Amz-Credential=SECRET&X-Amz-Date=2020&X-Amz-Signature=SECRET":
        "https://b.s3.com/a.pth?X-Amz-Credential=***&X-Amz-Date=***&X-Amz-Signature=***",
    "https://x.blob.net/c/f?sv=1&se=2&sr=b&sig=SECRET": "https://x.blob.net/c/f?sv=***&se=***&sr=***&sig=***",
    "https://h/f?file=a.pth&access_token=SECRET#auth=SECRET": "https://h/f?file=a.pth&access_token=***#auth=***",
    "'https://h/f?id=3&key=SECRET', then": "'https://h/f?id=3&key=***', then",
    "WANDB_API_KEY=SECRET HF_TOKEN=SECRET x": "WANDB_API_KEY=*** HF_TOKEN=*** x",
    "logger.mine.api_key: SECRET": "logger.mine.api_key: ***",
    '{"password": "SECRET", "seed": 1}': '{"password": "***", "seed": 1}',
    "Authorization: Bearer SECRET": "Authorization: Bearer ***",
    "a key hf_SECRETSECRETSECRET1": "a key ***",
    # No secrets:
    "tokens: 197, cls_token: 1, key: b, monitor=x/miou": "tokens: 197, cls_token: 1, key: b, monitor=x/miou",
    "https://host:8080/a@b/c.pth?dl=1": "https://host:8080/a@b/c.pth?dl=1",
    "token=null hydra.sweeper.storage=null s3://bucket/x": "token=null hydra.sweeper.storage=null s3://bucket/x",
    "git 7d3f0000aaaabbbbccccddddeeeeffff00001111": "git 7d3f0000aaaabbbbccccddddeeeeffff00001111",
}  # fmt: skip


@pytest.mark.parametrize("text", SHOWN)
def test_secrets_are_masked_once_and_nothing_else_is(text: str) -> None:
    assert mask_secrets(text) == SHOWN[text] and mask_secrets(SHOWN[text]) == SHOWN[text]


def test_two_addresses_stay_two_and_one_signed_again_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (mask_secrets(f"https://h/get?object={i}&token=SECRET") for i in "12")
    assert one != other and mask_secrets("https://h/get?object=1&token=ANOTHER") == one == mask_secrets(one)
    assert mask_nested({"a": [{"token": "SECRET"}, ("u:p", 1)], "api_key": None, "secret": "SECRET"}) == {
        "a": [{"token": "***"}, ("u:p", 1)], "api_key": None, "secret": "***",
    }  # fmt: skip
    monkeypatch.setenv("MY_API_KEY", "0123456789abcdef")
    assert mask_secrets("the server says 0123456789abcdef is wrong") == "the server says *** is wrong"
    command = resume_command(["checkpoint=https://h/a?token=SECRET"], "runs/a")
    assert "with the secrets in place of ***" in command and "***" not in resume_command(["seed=1"], "runs/a")
    folders = [name([f"checkpoint=https://h/a?token=SECRET{i}"], {"checkpoint"}) for i in "12"]
    assert "SECRET" not in "".join(folders) and len({*folders}) == 2


def test_what_steers_a_terminal_is_an_escape(caplog: pytest.LogCaptureFixture, capsys) -> None:
    text = "a\x1b[2J\x07b\r\u202ec\x9b1m"
    assert make_printable(text) == r"a\x1b[2J\x07b\r\u202ec\x9b1m" and make_printable("é\t中\n") == "é\t中\n"
    record = logging.makeLogRecord({"msg": "%s", "args": (f"{text} token=SECRET",)})
    try:
        raise ValueError("https://u:SECRET@h \x1b[1m")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
        shown = masking.Formatter("%(message)s").format(record)
        masking.print_exception(*record.exc_info)
    shown += capsys.readouterr().err
    assert "SECRET" not in shown and "\x1b" not in shown and shown.count("ValueError: https://***@h") == 2


def test_masking_a_page_takes_no_time(tmp_path: Path) -> None:
    page, records = "abcDEF0123" * 200_000 + "=", json.dumps([{"miou": 0.5, "key": "a"}] * 20_000, indent=1)
    start = time.process_time()
    results.write(tmp_path / "page", page)
    results.write(tmp_path / "records", records)
    assert time.process_time() - start < 10, "a step back at each letter takes minutes"
    assert (tmp_path / "records").read_text() == records and (tmp_path / "page").read_text() == page


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server that gives weights to whoever has a token."""
    shutil.copy(ROOT / "neco/model/tiny.safetensors", tmp_path / "tiny.safetensors")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if "token=SECRET" not in urlsplit(self.path).query:
                self.send_error(403)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}/tiny.safetensors"
        served.shutdown()


def test_a_run_from_a_signed_address_keeps_no_secret_and_goes_on(
    inside, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    small = [value for value in SMALL if value not in ("weights=none", "eval=[]")]
    light = ["eval=[retrieval]", "eval.retrieval.k=3", "logger=[csv,wandb]", "model=tiny", "show=2"]

    def run(query: str, *more: str) -> tuple[int, str]:
        return inside("task=train", *small, *light, f"checkpoint='{server}?{query}'", "run_dir=run", *more)

    code, said = run("object=1&token=SECRET1")
    assert code == 0, said
    code, again = run("object=1&token=SECRET2")
    assert code == 0 and "all 4 steps are done" in again, again
    code, other = run("object=2&token=SECRET2")
    assert code == 2 and "object=***" in other, other
    code, exported = inside("task=export", "checkpoint=run", "run_dir=out", "file=out/model.safetensors")
    assert code == 0, exported
    files = [path for folder in ("run", "out") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert {"config.yaml", "log.txt", "report.html", "last.ckpt", "README.md"} <= {path.name for path in files}
    assert [path for path in files if b"SECRET" in path.read_bytes()] == []
    assert "SECRET" not in said + again + other + exported
