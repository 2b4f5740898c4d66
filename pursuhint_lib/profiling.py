"""How alike all layers of a network are, from one look at the images.

`profile_layers` sends images once through a frozen teacher and keeps the joint second moments of all its layers' pooled
features; `LayerProfile.similarity` turns them into a labelled table under any metric of `METRICS`, with the numbers
that the pairwise functions of `similarity` give.
Letters: N images, B batch, C channels, H W space, T tokens, D features of all layers side by side, L layers.
"""

import difflib
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pursuhint_lib.moments import Moments
from pursuhint_lib.rbf import centered_kernel_products
from pursuhint_lib.reading import images_of, in_one_line
from pursuhint_lib.similarity import (
    RANK_TOLERANCE,
    double,
    mean_correlation,
    principal_directions,
    ratio,
    varies,
    weighted_correlation,
    without_bias,
)

# Rows per update of the moments: enough to make the (D, D) product cheap, and fixed so that batch size does not matter.
CHUNK_ROWS = 1024
# Of so many images the pooled features are kept: 80 MB for the 2016 channels of a ResNet-110.
KEPT_IMAGES = 10_000


def pool_features(features: Tensor, grid: int = 1) -> Tensor:
    """One vector per image: the mean over positions, in float32 or better whatever precision the network ran in.

    features: (B, C, H, W) -> (B, C); (B, T, D) -> (B, D), mean over tokens; (B, D) -> (B, D). Else ValueError.
    grid: with s > 1 the mean over each cell of an s x s grid instead, (B, C s s), which keeps where a channel fires; a
        map with fewer rows or columns than s keeps all it has. Tokens are a square map, row by row, after one leading
        class token if there is one, which is left out; ValueError for other numbers of tokens.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    if grid < 1:
        raise ValueError(f"grid is {grid}: it must be 1 or more")
    if features.ndim == 4:
        if grid == 1:
            return features.mean((2, 3), dtype=dtype)
        cells = [min(grid, side) for side in features.shape[2:]]
        return nn.functional.adaptive_avg_pool2d(features.to(dtype), cells).flatten(1)
    if features.ndim == 3:
        if grid == 1:
            return features.mean(1, dtype=dtype)
        return pool_features(_tokens_as_map(features), grid)
    if features.ndim == 2:
        return features.to(dtype)
    raise ValueError(f"features have shape {tuple(features.shape)}: they must be (B, C, H, W), (B, T, D) or (B, D)")


def _tokens_as_map(features: Tensor) -> Tensor:
    """(B, T, D) -> (B, D, side, side)."""
    tokens = features.shape[1]
    for class_tokens in (0, 1):
        side = math.isqrt(tokens - class_tokens)
        if side * side == tokens - class_tokens:
            return features[:, class_tokens:].transpose(1, 2).unflatten(2, (side, side))
    raise ValueError(f"{tokens} tokens are no square map: a grid needs s x s tokens, or one class token more")


def profile_layers(
    teacher: Any,
    batches: Iterable[Any],
    *,
    grid: int = 1,
    keep_images: int = KEPT_IMAGES,
    chunks: int = 0,
    seed: int = 0,
) -> "LayerProfile":
    """Look at every image once through a frozen teacher and keep what the similarities of its layers need.

    Memory does not depend on N. The joint moments take D x D float64 (33 MB for the 2016 channels of a ResNet-110, 1.8
    GB for the 15 104 of a ResNet-50's blocks). Beside them:

    keep_images: pooled features of at most so many images are kept (float32, on the CPU): all, or a uniform sample
        drawn by `seed`. "rbf_cka" and `pooled` look at these, `subset` and `resample` need them all. 0 keeps none.
    chunks: the images are dealt at random to so many chunks, and the moments of each are kept (each D x D float64), so
        that `resample` works for any N. Needless when all features are kept, and up to N = 2 D chunks the features are
        the smaller.
    grid: see `pool_features`.

    teacher: a `FrozenTeacher`, or anything with `layers`, names in execution order, and `observe(images, reduce=f)`
        that returns an object whose `features` is a dict layer -> f(feature).
    batches: a DataLoader, or any iterable of batches in one of the forms that `reading.images_of` knows.
    Raises TypeError for a bare model, or a batch of another form; ValueError for images that the teacher cannot take,
    for fewer than two, naming the layer whose features are not finite or change in number, or where the moments would
    not fit into this machine's memory.
    """
    if not hasattr(teacher, "observe"):
        raise TypeError(
            f"teacher is a {type(teacher).__name__}, which cannot observe: "
            "pass FrozenTeacher(model, candidate_layers(model))"
        )
    if not teacher.layers:
        raise ValueError("the teacher captures no layers: name at least one when making it")
    for name, value in (("keep_images", keep_images), ("chunks", chunks)):
        if value < 0:
            raise ValueError(f"{name} is {value}: it must be 0 or more")
    layers: list[str] = []
    widths: list[int] = []

    def pooled_batches() -> Iterator[Tensor]:
        for batch in batches:
            images = images_of(batch)
            with in_one_line("the teacher", images):
                # Pooled while the map is warm, and the map let go: all maps together would not fit into any cache.
                features = teacher.observe(images, reduce=functools.partial(pool_features, grid=grid)).features
            if not layers:
                layers[:] = features  # in execution order, in whatever order they were named
                widths[:] = [rows.shape[1] for rows in features.values()]
                _check_memory(widths, chunks)
            pooled = [features[layer] for layer in layers]
            for layer, rows, width in zip(layers, pooled, widths):
                if rows.shape[1] != width:
                    raise ValueError(
                        f"layer {layer!r} gives {rows.shape[1]} features and gave {width} in earlier batches"
                    )
            yield torch.cat(pooled, dim=1)  # (B, D)

    total: Moments | None = None
    parts: list[Moments] = []
    kept = _Sample(keep_images, seed)
    seen = 0
    for chunk in _rechunked(pooled_batches(), CHUNK_ROWS):
        rows = double(chunk)
        if total is None:
            total = Moments(widths)
            parts = [Moments(widths, rows.mean(0)) for _ in range(chunks)]
        part_of = _part_of(np.arange(seen, seen + len(rows)), chunks) if parts else None
        for number, part in enumerate(parts):
            own = rows[torch.from_numpy(part_of == number).to(rows.device)]
            if len(own):
                part.add(own)
        total.add(rows)
        kept.add(chunk)
        seen += len(rows)
    if seen < 2:
        raise ValueError(f"batches gave {seen} images: a profile needs two or more")
    features, images = kept.finish()
    return LayerProfile(layers, total.to("cpu"), features, images, [part.to("cpu") for part in parts if part.n])


def _part_of(images: np.ndarray, parts: int) -> np.ndarray:
    """Which of the chunks each image (by its number) is dealt to: known from the number alone, and as good as random,
    so that no chunk holds a class, or a day, of its own. The mixing of splitmix64 (Steele et al. 2014).
    """
    mixed = (images.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as it should
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(parts)).astype(np.int64)


def _check_memory(widths: Sequence[int], chunks: int) -> None:
    needed = 8 * (sum(widths) + len(widths)) ** 2 * (1 + chunks)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if needed > there:
        raise ValueError(
            f"the joint moments of {sum(widths)} features take {needed / 2**30:.0f} GB and this machine has "
            f"{there / 2**30:.0f}: profile fewer layers, with a coarser grid or fewer chunks"
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


class _Sample:
    """A uniform sample of `size` rows out of a stream of unknown length (Vitter 1985, algorithm R); all, if fewer."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seen = 0
        self.generator = np.random.default_rng(seed)
        self.rows: Tensor | None = None
        self.images = np.zeros(size, dtype=np.int64)  # which row of the stream each kept row is

    def add(self, rows: Tensor) -> None:
        if self.size == 0:
            return
        if self.rows is None:  # memory is taken only as rows are written
            self.rows = torch.empty(self.size, rows.shape[1], dtype=rows.dtype)
        arrived = np.arange(self.seen, self.seen + len(rows))
        # The t-th row, from 0, takes its own place while there is room; then a random one of t + 1, if it exists.
        places = np.where(arrived < self.size, arrived, self.generator.integers(0, arrived + 1))
        last = dict(zip(places.tolist(), range(len(rows))))  # of two rows for one place the later stays
        last = {place: row for place, row in last.items() if place < self.size}
        places, chosen = (np.fromiter(part, np.int64, len(last)) for part in (last.keys(), last.values()))
        self.rows[torch.from_numpy(places)] = rows.cpu()[torch.from_numpy(chosen)]
        self.images[places] = arrived[chosen]
        self.seen += len(rows)

    def finish(self) -> tuple[Tensor | None, np.ndarray]:
        """The sample in the order seen, and the numbers of its images."""
        if self.rows is None:
            return None, np.zeros(0, dtype=np.int64)
        if self.seen <= self.size:
            rows = self.rows[: self.seen]
            return rows.clone() if self.seen < self.size // 2 else rows, self.images[: self.seen]
        order = self.images.argsort()
        for columns in self.rows.split(64, dim=1):  # a few at a time: no second copy of all
            columns.copy_(columns[torch.from_numpy(order)])
        return self.rows, self.images[order]


@dataclass(frozen=True, eq=False, repr=False)
class LayerProfile:
    """What N images look like in each of L layers: made by `profile_layers` or `LayerProfile.from_features`.

    layers: L names in execution order. moments: of the pooled features of all layers side by side.
    features: (kept, D) pooled features of the images numbered `images` (kept,), in the order seen; or None.
    parts: moments of chunks of the images, together all of them; or none.
    """

    layers: Sequence[str]
    moments: Moments
    features: Tensor | None = None
    images: np.ndarray | None = None
    parts: Sequence[Moments] = ()

    def __post_init__(self) -> None:
        finite = self.moments.scatter.diagonal().isfinite()
        for layer, of in zip(self.layers, self.moments.columns()):
            if not finite[of].all():
                raise ValueError(f"layer {layer!r} gives features that are not finite")

    def __repr__(self) -> str:
        kept = f", features of {len(self.features)} kept" if self.features is not None else ""
        parts = f", {len(self.parts)} chunks" if self.parts else ""
        return (
            f"LayerProfile({len(self.layers)} layers, {self.n_images} images, {sum(self.widths)} features{kept}{parts})"
        )

    @property
    def n_images(self) -> int:
        """N."""
        return self.moments.n

    @property
    def widths(self) -> list[int]:
        """Features of each layer; they sum to D."""
        return self.moments.widths

    @classmethod
    def from_features(cls, features: Mapping[str, Tensor | np.ndarray], grid: int = 1) -> "LayerProfile":
        """A profile of features that are already there: layer -> (N, C, H, W), (N, T, D) or (N, D), the same images."""
        pooled = [pool_features(torch.as_tensor(rows), grid).cpu() for rows in features.values()]
        rows = {layer: len(z) for layer, z in zip(features, pooled)}
        if len(set(rows.values())) != 1 or min(rows.values()) < 2:
            raise ValueError(f"layers hold these numbers of images: {rows}: all must hold the same, two or more")
        widths = [z.shape[1] for z in pooled]
        return cls._of_rows(list(features), widths, torch.cat(pooled, dim=1), np.arange(len(pooled[0])))

    @classmethod
    def _of_rows(cls, layers: Sequence[str], widths: Sequence[int], rows: Tensor, images: np.ndarray) -> "LayerProfile":
        moments = Moments(widths)
        for chunk in rows.split(CHUNK_ROWS):
            moments.add(double(chunk))
        return cls(layers, moments, rows, images)

    def to(self, device: torch.device | str) -> "LayerProfile":
        """The same profile with its tensors on another device, where `similarity` then computes."""
        features = self.features.to(device) if self.features is not None else None
        parts = [part.to(device) for part in self.parts]
        return LayerProfile(self.layers, self.moments.to(device), features, self.images, parts)

    def kept(self, purpose: str) -> Tensor:
        """(kept, D) pooled features. Raises ValueError, naming `purpose`, where there are none."""
        if self.features is None:
            raise ValueError(f"{purpose} needs pooled features: call profile_layers with keep_images above 0")
        return self.features

    def pooled(self, layer: str) -> Tensor:
        """(kept, D_l): the pooled features of one layer, a row per kept image in the order seen."""
        if layer not in self.layers:
            raise ValueError(_unknown("layer", layer, self.layers))
        return self.kept("pooled")[:, self.moments.columns()[list(self.layers).index(layer)]]

    def subset(self, rows: Tensor | Sequence[int]) -> "LayerProfile":
        """The profile of some of the kept images: row numbers of `features`, or a boolean mask. Raises ValueError for
        fewer than two.
        """
        there = torch.arange(len(self.kept("subset")))
        try:
            chosen = there[torch.as_tensor(rows, dtype=None if len(rows) else torch.int64)]
        except IndexError:
            raise ValueError(f"subset asks for rows that are not among the {len(there)} kept images") from None
        if len(chosen) < 2:
            raise ValueError(f"subset leaves {len(chosen)} images: a profile needs two or more")
        return self._of_rows(self.layers, self.widths, self.features[chosen], self.images[chosen.numpy()])

    def resample(self, generator: torch.Generator, fraction: float = 0.5) -> "LayerProfile":
        """The profile of a random share of the images, drawn without replacement and kept in order; of whole chunks,
        where chunks were kept and the features of all images were not.

        Without replacement, because repeated images would look like agreement between layers.
        Raises ValueError for an impossible fraction, or where neither all features nor two chunks were kept.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction}: it must be above 0 and at most 1")
        if self.features is not None and len(self.features) == self.n_images:
            return self.subset(_random_numbers(self.n_images, round(fraction * self.n_images), generator))
        if len(self.parts) < 2:
            kept = len(self.features) if self.features is not None else 0
            raise ValueError(
                f"resample needs the features of all {self.n_images} images ({kept} were kept) or two chunks of them "
                f"({len(self.parts)} were): call profile_layers with keep_images={self.n_images}, or with chunks=16"
            )
        numbers = _random_numbers(len(self.parts), max(1, round(fraction * len(self.parts))), generator)
        moments = Moments(self.widths)
        for number in numbers:
            moments.merge(self.parts[number])
        if self.features is None:
            return LayerProfile(self.layers, moments)
        drawn = np.isin(_part_of(self.images, len(self.parts)), numbers.numpy())
        return LayerProfile(self.layers, moments, self.features[torch.from_numpy(drawn)], self.images[drawn])

    def similarity(self, metric: str) -> pd.DataFrame:
        """How alike every two layers are: a symmetric (L, L) table in [0, 1] with unit diagonal, labelled by layer.

        metric: one of `METRICS`. Off the diagonal the numbers are those of the pairwise function of the same name, up
            to rounding: relative 1e-8 and better for features whose channels, once standardized, are not closer to
            dependent than one part in a thousand.
            "rbf_cka" looks at the images whose features were kept, the others at all.
        Raises ValueError for an unknown metric, naming the nearest, or where the metric needs features not kept.
        """
        if metric not in METRICS:
            raise ValueError(_unknown("metric", metric, METRICS))
        table = METRICS[metric](self).cpu()
        table = ((table + table.T) / 2).fill_diagonal_(1)
        return pd.DataFrame(table.numpy(), index=list(self.layers), columns=list(self.layers))


def cross_similarity(teacher: LayerProfile, student: LayerProfile) -> pd.DataFrame:
    """Linear CKA of every teacher layer with every student layer, on the same images in the same order.

    Returns a labelled (teacher layers, student layers) table in [0, 1]. Raises ValueError when the images differ in
    number.
    """
    pooled = [(profile, double(profile.kept("cross_similarity"))) for profile in (teacher, student)]
    if teacher.n_images != student.n_images or not np.array_equal(teacher.images, student.images):
        raise ValueError(
            f"the profiles are of {teacher.n_images} and {student.n_images} images: they must be of the same"
        )
    t, s = ((z - z.mean(0)) * varies(z.std(0, correction=0), z.mean(0)) for _, z in pooled)
    shared = _block_sums((t.T @ s).square(), teacher.moments.columns(), student.moments.columns())
    norms = [
        torch.stack([(z[:, of].T @ z[:, of]).norm() for of in profile.moments.columns()])
        for z, (profile, _) in zip((t, s), pooled)
    ]
    values = ratio(shared, torch.outer(*norms))
    return pd.DataFrame(values.numpy(), index=list(teacher.layers), columns=list(student.layers))


def _random_numbers(n: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` of the numbers below n, ascending, without replacement; all if there are no more."""
    return torch.randperm(n, generator=generator)[:size].sort().values


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, 1, cutoff=0)
    return f"{what} {name!r} is unknown: did you mean {nearest[0]!r}? Known: {', '.join(known)}"


