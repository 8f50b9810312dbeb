"""The gradient of a batch, part by part, on several cores, and for long lists in the memory of short ones.

Both losses are functions of the encoders' vectors alone. So each part is computed by itself, the loss of all vectors
tells how it depends on each of them, and each part carries that on into the weights by itself. Parts that fit into
memory keep what they computed for that way back. The others are computed without gradient first and once more with
gradient then (Gao et al., 2021, "Scaling deep contrastive learning batch size under memory limited setup"; here for
pairs too), each in the memory that one before it has left. So memory does not grow with the length of the lists, and
time not by leaps. Of what hardly moves the loss a sample may stand for the whole.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tandemqa.encoders import threads
from tandemqa.encoders.inputs import TokenBatch
from tandemqa.encoders.lean import LeanEncoder
from tandemqa.encoders.step import Gradients, StepEncoder, add_gradient
from tandemqa.training.batch import ListBatch, Part, kept_rows
from tandemqa.training.joint import JointModel, Outputs, Task


class Piece(NamedTuple):
    """A part of a task, and the encoder for this step that all its parts share.

    `again`: what led to its vectors is not kept, but computed a second time for the gradient.
    """

    name: str
    task: Task
    rows: Tensor
    part: TokenBatch
    encoder: StepEncoder | LeanEncoder
    again: bool = True

    @property
    def tokens(self) -> int:
        """How many tokens the part holds, with padding."""
        return self.part.attention_mask.numel()

    @property
    def learns(self) -> bool:
        return self.task.learns

    @property
    def keeps(self) -> bool:
        """Whether the first pass keeps what led to its vectors."""
        return self.learns and not self.again


class Computed(NamedTuple):
    """A piece, its vectors (with their history unless it is computed again), and the state of dropout before them."""

    piece: Piece
    vectors: Tensor
    random: Tensor | None


class Passes:
    """One batch on its way through a model and back.

    `outputs` are leaves without history: take a loss of them, call its `backward`, then this one's. `kept_tokens`:
    parts of so many tokens in all keep what the first pass computed; the others are computed anew for their gradient.
    """

    def __init__(self, model: JointModel, batch: ListBatch, kept_tokens: float) -> None:
        self.model = model
        # Dropout inside the encoders draws from one stream, in order, and a GPU is one.
        self.alone = model.draws() or model.device.type != "cpu"
        self.tasks = model.tasks(batch)
        self.encoders = model.step_encoders(self.tasks.values())
        pieces = [piece for name in self.tasks for piece in self._pieces(name, self.tasks[name].parts)]
        pieces = _with_kept(pieces, kept_tokens)
        # Made here, and not by the first thread that wants it.
        read = {piece.task.encoder for piece in pieces if not piece.keeps}
        self.readers = {encoder: self.encoders[encoder].reader() for encoder in read}
        self.tokens_again = sum(piece.tokens for piece in pieces if piece.again)
        self.computed = threads.in_threads(self._compute, self._shares(pieces))
        outputs = {}
        for name, task in self.tasks.items():
            done = [one for share in self.computed for one in share if one.piece.name == name]
            dtype = done[0].vectors.dtype if done else None
            outputs[name] = torch.zeros(task.shape, dtype=dtype, device=model.device)
            for one in done:
                outputs[name][one.piece.rows.to(model.device)] = one.vectors.detach()
            outputs[name].requires_grad_(task.learns)
        self.outputs = Outputs(**outputs)

    def backward(self, keep: float = 1.0) -> int:
        """Add the gradient of the weights; returns how many tokens were read with gradient, with padding.

        keep 1 is exact, up to the order of sums: dropout falls as it did in the first pass. Below 1, which wants no
        tokens kept, the largest gradients of each encoder's outputs are carried back, as many as hold `keep` of their
        sum of squares, and a few of the others that stand for them all (see `_weights`): what comes out is right in
        expectation. Dropout then falls anew.
        """
        after = _random_state(self.model.device)
        work = self.computed
        if keep < 1:
            pieces = []
            for name, task in self.tasks.items():
                if (gradient := self._gradient(name)) is not None:
                    weights = _weights(gradient, keep)
                    gradient *= weights[:, None]
                    pieces += self._pieces(name, kept_rows(task.parts, (weights > 0).cpu()))
            work = [[Computed(piece, torch.empty(0), None) for piece in share] for share in self._shares(pieces)]
        # The shares' gradients are added in their order, so that the same numbers of threads give the same sums.
        total: Gradients = {}
        for gradients in threads.in_threads(self._backward, work):
            for leaf, gradient in gradients.items():
                total[leaf] = total[leaf].add_(gradient) if leaf in total else gradient
        for task in self.tasks.values():
            for parameter in task.behind:
                if parameter in total:
                    add_gradient(parameter, total.pop(parameter))
        for encoder in self.encoders.values():
            encoder.backward(total)
        if keep == 1:
            _set_random_state(self.model.device, after)
        return sum(
            done.piece.tokens for share in work for done in share if self._gradient(done.piece.name) is not None
        )

    def _pieces(self, name: str, parts: Sequence[Part]) -> list[Piece]:
        task = self.tasks[name]
        return [Piece(name, task, rows, part, self.encoders[task.encoder]) for rows, part in parts]

    def _shares(self, pieces: list[Piece]) -> list[list[Piece]]:
        """The pieces by threads."""
        # A way back takes twice a way there.
        costs = [piece.tokens * (1 + piece.learns * (2 + piece.again)) for piece in pieces]
        shared_out = threads.shares(costs, 1 if self.alone else threads.count())
        return [[pieces[number] for number in share] for share in shared_out]

    def _compute(self, share: Sequence[Piece]) -> list[Computed]:
        """The first pass of a thread."""
        done = []
        with self.model.autocast(remember=self.alone):
            for piece in share:
                random = _random_state(self.model.device) if self.alone else None
                read = piece.encoder if piece.keeps else self.readers[piece.task.encoder]
                with torch.set_grad_enabled(piece.keeps):
                    done.append(Computed(piece, self._vectors(piece, read), random))
        return done

    def _backward(self, share: Sequence[Computed]) -> Gradients:
        """The way back of a thread: the gradients of its pieces, added up, in float32 or more."""
        total: Gradients = {}
        # The way back through what is kept frees it, and leaves its room to the others.
        for piece, vectors, random in sorted(share, key=lambda done: done.piece.again):
            gradient = self._gradient(piece.name)
            if gradient is None:
                continue
            if piece.again:
                if random is not None:
                    _set_random_state(self.model.device, random)
                with self.model.autocast():
                    vectors = self._vectors(piece, piece.encoder)
            leaves = [*piece.encoder.leaves, *piece.task.behind]
            rows = piece.rows.to(self.model.device)
            found = torch.autograd.grad(vectors, leaves, gradient[rows], allow_unused=True)
            for leaf, own in zip(leaves, found, strict=True):
                if own is not None and leaf in total:
                    total[leaf].add_(own)
                elif own is not None:
                    total[leaf] = own.to(torch.promote_types(own.dtype, torch.float32)).contiguous()
        return total

    def _vectors(self, piece: Piece, read: Callable[[TokenBatch], Tensor]) -> Tensor:
        part = piece.part.to(self.model.device)
        return piece.task.pooled(read(part), part)

    def _gradient(self, name: str) -> Tensor | None:
        gradient: Tensor | None = getattr(self.outputs, name).grad
        return gradient


def _with_kept(pieces: list[Piece], room: float) -> list[Piece]:
    """The pieces, marked: those that come first keep what they compute, as far as there is room for their tokens."""
    marked = []
    for piece in pieces:
        if piece.learns:
            room -= piece.tokens
        marked.append(piece._replace(again=piece.learns and room < 0))
    return marked


def _weights(gradient: Tensor, keep: float) -> Tensor:
    """What the gradient of each row counts for, (N,), 0 if it is not carried back.

    The largest, which hold `keep` of the sum of squares, count once. Each of the others is drawn with a chance, its
    norm over the smallest norm of those, and counts once over its chance, so that the expected gradient is the whole
    one (threshold sampling; Duffield, Lund and Thorup, IEEE Transactions on Information Theory, 2005).
    """
    norms = gradient.norm(dim=1).double()
    values = norms.sort().values
    squares = values.square().cumsum(0)
    sure = values[squares > (1 - keep) * squares[-1:]]
    if not len(sure):
        return torch.zeros_like(gradient[:, 0])
    chances = (norms / sure[0]).clamp(max=1)
    drawn = torch.rand_like(chances) < chances
    return torch.where(drawn, 1 / chances, 0).to(gradient.dtype)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
