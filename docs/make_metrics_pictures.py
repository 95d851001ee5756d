"""Draw the pictures of docs/metrics.md: our kernels on inputs whose answer is known.

    python docs/make_metrics_pictures.py            # all, about a minute
    python docs/make_metrics_pictures.py nmi cka    # some

Lines are what the kernels of `clvsmim.metrics` return, open circles closed forms. The
style is that of the report. The same machine draws the same bytes again.
"""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from clvsmim import metrics, plugin
from clvsmim.report import canvas, figures, images, style

GRID, PATCH, N = (14, 14), 16, 196
OUT = pathlib.Path(__file__).parent / "metrics"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B0568E", "#5A5A5A")
TWO = (6.8, 2.9)  # inches of two plots side by side


def main(names: Sequence[str]) -> None:
    OUT.mkdir(exist_ok=True)
    for name in names or PICTURES:
        (OUT / f"{name}.png").write_bytes(PICTURES[name]())
        print(OUT / f"{name}.png")


# Inputs


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def gaussian(sigma: float) -> np.ndarray:
    """Attention falling off with the distance in pixels: (N, N)."""
    far = metrics.grid_distances(GRID, PATCH).astype(float)
    near = np.exp(-np.square(far / sigma) / 2)
    return near / near.sum(axis=1, keepdims=True)


def mixed(share: float, attention: np.ndarray) -> np.ndarray:
    """A share of `attention`, the rest uniform."""
    return share * attention + (1 - share) / N


def looking_right() -> np.ndarray:
    """Every query attends the patch on its right, at the border itself."""
    return np.eye(N)[np.arange(N) + (np.arange(N) % GRID[1] != GRID[1] - 1)]


def over(kernel: Callable, *arrays: Sequence) -> np.ndarray:
    """The kernel on each of a list of inputs, in one compiled call."""
    stacked = (jnp.asarray(np.stack(x), jnp.float32) for x in arrays)
    return np.asarray(jax.jit(jax.vmap(kernel))(*stacked))


def distance(attention: jax.Array) -> jax.Array:
    return metrics.attention_distance(attention, grid=GRID, patch=PATCH, prefix=0)


def nmi(attention: jax.Array) -> jax.Array:
    return metrics.attention_nmi(attention, prefix=0)


def measured(name: str, features: Mapping, **facts) -> list[metrics.Series]:
    """All Series of a metric of a single part, of all images at once."""
    metric = plugin.load("metrics", name, **facts)
    return metric.compute(state_of(metric.to_state, metric, features))


def state_of(to_state: Callable, metric: metrics.Metric, features: Mapping):
    first = jax.tree.leaves(features)[0]
    rows = jax.jit(metric.update)(features, jnp.ones(len(first)))
    return to_state(jax.device_get(rows))


# Drawing


@contextlib.contextmanager
def plots(count: int, size: tuple[float, float]) -> Iterator[tuple[Figure, Sequence]]:
    """A figure of some plots in a row."""
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=size)
        yield figure, np.atleast_1d(figure.subplots(1, count))


def curve(ax: Axes, x, y, name: str, colour: int = 0, dash="-", marker="") -> None:
    ax.plot(x, y, label=name, color=COLOURS[colour], ls=dash, marker=marker)


def known(ax: Axes, x, y, name: str = "", colour: int = 0) -> None:
    """Closed forms, as open circles."""
    ax.plot(x, y, "o", ms=7, mfc="none", mec=COLOURS[colour], mew=1.3, label=name)


def level(ax: Axes, y: float, name: str, low: bool = False) -> None:
    """A dashed horizontal line with its name, below the line if `low`."""
    ax.axhline(y, color=canvas.GREY, lw=1, ls=(0, (4, 2)))
    ax.annotate(
        name,
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(-2, -3 if low else 2),
        textcoords="offset points",
        ha="right",
        va="top" if low else "bottom",
        fontsize=8,
        color=canvas.GREY,
    )


def above(where: Axes | Figure) -> None:
    """The legend over a plot, or over all plots of a figure."""
    if isinstance(where, Figure):
        handles, _ = where.axes[0].get_legend_handles_labels()
        where.legend(handles=handles, loc="outside upper left", ncols=2)
        return
    where.legend(
        loc="lower left", bbox_to_anchor=(0, 1.01), borderaxespad=0, fontsize=8
    )