# ---- Metrics on a profile -> (L, L) ----


def _live_scatter(profile: LayerProfile) -> Tensor:
    """(D, D), exactly 0 in the rows and columns of dead channels."""
    moments = profile.moments
    live = varies((moments.scatter.diagonal() / moments.n).sqrt(), moments.mean)
    return moments.scatter if live.all() else moments.scatter * live[:, None] * live


def _block_sums(table: Tensor, rows: Sequence[slice], columns: Sequence[slice]) -> Tensor:
    """Sums over the blocks of a table: over the rows, then over the columns, that belong to each layer."""
    by_row = torch.stack([table[of].sum(0) for of in rows])
    return torch.stack([by_row[:, of].sum(1) for of in columns], dim=1)


def _by_diagonal(products: Tensor) -> Tensor:
    """Inner products (L, L) as cosines."""
    norms = products.diagonal().clamp(min=0).sqrt()
    return ratio(products, torch.outer(norms, norms))


def _linear_cka_products(profile: LayerProfile) -> Tensor:
    """||S_ij||_F^2 of all blocks of the scatter."""
    columns = profile.moments.columns()
    return _block_sums(_live_scatter(profile).square(), columns, columns)


def _linear_cka_table(profile: LayerProfile) -> Tensor:
    return _by_diagonal(_linear_cka_products(profile))


