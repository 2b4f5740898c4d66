"""How alike two layers of a network are.

The pairwise functions `linear_cka`, `rbf_cka` and `r2_cca` are the definitions: two matrices in, one number out.
`profile_layers` sends images once through a frozen teacher, and the `LayerProfile` it returns gives the same numbers
for all pairs of layers as a labelled table.
Letters: N images, B batch, C channels, H W space, T tokens, D features, L layers.
"""

import difflib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

# A channel whose spread is below one float32 rounding of its mean holds no signal: it counts as constant (dead).
CONSTANT_CHANNEL = 1e-7
# Directions of the standardized features with a singular value below this share of the largest are rounding, not
# signal: ten times what float32 features leave behind, and its square is far above the rounding of a float64 scatter.
RANK_TOLERANCE = 1e-5
# Rows per update of the moments: enough to make the (D, D) product cheap, and fixed so that batch size does not matter.
CHUNK_ROWS = 1024
# Rows of all L Gram matrices that are held at once: 110 MB for 54 layers and 2000 images.
BAND_ROWS = 128


# ---- Two representations of the same images -> one number ----


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centered kernel alignment (CKA) of two representations of the same N images.

    Both are centered here, so a constant added to either changes nothing; rotating or scaling either changes nothing.

    x: (N, Dx), y: (N, Dy). Rows must be the same images in the same order.
    Returns a float64 scalar in [0, 1]; 1 means equal up to rotation and scale. Where x or y is constant it is 0.
    Raises ValueError for other shapes, fewer than two rows, or values that are not finite.
    Kornblith et al. 2019 (arXiv 1905.00414), feature-space form: ||y'x||_F^2 / (||x'x||_F ||y'y||_F).
    """
    x, y = _checked(x, y)
    x, y = _centered(x), _centered(y)
    return _ratio((y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm())


def rbf_cka(x: Tensor, y: Tensor, *, bandwidth: float = 1.0) -> Tensor:
    """CKA with a Gaussian kernel, k(a, b) = exp(-||a - b||^2 / (2 t^2 m)), of two representations of the same N images.

    m is the median of the full N x N matrix of squared distances, its zero diagonal included, and t is `bandwidth`.
    Where more than half of all pairs coincide (a layer that is silent for most images) m would be 0; the mean squared
    distance stands in for it. Adding a constant, rotating and scaling change nothing.

    x: (N, Dx), y: (N, Dy). Rows must be the same images in the same order. Memory: a few N x N float64 matrices.
    Returns a float64 scalar in [0, 1]. Where x or y is constant the answer is 0.
    Raises ValueError as `linear_cka` does, and for a bandwidth that is not positive.
    Kornblith et al. 2019 (arXiv 1905.00414), eq. 4 with the biased HSIC of eq. 3: <HKH, HLH> / (||HKH||_F ||HLH||_F).
    """
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}: it must be positive")
    k, l = (_RbfKernel(_centered(z), bandwidth).centered_rows() for z in _checked(x, y))  # (N, N) each
    return _ratio((k * l).sum(), k.norm() * l.norm())


def r2_cca(x: Tensor, y: Tensor, *, centered: bool = True) -> Tensor:
    """Mean squared canonical correlation (R^2_CCA) of two representations of the same N images.

    With orthonormal bases Q_x (N, r_x) and Q_y (N, r_y) of the column spaces: ||Q_y'Q_x||_F^2 / min(r_x, r_y). Any
    invertible linear map of either side, and a constant added to either, change nothing.

    The published formula divides by min(Dx, Dy), which is the same for features of full rank. Dead or linearly
    dependent channels make the rank smaller than D; a QR would then invent arbitrary directions. Here directions below
    `RANK_TOLERANCE` are dropped and the ranks r are what divides, so that a layer always has similarity 1 with itself.
    Needs many more images than features: independent features score about max(r_x, r_y) / N, and exactly 1 at N <= D.

    `centered=False` is the rule of the method's public code, and wrong for real features; it is kept for comparison
    only. After a ReLU all layers share nearly the same constant direction, which alone adds up to 1 / min(r).

    x: (N, Dx), y: (N, Dy). Rows must be the same images in the same order.
    Returns a float64 scalar in [0, 1]. Where x or y is constant the answer is 0. Raises ValueError as `linear_cka`.
    Kornblith et al. 2019 (arXiv 1905.00414), table 1, R^2_CCA.
    """
    q_x, q_y = (_orthonormal_basis(z, centered) for z in _checked(x, y))
    rank = torch.tensor(min(q_x.shape[1], q_y.shape[1]), dtype=torch.float64, device=q_x.device)
    return _ratio((q_y.T @ q_x).square().sum(), rank)


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: both must be (images, features)")
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"x has {len(x)} rows and y {len(y)}: both must hold the same images, two or more")
    for name, z in (("x", x), ("y", y)):
        if not z.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    return _double(x), _double(y)


def _double(x: Tensor) -> Tensor:
    """float64, on the same device where that device can hold it."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator in [0, 1], and 0 where the denominator is 0; elementwise."""
    safe = torch.where(denominator > 0, denominator, 1)
    return torch.where(denominator > 0, numerator / safe, 0).clamp(0, 1)


