"""Logistic regression with an L2 penalty, taken to its optimum: the classifier of linear probes.

Minimised over a weight W [D, C] and a bias b [C] that is not penalised, for labels y of features x:

    sum over pictures of  log(sum over c of exp(z_c)) - z_y   +   l2 / 2 * |W|^2,       z = x W + b

This is scikit-learn's objective with C = 1 / l2, since `LogisticRegression` multiplies the *sum* of the losses; a
program that minimises their *mean* needs l2 / pictures. With two classes there is one column, as in scikit-learn, and
with labels 0/1 in a matrix (several things in a picture) each column is a problem of its own (one against the rest).

How: Newton's method. Features are centred (the bias takes that up) and turned to the axes of their covariance (the
penalty does not see rotations), where the Hessian is nearly a Kronecker product: that of the classes times the
variances of the axes. Its inverse, one eigendecomposition [C, C] a step, preconditions conjugate gradients so well that
about ten products with the Hessian make a step. Those products may be rough, so they run in bfloat16 or float32;
objective and gradient are float64 of the features as given, so the optimum is. See docs/probe.md.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.errors import UsageError
from diptych.model.inference.precision import has_fast_bfloat16

TOLERANCE = 1e-8
"""How far above the optimum's the objective of a fit may be, relative to the part of it that is the penalty.

`_Search._bound` says how that is known. That part is what counts: where the penalty is strong W is small, and yet it
alone tells classes apart. At 5e-7 of the whole up to 3 of 7,500 pictures got another label than at the optimum, enough
to choose another strength.
"""

_FINE, _ROUGH = 0.05, 0.3
"""Conjugate gradients end when the gradient they leave is this small a part; which of the two, the last step tells."""

_FAR = 1e-3
"""A step that promises to lower the objective by more, relative, is not the last: float32 will do to judge it."""

WEAKEST = 1e-15
"""The weakest penalty, for features whose largest deviation is 1: at 1e-18 what float64 sees has no optimum."""

MAX_STEPS = 200
MAX_PRODUCTS = 250
MAX_HALVINGS = 40
"""Newton steps of a fit, products with the Hessian in a step, and tries of a step's length."""

_BLOCK = 2**22
"""Bytes of features, or of scores, that are worked on at a time, so that they stay in the cache."""
_SMALL = 2**20
_LARGE = 2**24
"""Multiplications of a product below which float64 is as quick, and from which bfloat16 pays."""


@dataclass(frozen=True)
class Point:
    """A place in the solver's own coordinates: weight [S, R, K] along the axes, bias [S, 1, K] at the mean."""

    weight: Tensor
    bias: Tensor

    def along(self, step: Tensor | float, direction: "Point") -> "Point":
        return Point(self.weight + step * direction.weight, self.bias + step * direction.bias)


Inverse = Callable[[Point], Point]


