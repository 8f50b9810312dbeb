"""The pair trained together against the same models trained each for itself, on the same lists from the same start.

    python benchmarks/joint.py DATA --out WORK [--recipe quick] [--questions 800] [--passages 6000] [--seed 13]

All variants share the warm-ups, the candidates and the lists; only the weights of the loss differ. Without the
divergence the loss is a sum in which each model has a term of its own: each learns alone.
"""

from variants import arguments, run_variants

VARIANTS = {
    "each alone": ["loss.kl_weight=0", "loss.retriever_weight=1"],
    "joint": ["loss.retriever_weight=1"],
    "joint, as in the paper": ["loss.retriever_weight=0"],
    "warm-up only": ["joint.epochs=0"],
}


def main() -> None:
    options = arguments(__doc__.splitlines()[0], recipe="quick", questions=800, passages=6000).parse_args()
    run_variants(options, VARIANTS)


if __name__ == "__main__":
    main()
