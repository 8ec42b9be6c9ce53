"""A hosted model by a real server: `transformers serve` on loopback, with SmolLM2. `make test-api` runs these."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import eval_loop
from tests.conftest import ROOT

import httpx2
import pytest

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        command += ["--device", "cpu", "--dtype", "float32"]
        server = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        end = time.monotonic() + 120
        while True:
            try:
                httpx2.get(f"http://127.0.0.1:{port}/health", timeout=2).raise_for_status()
                break
            except httpx2.HTTPError:
                assert server.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < end, log.read_text()[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        server.kill()


def predictions(capsys) -> tuple[dict, dict[str, str]]:
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return result, json.loads((Path(result["run"]) / "predictions.json").read_text())


@pytest.mark.parametrize("order", ["context", "both"])
def test_a_server_answers_as_the_model_here_does(url, smollm2_base, tmp_path, capsys, order):
    same = [f"data.dev={ROOT / 'demo' / 'dev.json'}", "data.dev_questions=12", f"window.tokenizer={smollm2_base}"]
    same += [f"prompt.order={order}", f"runs={tmp_path}"]
    # its threads share one model, so one request at a time
    eval_loop.main(["api8b", f"api.url={url}", f"base.path={smollm2_base}", "api.concurrency=1", *same])
    there, texts_there = predictions(capsys)
    eval_loop.main(["smollm2-raw", "base.quant=none", "base.dtype=fp32", *same])
    here, texts_here = predictions(capsys)
    assert texts_there == texts_here
    assert len(set(texts_here.values())) > 6
    assert (there["em"], there["f1"]) == (here["em"], here["f1"])
    assert there["requests"] == 12
    assert there["tokens_read"] > 1000