def plain_log(side: Axis) -> None:
    """Powers of ten as text: the style writes no formulas."""
    side.set_major_formatter(lambda value, _: f"{value:g}")


def matrices(shown: Mapping[str, np.ndarray], size=(6.8, 2.1), **how) -> Figure:
    """Images in a row, each on its own scale."""
    with plots(len(shown), size) as (figure, axes):
        for ax, (title, values) in zip(axes, shown.items(), strict=True):
            ax.imshow(values, **how)
            ax.set_title(title, fontsize=8.5)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
    return figure


def sigma_axis(ax: Axes) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks([8, 16, 32, 64, 128, 256], [8, 16, 32, 64, 128, 256])
    ax.set_xlabel("width σ of the attention (px)")


# Attention


def draw_distance() -> bytes:
    sigmas = 2.0 ** np.linspace(2.5, 8.5, 40)
    with canvas.figure(canvas.WIDE) as (figure, ax):
        curve(ax, sigmas, over(distance, list(map(gaussian, sigmas))), "Gaussian")
        known(ax, [16, 32, 64, 128], [18.431, 36.680, 67.156, 98.604], "asserted")
        level(ax, 116.4922, "uniform: 116.49")
        level(ax, 14.8571, "right neighbour: 14.86")
        level(ax, 0, "itself: 0")
        sigma_axis(ax)
        ax.set(ylabel="attention distance (px)", ylim=(-5, 128))
        ax.legend(loc="center left")
    return canvas.to_png(figure)


def draw_nmi() -> bytes:
    sigmas, shares = 2.0 ** np.linspace(2.5, 8.5, 40), np.linspace(0, 1, 30)
    shuffled = np.eye(N)[np.random.default_rng(0).permutation(N)]
    families = {
        "Gaussian, σ grows": list(map(gaussian, sigmas)),
        "itself + uniform": [mixed(a, np.eye(N)) for a in shares],
        "permutation + uniform": [mixed(a, shuffled) for a in shares],
    }
    with plots(2, TWO) as (figure, (left, right)):
        curve(left, sigmas, over(nmi, families["Gaussian, σ grows"]), "NMI")
        known(left, [8, 16, 32, 64, 128], [0.76256, 0.49933, 0.27523, 0.09052, 0.01060])
        sigma_axis(left)
        left.set(ylabel="NMI", ylim=(-0.04, 1.04))
        for i, (name, maps) in enumerate(families.items()):
            curve(right, over(distance, maps), over(nmi, maps), name, i)
        one_key = np.eye(N)[np.full(N, 7 * 14 + 7)]
        for a, text in ((np.full((N, N), 1 / N), "uniform"), (one_key, "one key")):
            x, y = over(distance, [a])[0], over(nmi, [a])[0]
            known(right, x, y, colour=4)
            right.annotate(
                text, (x, y), (4, -6), textcoords="offset points", ha="right", va="top"
            )
        right.set(xlabel="attention distance (px)", ylabel="NMI", ylim=(-0.14, 1.04))
        above(right)
    return canvas.to_png(figure)


def draw_offsets() -> bytes:
    content = np.asarray(jax.nn.softmax(jnp.asarray(4 * noise(N, N)), axis=-1))
    maps = {
        "right neighbour": 0.7 * looking_right() + 0.3 * gaussian(64),
        "around itself": gaussian(24),
        "random keys": content,
        "uniform": np.full((N, N), 1 / N),
    }

    def kernel(a: jax.Array) -> jax.Array:
        return metrics.aligned_attention(a, grid=GRID, prefix=0)

    canvases = over(kernel, list(maps.values()))
    flags = metrics.offset_heads(canvases, grid=GRID)
    titles = [
        f"{name}\n{'an' if flag else 'no'} offset head"
        for name, flag in zip(maps, flags, strict=True)
    ]
    means = canvases / metrics.offset_visits(GRID)
    middle = [m[6:21, 6:21] for m in means]  # where most queries have a patch
    return canvas.to_png(matrices(dict(zip(titles, middle, strict=True)), vmin=0))


