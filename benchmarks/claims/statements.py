"""The paper's claims as comparisons of cells."""

from claims.verdicts import Claim, Comparison

RETRIEVER, RERANKER, PAIR = "retriever", "reranker", "pair"


def _each(stage: str, *pairs: tuple[str, str]) -> tuple[Comparison, ...]:
    """Comparisons of a cell with another, at one stage."""
    return tuple(Comparison(cell, against, stage) for cell, against in pairs)


REMEDIES = (
    ("supervised", "none"),
    ("supervised-share-0.5", "none"),
    ("temperature-0.02", "none-temperature-0.02"),
    ("temperature-0.1", "none-temperature-0.1"),
    ("fast", "none-fast"),
    ("long", "none-long"),
    ("warmer-dynamic", "warmer-none"),
    ("warmer-supervised", "warmer-none"),
    ("taught-dynamic", "taught-none"),
    ("taught-supervised", "taught-none"),
    ("varied-supervised", "varied-none"),
    ("strong-dynamic", "strong-none"),
)

CLAIMS = (
    Claim(
        "Dynamic listwise distillation beats static, for the retriever",
        _each(RETRIEVER, ("dynamic", "static"), ("dynamic", "static-trained")),
        _each(RETRIEVER, ("supervised", "supervised-static"), ("warmer-dynamic", "warmer-static"),
              ("taught-dynamic", "taught-static"), ("strong-dynamic", "strong-static")),
    ),
    Claim(
        "Dynamic listwise distillation beats no distillation, for the retriever",
        _each(RETRIEVER, ("dynamic", "none")),
        _each(RETRIEVER, *REMEDIES),
    ),
    Claim(
        "The joint training adds to the warm-ups",
        (*_each(RETRIEVER, ("dynamic", "warm")), *_each(RERANKER, ("dynamic", "warm"))),
        _each(RETRIEVER, ("supervised", "warm"), ("warmer-dynamic", "warmer"), ("warmer-supervised", "warmer"),
              ("taught-dynamic", "taught"), ("taught-supervised", "taught")),
    ),
    Claim(
        "Listwise beats pointwise for the re-ranker",
        _each(RERANKER, ("dynamic", "pointwise")),
        _each(RETRIEVER, ("dynamic", "pointwise")),
    ),
    Claim(
        "Hybrid lists beat undenoised alone and denoised alone",
        _each(RETRIEVER, ("share-0.5", "dynamic"), ("share-0.5", "share-1")),
        _each(RETRIEVER, ("supervised-share-0.5", "supervised")),
    ),
    Claim(
        "More negatives are better, at equal steps",
        _each(RETRIEVER, ("lists-8", "lists-4"), ("lists-16", "lists-8"), ("lists-32", "lists-16"),
              ("lists-64", "lists-32")),
    ),
    Claim(
        "More negatives are better, at equal time",
        _each(RETRIEVER, ("time-8", "time-4"), ("lists-16", "time-8"), ("time-32", "lists-16"),
              ("time-64", "time-32")),
    ),
    Claim(
        "The gain is the method's, not the backbone's: it is there with one backbone and with two",
        _each(RETRIEVER, ("dynamic", "none"), ("other-teacher", "other-teacher-none")),
    ),
    Claim("A re-ranker on the other backbone is the better teacher", _each(RETRIEVER, ("other-teacher", "dynamic"))),
    Claim(
        "The two improve each other: the pair beats each model trained alone for the same time",
        (*_each(RERANKER, ("dynamic", "none")), *_each(PAIR, ("dynamic", "none"))),
        (*_each(RERANKER, ("supervised", "none"), ("taught-supervised", "taught-none"),
                ("varied-supervised", "varied-none")),
         *_each(PAIR, ("supervised", "none"), ("long", "none-long"), ("warmer-supervised", "warmer-none"),
                ("taught-supervised", "taught-none"), ("varied-supervised", "varied-none"))),
    ),
    Claim(
        "The re-ranker gains from the gradient of the divergence",
        _each(RERANKER, ("dynamic", "no-kl-gradient")),
        _each(PAIR, ("dynamic", "no-kl-gradient")),
    ),
    Claim(
        "The paper's form of the divergence beats the reference code's",
        _each(PAIR, ("dynamic", "reference-code"), ("dynamic", "reverse-kl"), ("dynamic", "mean-kl")),
    ),
    Claim(
        "A weak teacher is helped by its student",
        _each(RERANKER, ("weak-dynamic", "weak-none")),
        _each(RERANKER, ("dynamic", "none"), ("strong-dynamic", "strong-none")),
    ),
    Claim(
        "Dynamic beats static however strong the re-ranker is at the start",
        _each(RETRIEVER, ("weak-dynamic", "weak-static"), ("dynamic", "static"), ("strong-dynamic", "strong-static")),
    ),
    Claim(
        "A longer warm-up of the retriever is worth its time",
        (*_each(RETRIEVER, ("warmer-supervised", "supervised")), *_each(PAIR, ("warmer-supervised", "supervised"))),
        _each(PAIR, ("warmer", "warm"), ("warmer-none", "none"), ("warmer-dynamic", "dynamic"),
              ("warmer-half", "supervised")),
    ),
    Claim(
        "So is a longer warm-up of the re-ranker",
        (*_each(RETRIEVER, ("taught-supervised", "warmer-supervised")),
         *_each(PAIR, ("taught-supervised", "warmer-supervised"))),
        (*_each(RETRIEVER, ("taught-dynamic", "warmer-dynamic"), ("taught-dynamic", "warmer-supervised")),
         *_each(PAIR, ("taught-dynamic", "warmer-dynamic"), ("taught-none", "warmer-none"),
                ("varied-supervised", "warmer-supervised"), ("varied-none", "warmer-none"))),
    ),
    Claim(
        "Other negatives in each pass of that warm-up help",
        (*_each(RERANKER, ("varied-supervised", "taught-supervised")),
         *_each(PAIR, ("varied-supervised", "taught-supervised"))),
        (*_each(RERANKER, ("varied-none", "taught-none")), *_each(PAIR, ("varied-none", "taught-none"))),
    ),
    Claim("Warm starts help", _each(PAIR, ("dynamic", "cold"), ("dynamic", "cold-longer"))),
    Claim("Fresh negatives help", _each(PAIR, ("refresh", "dynamic"))),
    Claim("A second round helps", _each(PAIR, ("rounds", "dynamic"))),
    Claim("Pseudo-labels help", _each(PAIR, ("pseudo-labels", "no-pseudo-labels"))),
    Claim(
        "The pair beats sentence-transformers' practice in the same time",
        _each(PAIR, ("dynamic", "st"), ("dynamic", "st-mined-twice"), ("dynamic", "st-mined-after")),
        _each(PAIR, ("supervised", "st"), ("supervised", "st-mined-twice"), ("supervised", "st-mined-after"),
              ("warmer-half", "st-mined-after")),
    ),
    Claim(
        "The pair beats what needs no training",
        _each(PAIR, ("dynamic", "base"), ("dynamic", "bm25"), ("dynamic", "hybrid")),
        _each(PAIR, ("supervised", "base"), ("supervised", "hybrid")),
    ),
    Claim(
        "The pair beats its own retriever",
        (Comparison("dynamic", "dynamic", PAIR, RETRIEVER),),
        (Comparison("supervised", "supervised", PAIR, RETRIEVER),),
    ),
)  # fmt: skip
