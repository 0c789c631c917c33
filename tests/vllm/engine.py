"""One vLLM engine in a process of its own: does what a JSON list says, prints results as JSON.

A process can have one engine, so tests run `python -m tests.vllm.engine` (`run` does).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BLOCK = 32
MARK = "RESULT "
SHOWN = ("vllm:nexusquant_", "vllm:external_prefix_cache_", "vllm:num_preemptions")

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads crawl on cores that something else uses too
    "KMP_BLOCKTIME": "0",
}

PROMPT = "The lighthouse keeper wrote in the log every evening. " + " ".join(
    f"On day {day}, the wind came from the {('north', 'south', 'east', 'west')[day % 4]} and"
    f" {day * 3 % 17} ships passed the point."
    for day in range(1, 31)
)
PROMPT += " On day 31, the wind came from the"


def run(model: Path, steps: list[dict[str, Any]], timeout: float = 600, **options: Any) -> Any:
    """The results of the steps, in a new process.

    Args:
        steps: {"do": "generate" | "reset" | "flip" | "kill" | "metrics", ...}.
        options: `store`, `codec`, ... of the connector, none for no connector; `engine`: arguments
            of vLLM.
    """
    order = json.dumps({"model": str(model), "steps": steps, **options})
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.engine", order],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-8000:]
    assert found, log[-8000:]
    return json.loads(found[-1].removeprefix(MARK)) | {"log": log}


def main(order: dict[str, Any]) -> None:
    """Start the engine, do the steps, print what came of them."""
    from vllm import LLM, SamplingParams

    extra = {name: order[name] for name in ("store", "codec", "codec_options") if name in order}
    transfer = {
        "kv_connector": "NexusQuantConnector",
        "kv_connector_module_path": "nexusquant.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {**extra, "wait_for_save": True, "retry_seconds": 1.0},
    }
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 2048,
        "enforce_eager": True,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": 256 << 20,
        "max_num_seqs": 4,
        "seed": 0,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
    }
    if extra:
        settings["kv_transfer_config"] = transfer
    engine = LLM(order["model"], **settings | order.get("engine", {}))
    results: dict[str, Any] = {}
    for step in order["steps"]:
        match step["do"]:
            case "generate":
                prompts = step.get("prompts", [PROMPT])
                parameters = SamplingParams(
                    temperature=0, max_tokens=step.get("tokens", 24), logprobs=20, ignore_eos=True
                )
                started = time.perf_counter()
                outputs = engine.generate(prompts, parameters, use_tqdm=False)
                results[step["name"]] = {
                    "seconds": time.perf_counter() - started,
                    "outputs": [_told(output) for output in outputs],
                }
            case "reset":
                assert engine.reset_prefix_cache()
            case "flip":  # one byte in the middle of the largest value
                file = max(Path(order["store"]).glob("kv*"), key=lambda path: path.name)
                data = bytearray(file.read_bytes())
                data[len(data) // 2] ^= 1
                file.write_bytes(data)
            case "kill":
                os.kill(step["process"], 9)
            case "sleep":
                time.sleep(step["seconds"])
            case "metrics":
                results["metrics"] = {
                    metric.name: metric.value
                    for metric in engine.get_metrics()
                    if metric.name.startswith(SHOWN)
                }
    sys.stdout.write(MARK + json.dumps(results) + "\n")


def _told(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "cached": output.num_cached_tokens,
        "tokens": list(completion.token_ids),
        "logprobs": [
            {str(token): entry.logprob for token, entry in position.items()}
            for position in completion.logprobs
        ],
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