def draw_rollout() -> bytes:
    depths, tokens = np.arange(1, 13), 17
    uniform = jnp.full((1, tokens, tokens), 1 / tokens)
    own = [metrics.attention_rollout([uniform] * int(n))[0, 0] for n in depths]
    with canvas.figure(canvas.WIDE) as (figure, ax):
        curve(ax, depths, own, "uniform attention in every block")
        closed = 0.5**depths + (1 - 0.5**depths) / tokens
        known(ax, depths, closed, "2⁻ᴸ + (1 − 2⁻ᴸ) / T")
        level(ax, 1 / tokens, "without the residual stream: 1 / T", low=True)
        ax.set(xlabel="blocks L", ylabel="share of its own input in a token", ylim=0)
        ax.set_xticks(depths)
        ax.legend()
    return canvas.to_png(figure)


def draw_diversity() -> bytes:
    steps = np.linspace(0, 1, 21)
    heads = np.asarray(jax.nn.softmax(jnp.asarray(3 * noise(6, N, N)), axis=-1))
    alike = np.broadcast_to(heads.mean(axis=0), heads.shape)
    flat = np.broadcast_to(heads[:1].mean(axis=1, keepdims=True), (1, N, N))

    def deviation(a: jax.Array) -> jax.Array:
        return metrics.row_deviation(a, prefix=0)

    def cosine(a: jax.Array) -> jax.Array:
        return metrics.head_cosine(a, prefix=0)

    with plots(2, TWO) as (figure, (left, right)):
        y = over(deviation, [(1 - t) * heads[0] + t * flat[0] for t in steps])
        curve(left, steps, y, "")
        known(left, steps[::5], (1 - steps[::5]) * y[0])
        left.set(xlabel="share of the mean query", ylabel="deviation over queries")
        curve(
            right, steps, over(cosine, [(1 - t) * heads + t * alike for t in steps]), ""
        )
        known(right, [1], [1])
        right.set(xlabel="share of the mean head", ylabel="cosine between heads")
    return canvas.to_png(figure)


def draw_maps() -> bytes:
    row, column = np.indices((224, 224))
    disc = np.hypot(row - 88, column - 136) < 62
    sky = np.stack([0.55 + row / 700, 0.7 + 0 * row, 0.85 - row / 900], axis=-1)
    image = np.where(disc[..., None], [0.85, 0.4, 0.2], sky)
    colour = image.reshape(14, 16, 14, 16, 3).mean(axis=(1, 3)).reshape(N, 3)
    unlike = np.square(colour[:, None] - colour).sum(axis=-1)
    near = np.square(metrics.grid_distances(GRID, PATCH) / 90.0)
    attention = jax.nn.softmax(jnp.asarray(-12 * unlike - near), axis=-1)
    queries = ((5, 8), (11, 2))
    seen = [metrics.query_map(attention, q, grid=GRID, prefix=0) for q in queries]
    marked = images.to_uint8(image)
    for query in queries:
        marked = images.mark(marked, query, PATCH)
    shown = {
        "two queries": marked,
        "query (5, 8)": images.attention_map(seen[0], queries[0], PATCH),
        "its 60% of mass": metrics.mass_mask(seen[0]),
        "query (11, 2)": images.attention_map(seen[1], queries[1], PATCH),
        "all queries": metrics.key_map(attention, grid=GRID, prefix=0),
    }
    return canvas.to_png(matrices(shown, (6.8, 1.7), cmap="plasma"))


# Similarity


def draw_cka() -> bytes:
    p, counts = 256, (8, 16, 32, 64, 128, 256, 512, 1024)
    kernels = {"biased": metrics.biased_cka, "unbiased": metrics.linear_cka}
    with canvas.figure(canvas.WIDE) as (figure, ax):
        for i, (name, kernel) in enumerate(kernels.items()):
            draws = [
                over(kernel, noise(8, n, p), noise(8, n, p, seed=1)) for n in counts
            ]
            mean, spread = np.mean(draws, axis=1), np.std(draws, axis=1)
            curve(ax, counts, mean, f"{name}, 8 draws", i, marker=".")
            ax.fill_between(
                counts, mean - spread, mean + spread, color=COLOURS[i], alpha=0.2, lw=0
            )
        floor = [metrics.biased_floor(n, p, p) for n in counts]
        known(ax, counts, floor, "biased_floor")
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, counts)
        ax.set(xlabel="images of a mini-batch", ylabel=f"CKA of noise, {p} wide")
        ax.legend()
    return canvas.to_png(figure)