def _linear_cka_debiased_table(profile: LayerProfile) -> Tensor:
    # A dead channel counts in the squared norms, whose sum was kept: nothing in float32 features, whose dead channels
    # do not vary at all, but seen in float64 ones with a mean of 1e7 times their spread.
    if profile.n_images < 4:
        raise ValueError(f"linear_cka_debiased needs four images and the profile is of {profile.n_images}")
    scatter = _live_scatter(profile)
    traces = torch.stack([scatter.diagonal()[of].sum() for of in profile.moments.columns()])
    diagonals = profile.moments.norm_products()
    return _by_diagonal(
        without_bias(_linear_cka_products(profile), diagonals, torch.outer(traces, traces), profile.n_images)
    )


def _rbf_cka_table(profile: LayerProfile) -> Tensor:
    features = double(profile.kept("rbf_cka"))
    if len(features) < 2:
        raise ValueError("rbf_cka needs the features of two images or more and those of one were kept")
    mean = features.mean(0)
    features = features - mean
    features *= varies(features.square().mean(0).sqrt(), mean)
    return _by_diagonal(
        centered_kernel_products([features[:, of].contiguous() for of in profile.moments.columns()], 1.0)
    )


def _procrustes_table(profile: LayerProfile) -> Tensor:
    scatter, columns = _live_scatter(profile), profile.moments.columns()
    norms = torch.stack([scatter.diagonal()[of].sum() for of in columns]).sqrt()
    return ratio(_of_pairs(columns, lambda i, j: torch.linalg.svdvals(scatter[i, j]).sum()), torch.outer(norms, norms))


