"""Features of the first and last step for the report: t-SNE points, and a similarity that needs no common width.

``z_s`` are the student's own question states; ``z_l`` the teacher's question states and ``r_s``, ``r_l`` what the
Recalibrator makes of student's and teacher's questions, all three in the teacher's space. Distances between
the two spaces mean nothing, whatever their widths: each space gets its own embedding.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file

from teacher_cache.errors import DataError

SPACES = {"student": ("z_s",), "teacher": ("z_l", "r_s", "r_l")}
PAIRS = (("z_s", "z_l"), ("z_s", "r_s"), ("r_s", "z_l"), ("r_s", "r_l"))
MAX_SAMPLES = 256
SEED = 0

Features = Mapping[str, Float[np.ndarray, "samples width"]]


def read_features(path: Path) -> Features:
    """Read the sets of one step, their first MAX_SAMPLES samples, in float64.

    Raises:
        DataError: The sets do not hold the same number of samples.
    """
    features = {name: values[:MAX_SAMPLES].astype(np.float64) for name, values in load_file(path).items()}
    if len({len(values) for values in features.values()}) > 1:
        sizes = {name: len(values) for name, values in features.items()}
        raise DataError(f"{path} holds sets of different numbers of samples: {sizes}")
    return features


def embed(features: Features) -> dict[str, dict[str, Float[np.ndarray, "samples 2"]]]:
    """Return t-SNE points by space and set; the sets of one space are embedded together.

    A space with fewer than four vectors is left out.
    """
    spaces = {space: [name for name in names if name in features] for space, names in SPACES.items()}
    embedded = {}
    for space, names in spaces.items():
        if sum(len(features[name]) for name in names) < 4:
            continue
        points = tsne(standardize(np.concatenate([features[name] for name in names])))
        embedded[space] = dict(zip(names, np.split(points, len(names)), strict=True))
    return embedded


def standardize(values: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "rows width"]:
    """Return columns of mean 0 and variance 1 over all rows; constant columns become 0."""
    centred = values - values.mean(axis=0)
    scale = centred.std(axis=0)
    return centred / np.where(scale > 0, scale, 1.0)


def tsne(values: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "rows 2"]:
    """Return a t-SNE embedding with a fixed seed, started from the principal components."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    width = min(50, *values.shape)
    reduced = PCA(n_components=width, svd_solver="full").fit_transform(values)
    perplexity = min(30.0, (len(values) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=SEED, n_jobs=1).fit_transform(reduced)


def similarities(features: Features) -> dict[tuple[str, str], float]:
    """Return the CKA of each pair of sets at hand."""
    return {pair: unbiased_cka(features[pair[0]], features[pair[1]]) for pair in PAIRS if {*pair} <= features.keys()}


def unbiased_cka(left: Float[np.ndarray, "samples left"], right: Float[np.ndarray, "samples right"]) -> float:
    """Return the linear centred kernel alignment of two views of the same samples, debiased.

    1 when the samples lie alike up to rotation and scale, about 0 when unrelated, whatever the widths
    (Kornblith et al. 2019, with the unbiased HSIC of Song et al. 2012); nan below four samples.
    """
    if len(left) < 4:
        return float("nan")
    cross, own_left, own_right = _hsic(left, right), _hsic(left, left), _hsic(right, right)
    return float(cross / np.sqrt(own_left * own_right)) if own_left > 0 and own_right > 0 else float("nan")


def _hsic(left: Float[np.ndarray, "samples left"], right: Float[np.ndarray, "samples right"]) -> float:
    grams = [values @ values.T for values in (left - left.mean(axis=0), right - right.mean(axis=0))]
    for gram in grams:
        np.fill_diagonal(gram, 0.0)
    first, second = grams
    count = len(first)
    total = (first * second).sum()
    total += first.sum() * second.sum() / ((count - 1) * (count - 2))
    total -= 2 * (first.sum(axis=0) @ second.sum(axis=0)) / (count - 2)
    return float(total / (count * (count - 3)))