def draw_grams() -> bytes:
    """Two models that agree in their first three blocks, and part from then on."""
    shared = noise(6, 64, 1, 16, 8).cumsum(axis=0)
    parted = shared[:3].tolist() + list(
        shared[2] + noise(3, 64, 1, 16, 8, seed=1).cumsum(axis=0)
    )
    metric = plugin.load("metrics", "grams", prefix=0, group=16)
    a, b = (
        state_of(
            metric.to_state,
            metric,
            {
                "head_outputs": tuple(jnp.asarray(x, jnp.float32) for x in blocks),
                "index": jnp.arange(64),
            },
        )
        for blocks in (shared, parted)
    )
    series = metrics.between_models(a, b, name_a="A", name_b="B")
    return figures.panels({"A and B": series}, {})[0].png


# Spectra


def power_law(log_range: float, channels: int = 256) -> np.ndarray:
    """(N, channels) float32 tokens; the log eigenvalues fall by `log_range` in all."""
    ones = noise(N, N)
    ones[:, 0] = 1
    q = np.linalg.qr(ones)[0][:, 1:]  # orthogonal to the ones: no mean
    v = np.linalg.qr(noise(channels, N - 1, seed=1))[0]
    s = 100 * np.arange(1.0, N) ** (-log_range / 2 / np.log(N - 1))
    return ((q * s) @ v.T).astype("f4")


def by_svd(tokens: np.ndarray) -> np.ndarray:
    x = tokens.astype(float) - tokens.astype(float).mean(axis=0)
    return 2 * np.log(np.linalg.svd(x, compute_uv=False)[: N - 1]) - np.log(N - 1)


def by_float32_gram(tokens: np.ndarray) -> np.ndarray:
    x = tokens - tokens.mean(axis=0)
    values = np.linalg.eigvalsh(x @ x.T / np.float32(N - 1))[::-1][: N - 1]
    return np.log(np.maximum(values, 1e-12 * values[0]))


def draw_spectrum() -> bytes:
    ways = {
        "Gram matrix in float32": by_float32_gram,
        "token_log_spectrum": jax.jit(
            lambda x: metrics.token_log_spectrum(x, prefix=0)
        ),
        "token_spectrum": lambda x: np.log(metrics.token_spectrum(x, prefix=0)),
    }
    ranges, rank = np.arange(4, 22.1, 2), np.arange(1, N)
    draws = [power_law(r) for r in ranges]
    truth = [by_svd(x) for x in draws]
    with plots(2, TWO) as (figure, (left, right)):
        for i, (name, way) in zip((1, 2, 0), ways.items(), strict=True):
            found = [np.asarray(way(x)) for x in draws]
            off = [np.abs(a - b).max() for a, b in zip(found, truth, strict=True)]
            curve(right, ranges, off, name, i, marker=".")
            if i != 2:  # the last two look alike
                curve(left, rank, found[-2], name, i)
        shown = [0, 1, 3, 7, 15, 31, 63, 127, 194]
        known(left, rank[shown], truth[-2][shown], "svd in float64")
        left.set(xlabel="rank", ylabel="log singular value", xscale="log")
        plain_log(left.xaxis)
        right.set(xlabel="ln(s₁ / s₁₉₅)", ylabel="largest error", yscale="log")
        plain_log(right.yaxis)
        above(left)
        above(right)
    return canvas.to_png(figure)


def draw_rank() -> bytes:
    width, counts = 64, [16, 32, 65, 128, 256, 512, 1024, 2048]
    kernel = jax.jit(metrics.image_log_spectrum)
    x = noise(max(counts), width)
    with plots(2, TWO) as (figure, (left, right)):
        for i, m in enumerate((32, 128, 2048)):
            values = kernel(jnp.asarray(x[:m]))
            curve(left, np.arange(1, len(values) + 1), values, f"{m} images", i)
        mean = [float(kernel(jnp.asarray(x[:m])).mean()) for m in counts]
        curve(right, counts, mean, "", marker=".")
        for ax in (left, right):
            level(ax, 0, "true value" if ax is right else "")
        left.set(xlabel="rank", ylabel="log singular value")
        left.legend(fontsize=8)
        right.set_xscale("log", base=2)
        right.set_xticks([16, 64, 256, 1024], [16, 64, 256, 1024])
        right.set(xlabel="images", ylabel="mean over ranks")
    return canvas.to_png(figure)


