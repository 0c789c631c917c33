"""`nexusquant_evict` and threads: settings of their own, workers started inside a block."""

from __future__ import annotations

import threading
from typing import Any

from transformers import TextIteratorStreamer

from nexusquant import nexusquant_evict
from tests.hf.models import assert_same_run, generate, prompt
from tests.hf.situation_cases import EXACT, HALF
from tests.hf.together import together


def test_two_threads_with_settings_of_their_own(model: Any) -> None:
    def work(ratio: float, gate: threading.Barrier) -> float:
        with nexusquant_evict(model, HALF.replace(evict_ratio=ratio)) as run:
            gate.wait()  # both are inside
            for _ in range(3):
                generate(model, prompt(100), 3)
                gate.wait()
            kept = run.stats.kept_tokens
            gate.wait()  # neither leaves before the other is done
        return kept

    assert together(work, (0.2, 0.7)) == [82, 32]


def test_a_worker_started_inside_the_block_is_compressed(model: Any) -> None:
    """The streamer pattern: `generate` runs in a thread, which inherits no context."""

    class Tokenizer:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"{int(i)} " for i in ids)

    streamer = TextIteratorStreamer(Tokenizer(), timeout=60)
    with nexusquant_evict(model, HALF) as run:
        kwargs = {"input_ids": prompt(60), "max_new_tokens": 5, "do_sample": False}
        worker = threading.Thread(target=model.generate, kwargs={**kwargs, "streamer": streamer})
        worker.start()
        words = "".join(streamer).split()
        worker.join()
    assert len(words) == 60 + 5
    assert run.stats.kept_tokens == 30 + 4


def test_a_worker_that_outlives_the_block_ends_well(model: Any) -> None:
    stock = generate(model, prompt(40), 20)
    inside, left = threading.Event(), threading.Event()
    outputs: list[Any] = []

    class Pause:
        """A streamer that stops after the first token until the block has been left."""

        def put(self, value: Any) -> None:
            inside.set()
            left.wait(60)

        def end(self) -> None:
            pass

    def work() -> None:
        outputs.append(generate(model, prompt(40), 20, streamer=Pause()))

    with nexusquant_evict(model, EXACT):
        worker = threading.Thread(target=work)
        worker.start()
        inside.wait(60)
    left.set()
    worker.join()
    assert_same_run(outputs.pop(), stock)