def _r2_cca_table(profile: LayerProfile) -> Tensor:
    return _r2_cca_of(profile, _live_scatter(profile))


def _r2_cca_uncentered_table(profile: LayerProfile) -> Tensor:
    mean = profile.moments.mean
    return _r2_cca_of(profile, torch.addr(profile.moments.scatter, mean, mean, alpha=profile.n_images))  # sum of x x'


def _r2_cca_of(profile: LayerProfile, scatter: Tensor) -> Tensor:
    """||W_i' S_ij W_j||_F^2 / min(r_i, r_j)."""
    bases = _standardized_bases(profile, scatter)
    shared = _in_bases(profile, scatter, bases, lambda block, i, j: block.square().sum())
    ranks = torch.tensor([w.shape[1] for w in bases], dtype=torch.float64, device=shared.device)
    return ratio(shared, torch.minimum(ranks[:, None], ranks))


def _svcca_table(profile: LayerProfile) -> Tensor:
    scatter, bases = _live_scatter(profile), []
    for of in profile.moments.columns():
        values, vectors = torch.linalg.eigh(scatter[of, of])
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        kept = principal_directions(values, 0.99)
        bases.append(vectors[:, :kept] * values[:kept].rsqrt())
    _warn_of_few_images("svcca", profile, max(w.shape[1] for w in bases))
    return _in_bases(profile, scatter, bases, lambda block, i, j: mean_correlation(block))