def draw_dimension() -> bytes:
    powers, rank = np.linspace(0, 3, 31), np.arange(1, 257.0)
    spectra = rank ** -powers[:, None]
    ranks = {
        "effective rank, RankMe": metrics.rank_me(np.sqrt(spectra)),
        "participation ratio": metrics.participation_ratio(spectra),
        "stable rank": metrics.stable_rank(spectra),
    }
    with plots(2, TWO) as (figure, (left, right)):
        for i, (name, values) in enumerate(ranks.items()):
            curve(left, powers, values, name, i)
        known(left, [0], [256])
        left.set(xlabel="power a of eigenvalues k⁻ᵃ", ylabel="dimensions", yscale="log")
        plain_log(left.yaxis)
        above(left)
        curve(right, powers, metrics.alpha_req(spectra).alpha, "", 3)
        known(right, powers[::5], powers[::5], colour=3)
        right.set(xlabel="power a of eigenvalues k⁻ᵃ", ylabel="alpha-ReQ")
    return canvas.to_png(figure)


def draw_lidar() -> bytes:
    """r directions tell objects apart; 32 others differ between crops only."""
    ranks, objects, views, width = (1, 2, 4, 8, 16, 32), 400, 10, 64
    lidar, rank_me, closed = [], [], []
    for r in ranks:
        x = 0.2 * noise(objects, views, width)
        x[..., :r] += noise(objects, 1, r, seed=1)
        x[..., 32:] += noise(objects, views, 32, seed=2)
        lidar.append(float(metrics.lidar_rank(x)))
        flat = x.reshape(-1, width)
        rank_me.append(float(metrics.rank_me(np.linalg.svd(flat, compute_uv=False))))
        # Means of q views still differ by 1 / q of what views differ by.
        spectrum = np.r_[np.full(r, 1 / 0.2**2), np.zeros(width - r)] + 1 / views
        closed.append(float(metrics.effective_rank(spectrum)))
    with canvas.figure(canvas.WIDE) as (figure, ax):
        curve(ax, ranks, rank_me, "RankMe of the same features", 1, marker=".")
        curve(ax, ranks, lidar, "LiDAR", marker=".")
        known(ax, ranks, closed, "LiDAR, closed form")
        curve(ax, ranks, ranks, "as many as there are", 4, (0, (4, 2)))
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xticks(ranks, ranks)
        ax.set_yticks([*ranks, 64], [*ranks, 64])
        ax.set(xlabel="directions that tell images apart", ylabel="dimensions")
        above(figure)
    return canvas.to_png(figure)


# Tokens


def draw_smoothing() -> bytes:
    """Tokens averaged with their neighbours, as by local attention; one long token."""
    steps, sizes, attention = np.arange(13), 2.0 ** np.arange(13), gaussian(20)
    blurred = [noise(N, 64) + 0.4 * noise(64, seed=1)]
    for _ in steps[1:]:
        blurred.append(attention @ blurred[-1])
    longer = [noise(N, 64) * np.where(np.arange(N) == 0, a, 1)[:, None] for a in sizes]
    with plots(2, TWO) as (figure, (left, right)):
        for i, name in enumerate(("as they are", "mean taken out")):

            def kernel(x: jax.Array, centred: bool = bool(i)) -> jax.Array:
                return metrics.token_cosine(x, prefix=0, centred=centred)

            curve(left, steps, over(kernel, blurred), name, i, marker=".")
            curve(right, sizes, over(kernel, longer), name, i, marker=".")
        left.set(xlabel="times averaged", ylabel="cosine between tokens")
        right.set(xlabel="length of one of 196 tokens")
        right.set_xscale("log", base=2)
        right.set_xticks(sizes[::4], [f"{a:g}" for a in sizes[::4]])
        for ax in (left, right):
            level(ax, 1, "all alike: 1")
            ax.set_ylim(-0.1, 1.12)
        above(left)
    return canvas.to_png(figure)