@dataclass(frozen=True)
class State:
    """State at a point: per problem ([S, 1, 1], or [S, 1, K] for separate columns) and per picture."""

    objective: Tensor
    size: Tensor
    """|W|^2."""
    gradient: Point
    shares: Tensor
    """float32 [S, N, K]: probabilities; for separate columns p (1 - p)."""
    exact: bool
    """Whether the products with the features were float64."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The optimum for one strength of the penalty; S problems at once."""

    l2: float
    weight: Float[Tensor, "S D C"]
    bias: Float[Tensor, "S C"]
    objective: Float[Tensor, "S K"]
    """Sum of losses plus penalty; K is 1, or C for separate columns."""
    gap: Float[Tensor, "S K"]
    """Bound on the distance of the objective from the optimum's, relative."""
    converged: bool
    steps: int
    products: int

    def scores(self, features: Float[Tensor, "S M D"]) -> Float[Tensor, "S M C"]:
        """Scores whose softmax (or sigmoid, for separate columns) are the probabilities."""
        rows = max(1, _BLOCK // 8 // (features.shape[0] * max(self.weight.shape[1:])))
        blocks = [(block.double() @ self.weight + self.bias[:, None]).float() for block in features.split(rows, dim=1)]
        return torch.cat(blocks, dim=1)

    def problems(self) -> Iterator["Fit"]:
        """The problems of the batch, one by one."""
        for i in range(len(self.weight)):
            of_one = {name: vars(self)[name][i : i + 1] for name in ("weight", "bias", "objective", "gap")}
            yield replace(self, **of_one)


class Problem:
    """Features and labels, prepared once for all strengths of the penalty; each class needs a picture (and a column
    of its own also one that does not show it), else its bias has no optimum.
    """

    def __init__(
        self,
        features: Float[Tensor, "S N D"],
        labels: Int[Tensor, "S N"] | Float[Tensor, "S N C"],
        classes: int,
    ) -> None:
        self.separate = labels.ndim == 3
        self.two = classes == 2 and not self.separate
        self.coupled = not (self.separate or self.two)
        self.classes = classes
        self.pictures, self.columns = features.shape[1], 1 if self.two else classes
        self.labels = labels[:, :, None] if self.coupled else None
        target = labels[:, :, None] == 1 if self.two else labels > 0.5
        self.signs = None if self.coupled else target.double() * 2 - 1
        self._of_problem = (1, 2) if self.coupled else (1,)
        self._prepare(features)

    def _prepare(self, features: Tensor) -> None:
        """Centre, and find the axes: eigenvectors of the covariance, in units of its largest deviation."""
        self.features, self.lift = features, None
        if features.shape[1] < features.shape[2]:  # pictures span a space of at most N dimensions
            self.lift, triangle = torch.linalg.qr(features.double().mT)
            self.features = triangle.mT.contiguous()
        self.mean = self.features.mean(dim=1, keepdim=True, dtype=torch.float64)
        size = self.features.shape[2]
        covariance = self.mean.new_zeros(len(features), size, size)
        for rows in self._blocks():
            block = self._centred(rows)
            covariance += _product(block.mT, block)
        if not covariance.isfinite().all():
            raise UsageError("the squares of the features are too large for float64; scale the features")
        variance, axes = torch.linalg.eigh(covariance / self.pictures)
        largest = variance[:, -1:].clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        self.unit = torch.where(variance[:, -1:] > 0, largest, 1.0)[:, :, None]
        self.axes = axes / self.unit
        self.variance = (variance[:, :, None] / self.unit**2).clamp(min=0)
        self._rough: dict[torch.dtype, Tensor] = {}

    def _blocks(self, dtype: torch.dtype = torch.float64) -> Iterator[slice]:
        rows = max(1, _BLOCK // dtype.itemsize // (len(self.features) * max(self.features.shape[2], self.columns)))
        for first in range(0, self.pictures, rows):
            yield slice(first, first + rows)

    def _centred(self, rows: slice, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.features[:, rows].to(dtype) - self.mean.to(dtype)

    def rough(self, dtype: torch.dtype) -> Tensor:
        """Features along the axes, for products with the Hessian."""
        if dtype not in self._rough:
            self._rough = {
                dtype: torch.cat([_product(self._centred(r), self.axes).to(dtype) for r in self._blocks()], dim=1)
            }
        return self._rough[dtype]

    @property
    def _work(self) -> int:
        """Multiplications of a product with the features."""
        return self.features.numel() * self.columns

    @cached_property
    def precisions(self) -> tuple[torch.dtype, ...]:
        """Precisions for products with the Hessian, in turn: the next one if a step led nowhere."""
        if self._work < _SMALL:
            return (torch.float64,)
        if self._work >= _LARGE and has_fast_bfloat16(self.features.device):
            return torch.bfloat16, torch.float32, torch.float64
        return torch.float32, torch.float64

    def penalty(self, l2: float) -> Tensor:
        """The strength in the solver's coordinates, [S, 1, 1]; UsageError if the features are so large that float64
        does not see it."""
        penalty = l2 / self.unit**2
        if not (penalty >= WEAKEST).all():
            raise UsageError(
                f"the features spread by {float(self.unit.max()):.1g}, beside which a penalty of {l2:.1g} is none; "
                "scale them, say by their standard deviation, or give a stronger l2"
            )
        return penalty

    def total(self, of: Tensor) -> Tensor:
        """Sum over what belongs to one problem."""
        return of.sum(dim=self._of_problem, keepdim=True).double()

    def dot(self, a: Point, b: Point) -> Tensor:
        return self.total(a.weight * b.weight) + self.total(a.bias * b.bias)

    def start(self) -> Point:
        """The optimum under an endless penalty: how frequent the classes are."""
        if self.signs is not None:
            share = (self.signs > 0).double().mean(dim=1, keepdim=True)
            bias = share.logit()
        else:
            counts = self.mean.new_zeros(len(self.features), self.columns)
            ones = torch.ones_like(self.labels[:, :, 0], dtype=torch.float64)  # pyright: ignore[reportOptionalSubscript]
            counts.scatter_add_(1, self.labels[:, :, 0], ones)  # pyright: ignore[reportOptionalSubscript]
            bias = (counts / self.pictures).log()[:, None]
        return Point(self.mean.new_zeros(len(self.features), self.axes.shape[2], self.columns), bias)

    def evaluate(self, point: Point, penalty: Tensor, *, exact: bool = True) -> State:
        """Objective and gradient in float64, or from products in float32, which is nearly twice as fast."""
        dtype = torch.float64 if exact else torch.float32
        weight, bias = (self.axes @ point.weight).to(dtype), point.bias.to(dtype)
        loss, slope, slope_bias = torch.zeros_like(penalty), torch.zeros_like(weight), torch.zeros_like(bias)
        shares = torch.empty(len(weight), self.pictures, self.columns, device=weight.device)
        for rows in self._blocks(dtype):
            block = self._centred(rows, dtype)
            losses, residual = self._judge(_product(block, weight).add_(bias), rows, shares)
            loss = loss + self.total(losses)
            slope += _product(block.mT, residual)
            slope_bias += residual.sum(dim=1, keepdim=True)
        gradient = Point((self.axes.mT @ slope.double()).addcmul_(penalty, point.weight), slope_bias.double())
        size = self.total(point.weight**2)
        return State(loss + penalty / 2 * size, size, gradient, shares, exact)

    def _judge(self, logits: Tensor, rows: slice, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and their slope by logit; fills `shares`. Small losses keep their digits. `logits` is used up."""
        if self.labels is None:
            signs = self.signs[:, rows]  # pyright: ignore[reportOptionalSubscript]
            margin = logits * signs
            wrong = torch.sigmoid(-margin)
            shares[:, rows] = wrong * torch.sigmoid(margin)
            return -torch.nn.functional.logsigmoid(margin), (-signs * wrong).to(logits.dtype)
        labels = self.labels[:, rows]
        logits -= logits.gather(2, labels)
        top = logits.amax(dim=2, keepdim=True)
        parts = logits.sub_(top).exp_()
        total = parts.sum(dim=2, keepdim=True, dtype=torch.float64)
        wrong = 1 - parts.gather(2, labels) / total
        shares[:, rows] = parts.div_(total)
        return top + total.log(), parts.scatter_(2, labels, -wrong.to(parts.dtype))

    def bend(self, shares: Tensor, direction: Point, dtype: torch.dtype) -> Point:
        """The Hessian of the losses times a direction; `dtype` is the precision of the two large products."""
        rough, weight = self.rough(dtype), direction.weight.to(dtype)
        bent, bent_bias = torch.zeros_like(direction.weight), torch.zeros_like(direction.bias)
        for rows in self._blocks(dtype):
            block, share = rough[:, rows], shares[:, rows].to(bent.dtype)
            change = _product(block, weight).to(bent.dtype).add_(direction.bias)
            if self.labels is not None:
                change -= change.gather(2, self.labels[:, rows])  # a picture that is settled keeps its digits
                change *= share
                change.addcmul_(share, change.sum(dim=2, keepdim=True), value=-1)
            else:
                change *= share
            bent += _product(block.mT, change.to(dtype))
            bent_bias += change.sum(dim=1, keepdim=True)
        return Point(bent, bent_bias)

    def preconditioner(self, shares: Tensor, penalty: Tensor) -> Inverse:
        """Inverse of (Hessian by class) x (variance by axis) + penalty, as a function of residuals."""
        if not self.coupled:
            curve = shares.sum(dim=1, keepdim=True, dtype=torch.float64)
            scale, scale_bias = 1 / (self.variance * curve + penalty), 1 / curve.clamp(min=1e-30)
            return lambda r: Point(r.weight * scale.to(r.weight.dtype), r.bias * scale_bias.to(r.weight.dtype))
        together = _product(shares.mT, shares).double()
        together = (together + together.mT) / 2  # rounding is not symmetric, and a constant must cost nothing
        together.diagonal(dim1=1, dim2=2).zero_()  # the diagonal follows from the rest, without cancellation
        curve, turn = torch.linalg.eigh(together.sum(dim=2).diag_embed() - together)
        curve = curve[:, None].clamp(min=0)
        scale = 1 / (self.variance * curve + penalty)
        least = 1e-12 * curve.amax(dim=2, keepdim=True)  # a constant added to all biases changes nothing
        scale_bias = torch.where(curve > least, 1 / curve, 0.0)

        def apply(r: Point) -> Point:
            dtype = r.weight.dtype
            turned = turn.to(dtype)
            weight = ((r.weight @ turned) * scale.to(dtype)) @ turned.mT
            return Point(weight, ((r.bias @ turned) * scale_bias.to(dtype)) @ turned.mT)

        return apply

    def fit(self, l2: float, path: Sequence[Fit] = (), tolerance: float = TOLERANCE) -> Fit:
        """Go to the optimum; `path` are fits of other strengths, from which a start is guessed."""
        penalty = self.penalty(l2)
        with _alone() if self._work < _SMALL else nullcontext():
            point, state = self._guess(l2, penalty, path)
            search = _Search(self, penalty, tolerance)
            point, state = search.run(point, state)
        weight, bias = self.axes @ point.weight, point.bias
        bias = bias - self.mean @ weight
        if self.lift is not None:
            weight = self.lift @ weight
        if self.two:  # half to either class: the same probabilities from a softmax
            weight, bias = (torch.cat([-half / 2, half / 2], dim=2) for half in (weight, bias))
        return Fit(
            l2=l2,
            weight=weight,
            bias=bias[:, 0],
            objective=state.objective[:, 0],
            gap=(search.gap / state.objective)[:, 0],
            converged=bool(search.done.all()),
            steps=search.steps,
            products=search.products,
        )

    def _locate(self, fit: Fit) -> Point:
        """A fit, of this problem or of another with the same features' columns, in this problem's coordinates."""
        weight, bias = fit.weight, fit.bias[:, None]
        if self.two:
            weight, bias = 2 * weight[:, :, 1:], 2 * bias[:, :, 1:]
        if self.lift is not None:
            weight = self.lift.mT @ weight
        return Point(self.unit**2 * (self.axes.mT @ weight), bias + self.mean @ weight)

    def _guess(self, l2: float, penalty: Tensor, path: Sequence[Fit]) -> tuple[Point, State]:
        """Where the path of optima leads, as a polynomial of log(l2), unless its nearest point is better."""
        exact = len(self.precisions) == 1
        near = sorted(path, key=lambda fit: abs(math.log(fit.l2 / l2)))[:3]
        nearest = self._locate(near[0]) if near else self.start()
        if len(near) < 2:
            return nearest, self.evaluate(nearest, penalty, exact=exact)
        where = [math.log(fit.l2 / l2) for fit in near]
        shares = [math.prod(b / (b - a) for b in where if b != a) for a in where]
        guess = Point(torch.zeros_like(nearest.weight), torch.zeros_like(nearest.bias))
        for share, fit in zip(shares, near, strict=True):
            guess = guess.along(share, self._locate(fit))
        state = self.evaluate(guess, penalty, exact=exact)
        more = (penalty - self.penalty(near[0].l2)) / 2 * self.total(nearest.weight**2)
        better = state.objective <= near[0].objective[:, None] + more
        if better.all():
            return guess, state
        guess = Point(guess.weight.where(better, nearest.weight), guess.bias.where(better, nearest.bias))
        return guess, self.evaluate(guess, penalty, exact=exact)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix products, problem by problem where a batched one is slower: one alone, and bfloat16 (by ten times)."""
    if len(a) > 1 and a.dtype != torch.bfloat16:
        return a @ b
    return torch.stack([left @ right for left, right in zip(a, b, strict=True)])


@contextmanager
def _alone() -> Iterator[None]:
    """On one core: threads do not help a small problem, and where other programs run they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Search:
    """Newton's method from one start, for all problems of a batch at once."""

    def __init__(self, problem: Problem, penalty: Tensor, tolerance: float) -> None:
        self.problem, self.penalty, self.tolerance = problem, penalty, tolerance
        self.precisions = list(problem.precisions)
        self.steps = self.products = 0

    def run(self, point: Point, state: State) -> tuple[Point, State]:
        """Step until each problem is at its optimum."""
        problem = self.problem
        settled = torch.zeros_like(state.objective, dtype=torch.bool)
        self.rough = torch.full_like(state.objective, _ROUGH)
        self.gap = torch.zeros_like(state.objective)
        while True:
            precondition = problem.preconditioner(state.shares, self.penalty)
            goal = self._goal(state)
            self.gap = torch.where(settled, self.gap, self._bound(state, precondition, goal))
            self.done = settled | (self.gap <= goal)
            if self.done.all() and not state.exact:
                state = problem.evaluate(point, self.penalty)
                continue
            if self.done.all() or self.steps == MAX_STEPS:
                return point, state
            before = problem.total(state.gradient.weight**2)
            direction, decrease, left = self._solve(state, precondition, goal)
            far = (decrease > _FAR * state.objective).any() and not state.exact
            point, state, stuck = self._descend(point, state, direction, exact=not far)
            after = problem.total(state.gradient.weight**2)
            self.rough = ((after.sqrt() - left.sqrt()).abs() / before.sqrt()).clamp(_FINE, _ROUGH)
            self.steps += 1
            stuck &= ~self.done
            if stuck.any() and len(self.precisions) > 1:
                self.precisions.pop(0)
            elif stuck.any():  # what is left to gain, float64 cannot see
                settled = settled | stuck
                self.gap = torch.where(stuck, decrease, self.gap)

    def _goal(self, state: State) -> Tensor:
        """How near is near enough; the floor is for features that tell nothing, where W is 0."""
        return (self.tolerance * self.penalty / 2 * state.size).maximum(1e-20 * state.objective)

    def _bound(self, state: State, precondition: Inverse, goal: Tensor) -> Tensor:
        """How far the optimum can be below: the penalty alone bends the objective as much as `penalty`.

        That holds for the weight, once the bias is at its best for it. The way there is known from the Hessian of the
        bias, whose inverse the preconditioner has exactly; what it changes in the gradient costs a product, which is
        asked for when all else says that this is the end.
        """
        gradient = state.gradient
        nothing = torch.zeros_like(gradient.weight)
        best = precondition(Point(nothing, -gradient.bias)).bias
        gain = self.problem.total(best * -gradient.bias)
        bound = self.problem.total(gradient.weight**2) / (2 * self.penalty) + gain
        if (bound > goal).all():
            return bound
        self.products += 1
        change = self.problem.bend(state.shares, Point(nothing.float(), best.float()), self.precisions[0]).weight
        return torch.maximum(bound, self.problem.total((gradient.weight + change) ** 2) / (2 * self.penalty) + gain)

    def _solve(self, state: State, precondition: Inverse, goal: Tensor) -> tuple[Point, Tensor, Tensor]:
        """Conjugate gradients: a direction, its gain by the quadratic model, and what it leaves of the gradient."""
        problem, dtype = self.problem, self.precisions[0]
        work = torch.float64 if dtype == torch.float64 else torch.float32
        residual = Point(-state.gradient.weight.to(work), -state.gradient.bias.to(work))
        search = preconditioned = precondition(residual)
        direction = Point(torch.zeros_like(residual.weight), torch.zeros_like(residual.bias))
        energy, decrease = problem.dot(residual, preconditioned), torch.zeros_like(goal)
        active = ~self.done
        start = size = problem.total(residual.weight**2)
        for _ in range(MAX_PRODUCTS):
            bent = problem.bend(state.shares, search, dtype)
            bent = Point(bent.weight.addcmul_(self.penalty.to(work), search.weight), bent.bias)
            self.products += 1
            curve = problem.dot(search, bent)
            active = active & (curve > 0)
            length = torch.where(active, energy / curve, 0.0)
            direction = direction.along(length.to(work), search)
            residual = residual.along(-length.to(work), bent)
            decrease = decrease + length * energy / 2
            preconditioned = precondition(residual)
            left = problem.dot(residual, preconditioned)
            size = problem.total(residual.weight**2)
            rough = (left / 2 > self.rough**2 * decrease) | (size > self.rough**2 * start)
            active = active & rough & (size / (2 * self.penalty) > 0.1 * goal)
            if not active.any():
                break
            search = preconditioned.along(torch.where(active, left / energy, 0.0).to(work), search)
            energy = left
        return Point(direction.weight.double(), direction.bias.double()), decrease, size

    def _descend(self, point: Point, state: State, direction: Point, *, exact: bool) -> tuple[Point, State, Tensor]:
        """Go the whole step, or half of it, ..., until the objective falls; says where it does not."""
        problem = self.problem
        slope = problem.dot(state.gradient, direction)
        both = exact and state.exact
        noise = 1e-14 * (state.objective + 1e-3 * problem.pictures) if both else 1e-5 * state.objective
        step = torch.ones_like(slope)
        there, found = point, state
        for _ in range(MAX_HALVINGS):
            there = point.along(step, direction)
            found = problem.evaluate(there, self.penalty, exact=exact)
            fell = found.objective <= state.objective + 1e-4 * step * slope + noise
            if fell.all():
                break
            step = torch.where(fell, step, step / 2)
        return there, found, (found.objective >= state.objective - noise) & both
