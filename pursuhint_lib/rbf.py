"""Gaussian kernels of many images, in tiles.

The kernel matrix of N images has N^2 entries: 800 MB in float64 for 10 000 images, for every layer. Nothing here holds
one. Each matrix is made tile by tile, of all layers at once, the inner products that CKA needs are taken of the tiles,
and the tiles are thrown away. What comes out is exact: the same sums, in another order.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# Tiles of all layers together: large enough to keep the cores busy, small enough for any machine.
TILE_BYTES = 64 * 2**20
# Up to so many distances are sorted as they are; of more, a sample says first where the median must be.
FEW_DISTANCES = 2_000_000
SAMPLED_DISTANCES = 200_000


def centered_kernel_products(representations: Sequence[Tensor], bandwidth: float) -> Tensor:
    """<HKH, HK'H> of the Gaussian kernel matrices of every two representations, H = I - 11'/N: (L, L), symmetric.

    representations: L tensors (N, D_l), float64, centered, on one device. k(a, b) = exp(-||a - b||^2 / (2 t^2 m)) with
    t = `bandwidth` and m the typical squared distance, see `typical_squared_distance`.

    Cost: two passes over N^2 / 2 entries per layer; memory: `TILE_BYTES` and L vectors of N.
    """
    layers = [_Distances(z) for z in representations]
    n, count = len(representations[0]), len(layers)
    divisors = [2 * bandwidth**2 * typical_squared_distance(z) for z in representations]
    raw = torch.zeros(count, count, dtype=torch.float64, device=representations[0].device)
    row_sums = torch.zeros(count, n, dtype=torch.float64, device=raw.device)
    for rows, columns in _upper_tiles(n, _tile_side(count)):
        tiles = raw.new_empty(count, rows.stop - rows.start, columns.stop - columns.start)
        for tile, distances, divisor in zip(tiles, layers, divisors):
            # k - 1 instead of k: centering makes them equal, and entries close to 1 keep their digits.
            distances.tile(rows, columns, out=tile).mul_(-1 / divisor).expm1_()
        flat = tiles.flatten(1)
        twice = 1 if rows == columns else 2  # the tile on the other side of the diagonal is this one's transpose
        raw.addmm_(flat, flat.T, alpha=twice)
        row_sums[:, rows] += tiles.sum(2)
        if rows != columns:
            row_sums[:, columns] += tiles.sum(1)
    sums = row_sums.sum(1)
    return raw - 2 / n * (row_sums @ row_sums.T) + torch.outer(sums, sums) / n**2


def typical_squared_distance(z: Tensor) -> float:
    """Median of the full N x N matrix of squared distances, zero diagonal included; of an even number the mean of the
    middle two.

    Where more than half of all pairs coincide (a layer that is silent for most images) that would be 0, and the mean
    stands in for it; where all do, 1.

    z: (N, D), float64, centered.
    """
    n = len(z)
    # The matrix holds N zeros and every pair twice, so its entry of rank r is the pair of rank (r - N) / 2.
    ranks = [(rank - n) // 2 for rank in ((n * n - 1) // 2, n * n // 2)]
    values = dict.fromkeys(ranks, 0.0) | _order_statistics(z, sorted({rank for rank in ranks if rank >= 0}))
    median = sum(values[rank] for rank in ranks) / 2
    return median or _mean_squared_distance(z) or 1.0


def _mean_squared_distance(z: Tensor) -> float:
    """Of all N^2 entries; z is centered."""
    return 2 * float(z.square().mean(0).sum())


def _order_statistics(z: Tensor, ranks: list[int]) -> dict[int, float]:
    """rank -> the squared distance of that rank (from 0) among the N (N - 1) / 2 pairs of rows.

    Distances are counted up to where the ranks must be and kept only there: about one in a hundred, more only where
    very many pairs are equally far apart.
    """
    n, distances = len(z), _Distances(z)
    rounding = 1e-12 * _mean_squared_distance(z)  # equal rows are so far apart at most: their distance counts as 0
    low, high = 0.0, np.inf
    margin = 4 * 0.5 / SAMPLED_DISTANCES**0.5  # four standard deviations of a sampled quantile near the median
    while True:
        if n * (n - 1) // 2 > FEW_DISTANCES:
            low, high = _bracket(z, ranks, margin)
        low = max(low, rounding)
        below, between = 0, []
        for rows, columns in _upper_tiles(n, _tile_side(1, 512)):
            tile = distances.tile(rows, columns)
            if rows == columns:
                tile = tile[torch.triu_indices(*tile.shape, 1, device=z.device).unbind()]
            above = tile > low
            below += tile.numel() - int(above.sum())
            between.append(tile[above.logical_and_(tile <= high)].cpu().numpy())
        between = np.concatenate(between)
        small_enough = low == rounding  # what lies below is then 0, and known
        if all((below <= rank or small_enough) and rank < below + len(between) for rank in ranks):
            break
        margin *= 4  # an unlucky sample; a bracket of margin 1 or more holds everything
    inside = {rank: rank - below for rank in ranks}
    if wanted := [i for i in inside.values() if i >= 0]:
        between.partition(wanted)
    return {rank: float(between[i]) if i >= 0 else 0.0 for rank, i in inside.items()}


def _bracket(z: Tensor, ranks: list[int], margin: float) -> tuple[float, float]:
    """Two values between which the distances of these ranks very probably lie, from a seeded sample of pairs."""
    pairs, generator = len(z) * (len(z) - 1) // 2, torch.Generator().manual_seed(0)
    a = torch.randint(len(z), (SAMPLED_DISTANCES,), generator=generator)
    b = (a + torch.randint(1, len(z), (SAMPLED_DISTANCES,), generator=generator)) % len(z)
    sampled = torch.cat([(z[i] - z[j]).square().sum(1) for i, j in zip(a.split(20_000), b.split(20_000))])
    sampled = np.sort(sampled.cpu().numpy())
    low, high = (int((rank / pairs + step) * len(sampled)) for rank, step in ((ranks[0], -margin), (ranks[-1], margin)))
    # A sampled distance and the same one in a tile may differ by rounding, hence the last factor.
    return (
        float(sampled[low]) * (1 - 1e-9) if low > 0 else 0.0,
        float(sampled[high]) * (1 + 1e-9) if high < len(sampled) else np.inf,
    )


class _Distances:
    """Squared distances between the rows of z (N, D), any tile of them at a time."""

    def __init__(self, z: Tensor) -> None:
        self.z = z
        self.squared_norms = z.square().sum(1)  # (N,)

    def tile(self, rows: slice, columns: slice, out: Tensor | None = None) -> Tensor:
        """(R, C), by ||a||^2 + ||b||^2 - 2 a'b."""
        tile = torch.addmm(self.squared_norms[columns], self.z[rows], self.z[columns].T, alpha=-2, out=out)
        return tile.add_(self.squared_norms[rows, None]).clamp_(min=0)


def _upper_tiles(n: int, side: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the tiles on and above the diagonal of an n x n matrix."""
    edges = [slice(start, min(start + side, n)) for start in range(0, n, side)]
    for i, rows in enumerate(edges):
        for columns in edges[i:]:
            yield rows, columns


def _tile_side(layers: int, largest: int = 1024) -> int:
    return max(32, min(largest, int((TILE_BYTES / 8 / layers) ** 0.5)))