def _live(spread: Tensor, mean: Tensor) -> Tensor:
    """Which channels vary: (D,) standard deviations and means -> (D,) bool."""
    return spread > CONSTANT_CHANNEL * mean.abs()


def _centered(x: Tensor) -> Tensor:
    """Subtract the mean of each column; constant columns become exactly 0."""
    mean = x.mean(0)
    x = x - mean
    return x * _live(x.square().mean(0).sqrt(), mean)


def _orthonormal_basis(x: Tensor, centered: bool) -> Tensor:
    """(N, D) -> (N, r): orthonormal columns that span the columns of x, centered first if asked."""
    if centered:
        x = _centered(x)
    # Correlations do not depend on the scale of a channel; equal scales make the rank cut-off fair to quiet ones.
    scale = x.square().mean(0).sqrt()
    u, singular, _ = torch.linalg.svd(x / torch.where(scale > 0, scale, 1), full_matrices=False)
    return u[:, singular > RANK_TOLERANCE * singular[:1]]


class _RbfKernel:
    """The centered Gaussian Gram matrix of one representation, any rows of it at a time.

    z: (N, D), float64, centered: distances stay the same, and their rounding does not see a large common offset.
    """

    def __init__(self, z: Tensor, bandwidth: float = 1.0):
        self.z = z
        self.squared_norms = z.square().sum(1)  # (N,)
        distances = self._squared_distances(slice(None))
        # Not `torch.median`, which takes the lower of the middle two entries.
        typical, mean = float(np.median(distances.detach().cpu().numpy())), distances.mean().item()
        if not typical > 1e-12 * mean:  # identical rows differ by rounding here, so not "== 0"
            typical = mean or 1.0
        self.divisor = 2 * bandwidth**2 * typical
        self.row_means = self._gram(distances).mean(1)  # (N,)

    def _squared_distances(self, rows: slice) -> Tensor:
        """(R, N), by ||a||^2 + ||b||^2 - 2 a'b."""
        distances = torch.addmm(self.squared_norms, self.z[rows], self.z.T, alpha=-2)
        return distances.add_(self.squared_norms[rows, None]).clamp_(min=0)

    def _gram(self, distances: Tensor) -> Tensor:
        return distances.div_(-self.divisor).exp_()  # in place: one matrix fewer to hold

    def centered_rows(self, rows: slice = slice(None)) -> Tensor:
        """(R, N): these rows of HKH, H = I - 11'/N."""
        gram = self._gram(self._squared_distances(rows))
        return gram.sub_(self.row_means[rows, None]).sub_(self.row_means).add_(self.row_means.mean())


# ---- All layers of a teacher, in one pass ----


