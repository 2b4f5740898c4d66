"""Means and joint second moments of features that come a few rows at a time.

Rows are centered on their own mean and merged (Chan, Golub and LeVeque 1983), so a large offset costs no digits:
nothing is ever the difference of two large sums. Memory is one D x D matrix, however many rows there are.
Letters: R rows, D features of all layers side by side, L layers.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# The scatter is symmetric: it is made in this many bands of rows, each from its diagonal on to the right.
BANDS = 8


class Moments:
    """Mean and scatter of the features of all layers side by side, and of each layer's squared norms beside them.

    widths: D_l, features of each layer. n: rows so far. `mean` and `scatter` are there after the first `add`.

    The squared norms are taken around a fixed point, the mean of the first rows; `norm_products` moves them to the
    mean of all. The debiased CKA needs them, and nothing else does.
    """

    def __init__(self, widths: Sequence[int], around: Tensor | None = None) -> None:
        self.widths = list(widths)
        self.n = 0
        self.around = around  # (D,)
        self._mean: Tensor  # (D + L,)
        self._scatter: Tensor  # (D + L, D + L), its lower triangle only in part

    def add(self, rows: Tensor) -> None:
        """rows: (R, D), float64."""
        if self.around is None:
            self.around = rows.mean(0)
        squares = (rows - self.around).square_()
        norms = [squares[:, of].sum(1, keepdim=True) for of in self.columns()]
        rows = torch.cat([rows, *norms], dim=1)
        mean = rows.mean(0)
        rows -= mean
        if self.n == 0:
            self._scatter = rows.new_zeros(rows.shape[1], rows.shape[1])
            self._mean = torch.zeros_like(mean)
        for band in _bands(rows.shape[1]):
            self._scatter[band, band.start :].addmm_(rows[:, band].T, rows[:, band.start :])
        self._shift(len(rows), mean)

    def merge(self, other: "Moments") -> None:
        """As if the rows of `other`, which must have the same `around`, had been added here."""
        if self.n == 0:
            self.n, self.around = other.n, other.around
            self._mean, self._scatter = other._mean.clone(), other._scatter.clone()
            return
        self._scatter += other._scatter
        self._shift(other.n, other._mean)

    def _shift(self, n: int, mean: Tensor) -> None:
        """Account for `n` more rows of this mean, whose scatter around it has been added."""
        total = self.n + n
        shift = mean - self._mean
        if self.n:
            self._scatter.addr_(shift, shift, alpha=self.n * n / total)
        self._mean += shift * (n / total)
        self.n = total

    def columns(self) -> list[slice]:
        """Where each layer sits among the D columns."""
        edges = [0, *itertools.accumulate(self.widths)]
        return [slice(start, stop) for start, stop in itertools.pairwise(edges)]

    @property
    def mean(self) -> Tensor:
        """(D,)"""
        return self._mean[: sum(self.widths)]

    @property
    def scatter(self) -> Tensor:
        """(D, D): the sum of (x - mean)(x - mean)' over the rows."""
        return self._whole()[: sum(self.widths), : sum(self.widths)]

    def norm_products(self) -> Tensor:
        """(L, L): for every two layers, the sum over the rows of ||x_i - mean_i||^2 ||x_j - mean_j||^2."""
        d, scatter = sum(self.widths), self._whole()
        # ||x - mean||^2 = ||x - around||^2 - 2 (mean - around)'(x - around) + a constant: linear in what was kept.
        linear = scatter.new_zeros(len(scatter), len(self.widths))
        for layer, of in enumerate(self.columns()):
            linear[of, layer] = -2 * (self.mean - self.around)[of]
            linear[d + layer, layer] = 1
        traces = torch.stack([scatter.diagonal()[of].sum() for of in self.columns()])
        return linear.T @ scatter @ linear + torch.outer(traces, traces) / self.n

    def _whole(self) -> Tensor:
        """The scatter with its lower triangle filled in from the upper."""
        for band in _bands(len(self._scatter)):
            self._scatter[band.stop :, band] = self._scatter[band, band.stop :].T
        return self._scatter

    def to(self, device: torch.device | str) -> "Moments":
        """The same on another device."""
        moved = Moments(self.widths, self.around.to(device))
        moved.n, moved._mean, moved._scatter = self.n, self._mean.to(device), self._scatter.to(device)
        return moved


def _bands(size: int) -> Iterator[slice]:
    height = max(64, -(-size // BANDS))
    for start in range(0, size, height):
        yield slice(start, min(start + height, size))