def _pwcca_table(profile: LayerProfile) -> Tensor:
    scatter = _live_scatter(profile)
    bases = _standardized_bases(profile, scatter)
    neurons = [w.T @ scatter[of, of] for w, of in zip(bases, profile.moments.columns())]  # Q'x: (r_i, D_i)
    return _in_bases(profile, scatter, bases, lambda block, i, j: weighted_correlation(block, neurons[i], neurons[j]))


def _standardized_bases(profile: LayerProfile, scatter: Tensor) -> list[Tensor]:
    """W_i (D_i, r_i) of every layer, such that W_i' S_ii W_i = I: X_i W_i is an orthonormal basis of layer i, so the
    metrics of `similarity` that begin with one can do without the N rows.
    """
    _warn_of_few_images("canonical correlation", profile, max(profile.widths))
    inverse = torch.where(scatter.diagonal() > 0, scatter.diagonal().rsqrt(), 0)  # standardizes; 0 for dead channels
    bases = []
    for of in profile.moments.columns():
        correlation = scatter[of, of] * inverse[of, None] * inverse[of]
        values, vectors = torch.linalg.eigh(correlation)  # squared singular values of the standardized features
        kept = values > RANK_TOLERANCE**2 * values[-1:]
        bases.append(inverse[of, None] * vectors[:, kept] * values[kept].rsqrt())
    return bases