def pool_features(features: Tensor) -> Tensor:
    """One vector per image: the mean over positions, in float32 or better whatever precision the network ran in.

    features: (B, C, H, W) -> (B, C); (B, T, D) -> (B, D), mean over tokens; (B, D) -> (B, D). Else ValueError.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    if features.ndim == 4:
        return features.mean((2, 3), dtype=dtype)
    if features.ndim == 3:
        return features.mean(1, dtype=dtype)
    if features.ndim == 2:
        return features.to(dtype)
    raise ValueError(f"features have shape {tuple(features.shape)}: they must be (B, C, H, W), (B, T, D) or (B, D)")


def profile_layers(teacher: Any, batches: Iterable[Any], *, keep_features: bool = True) -> "LayerProfile":
    """Look at every image once through a frozen teacher and keep what the similarities of its layers need.

    Memory for the moments is D x D float64, D being the channels of all layers together, and does not grow with N. The
    pooled features are kept as well (N x D, float32 on the CPU: 80 MB for 10 000 images of a ResNet-110) unless
    `keep_features` is False; without them "rbf_cka" and `subset` are not to be had.

    teacher: anything with `layers`, names in execution order, and `observe(images)` that returns an object whose
        `features` is a dict layer -> tensor; a `FrozenTeacher`.
    batches: iterable of objects with `images`.
    Raises ValueError for fewer than two images, or naming the layer whose features are not finite.
    """
    layers = list(teacher.layers)
    widths: list[int] = []

    def pooled_batches() -> Iterator[Tensor]:
        for batch in batches:
            features = teacher.observe(batch.images).features
            pooled = [pool_features(features[layer]) for layer in layers]
            widths[:] = [rows.shape[1] for rows in pooled]
            yield torch.cat(pooled, dim=1)  # (B, D)

    moments, kept = _Moments(), []
    for chunk in _rechunked(pooled_batches(), CHUNK_ROWS):
        moments.add(_double(chunk))
        if keep_features:
            kept.append(chunk.cpu())
    if moments.n < 2:
        raise ValueError(f"batches gave {moments.n} images: a profile needs two or more")
    return LayerProfile(
        layers=layers,
        widths=widths,
        n_images=moments.n,
        mean=moments.mean.cpu(),
        scatter=moments.scatter.cpu(),
        features=torch.cat(kept) if keep_features else None,
    )


def _rechunked(batches: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """The same rows in chunks of exactly `rows` (the last may be shorter), whatever the sizes that come in."""
    pending, count = [], 0
    for batch in batches:
        pending.append(batch)
        count += len(batch)
        if count >= rows:
            joined, whole = torch.cat(pending), count - count % rows
            yield from joined[:whole].split(rows)
            pending, count = [joined[whole:]], count - whole
    if count:
        yield torch.cat(pending)


class _Moments:
    """Mean (D,) and scatter (D, D), the sum of (x - mean)(x - mean)', of rows that come in chunks.

    Chunks are centered on their own mean and merged (Chan, Golub and LeVeque 1983), so a large offset costs no digits:
    nothing is ever the difference of two large sums.
    """

    def __init__(self) -> None:
        self.n = 0

    def add(self, rows: Tensor) -> None:
        """rows: (R, D), float64."""
        mean = rows.mean(0)
        rows = rows - mean
        if self.n == 0:
            self.n, self.mean, self.scatter = len(rows), mean, rows.T @ rows
            return
        total = self.n + len(rows)
        shift = mean - self.mean
        self.scatter.addmm_(rows.T, rows).addr_(shift, shift, alpha=self.n * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.n = total


@dataclass(frozen=True, eq=False, repr=False)
class LayerProfile:
    """What N images look like in each of L layers: made by `profile_layers` or `LayerProfile.from_features`.

    layers: L names in execution order; widths: D_l, channels of each.
    mean: (D,), scatter: (D, D), float64, of the pooled features of all layers side by side, D = sum of D_l.
    features: (N, D) pooled features, or None when they were not kept.
    """

    layers: Sequence[str]
    widths: Sequence[int]
    n_images: int
    mean: Tensor
    scatter: Tensor
    features: Tensor | None = None

    def __post_init__(self) -> None:
        for layer, columns in zip(self.layers, self._columns()):
            if not self.scatter[columns, columns].isfinite().all():
                raise ValueError(f"layer {layer!r} gives features that are not finite")

    def __repr__(self) -> str:
        kept = "" if self.features is not None else ", features not kept"
        return f"LayerProfile({len(self.layers)} layers, {self.n_images} images, {sum(self.widths)} channels{kept})"

    @classmethod
    def from_features(cls, features: Mapping[str, Tensor]) -> "LayerProfile":
        """A profile of features that are already there: layer -> (N, C, H, W), (N, T, D) or (N, D), the same images."""
        pooled = [pool_features(rows).cpu() for rows in features.values()]
        rows = {layer: len(z) for layer, z in zip(features, pooled)}
        if len(set(rows.values())) != 1 or min(rows.values()) < 2:
            raise ValueError(f"layers hold these numbers of images: {rows}: all must hold the same, two or more")
        return cls._of_rows(list(features), [z.shape[1] for z in pooled], torch.cat(pooled, dim=1))

    @classmethod
    def _of_rows(cls, layers: Sequence[str], widths: Sequence[int], rows: Tensor) -> "LayerProfile":
        moments = _Moments()
        for chunk in rows.split(CHUNK_ROWS):
            moments.add(_double(chunk))
        return cls(layers, widths, moments.n, moments.mean, moments.scatter, rows)

    def _columns(self) -> list[slice]:
        """Where each layer sits among the D columns."""
        edges = [0, *itertools.accumulate(self.widths)]
        return [slice(start, stop) for start, stop in itertools.pairwise(edges)]

    def _kept(self, purpose: str) -> Tensor:
        if self.features is None:
            raise ValueError(f"{purpose} needs the pooled features: call profile_layers with keep_features=True")
        return self.features

    def pooled(self, layer: str) -> Tensor:
        """(N, D_l): the pooled features of one layer, a row per image in the order seen."""
        if layer not in self.layers:
            raise ValueError(_unknown("layer", layer, self.layers))
        return self._kept("pooled")[:, self._columns()[list(self.layers).index(layer)]]

    def subset(self, rows: Tensor | Sequence[int]) -> "LayerProfile":
        """The profile of some of the images: indices or a boolean mask. Raises ValueError for fewer than two."""
        rows = self._kept("subset")[torch.as_tensor(rows)]
        if len(rows) < 2:
            raise ValueError(f"subset leaves {len(rows)} images: a profile needs two or more")
        return self._of_rows(self.layers, self.widths, rows)

    def resample(self, generator: torch.Generator, fraction: float = 0.5) -> "LayerProfile":
        """The profile of a random share of the images, drawn without replacement and kept in order.

        Without replacement, because repeated images would look like agreement between layers.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction}: it must be above 0 and at most 1")
        return self.subset(_random_rows(self.n_images, round(fraction * self.n_images), generator))

    def similarity(self, metric: str, *, rbf_images: int = 2000, seed: int = 0) -> pd.DataFrame:
        """How alike every two layers are: a symmetric (L, L) table in [0, 1] with unit diagonal, labelled by layer.

        metric: one of `METRICS`. Off the diagonal the numbers are those of the pairwise function of the same name.
        rbf_images: "rbf_cka" costs N^2 per layer, so it looks at this many images, drawn without replacement by `seed`;
            all of them where there are no more. Other metrics always use all.
        Raises ValueError for an unknown metric, naming the nearest, or where the metric needs features not kept.
        """
        if metric not in METRICS:
            raise ValueError(_unknown("metric", metric, METRICS))
        rows = _random_rows(self.n_images, rbf_images, torch.Generator().manual_seed(seed))
        table = METRICS[metric](self, rows)
        table = ((table + table.T) / 2).fill_diagonal_(1)
        return pd.DataFrame(table.numpy(), index=list(self.layers), columns=list(self.layers))


