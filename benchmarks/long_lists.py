"""Long lists: what it saves, and costs, to carry back only the gradient that matters.

    python benchmarks/long_lists.py DATA --out WORK [--questions 96] [--passages 6000]

Lists of 128 (one positive, 127 of the retriever's top 200) for the same pair from the same start; the variants differ
in `joint.grad_keep` alone. Prints the time a list takes, the share of the tokens that the second pass reads, and the
measures of `variants.py`.
"""

import json
import statistics

from variants import arguments, folder_name, run_variants

VARIANTS = {f"grad_keep {keep}": [f"joint.grad_keep={keep}"] for keep in (1.0, 0.99, 0.95)}
LONG = ["lists.size=128", "lists.depth=200", "mine.depth=200", "joint.batch_lists=4", "loss.retriever_weight=1"]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], recipe="quick", questions=96, passages=6000)
    options = parser.parse_args()
    options.set = [*LONG, *options.set]
    run_variants(options, VARIANTS)
    print("\n| variant | s a list, median | tokens read with gradient |\n|---|---|---|")
    for name in VARIANTS:
        log = options.out / folder_name(name) / "stages" / "joint" / "log.jsonl"
        steps = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        seconds = statistics.median(step["seconds"] for step in steps) / 4
        share = sum(step["gradient_tokens"] for step in steps) / sum(step["padded_tokens"] for step in steps)
        print(f"| {name} | {seconds:.2f} | {share:.0%} |")


if __name__ == "__main__":
    main()