def draw_variance() -> bytes:
    sizes = np.array([1, 2, 4, 7, 14, 28, 49, 98, 196])
    x = noise(N, 2048)
    tokens = [
        np.repeat(x.reshape(N // m, m, -1).mean(axis=1), m, axis=0) for m in sizes
    ]

    def kernel(x: jax.Array) -> jax.Array:
        return metrics.map_variance(x, prefix=0)

    with canvas.figure(canvas.WIDE) as (figure, ax):
        curve(ax, sizes, over(kernel, tokens), "noise averaged in groups", marker=".")
        known(ax, sizes, (N / sizes - 1) / (N - 1), "(N/m − 1) / (N − 1)")
        ax.set_xscale("log")
        ax.set_xticks(sizes, sizes)
        ax.minorticks_off()
        ax.set(xlabel="patches m of a group", ylabel="feature map variance")
        ax.legend()
    return canvas.to_png(figure)


def draw_displacement() -> bytes:
    x = noise(16, 2) + 2.5
    updates = {
        "all alike": np.tile([1.0, 0.4], (16, 1)),
        "each its own": noise(16, 2, seed=4),
        "towards their mean": 0.6 * (x.mean(axis=0) - x),
    }
    with plots(3, (6.8, 2.7)) as (figure, axes):
        for ax, (name, u) in zip(axes, updates.items(), strict=True):
            pair = (jnp.asarray(x, jnp.float32), jnp.asarray(x + u, jnp.float32))
            share = float(metrics.translation_share(*pair, prefix=0))
            moved = metrics.token_displacement(*pair, prefix=0)
            ax.quiver(
                *x.T, *u.T, angles="xy", scale_units="xy", scale=1, color=COLOURS[0]
            )
            ax.plot(*x.T, ".", color=canvas.GREY)
            ax.set_title(
                f"{name}\ntranslation share {style.number(round(share, 3))}\n"
                f"relative displacement {float(moved.relative):.2f}",
                fontsize=8.5,
            )
            ax.set(xlim=(-0.5, 6), ylim=(-0.5, 5.5), xticks=[], yticks=[])
            ax.set_aspect("equal")
    return canvas.to_png(figure)


def draw_clusters() -> bytes:
    count, each = 6, 30
    groups, apart = np.repeat(np.arange(count), each), np.linspace(0, 5, 26)
    centre, x = noise(count, 8, seed=1), noise(count * each, 8)
    tokens = [x + a * centre[groups] for a in apart]

    def purity(x: jax.Array) -> jax.Array:
        return metrics.neighbour_purity(x, jnp.asarray(groups))

    def coefficient(x: jax.Array) -> jax.Array:
        return metrics.silhouette(x, jnp.asarray(groups), count=count)

    with canvas.figure(canvas.WIDE) as (figure, ax):
        curve(ax, apart, over(purity, tokens), "purity of 10 neighbours")
        curve(ax, apart, over(coefficient, tokens), "silhouette", 1)
        level(ax, (each - 1) / (count * each - 1), "purity of mixed groups: 29 / 179")
        ax.set(xlabel="distance between 6 groups of 30 tokens", ylim=(-0.1, 1.08))
        above(figure)
    return canvas.to_png(figure)


# Frequencies


def one_over_f(channels: int) -> np.ndarray:
    """Maps (14, 14, channels) of noise whose amplitude falls like 1 / frequency."""
    f = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(14, 1 / 14)]))
    f[0, 0] = 1
    spectrum = np.fft.fft2(noise(14, 14, channels), axes=(0, 1)) / f[..., None]
    return np.fft.ifft2(spectrum, axes=(0, 1)).real


def draw_fourier() -> bytes:
    place = np.add.outer(np.arange(14), np.arange(14))[..., None]
    wave = 1 + 0.5 * np.cos(2 * np.pi * 3 * place / 14)
    maps = {
        "white noise": noise(14, 14, 4096),
        "noise like 1 / f": one_over_f(4096),
        "white noise + 1": noise(14, 14, 4096) + 1,
        "1 + a wave at 3/7 π": wave,
    }
    frequency = 2 * np.arange(7) / 14
    with canvas.figure(canvas.WIDE) as (figure, ax):
        for i, (name, x) in enumerate(maps.items()):
            tokens = jnp.asarray(x.reshape(N, -1), jnp.float32)
            y = metrics.delta_log_amplitude(tokens, grid=GRID, prefix=0)
            apart = name == "1 + a wave at 3/7 π"  # about -19 at the others
            curve(ax, frequency, y, name, i, "" if apart else "-", ".")
        f = np.arange(1, 7)
        known(ax, frequency[1:], np.full(6, 0.3466))
        known(ax, frequency[1:], 0.3466 - np.log(np.sqrt(2) * f), colour=1)
        known(ax, frequency[3], np.log(0.25), colour=3)
        ax.set(xlabel="frequency (π)", ylabel="Δ log amplitude", ylim=(-3.4, 0.8))
        ax.set_xticks(frequency, [0, *(f"{k}/7" for k in f)])
        above(figure)
    return canvas.to_png(figure)


