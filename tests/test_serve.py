"""A converted folder behind transformers' OpenAI-compatible server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conftest import build, tiny_tokenizer

from lrkv_convert import convert

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def post(url: str, content: dict) -> dict:
    request = urllib.request.Request(
        url, data=json.dumps(content).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
def test_a_chat_request_is_answered(tmp_path):
    pytest.importorskip("fastapi")
    build("llama", tmp_path / "source")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "out", rank=7, calibration=[])
    port, log = free_port(), tmp_path / "log"
    command = [
        sys.executable,
        "-c",
        "from lrkv_cli.main import app; app()",
        "serve",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with open(log, "w") as stream:
        server = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, log.read_text()
                time.sleep(0.5)
        answer = post(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            {
                "model": str(tmp_path / "out"),
                "messages": [{"role": "user", "content": "hi"}],
                "max_tokens": 5,
                "temperature": 0,
            },
        )
    finally:
        server.terminate()
        server.wait(20)
    assert (
        answer["object"] == "chat.completion"
        and answer["choices"][0]["message"]["role"] == "assistant"
    ), log.read_text()
    assert "no chat template" not in log.read_text()
    assert answer["usage"]["completion_tokens"] == 5
