"""Score published responses with the checkers of IFEval: what ours say against what the publication says.

    python bench/ifeval_published.py ifeval_prompts.jsonl ifeval_gpt4_responses.jsonl

The first file holds IFEval's prompts as google/IFEval has them, the second rows of `prompt` and `response`. Published
for GPT-4 (arXiv 2311.07911): 76.9 % of the prompts, strictly.
"""

import argparse
import json
from pathlib import Path

from qad.evals.tasks import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="IFEval's prompts, JSON lines")
    parser.add_argument("responses", type=Path, help="JSON lines of prompt and response")
    arguments = parser.parse_args()
    task = load("ifeval", path=arguments.prompts)
    rows = [json.loads(line) for line in arguments.responses.read_text(encoding="utf-8").splitlines() if line.strip()]
    said = {row["prompt"]: row["response"] for row in rows}
    scores = [task.score(item, said[item.prompt]) for item in task.items]
    strict = sum(score.correct for score in scores)
    loose = sum(score.correct or score.detail.endswith("kept loosely") for score in scores)
    asked = sum(len(item.meta["instructions"]) for item in task.items)
    failed = sum(score.detail.count(":") - 1 for score in scores if not score.correct)
    print(f"prompts: {len(scores)}")
    print(f"all instructions of a prompt, strictly: {100 * strict / len(scores):.2f} %")
    print(f"all instructions of a prompt, loosely:  {100 * loose / len(scores):.2f} %")
    print(f"instructions, strictly:                 {100 * (asked - failed) / asked:.2f} %")


if __name__ == "__main__":
    main()
