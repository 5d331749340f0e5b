"""`vllm serve` with the plugin: the OpenAI API, streaming and not, several clients at once, and a key."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tidaldecode.serving.metrics import COUNTERS

KEY = "a-key-for-a-test"
QUESTIONS = ["What is the capital of France?", "Name a whale.", "Who wrote Moby-Dick?", "What is 2 + 2?"]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _command(folder: str, port: int, settings: str) -> list[str]:
    return [
        # the server of `vllm serve`, whose own command does not start in the CPU build: it looks for a package `vllm`
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", folder, "--served-model-name", "demo", "--additional-config", settings),
        *("--attention-backend", "CUSTOM", "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"),
        *("--kv-cache-memory-bytes", "1G", "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY),
    ]


ENVIRONMENT = dict(os.environ) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}


@pytest.fixture(scope="module")
def server(demo_files, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The address of a server, and its log."""
    port, log = _free_port(), tmp_path_factory.mktemp("server") / "log"
    command = _command(demo_files.location, port, '{"tidaldecode": {"plan": "auto", "token_budget": 40}}')
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=ENVIRONMENT) as process:
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1", log
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: subprocess.Popen, address: str, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def _ask(client: openai.OpenAI, question: str, stream: bool) -> str:
    messages = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(
        model="demo", messages=messages, temperature=0, max_tokens=24, stream=stream
    )
    if not stream:
        return answer.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)


def test_clients_at_once_get_what_they_get_alone(server):
    client = openai.OpenAI(base_url=server[0], api_key=KEY)
    alone = [_ask(client, question, stream=False) for question in QUESTIONS]
    assert "Paris" in alone[0]
    with ThreadPoolExecutor(4) as clients:
        together = list(clients.map(lambda question: _ask(client, question, stream=True), QUESTIONS))
    assert together == alone


def test_a_wrong_key_is_refused(server):
    client = openai.OpenAI(base_url=server[0], api_key="another")
    with pytest.raises(openai.AuthenticationError):
        _ask(client, QUESTIONS[0], stream=False)


def test_metrics_say_what_was_read(server):
    client = openai.OpenAI(base_url=server[0], api_key=KEY)
    before = _counters(server[0])
    _ask(client, QUESTIONS[0], stream=False)
    after = _counters(server[0])
    decoded, read, full = (after[name] - before.get(name, 0) for name in COUNTERS)
    assert 1 <= decoded < 24
    assert 0.2 * full < read < full


def _counters(address: str) -> dict[str, float]:
    """What the server's `/metrics` says of our counters."""
    with urllib.request.urlopen(address.removesuffix("/v1") + "/metrics", timeout=30) as page:
        lines = [line.split() for line in page.read().decode().splitlines() if line.startswith("tidaldecode")]
    return {name.removesuffix("_total"): float(value) for name, value in lines}


def test_the_log_says_what_the_plan_does(server):
    text = server[1].read_text()
    assert text.count("tidaldecode: plan smollm2-135m with a budget of 40 tokens") == 1


def test_a_wrong_plan_stops_the_server_with_a_line_that_names_it(demo_files):
    command = _command(demo_files.location, _free_port(), '{"tidaldecode": {"plan": "no-such-plan"}}')
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert result.returncode != 0
    assert "no plan 'no-such-plan': give a plan file, 'auto'" in result.stdout + result.stderr
