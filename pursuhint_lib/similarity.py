"""How alike two representations of the same images are.

Each function is a definition: two matrices in, one number out, 1 for equal and 0 for unrelated. `profiling` gives the
same numbers for all pairs of layers of a network at once.

| function | what may differ without being noticed |
|---|---|
| `linear_cka` | rotation, scale |
| `rbf_cka` | rotation, scale |
| `procrustes` | rotation, scale |
| `svcca` | rotation, scale, and what little variance the least directions hold |
| `pwcca` | scale |
| `r2_cca` | any invertible linear map |

A constant added to the features changes nothing in any of them. A channel that does not vary (dead) counts as absent.
Where one side is constant altogether the answer is 0: nothing resembles silence.

With D features and N images, the canonical correlations (`svcca`, `pwcca`, `r2_cca`) need N much larger than D: from
N <= D images they are 1 whatever the images show. The other three are defined and meaningful there.

Letters: N images, D features, r rank. Source of most: Kornblith et al. 2019 (arXiv 1905.00414).
"""

import torch
from torch import Tensor

from pursuhint_lib.rbf import centered_kernel_products

# A channel whose spread is below one float32 rounding of its mean holds no signal: it counts as constant (dead).
CONSTANT_CHANNEL = 1e-7
# Directions of the standardized features with a singular value below this share of the largest are rounding, not
# signal: ten times what float32 features leave behind, and its square is far above the rounding of a float64 scatter.
RANK_TOLERANCE = 1e-5


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> Tensor:
    """Linear centered kernel alignment (CKA) of two representations of the same N images.

    Both are centered here, so a constant added to either changes nothing; rotating or scaling either changes nothing.

    x: (N, Dx), y: (N, Dy). Rows must be the same images in the same order.
    debiased: with few images, unrelated features look alike (about sqrt(Dx Dy) / N). The unbiased estimator of Song et
        al. 2012 (JMLR 13, eq. 5) in all three places, as Nguyen et al. 2021 (arXiv 2010.15327, eq. 3) use it, is 0 for
        them on average. A negative estimate is reported as 0. Needs four images.
    Returns a float64 scalar in [0, 1]; 1 means equal up to rotation and scale. Where x or y is constant it is 0.
    Raises ValueError for other shapes, fewer than two rows (four for the debiased form), or values that are not finite.
    Kornblith et al. 2019 (arXiv 1905.00414), feature-space form: ||y'x||_F^2 / (||x'x||_F ||y'y||_F).
    """
    x, y = (_centered(z) for z in _checked(x, y, fewest=4 if debiased else 2))
    products = [(a.T @ b).square().sum() for a, b in ((x, y), (x, x), (y, y))]
    if debiased:
        norms = [z.square().sum(1) for z in (x, y)]  # (N,) each: the diagonals of the kernel matrices
        pairs = ((norms[0], norms[1]), (norms[0], norms[0]), (norms[1], norms[1]))
        products = [without_bias(product, a @ b, a.sum() * b.sum(), len(x)) for product, (a, b) in zip(products, pairs)]
    shared, of_x, of_y = products
    return ratio(shared, of_x.clamp(min=0).sqrt() * of_y.clamp(min=0).sqrt())


def without_bias(product: Tensor, diagonals: Tensor, traces: Tensor, n_images: int) -> Tensor:
    """HSIC without bias, times N (N - 3), of two centered linear kernels; elementwise.

    Song et al. 2012 (JMLR 13, eq. 5) for K = xx' and L = yy'. As x and y are centered, K1 = 0, and what the formula
    asks of K and L without their diagonals comes down to product = ||y'x||_F^2 = tr(KL), diagonals = sum_n K_nn L_nn
    and traces = tr(K) tr(L). What is only rounding of `product` is 0: of a layer that a single image activates, nothing
    else would be left.
    """
    unbiased = product - diagonals * n_images / (n_images - 2) + traces / ((n_images - 1) * (n_images - 2))
    return torch.where(unbiased.abs() > 1e-12 * product, unbiased, 0)


