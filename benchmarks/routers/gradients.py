"""How far from the truth are router gradients that see one expert: bias and variance of top_k and sparse_mixer on the logits.

One token, 8 experts with outputs f_i, probabilities p = softmax(logits), and a loss L of what the layer puts out. Routing one expert by
sampling has the objective J = sum_i p_i L(p_i f_i). The truth is its gradient on the logits, enumerated over experts in float64: a
selection term, sum_i L(p_i f_i) dp_i, and a backpropagation term, sum_i p_i dL(p_i f_i). An estimate is what one pass through the
shipped router gives with one draw. L is a polynomial of degree 1, 2 or 3, or the cross-entropy of a small tanh network, which
has every degree.

sparse_mixer promises exactness for samples other than the winner (the expert with the largest logit): v1 to degree 2, v2_star to degree 3,
and v2 likewise for the selection term alone, which is what it aims at. The column "beside the winner" compares that part of the
estimate with the same part of its own aim: the sum over i other than the winner of (L(p_i f_i) - L(0)) dp_i, plus p_i dL(p_i f_i) but
for v2.

Two enumerated rows put the others in place: plain backpropagation through a sampled expert, and the likelihood-ratio estimate (REINFORCE
with the baseline L(0), plus backpropagation), which is unbiased and evaluates the loss once more. `top_k` is k=1, normalize=none:
always the winner, so that its estimate has no variance.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.report import RESULTS, write_report
from benchmarks.routers.figure import dots
from moe.routers import Router, Tokens, build

EXPERTS, WIDTH = 8, 4
BATCHES = 16  # of samples, from whose scatter the standard errors come
EVERYBODY = 1e9  # a jitter with which every expert is a candidate
MIXERS = ("v1", "v2", "v2_star")
ROWS = {"top_k": {"name": "top_k", "k": 1, "normalize": "none", "balance_loss": 0.0}} | {
    f"sparse_mixer {estimator}": {"name": "sparse_mixer", "k": 1, "estimator": estimator, "jitter": EVERYBODY, "balance_loss": 0.0}
    for estimator in MIXERS
}
CASES = (("linear", 1.0), ("quadratic", 1.0), ("cubic", 1.0), ("network", 0.5), ("network", 1.0), ("network", 2.0))


class Problem(NamedTuple):
    """One token: logits divided by the temperature, what each expert says, and the rest of the network, row by row."""

    logits: Tensor
    outputs: Tensor
    loss: Callable[[Tensor], Tensor]


class Truth(NamedTuple):
    """Parts of the gradient of J on the logits, one row an expert that may be drawn."""

    selection: Tensor  # (L(p_i f_i) - L(0)) dp_i
    backpropagation: Tensor  # p_i dL(p_i f_i)
    probability: Tensor


class Moments(NamedTuple):
    """Of many estimates: their mean in each batch, and the mean of their squared distance from the mean of all."""

    means: Tensor
    variance: float


def problem(kind: str, temperature: float, seed: int) -> Problem:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    logits, outputs = normal(EXPERTS) / temperature, 4 * normal(EXPERTS, WIDTH)
    slope, square, cubes = normal(WIDTH), normal(WIDTH, WIDTH), normal(6, WIDTH)
    inner, bias, outer = normal(WIDTH, 16), normal(16), normal(16, WIDTH) / 2
    degree = {"linear": 1, "quadratic": 2, "cubic": 3}.get(kind)

    def polynomial(h: Tensor) -> Tensor:
        value = h @ slope
        if degree != 1:
            value = value + ((h @ square) * h).sum(-1) / 2
        return value + (h @ cubes.T).pow(3).sum(-1) / 6 if degree == 3 else value

    def network(h: Tensor) -> Tensor:
        return -(torch.tanh(h @ inner / 2 + bias) @ outer).log_softmax(-1)[..., 0]

    return Problem(logits, outputs, network if degree is None else polynomial)


def truth(given: Problem) -> Truth:
    """The gradient of J by its parts: sum both over experts."""
    p = given.logits.softmax(-1)
    slope = p.diag() - p[:, None] * p  # slope[i] = dp_i by every logit
    h = (p[:, None] * given.outputs).requires_grad_()
    value = given.loss(h)
    (pull,) = torch.autograd.grad(value.sum(), h)
    at_zero = given.loss(torch.zeros_like(h[:1]))
    along = (pull * given.outputs).sum(-1)
    return Truth((value.detach() - at_zero)[:, None] * slope, (p * along)[:, None] * slope, p)


def estimates(router: Router, given: Problem, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gradients on the logits, one row a sample, and the expert that each sample drew."""
    x = given.logits.expand(samples, -1).clone().requires_grad_()
    router.stream = 16 * seed  # a router draws from streams next to its own
    routing = router(x, Tokens.of(x))
    row = routing.weight[:, None] * given.outputs[routing.expert]
    if routing.gradient_scale is not None:
        shared = routing.gradient_scale[:, None] * row
        row = shared + (row - shared).detach()
    (gradient,) = torch.autograd.grad(given.loss(row).sum(), x)
    return gradient, routing.expert


def moments(gradients: Tensor) -> Moments:
    means = torch.stack([batch.mean(0) for batch in gradients.chunk(BATCHES)])
    return Moments(means, (gradients - gradients.mean(0)).square().sum(-1).mean().item())


