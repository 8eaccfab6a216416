"""The sides of inference.py, each in a process of its own: ours, llama.cpp and transformers.

A process reads one JSON task a line from standard input and answers with one line. Sides get the
same token ids and choose greedily, so that nothing but the engine is measured.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Side:
    """What is measured. All times are in seconds."""

    def load(self, path: str) -> None:
        """Read the model."""
        raise NotImplementedError

    def _run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float, list[int]]:
        """Seconds until every prompt has its first token, seconds for the rest, first answer."""
        raise NotImplementedError

    def prefill(self, prompt: list[int]) -> float:
        """Read a prompt and choose one token."""
        return self._run([prompt], 1)[0]

    def decode(self, prompt: list[int], new_tokens: int) -> tuple[float, list[int]]:
        """Write tokens behind a prompt; the clock starts when the first one is there."""
        _, seconds, tokens = self._run([prompt], new_tokens + 1)
        return seconds, tokens

    def together(self, prompts: list[list[int]], new_tokens: int) -> float:
        """The same for several prompts at once; the clock starts when each has its first token."""
        return self._run(prompts, new_tokens + 1)[1]


def resident() -> dict[str, int]:
    """Memory of this process in bytes: the most there was, and what there is."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line
    )
    names = {"peak": "VmHWM", "now": "VmRSS", "anonymous": "RssAnon"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items()}


class Ours(Side):
    """This project's engine with a GGUF file as it is."""

    def __init__(self, threads: int) -> None:
        import torch

        from llm_from_scratch.generate import engine, requests, sampling
        from llm_from_scratch.weights import sources

        torch.set_num_threads(threads)
        self.engine, self.requests, self.sampling = engine, requests, sampling
        self.sources = sources

    def load(self, path: str) -> None:
        self.model, _ = self.sources.load(path, device="cpu")

    def _run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float, list[int]]:
        settings = self.sampling.SamplingSettings(max_new_tokens=new_tokens, temperature=0.0)
        room = self.engine.room_for(self.model, prompts, settings)
        engine = self.engine.Engine(self.model, cache_tokens=room, reuse_prefixes=False)
        for prompt in prompts:
            engine.submit(self.requests.Request(prompt, settings))
        start = time.perf_counter()
        new = []
        while len({one.request for one in new}) < len(prompts):
            new += engine.step()
        first = time.perf_counter()
        assert len(new) == len(prompts), "the prompts were not read in one step"
        while engine.busy:
            new += engine.step()
        end = time.perf_counter()
        return first - start, end - first, [one.token for one in new if one.request == 0]


class LlamaCpp(Side):
    """llama.cpp through its own C interface, as llama-cpp-python binds it."""

    CONTEXT, SEQUENCES = 1024, 8

    def __init__(self, threads: int) -> None:
        import llama_cpp
        import numpy as np

        self.api, self.np, self.threads = llama_cpp, np, threads
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self.silent = silent  # kept: C holds no reference
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def load(self, path: str) -> None:
        api = self.api
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self.CONTEXT, 512, 512
        params.n_seq_max, params.kv_unified = self.SEQUENCES, True
        params.n_threads = params.n_threads_batch = self.threads
        self.context = api.llama_init_from_model(self.model, params)
        self.memory = api.llama_get_memory(self.context)
        self.batch = api.llama_batch_init(512, 0, self.SEQUENCES)
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def _feed(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted) each, in one batch."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")

    def _best(self, place: int) -> int:
        logits = self.api.llama_get_logits_ith(self.context, place)
        return int(self.np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())

    def _run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float, list[int]]:
        self.api.llama_memory_clear(self.memory, True)
        start = time.perf_counter()
        feed, ends = [], []
        for number, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                feed.append((token, position, number, position + 1 == len(prompt)))
            ends.append(len(feed) - 1)
        self._feed(feed)
        last = [self._best(end) for end in ends]
        first = time.perf_counter()
        answer = last[:1]
        for step in range(new_tokens - 1):
            self._feed([(t, len(prompts[i]) + step, i, True) for i, t in enumerate(last)])
            last = [self._best(i) for i in range(len(prompts))]
            answer.append(last[0])
        return first - start, time.perf_counter() - first, answer


class Transformers(Side):
    """LlamaForCausalLM of transformers in bf16, from a folder."""

    def __init__(self, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.torch, self.transformers = torch, transformers

    def load(self, path: str) -> None:
        self.model = self.transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=self.torch.bfloat16
        ).eval()

    def _run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float, list[int]]:
        """Its own forward with its own cache: faster than `generate`, which adds checks."""
        torch = self.torch
        with torch.inference_mode():
            start = time.perf_counter()
            found = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
            last = found.logits[:, -1].argmax(-1)
            first = time.perf_counter()
            answer = [int(last[0])]
            for _ in range(new_tokens - 1):
                found = self.model(
                    last[:, None], past_key_values=found.past_key_values, use_cache=True
                )
                last = found.logits[:, -1].argmax(-1)
                answer.append(int(last[0]))
        return first - start, time.perf_counter() - first, answer


SIDES: dict[str, Callable[[int], Side]] = {
    "ours": Ours, "llama.cpp": LlamaCpp, "transformers": Transformers,
}  # fmt: skip


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[2])
    side = SIDES[name](threads)
    imported = resident()
    for line in sys.stdin:
        task = json.loads(line)
        arguments: dict[str, Any] = task["arguments"]
        if task["do"] == "memory":
            answer: Any = {"imported": imported, "end": resident()}
        else:
            answer = getattr(side, task["do"])(**arguments)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