def rbf_cka(x: Tensor, y: Tensor, *, bandwidth: float = 1.0) -> Tensor:
    """CKA with a Gaussian kernel, k(a, b) = exp(-||a - b||^2 / (2 t^2 m)), of two representations of the same N images.

    m is the median of the full N x N matrix of squared distances, its zero diagonal included, and t is `bandwidth`.
    Where more than half of all pairs coincide (a layer that is silent for most images) m would be 0; the mean squared
    distance stands in for it. Adding a constant, rotating and scaling change nothing.

    x: (N, Dx), y: (N, Dy). Rows must be the same images in the same order. Memory: tiles of the kernel matrices only.
    Returns a float64 scalar in [0, 1]. Where x or y is constant the answer is 0.
    Raises ValueError as `linear_cka` does, and for a bandwidth that is not positive.
    Kornblith et al. 2019 (arXiv 1905.00414), eq. 4 with the biased HSIC of eq. 3: <HKH, HLH> / (||HKH||_F ||HLH||_F).
    """
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}: it must be positive")
    products = centered_kernel_products([_centered(z) for z in _checked(x, y)], bandwidth)
    return ratio(products[0, 1], products[0, 0].sqrt() * products[1, 1].sqrt())


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """How well one representation lies on the other after the best rotation and scaling.

    With x and y centered and scaled to unit norm, the least squared distance ||x R - y||_F^2 over orthogonal R is
    2 - 2 ||y'x||_*, so this is 1 - distance / 2 = ||y'x||_* / (||x||_F ||y||_F), with the nuclear norm (sum of singular
    values). Unlike CKA, which squares them, it hears the weak directions too.

    x: (N, Dx), y: (N, Dy). Rows must be the same images in the same order; Dx and Dy may differ (the narrower side is
    filled up with zeros, which changes nothing). Cost: a singular value decomposition of (Dy, Dx).
    Returns a float64 scalar in [0, 1]. Where x or y is constant the answer is 0. Raises ValueError as `linear_cka`.
    Williams et al. 2021 (arXiv 2110.14739), sec. 2; Ding et al. 2021 (arXiv 2108.01661), sec. 2.3.
    """
    x, y = (_centered(z) for z in _checked(x, y))
    return ratio(torch.linalg.svdvals(y.T @ x).sum(), x.norm() * y.norm())


def r2_cca(x: Tensor, y: Tensor, *, centered: bool = True) -> Tensor:
    """Mean squared canonical correlation (R^2_CCA) of two representations of the same N images.

    With orthonormal bases Q_x (N, r_x) and Q_y (N, r_y) of the column spaces: ||Q_y'Q_x||_F^2 / min(r_x, r_y). Any
    invertible linear map of either side, and a constant added to either, change nothing (as long as no direction
    becomes so faint beside the others that it counts as rounding, see below: a map of condition 1e4 is safe).

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
    x, y = _checked(x, y)
    q_x, q_y = (_orthonormal_basis(_centered(z) if centered else z) for z in (x, y))
    rank = torch.tensor(min(q_x.shape[1], q_y.shape[1]), dtype=torch.float64, device=q_x.device)
    return ratio((q_y.T @ q_x).square().sum(), rank)


def svcca(x: Tensor, y: Tensor, *, variance: float = 0.99) -> Tensor:
    """Mean canonical correlation between the principal directions of two representations of the same N images.

    Of each side the fewest principal directions are kept that hold `variance` of the total variance (squared singular
    values), and the mean over min(kept_x, kept_y) canonical correlations is taken. The cut removes directions that are
    mostly noise, which `r2_cca` counts in full. Rotation, scale and a constant added change nothing.

    x: (N, Dx), y: (N, Dy). Rows must be the same images in the same order.
    Returns a float64 scalar in [0, 1]. Where x or y is constant the answer is 0.
    Raises ValueError as `linear_cka`, and for a share of variance outside (0, 1].
    Raghu et al. 2017 (arXiv 1706.05806), sec. 2.
    """
    if not 0 < variance <= 1:
        raise ValueError(f"variance is {variance}: it must be above 0 and at most 1")
    bases = []
    for z in _checked(x, y):
        u, singular, _ = torch.linalg.svd(_centered(z), full_matrices=False)
        bases.append(u[:, : principal_directions(singular.square(), variance)])
    return mean_correlation(bases[0].T @ bases[1])


def principal_directions(variances: Tensor, share: float) -> int:
    """How many of these variances, largest first, it takes to hold `share` of their sum; with all that equal the last
    of them, and none that are only rounding.
    """
    total = variances.sum()
    if not total > 0:
        return 0
    enough = min(int((variances.cumsum(0) < share * total).sum()) + 1, len(variances))
    enough = int((variances >= variances[enough - 1] * (1 - 1e-9)).sum())  # of equal ones all, not any one
    return min(enough, int((variances > RANK_TOLERANCE**2 * variances[0]).sum()))


def mean_correlation(shared: Tensor) -> Tensor:
    """Mean of the canonical correlations, given Q_x'Q_y (r_x, r_y); 0 where either side is empty."""
    if 0 in shared.shape:
        return shared.new_zeros(())
    return torch.linalg.svdvals(shared).mean().clamp(0, 1)


