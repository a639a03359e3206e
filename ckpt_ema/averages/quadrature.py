"""Sums of smooth functions over many consecutive steps, from a few of their values.

A sum over n equally spaced points has Gaussian rules as an integral has: their nodes are the zeros of the discrete
Chebyshev (Gram) polynomials, and NUM_NODES of them sum every polynomial up to degree 2 * NUM_NODES - 1 exactly
(Gautschi, Orthogonal Polynomials: Computation and Approximation, 2004, section 1.5.2).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

NUM_NODES = 8


def nodes_between(begin: int, end: int) -> Iterator[tuple[float, float]]:
    """(node, weight) pairs that sum a function over the steps `begin + 1, ..., end`.

    What is summed here decays from `end` backwards, as averages do, and may be a power of the steps since `begin`:
    the first and the last steps are taken one by one, towards the middle panels that are twice as long each. In
    float64; exact where a panel has no more than NUM_NODES steps.
    """
    middle = begin + (end - begin) // 2
    for count in _doubled(end - middle):
        end -= count
        for node, weight in sum_rule(count):
            yield end + node, weight
    for count in _doubled(middle - begin):
        for node, weight in sum_rule(count):
            yield begin + node, weight
        begin += count


def _doubled(total: int) -> Iterator[int]:
    """Lengths that sum to `total`, each twice the one before but for the last."""
    length = NUM_NODES
    while total > 0:
        count = min(length, total)
        # But the first ones stay exact: a narrow power profile falls faster than a polynomial can follow.
        if length > NUM_NODES and total - count < count // 2:
            count = total
        yield count
        total -= count
        length *= 2


@functools.cache
def sum_rule(count: int) -> tuple[tuple[float, float], ...]:
    """(node, weight) pairs that sum a function over 1, ..., `count`; the points themselves for a few."""
    if count <= NUM_NODES:
        return tuple((float(i), 1.0) for i in range(1, count + 1))
    # beta_j of the three-term recurrence p_(j+1)(x) = x p_j(x) - beta_j p_(j-1)(x) around the middle.
    betas = [j * j * (count * count - j * j) / (4 * (4 * j * j - 1)) for j in range(NUM_NODES)]
    middle, half = (count + 1) / 2, (count - 1) / 2
    rule = []
    for node in _zeros(betas, half):
        # Christoffel numbers: 1 over the sum of the squares of the orthonormal polynomials.
        total, norm = 0.0, float(count)
        previous, value = 0.0, 1.0
        for j in range(NUM_NODES):
            total += value * value / norm
            previous, value = value, node * value - betas[j] * previous
            norm *= betas[j + 1] if j + 1 < NUM_NODES else 1.0
        rule.append((middle + node, 1 / total))
    return tuple(rule)


def _zeros(betas: list[float], half: float) -> list[float]:
    """The zeros of the polynomial after the last of `betas`, all between -half and half, by bisection.

    Zeros of each degree separate those of the next.
    """
    zeros: list[float] = []
    for degree in range(1, len(betas) + 1):
        borders = [-half, *zeros, half]
        zeros = [_bisect(betas[:degree], low, high) for low, high in itertools.pairwise(borders)]
    return zeros


def _bisect(betas: list[float], low: float, high: float) -> float:
    rises = _polynomial(betas, high) > 0
    for _ in range(80):
        middle = (low + high) / 2
        if (_polynomial(betas, middle) > 0) is rises:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def _polynomial(betas: list[float], x: float) -> float:
    previous, value = 0.0, 1.0
    for beta in betas:
        previous, value = value, x * value - beta * previous
    return value
