"""How fast K trajectories of one prompt are in llama.cpp: against llama-batched-bench, and against K runs one by one.

    python bench/trajectories.py FILE.gguf --batched-bench BUILD/bin/llama-batched-bench [--k 1,2,4,8,16]
        [--prompt-tokens 128] [--new-tokens 48] [--threads 1] [--rounds 3] [--json OUT.json]

llama-batched-bench decodes random tokens in batches of K after one shared prompt: the speed of the engine with nothing
around it. bench/batched_bench/CMakeLists.txt builds it. For each K it runs once before and once after qad, on the same
file, threads and numbers of tokens, and qad is compared with the mean of the two; each figure is the median of the
rounds, and the best and worst ratio are told beside it. Both are held on the same cores, as many as there are threads:
left to wander, one thread lost up to a tenth for a whole run (69 instead of 75 tokens/s at K = 2), now one program's
and now the other's.

- decode: tokens over the time inside the decode calls of ``Session.sample``, as a share of llama-batched-bench's rate,
  over the steps in which none of the K has ended yet;
- all: tokens over the whole time of the same steps, with sampling at temperature 0.8 and top_p 0.95, log-probabilities,
  a stop text, text and a callback for each token, as a share of the same rate;
- against the ``Llama`` class of llama-cpp-python: eight trajectories at once and eight runs one after the other, both
  from an empty cache to the last answer; the class keeps the prompt between its runs, as it does for everybody;
- dropping: time of a step of eight before and after four of them are dropped;
- choosing: one token by qad's pass (with its log-probability) and by llama.cpp's own samplers for the same rule.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from qad.runtimes import Sampling, Step, llamacpp
from qad.runtimes._sampling import Chooser

RULE = Sampling(temperature=0.8, top_p=0.95, seed=1)
TEXT = (
    "The harbour was quiet in the early morning. A fisherman mended his nets while his daughter counted the boats that "
    "had come back during the night. She wrote each name into a small blue book and told him what she saw. "
)


def batched_bench(program: Path, file: Path, k: int, prompt: int, new: int, threads: int) -> float:
    """Return the tokens per second that llama-batched-bench decodes."""
    options = {"-m": file, "-npp": prompt, "-ntg": new, "-npl": k, "-t": threads, "-tb": threads}
    cells = -(-(prompt + k * new) // 256) * 256
    options |= {"-c": cells, "-b": 512, "-ub": 512, "--output-format": "jsonl"}
    command = [str(program), "-pps", "-kvu", *(str(part) for pair in options.items() for part in pair)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("{")]
    return float(json.loads(line)["speed_tg"])


def trajectories(session: llamacpp.LlamaSession, prompt: list[int], k: int, new: int) -> dict[str, float]:
    """Return the rates of one call of ``sample``, from an empty cache."""
    session.logits([[1]])
    shown: list[str] = []
    # After each call: tokens run, seconds in the engine, the time.
    marks: list[tuple[int, float, float]] = []

    def watch(step: Step) -> None:
        shown.append(step.text)
        if session.work.calls == len(marks):
            marks.append((session.work.new_tokens, session.work.decode_seconds, time.perf_counter()))

    began = time.perf_counter()
    made = session.sample(prompt, k, RULE, new_tokens=new, stop=["\n\n\n\n"], on_token=watch)
    seconds = time.perf_counter() - began
    assert session.work.prompt_tokens == len(prompt)
    steps = np.diff(np.array(marks), axis=0)
    # Steps of fewer are slower per token: what is compared has K rows.
    full = steps[steps[:, 0] == k]
    return {
        "decode": float(full[:, 0].sum() / full[:, 1].sum()),
        "all": float(full[:, 0].sum() / full[:, 2].sum()),
        "full": len(full) / len(steps),
        "tokens": sum(len(one.tokens) for one in made),
        "seconds": seconds,
    }


def one_by_one(model: Any, prompt: list[int], k: int, new: int) -> dict[str, float]:
    """Return tokens and seconds of k completions one after the other, the first from an empty cache."""
    model.reset()
    model._ctx.kv_cache_clear()
    tokens = 0
    began = time.perf_counter()
    for seed in range(k):
        answer = model.create_completion(prompt, max_tokens=new, temperature=0.8, top_p=0.95, top_k=0, seed=seed)
        tokens += answer["usage"]["completion_tokens"]
    return {"tokens": tokens, "seconds": time.perf_counter() - began}


def dropping(session: llamacpp.LlamaSession, prompt: list[int], new: int) -> dict[str, float]:
    """Return the seconds of a step of eight trajectories before and after four of them are dropped."""
    times: dict[int, float] = {}

    def watch(step: Step) -> range | None:
        times.setdefault(session.work.calls, time.perf_counter())
        return range(4) if step.index == 7 and session.work.calls == new // 2 else None

    session.sample(prompt, 8, RULE, new_tokens=new, on_token=watch)
    steps = np.diff([times[call] for call in sorted(times)])
    return {"before": float(np.median(steps[: new // 2])), "after": float(np.median(steps[new // 2 + 1 :]))}


def choosing(session: llamacpp.LlamaSession, prompt: list[int]) -> dict[str, float]:
    """Return the microseconds of choosing one token, by qad and by llama.cpp's chain of samplers."""
    import llama_cpp

    logits = np.ascontiguousarray(session.logits([prompt])[0])
    chooser, generator = Chooser(RULE, session.vocabulary), np.random.default_rng(0)
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for sampler in (
        llama_cpp.llama_sampler_init_temp(RULE.temperature),
        llama_cpp.llama_sampler_init_top_p(RULE.top_p, 1),
        llama_cpp.llama_sampler_init_dist(1),
    ):
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    candidates = (llama_cpp.llama_token_data * session.vocabulary)()
    fields = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    view = np.frombuffer(candidates, dtype=fields)  # type: ignore[arg-type]

    def ours(row: np.ndarray) -> None:
        chooser.choose(row, generator)

    def theirs(row: np.ndarray) -> None:
        view["id"], view["logit"], view["p"] = np.arange(len(row)), row, 0
        array = llama_cpp.llama_token_data_array(candidates, len(row), -1, False)
        llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))

    spent = {}
    for name, function in (("qad", ours), ("llama.cpp", theirs)):
        times = []
        for row in logits[-48:]:
            began = time.perf_counter()
            function(row)
            times.append(time.perf_counter() - began)
        spent[name] = statistics.median(times) * 1e6
    llama_cpp.llama_sampler_free(chain)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--batched-bench", type=Path, required=True)
    parser.add_argument("--k", default="1,2,4,8,16")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts = [int(word) for word in options.k.split(",")]
    if hasattr(os, "sched_setaffinity"):
        # llama-batched-bench inherits it.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    sizes = options.prompt_tokens, options.new_tokens

    from llama_cpp import Llama

    rounds: list[dict[str, Any]] = []
    with llamacpp.open(options.file, threads=options.threads) as session:
        high = Llama(
            str(options.file),
            n_ctx=sum(sizes),
            n_threads=options.threads,
            n_threads_batch=options.threads,
            verbose=False,
        )
        prompt = session.tokenize(TEXT * 40)[: options.prompt_tokens]
        trajectories(session, prompt, max(counts), 4)
        for _ in range(options.rounds):
            rates: dict[int, Any] = {}
            for k in counts:
                before = batched_bench(options.batched_bench, options.file, k, *sizes, options.threads)
                ours = trajectories(session, prompt, k, options.new_tokens)
                after = batched_bench(options.batched_bench, options.file, k, *sizes, options.threads)
                rates[k] = {"bare": (before + after) / 2, **ours}
            rounds.append(
                {
                    "rates": rates,
                    "one_by_one": one_by_one(high, prompt, 8, options.new_tokens),
                    "together": trajectories(session, prompt, 8, options.new_tokens),
                    "dropping": dropping(session, prompt, options.new_tokens),
                    "choosing": choosing(session, prompt),
                }
            )
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, {options.rounds} rounds")
    print(f"prompt {sizes[0]}, new {sizes[1]}; ratios: median (least to most)")
    for k in counts:
        rows = [one["rates"][k] for one in rounds]
        bare, full = (statistics.median(row[name] for row in rows) for name in ("bare", "full"))
        shares = "   ".join(f"{name} {spread([row[name] / row['bare'] for row in rows])}" for name in ("decode", "all"))
        print(f"K={k:3d}  llama-batched-bench {bare:7.1f} tokens/s   {shares}   steps of all K: {full:.0%}")
    pairs = [(one["together"], one["one_by_one"]) for one in rounds]
    rate = [a["tokens"] / a["seconds"] * b["seconds"] / b["tokens"] for a, b in pairs]
    wall = [a["seconds"] / b["seconds"] for a, b in pairs]
    print(f"8 at once against 8 by class Llama: rate {spread(rate)}, time {spread(wall)}")
    drop = [one["dropping"]["after"] / one["dropping"]["before"] for one in rounds]
    print(f"a step after 4 of 8 were dropped: {spread(drop)} of one before")
    for name in ("qad", "llama.cpp"):
        print(f"choosing one token, {name}: {statistics.median(one['choosing'][name] for one in rounds):.0f} us")
    if options.json:
        options.json.write_text(json.dumps(rounds, indent=1) + "\n")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