def pwcca(x: Tensor, y: Tensor) -> Tensor:
    """Canonical correlations of two representations of the same N images, weighted by what they account for.

    Canonical correlation i, with unit variate h_i (N,), has weight sum_j |<h_i, x_j>| over the centered neurons x_j:
    directions that the neurons of x do not use count little. The weighting by x and that by y differ; this is the mean
    of the two, so that the order of the arguments does not matter. Scaling and a constant added change nothing;
    rotating does, because neurons are then others. Where several canonical correlations are equal (one side is a copy
    of channels of the other, say), the definition leaves their variates, and so their weights, open.

    x: (N, Dx), y: (N, Dy). Rows must be the same images in the same order.
    Returns a float64 scalar in [0, 1]. Where x or y is constant the answer is 0. Raises ValueError as `linear_cka`.
    Morcos et al. 2018 (arXiv 1806.05759), sec. 2.2 (eq. 2).
    """
    x, y = (_centered(z) for z in _checked(x, y))
    q_x, q_y = _orthonormal_basis(x), _orthonormal_basis(y)
    return weighted_correlation(q_x.T @ q_y, q_x.T @ x, q_y.T @ y)


def weighted_correlation(shared: Tensor, x_in_basis: Tensor, y_in_basis: Tensor) -> Tensor:
    """`pwcca`, given Q_x'Q_y (r_x, r_y), Q_x'x (r_x, Dx) and Q_y'y (r_y, Dy); 0 where either side is empty."""
    if 0 in shared.shape:
        return shared.new_zeros(())
    u, correlations, v = torch.linalg.svd(shared, full_matrices=False)  # (r_x, m), (m,), (m, r_y)
    correlations = correlations.clamp(0, 1)
    weights = ((u.T @ x_in_basis).abs().sum(1), (v @ y_in_basis).abs().sum(1))  # (m,) each
    return sum((w * correlations).sum() / w.sum() for w in weights) / 2


# ---- Shared with `profiling`, which knows moments only ----


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator in [0, 1], and 0 where the denominator is 0; elementwise."""
    safe = torch.where(denominator > 0, denominator, 1)
    return torch.where(denominator > 0, numerator / safe, 0).clamp(0, 1)


def double(x: Tensor) -> Tensor:
    """float64, on the same device where that device can hold it."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def varies(spread: Tensor, mean: Tensor) -> Tensor:
    """Which channels are not dead: (D,) standard deviations and means -> (D,) bool."""
    return spread > CONSTANT_CHANNEL * mean.abs()


def _checked(x: Tensor, y: Tensor, fewest: int = 2) -> tuple[Tensor, Tensor]:
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: both must be (images, features)")
    if len(x) != len(y) or len(x) < fewest:
        many = {2: "two", 4: "four"}[fewest]
        raise ValueError(f"x has {len(x)} rows and y {len(y)}: both must hold the same images, {many} or more")
    for name, z in (("x", x), ("y", y)):
        if z.is_complex():
            raise ValueError(f"{name} is complex: features are real numbers")
        if not z.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    return double(x), double(y)


def _centered(x: Tensor) -> Tensor:
    """Subtract the mean of each column; constant columns become exactly 0."""
    mean = x.mean(0)
    x = x - mean
    return x * varies(x.square().mean(0).sqrt(), mean)


def _orthonormal_basis(x: Tensor) -> Tensor:
    """(N, D) -> (N, r): orthonormal columns that span the columns of x."""
    # Correlations do not depend on the scale of a channel; equal scales make the rank cut-off fair to quiet ones.
    scale = x.square().mean(0).sqrt()
    u, singular, _ = torch.linalg.svd(x / torch.where(scale > 0, scale, 1), full_matrices=False)
    return u[:, singular > RANK_TOLERANCE * singular[:1]]