def _warn_of_few_images(what: str, profile: LayerProfile, widest: int) -> None:
    if profile.n_images <= widest:
        text = (
            f"{what} from {profile.n_images} images for up to {widest} channels is 1 whatever they show: use many more"
        )
        warnings.warn(text, stacklevel=5)


def _in_bases(
    profile: LayerProfile, scatter: Tensor, bases: Sequence[Tensor], measure: Callable[[Tensor, int, int], Tensor]
) -> Tensor:
    """measure(Q_i'Q_j, i, j) of every two layers, Q_i'Q_j = W_i' S_ij W_j."""
    columns = profile.moments.columns()
    strips = [w.T @ scatter[of] for w, of in zip(bases, columns)]  # (r_i, D)
    numbers = range(len(columns))
    return _of_pairs(numbers, lambda i, j: measure(strips[i][:, columns[j]] @ bases[j], i, j))


def _of_pairs(things: Sequence[Any], measure: Callable[[Any, Any], Tensor]) -> Tensor:
    """measure(a, b) of every two things, the first of them the earlier; a symmetric table."""
    rows = [torch.stack([measure(a, b) for b in things[i:]]) for i, a in enumerate(things)]
    upper = torch.stack([torch.cat([row.new_zeros(i), row]) for i, row in enumerate(rows)])
    return upper + upper.triu(1).T


def _depth_table(profile: LayerProfile) -> Tensor:
    depth = torch.arange(len(profile.layers), dtype=torch.float64)
    return 1 - (depth[:, None] - depth).abs() / max(len(depth) - 1, 1)


METRICS: dict[str, Callable[[LayerProfile], Tensor]] = {
    "r2_cca": _r2_cca_table,  # mean squared canonical correlation
    "r2_cca_uncentered": _r2_cca_uncentered_table,  # the same without subtracting the means, as the public code has it
    "svcca": _svcca_table,  # mean canonical correlation of the directions that hold 99 % of the variance
    "pwcca": _pwcca_table,  # canonical correlations weighted by what they account for
    "linear_cka": _linear_cka_table,  # alignment of linear kernels
    "linear_cka_debiased": _linear_cka_debiased_table,  # the same, 0 on average for unrelated features of any N
    "rbf_cka": _rbf_cka_table,  # alignment of Gaussian kernels, median bandwidth
    "procrustes": _procrustes_table,  # what is left alike after the best rotation
    "depth": _depth_table,  # no data at all, 1 - |i - j| / (L - 1): the control
}