def draw_amplitude() -> bytes:
    row, column = np.indices((14, 14))[..., None]
    maps = {
        "1 + wave down the rows": 1 + np.cos(2 * np.pi * 3 * row / 14),
        "1 + checkerboard": 1 + (-1.0) ** (row + column),
        "white noise": noise(14, 14, 1024),
        "noise like 1 / f": one_over_f(1024),
    }
    planes = {}
    for name, x in maps.items():
        tokens = jnp.asarray(x.reshape(N, -1), jnp.float32)
        planes[name] = metrics.log_amplitude_plane(tokens, grid=GRID, prefix=0)
    figure = matrices(planes, cmap="viridis")
    bins = 7 + metrics.half_diagonal(GRID)
    for ax in figure.axes:
        ax.plot(bins[:, 1], bins[:, 0], "o", ms=3.5, mfc="none", mec="white", mew=0.9)
    return canvas.to_png(figure)


# Probes


def classified(count: int, seed: int, classes: int = 5, width: int = 32) -> dict:
    """Images of an encoder of 8 blocks that tells classes apart best at block 5."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, count)
    centre = np.random.default_rng(99).standard_normal((classes, width))
    found = np.exp(-np.square((np.arange(9) - 5) / 3.0)) / 1.8  # of each block
    stream = [
        a * centre[label][:, None] + rng.standard_normal((count, 2, width))
        for a in found
    ]
    taps = [x for block in stream for x in (block, block)][1:]  # embed, attn, mlp, ...
    output = stream[5] + 0.3 * rng.standard_normal((count, 2, width))
    output[:, 0] += rng.standard_normal((count, width))
    return {
        "residual": tuple(jnp.asarray(x, jnp.float32) for x in taps),
        "output": jnp.asarray(output, jnp.float32),
        "label": jnp.asarray(label),
        "index": jnp.arange(count),
    }


def learned(
    name: str, train: Mapping, test: Mapping, **options
) -> list[metrics.Series]:
    metric = plugin.load("metrics", name, prefix=1, classes=5, **options)
    parts = (("train", train), ("test", test))
    return metric.compute(*(state_of(metric.summing(p), metric, x) for p, x in parts))


def draw_probe() -> bytes:
    test = classified(1000, 1)
    names = {"50 training images": 50, "500 training images": 500}
    drawn = {k: learned("probe", classified(n, 0), test)[0] for k, n in names.items()}
    looks = style.looks([(name, "") for name in names])
    return figures.panels(drawn, looks)[0].png


def draw_knn() -> bytes:
    neighbours = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    train, test = classified(500, 0), classified(1000, 1)
    top, _ = learned("knn", train, test, neighbours=neighbours)
    with canvas.figure(canvas.WIDE) as (figure, ax):
        for i, pool in enumerate(top.axes[0].values):
            low, high = (top.values[i] + s * top.stderr[i] for s in (-1, 1))
            ax.fill_between(neighbours, low, high, color=COLOURS[i], alpha=0.2, lw=0)
            curve(ax, neighbours, top.values[i], pool, i, marker=".")
        level(ax, 20, "chance of 5 classes: 20%")
        ax.set_xscale("log")
        ax.set_xticks(neighbours, neighbours)
        ax.minorticks_off()
        ax.set(xlabel="neighbours", ylabel="k-NN accuracy (%)", ylim=(0, 100))
        ax.legend()
    return canvas.to_png(figure)


PICTURES = {
    name.removeprefix("draw_"): draw
    for name, draw in list(globals().items())
    if name.startswith("draw_")
}

if __name__ == "__main__":
    main(sys.argv[1:])