def cross_similarity(teacher: LayerProfile, student: LayerProfile) -> pd.DataFrame:
    """Linear CKA of every teacher layer with every student layer, on the same images in the same order.

    Returns a labelled (teacher layers, student layers) table in [0, 1]. Raises ValueError when the numbers of images
    differ.
    """
    if teacher.n_images != student.n_images:
        raise ValueError(
            f"the profiles are of {teacher.n_images} and {student.n_images} images: they must be of the same"
        )
    values = [[float(linear_cka(teacher.pooled(t), student.pooled(s))) for s in student.layers] for t in teacher.layers]
    return pd.DataFrame(values, index=list(teacher.layers), columns=list(student.layers))


def _random_rows(n: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` of n row numbers, ascending, without replacement; all n if there are no more."""
    return torch.randperm(n, generator=generator)[:size].sort().values


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, 1, cutoff=0)
    return f"{what} {name!r} is unknown: did you mean {nearest[0]!r}? Known: {', '.join(known)}"


# ---- Metrics on a profile: (profile, rows) -> (L, L); `rows`: the images for metrics that compare images in pairs ----


def _r2_cca_table(profile: LayerProfile, rows: Tensor) -> Tensor:
    return _r2_cca_of_moments(profile, profile.scatter, profile.mean)


def _r2_cca_uncentered_table(profile: LayerProfile, rows: Tensor) -> Tensor:
    raw = torch.addr(profile.scatter, profile.mean, profile.mean, alpha=profile.n_images)  # sum of x x'
    return _r2_cca_of_moments(profile, raw, torch.zeros_like(profile.mean))


def _r2_cca_of_moments(profile: LayerProfile, scatter: Tensor, mean: Tensor) -> Tensor:
    """||W_i' S_ij W_j||_F^2 / min(r_i, r_j), with W_i (D_i, r_i) such that W_i' S_ii W_i = I.

    X_i W_i is then an orthonormal basis of layer i, so this is `r2_cca` without the N rows.
    """
    widest = max(profile.widths)
    if profile.n_images <= widest:
        warnings.warn(
            f"r2_cca from {profile.n_images} images for up to {widest} channels is 1 whatever they show: use many more",
            stacklevel=4,
        )
    columns = profile._columns()
    spread = (scatter.diagonal() / profile.n_images).sqrt()
    inverse = torch.where(_live(spread, mean), scatter.diagonal().rsqrt(), 0)  # standardizes; 0 for dead channels
    whiteners = []
    for of in columns:
        correlation = scatter[of, of] * inverse[of, None] * inverse[of]
        values, vectors = torch.linalg.eigh(correlation)  # squared singular values of the standardized features
        kept = values > RANK_TOLERANCE**2 * values[-1:]
        whiteners.append(inverse[of, None] * vectors[:, kept] * values[kept].rsqrt())  # (D_i, r_i)
    shared = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    for i, of_i in enumerate(columns):
        whitened = whiteners[i].T @ scatter[of_i]  # (r_i, D)
        for j in range(i, len(columns)):
            shared[i, j] = shared[j, i] = (whitened[:, columns[j]] @ whiteners[j]).square().sum()
    ranks = torch.tensor([w.shape[1] for w in whiteners], dtype=torch.float64)
    return _ratio(shared, torch.minimum(ranks[:, None], ranks))


def _linear_cka_table(profile: LayerProfile, rows: Tensor) -> Tensor:
    live = _live((profile.scatter.diagonal() / profile.n_images).sqrt(), profile.mean)
    squared = (profile.scatter * live[:, None] * live).square_()
    # ||S_ij||_F^2 of all blocks at once: sums over the rows, then over the columns, that belong to each layer.
    by_layer = torch.stack([squared[of].sum(0) for of in profile._columns()])  # (L, D)
    by_pair = torch.stack([by_layer[:, of].sum(1) for of in profile._columns()], dim=1)  # (L, L)
    norms = by_pair.diagonal().sqrt()
    return _ratio(by_pair, norms[:, None] * norms)


def _rbf_cka_table(profile: LayerProfile, rows: Tensor) -> Tensor:
    """Inner products of all centered Gram matrices, a band of rows at a time: L Grams are never held at once."""
    features = profile._kept("rbf_cka")[rows]
    kernels = [_RbfKernel(_centered(_double(features[:, of]))) for of in profile._columns()]
    products = torch.zeros(len(kernels), len(kernels), dtype=torch.float64)
    for start in range(0, len(rows), BAND_ROWS):
        band = torch.stack([kernel.centered_rows(slice(start, start + BAND_ROWS)).flatten() for kernel in kernels])
        products.addmm_(band, band.T)  # (L, BAND_ROWS N) times its transpose
    norms = products.diagonal().sqrt()
    return _ratio(products, norms[:, None] * norms)


def _depth_table(profile: LayerProfile, rows: Tensor) -> Tensor:
    depth = torch.arange(len(profile.layers), dtype=torch.float64)
    return 1 - (depth[:, None] - depth).abs() / max(len(depth) - 1, 1)


METRICS: dict[str, Callable[[LayerProfile, Tensor], Tensor]] = {
    "r2_cca": _r2_cca_table,  # mean squared canonical correlation
    "r2_cca_uncentered": _r2_cca_uncentered_table,  # the same without subtracting the means, as the public code has it
    "linear_cka": _linear_cka_table,  # alignment of linear kernels
    "rbf_cka": _rbf_cka_table,  # alignment of Gaussian kernels, median bandwidth
    "depth": _depth_table,  # no data at all, 1 - |i - j| / (L - 1): the control
}
