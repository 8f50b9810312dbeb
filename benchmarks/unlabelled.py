"""Does it help to add questions without labels? The same chain with and without pseudo-labelled lists.

    python benchmarks/unlabelled.py DATA --out WORK [--labelled 1000] [--questions 2500] [--passages 6000]

Of `--questions` training questions, `--labelled` keep their labels; those of the others are not read. All variants
share the warm-ups (on the labelled questions), the candidates and their scores. A threshold of 1 for pseudo-labels
leaves every unlabelled question out. More lists are more steps, so one variant goes over the labelled lists as often
as it takes to make about as many steps.
"""

from variants import arguments, run_variants

RECIPE = {
    "retriever.passage_length": 96,
    "reranker.pair_length": 112,
    "warm_retriever.retriever_rate": 5e-5,
    "mine.depth": 15,
    "warm_lists.size": 4,
    "warm_lists.depth": 15,
    "lists.size": 4,
    "lists.depth": 15,
    "lists.denoised_share": 0,
    "loss.retriever_weight": 1,
}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], recipe="rocketqa-v2", questions=2500, passages=6000)
    parser.add_argument("--labelled", type=int, default=1000)
    parser.add_argument("--more-epochs", type=float, default=1.8, help="of the variant with as many steps")
    options = parser.parse_args()
    settings = RECIPE | {"data.questions": options.labelled, "data.unlabelled": options.questions - options.labelled}
    options.set = [f"{name}={value}" for name, value in settings.items()] + options.set
    run_variants(
        options,
        {
            "labelled only": ["lists.high=1"],
            "with pseudo-labels": ["lists.high=0.9"],
            "labelled only, more steps": ["lists.high=1", f"joint.epochs={options.more_epochs}"],
        },
    )


if __name__ == "__main__":
    main()
