"""One page about a training run: what was run, how good it is, and what to look at."""