def enumerated(values: Tensor, probability: Tensor) -> Moments:
    """Exact moments of an estimate that is values[i] with a probability."""
    mean = probability @ values
    return Moments(mean.expand(BATCHES, -1), (probability @ (values - mean).square().sum(-1)).item())


def bias(found: list[Moments], aims: list[Tensor]) -> tuple[float, float]:
    """Length of the bias relative to the aim's, over all problems, and its standard error.

    The mean product of two different batches' deviations has the squared bias as its expectation: the scatter of finite
    samples does not pass for a bias. The error is that of the square, as the root's distance to one standard error more.
    """
    deviation = torch.stack([each.means - aim for each, aim in zip(found, aims, strict=True)])  # problem, batch, expert
    length = sum(aim.square().sum().item() for aim in aims)

    def square(batches: Tensor) -> float:
        n, total = batches.shape[1], batches.sum(1)
        return (total.square().sum() - batches.square().sum()).item() / (n * (n - 1)) / length

    value = square(deviation)
    left_out = torch.tensor([square(torch.cat([deviation[:, :i], deviation[:, i + 1 :]], 1)) for i in range(BATCHES)])
    error = ((BATCHES - 1) * left_out.var(correction=0)).sqrt().item()
    root = math.sqrt(max(value, 0))
    return root, math.sqrt(max(value, 0) + error) - root


def measure(kind: str, temperature: float, problems: int, samples: int) -> list[dict[str, Any]]:
    """Every row of one kind of loss and temperature."""
    given = [problem(kind, temperature, seed) for seed in range(problems)]
    truths = [truth(each) for each in given]
    whole = [(part.selection + part.backpropagation).sum(0) for part in truths]
    rows = []
    for name, options in ROWS.items():
        router = build(options, EXPERTS, EXPERTS).double()
        router.load_state_dict({"weight": torch.eye(EXPERTS)})  # its input is the logits
        found, beside, aims = [], [], []
        for seed, (each, parts) in enumerate(zip(given, truths, strict=True)):
            gradients, expert = estimates(router, each, samples, seed)
            winner = each.logits.argmax()
            found.append(moments(gradients))
            beside.append(moments(gradients * (expert != winner)[:, None]))
            aim = parts.selection if name.endswith("v2") else parts.selection + parts.backpropagation
            aims.append(aim.sum(0) - aim[winner])
        rows.append(_row(name, found, whole) | ({} if name == "top_k" else _two("beside", bias(beside, aims))))
    # truths hold p_i times what a draw of i gives
    plain = [enumerated(part.backpropagation / part.probability[:, None], part.probability) for part in truths]
    ratio = [enumerated((part.selection + part.backpropagation) / part.probability[:, None], part.probability) for part in truths]
    rows += [_row("plain backpropagation, enumerated", plain, whole), _row("likelihood ratio, enumerated", ratio, whole)]
    return [{"loss": kind, "temperature": temperature, **row} for row in rows]


def _row(name: str, found: list[Moments], whole: list[Tensor]) -> dict[str, Any]:
    length = sum(aim.square().sum().item() for aim in whole)
    cosine = [torch.cosine_similarity(each.means.mean(0), aim, 0).item() for each, aim in zip(found, whole, strict=True)]
    spread = math.sqrt(sum(each.variance for each in found) / length)
    return {"router": name, **_two("bias", bias(found, whole)), "std": spread, "cosine": sum(cosine) / len(cosine)}


def _two(name: str, value: tuple[float, float]) -> dict[str, float]:
    return {name: value[0], f"{name}_error": value[1]}


def line(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the table shows it."""
    return {
        "loss": row["loss"],
        "temperature": row["temperature"],
        "router": row["router"],
        "relative bias": f"{row['bias']:.3f} ± {row['bias_error']:.3f}",
        "relative standard deviation": f"{row['std']:.3f}",
        "cosine with the truth": f"{row['cosine']:.3f}",
        "bias beside the winner": f"{row['beside']:.3f} ± {row['beside_error']:.3f}" if "beside" in row else "",
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", type=int, default=32, help="random tokens, experts and losses")
    parser.add_argument("--samples", type=int, default=65536, help="draws for each")


def run(options: argparse.Namespace) -> None:
    problems, samples = (2, 256) if options.quick else (options.problems, options.samples)
    rows = []
    for kind, temperature in CASES:
        rows += measure(kind, temperature, problems, samples)
        print(f"{kind} at temperature {temperature}: done", flush=True)
    notes = [
        f"{problems} random problems, seeds 0 to {problems - 1}, {samples} draws each; {EXPERTS} experts, float64.",
        "Relative: of the root of the sum of squares over problems, to the truth's. The cosine is the mean over problems of that of the "
        "mean estimate; ± is the standard error over draws, for these problems.",
        "Beside the winner: the part of samples other than the arg max, against the same part of the estimator's own aim (for v2 "
        "the selection term alone).",
        "One draw's standard deviation; that of a mean over n tokens is smaller by the root of n, and the bias is not.",
    ]
    write_report("routers_gradients", [line(row) for row in rows], raw=rows, json_file=options.json, quick=options.quick, notes=notes)
    if not options.quick:
        shown = [row for row in rows if (row["loss"], row["temperature"]) == ("network", 1.0)]
        bars = [(row["router"], row["bias"], row["bias_error"]) for row in shown]
        dots(RESULTS / "routers_gradients.svg", bars, "Bias of the router's gradient, tanh network", "bias relative to the true gradient")
