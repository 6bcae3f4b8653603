"""Does a vote of K help, and what does stopping early save? On a tiny model that learns its tasks here, in minutes.

    python bench/voting.py [-o FOLDER] [--tasks spell_backward@1,letter_counting@0] [--steps 2200] [--items 200] [--k 8]
        [--temperature 0.8] [--wave 1] [--json OUT.json]
    python bench/voting.py --model FILE.gguf --tasks …        any other model, without training

The model: a Llama of some 0.8M parameters with random weights and a small tokenizer of its own, trained by the recipe
``reasoning`` on worked problems (``qad train --recipe reasoning``) and exported to GGUF, whose weights are compared
with those of the trainer bit for bit. Training stops before tasks are mastered: a model that is always right has
nothing to vote on, and neither has one that is always wrong.

Each task is asked questions that it was not trained on (``qad.data.worked``), K times each, through llama.cpp:

- M@K, V@K, P@K as ``qad eval`` counts them, with 95 % intervals, and the difference V@K - M@K with the interval of a
  bootstrap over the same questions;
- the same questions again with exact early consensus: trajectories start some at a time, and stop when the undecided
  cannot change the vote. Counted are the questions whose vote comes out the same, and the tokens, over all questions
  and over those that were decided before all K had ended.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qad import export, recipes
from qad.architectures import SPLITTERS
from qad.artifact import open_artifact
from qad.data.worked import EVALUATED, worked_rows
from qad.distill import distill
from qad.evals.compare import paired
from qad.evals.metrics import metrics_of, values_of
from qad.evals.runner import Asking, Model, run_task
from qad.evals.samples import SampleFile
from qad.evals.tasks import load
from qad.evals.tasks.procedural import PREFIX
from qad.final_answer import same
from qad.outcome import print_outcome
from qad.runtimes import Sampling
from qad.think import ThinkOptions, think, vote
from qad.verify import verify

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH, LAYERS, HEAD = 128, 4, 32
NEW_TOKENS = 160


def make_tokenizer(tasks: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that has the words all questions share, and else single letters and digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = SPLITTERS["smollm"].build()  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    rows = worked_rows(tasks, 50, 7).rows
    texts = [f"user\n{row['prompt'][0]['content']}\nassistant\n{row['completion'][0]['content']}" for row in rows]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        # Words of single questions stay letters: a model that spells has to see them.
        min_frequency=40,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def make_base(folder: Path, tasks: list[str], seed: int) -> None:
    """Write the untrained model and its tokenizer as a Hugging Face folder."""
    tokenizer = make_tokenizer(tasks)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 5 // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // HEAD,
        num_key_value_heads=WIDTH // HEAD,
        head_dim=HEAD,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,  # type: ignore[arg-type]
        eos_token_id=tokenizer.eos_token_id,  # type: ignore[arg-type]
        pad_token_id=tokenizer.pad_token_id,  # type: ignore[arg-type]
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(folder: Path, options: argparse.Namespace, console: Console) -> Path:
    """Train and export; return the GGUF file."""
    tasks = options.tasks.split(",")
    if not (folder / "base").is_dir():
        make_base(folder / "base", tasks, options.seed)
    recipe = recipes.get("reasoning").override(
        student=str(folder / "base"),
        tasks=tuple(tasks),
        task_rows=options.task_rows,
        steps=options.steps,
        # Random weights have far to go, those of a trained model have not: the recipe's own rate is for these.
        lr=0.1,
        batch_size=16,
        eval_every=400,
        seed=options.seed,
    )
    began = time.process_time()
    print_outcome(distill(recipe, folder / "run", resume=True, console=console), console)
    console.print(f"trained in {time.process_time() - began:.0f} s of processor time", highlight=False)
    file = folder / "model.gguf"
    export.get("gguf").write(open_artifact(folder / "run"), file)
    proof = verify(folder / "run", file)
    assert proof.ok, proof.mismatches
    console.print(f"{file}: {proof.exact} of {proof.quantized} tensors bit-exact", highlight=False)
    return file


def judge(model: Model, name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the figures of one task."""
    task = load(PREFIX + name, limit=options.items)
    assert task.kind is not None
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    asking = Asking(k=options.k, sampling=sampling, new_tokens=NEW_TOKENS)
    path = folder / f"{name.replace('@', '-')}-t{options.temperature:g}-k{options.k}.jsonl"
    with SampleFile(path, asking.setting(task, 0, model)) as file:
        results = run_task(model, task, file, asking, lambda _, asked: None)
        stored = {item.id: file.samples(item) for item in task.items}
    values = values_of(results)
    gain = paired("V@K - M@K", values["V@K"], values["M@K"], 0.0)
    row: dict[str, Any] = {
        "task": name,
        "items": len(results),
        "k": options.k,
        "metrics": {key: vars(estimate) for key, estimate in metrics_of(results).items()},
        "V@K - M@K": vars(gain.difference),
        "wave": options.wave,
    }
    early = ThinkOptions(k=options.k, method="vote", new_tokens=NEW_TOKENS, certainty=1.0, wave=options.wave)
    agreed, tokens, full, decided = [], [], [], []
    for item in task.items:
        samples = stored[item.id]
        voted = vote([one.answer for one in samples], task.kind).answer
        # As ``qad eval`` does: a prompt that is partly in the cache rounds otherwise, and may be answered otherwise.
        model.session.forget()
        thought = think(
            model.session, item.prompt, dataclasses.replace(early, sampling=asking.of(item)), kind=task.kind
        )
        answer = None if thought.vote is None else thought.vote.answer
        agreed.append(answer == voted or (answer is not None and voted is not None and same(answer, voted, task.kind)))
        tokens.append(thought.tokens)
        full.append(sum(one.n_tokens for one in samples))
        ended = sum(one.reason != "dropped" for one in thought.trajectories)
        decided.append(ended < options.k)
    mask = np.array(decided)
    spent, whole = np.array(tokens), np.array(full)
    row["early"] = {
        "same_answer": sum(agreed),
        "decided": int(mask.sum()),
        "tokens": int(spent.sum()),
        "tokens_full": int(whole.sum()),
        "saved": 1 - spent.sum() / whole.sum(),
        "saved_of_decided": 1 - spent[mask].sum() / whole[mask].sum() if mask.any() else 0.0,
    }
    return row


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""

    def share(estimate: dict[str, Any]) -> str:
        return f"{estimate['value']:.1%} [{estimate['low']:.1%}, {estimate['high']:.1%}]"

    answers = Table(title=f"K = {rows[0]['k']}, 95 % intervals")
    for column in ("task", "items", "M@K", "V@K", "P@K", "V@K - M@K"):
        answers.add_column(column, no_wrap=True)
    for row in rows:
        shares = [share(row["metrics"][name]) for name in ("M@K", "V@K", "P@K")]
        answers.add_row(row["task"], str(row["items"]), *shares, share(row["V@K - M@K"]))
    console.print(answers)
    early = Table(title=f"exact early consensus, {rows[0]['wave']} trajectories at a time")
    for column in ("task", "same answer", "decided early", "tokens saved on these", "tokens saved on all"):
        early.add_column(column, no_wrap=True)
    for row in rows:
        found = row["early"]
        early.add_row(
            row["task"],
            f"{found['same_answer']} of {row['items']}",
            f"{found['decided']} of {row['items']}",
            f"{found['saved_of_decided']:.1%}",
            f"{found['saved']:.1%}",
        )
    console.print(early)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/voting"))
    parser.add_argument("--model", help="any model that qad opens, in place of one that is trained here")
    parser.add_argument("--tasks", default="spell_backward@1,letter_counting@0")
    parser.add_argument("--task-rows", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--wave", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    assert options.items <= EVALUATED, f"only the first {EVALUATED} questions are kept out of training"
    console = Console(width=130)
    file = options.model or str(train(options.output, options, console))
    with Model(file, Path(file).stem, {"threads": options.threads}) as model:
        rows = []
        for name in options.tasks.split(","):
            rows.append(judge(model, name, options, options.output))
            console.print(f"{name}: done")
    show(rows, console)
    if options.json:
        options.json.write_text(json.dumps({"command": vars(options), "rows": rows}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
