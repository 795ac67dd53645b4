"""Does a picture show what its caption says? A judge of one or two coloured solids, from pixels alone.

It knows the caption, not who made the picture. Colour is found by hue; shape by fitting outlines of the four solids,
seen from somewhat above, to each colour's silhouette, of which the other solid may hide a part; the relation from the
two fitted boxes. Solids must be of different colours, on a ground that is bright and nearly neutral.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sd_jax.types import RequestError

# Wordings of each relation; a caption holds exactly one.
RELATIONS = {
    "on top of": ("on top of", "sitting on", "stacked on"),
    "to the left of": ("left of",),
    "to the right of": ("right of",),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
# Hue in degrees up to which a pixel has the colour; the circle closes at red. Gray has no hue and is not ground.
HUES = {"red": 14, "orange": 41, "yellow": 88, "green": 156, "cyan": 206, "blue": 252, "purple": 322}
COLOURS = (*HUES, "gray")
SHAPES = ("cube", "sphere", "cylinder", "cone")
NOUN = re.compile(rf"\b(?:(small|large) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")

SATURATION, CHROMA = 0.3, 0.1  # a pixel with more of both has a hue
GRAY = 0.62  # a pixel without is gray if darker, else ground
SMALLEST = 24 / 64**2  # share of the picture that a solid covers at least
SECOND = 0.2  # a second piece of a colour, of more than this share of the first, is a second solid
STRETCH = 0.2  # an outline may be as much taller or wider, as a logarithm
HIDING = 0.1  # cost of growing a box by the picture's width, against 1 for getting every pixel wrong
CLOSEST = 6  # so many outlines, of twelve, have their boxes refined
WORST = 0.3  # a silhouette that every outline fits worse than this shows none of the solids
LARGE = 0.49  # a single solid is large if its box is, in the geometric mean of its sides, against the picture's width

COLUMNS = ("colours", "+ shapes", "relation", "everything")


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a caption says: (size word or "", colour, shape) of each solid, and how the first is to the second."""

    solids: tuple[tuple[str, str, str], ...]
    relation: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What of a claim the picture bears out. Shapes, size and relation are False where the colours are not there."""

    colours: bool  # each of the claim's colours in one piece, and no other colour
    shapes: bool
    size: bool  # True if the claim names none
    relation: bool  # True if the claim names none

    @property
    def everything(self) -> bool:
        return self.colours and self.shapes and self.size and self.relation


@dataclasses.dataclass(frozen=True)
class Fit:
    """An outline fitted to a silhouette: its box in pixels with hidden parts, and the share of pixels it gets wrong."""

    shape: str
    box: tuple[float, float, float, float]  # left, top, right, bottom
    error: float


def evaluate(
    generate: Callable[[list[str], list[int]], np.ndarray],
    groups: Mapping[str, Sequence[str]],
    seed: int = 0,
    batch: int = 32,
) -> dict[str, dict[str, float]]:
    """Judges the pictures that ``generate(captions, seeds) -> uint8 [B, H, W, 3]`` makes of groups of captions.

    Caption i, counted through all groups, gets the seed ``seed + i``; ``generate`` is given at most ``batch`` at a
    time. Returns, for each group and then for each relation, "images", their number, and the per cent that are right in
    each of ``COLUMNS``, NaN where there is nothing to count. "relation" is counted among pairs whose colours are right.
    The rows by relation leave out a group that repeats a single caption. A caption that ``parse`` does not understand
    is a RequestError, raised before anything is generated.
    """
    claims = {caption: parse(caption) for captions in groups.values() for caption in captions}
    rows: dict[str, list[tuple[Claim, Verdict]]] = {name: [] for name in (*groups, *RELATIONS)}
    for name, captions in groups.items():
        for start in range(0, len(captions), batch):
            some = list(captions[start : start + batch])
            images = generate(some, list(range(seed, seed + len(some))))
            seed += len(some)
            for caption, image in zip(some, images, strict=True):
                claim = claims[caption]
                result = claim, judge(np.asarray(image), claim)
                rows[name].append(result)
                if claim.relation and len(set(captions)) > 1:
                    rows[claim.relation].append(result)
    return {name: _count(results) for name, results in rows.items() if results}


def _count(results: list[tuple[Claim, Verdict]]) -> dict[str, float]:
    verdicts = [verdict for _, verdict in results]
    columns = (
        [v.colours for v in verdicts],
        [v.colours and v.shapes for v in verdicts],
        [v.relation for claim, v in results if claim.relation and v.colours],
        [v.everything for v in verdicts],
    )
    share = (100 * sum(column) / len(column) if column else float("nan") for column in columns)
    return {"images": len(results), **dict(zip(COLUMNS, share, strict=True))}


def table(counts: Mapping[str, Mapping[str, float]]) -> str:
    """What ``evaluate`` returned, as a Markdown table of per cent."""
    lines = ["| | images | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) + 1)]
    for name, row in counts.items():
        cells = ("-" if np.isnan(row[column]) else f"{row[column]:.1f}" for column in COLUMNS)
        lines.append(f"| {name} | {row['images']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- one picture ---------------------------------------------------------------------------------------------------


def parse(caption: str) -> Claim:
    """The claim of a caption such as "a picture of a small red cube" or "a red cube on top of a blue sphere"."""
    words = caption.lower()
    solids = tuple(NOUN.findall(words))
    relations = [name for name, wordings in RELATIONS.items() if any(w in words for w in wordings)]
    if len(solids) not in (1, 2) or len(relations) != len(solids) - 1:
        raise RequestError(
            f"the caption {caption!r} is not understood: write one solid ('a red cube') or two in a relation "
            f"({', '.join(RELATIONS)}), of the colours {', '.join(COLOURS)} and the shapes {', '.join(SHAPES)}"
        )
    return Claim(solids, *relations)


def judge(image: np.ndarray, claim: Claim) -> Verdict:
    """Holds a picture, uint8 [H, W, 3], against a claim."""
    found = silhouettes(image)
    if found is None or set(found) != {colour for _, colour, _ in claim.solids}:
        return Verdict(False, False, False, False)
    masks = [found[colour] for _, colour, _ in claim.solids]
    hidden = [masks[1], masks[0]] if len(masks) == 2 else [np.zeros_like(masks[0])]
    fits = [fit(mask, other) for mask, other in zip(masks, hidden, strict=True)]
    size = claim.solids[0][0]
    return Verdict(
        colours=True,
        shapes=all(f.shape == shape for f, (_, _, shape) in zip(fits, claim.solids, strict=True)),
        size=not size or size == ("large" if _extent(fits[0]) / len(image) > LARGE else "small"),
        relation=not claim.relation or claim.relation == relation(*(f.box for f in fits)),
    )


def _extent(found: Fit) -> float:
    left, top, right, bottom = found.box
    return ((right - left) * (bottom - top)) ** 0.5


# ---- colour --------------------------------------------------------------------------------------------------------


def silhouettes(image: np.ndarray) -> dict[str, np.ndarray] | None:
    """Each colour's pixels, bool [H, W]; None if a colour is there twice."""
    found = {}
    smallest = SMALLEST * image.shape[0] * image.shape[1]
    thick = max(2, round(3 * len(image) / 64))  # thinner things are borders where two colours mix
    for colour, mask in colour_masks(image).items():
        pieces = [piece for piece in _pieces(_open(mask, 2), smallest) if _open(piece, thick).sum() >= smallest]
        pieces.sort(key=np.sum, reverse=True)
        if len(pieces) > 1 and pieces[1].sum() > SECOND * pieces[0].sum():
            return None
        if pieces:
            found[colour] = pieces[0]
    return found


def colour_masks(image: np.ndarray) -> dict[str, np.ndarray]:
    """Colour -> the pixels that have it, bool [H, W]."""
    rgb = image.astype(np.float32) / 255
    value, chroma = rgb.max(2), rgb.max(2) - rgb.min(2)
    coloured = (chroma > CHROMA) & (chroma > SATURATION * value)
    r, g, b = np.moveaxis(rgb, 2, 0)
    hue = np.degrees(np.arctan2(3**0.5 * (g - b), 2 * r - g - b)) % 360
    index = np.searchsorted(list(HUES.values()), hue) % len(HUES)
    masks = {colour: coloured & (index == i) for i, colour in enumerate(HUES)}
    return {**masks, "gray": ~coloured & (value < GRAY)}


def _open(mask: np.ndarray, width: int) -> np.ndarray:
    """Keeps what a square of ``width`` pixels fits into."""
    for keep in (np.logical_and, np.logical_or):
        for axis in (0, 1):
            pad = [(0, 0), (0, 0)]
            pad[axis] = (0, width - 1) if keep is np.logical_and else (width - 1, 0)
            padded = np.pad(mask, pad)
            n = mask.shape[axis]
            mask = keep.reduce([padded.take(range(i, i + n), axis) for i in range(width)])
    return mask


def _pieces(mask: np.ndarray, smallest: float) -> list[np.ndarray]:
    """The connected parts of at least ``smallest`` pixels."""
    pieces, rest = [], mask.copy()
    while rest.sum() >= smallest:
        piece = np.zeros_like(mask)
        piece.flat[rest.argmax()] = True
        while True:
            grown = np.pad(piece, 1)
            grown = grown[1:-1, 1:-1] | grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:]
            grown &= rest
            if (grown == piece).all():
                break
            piece = grown
        rest &= ~piece
        if piece.sum() >= smallest:
            pieces.append(piece)
    return pieces


# ---- shape ---------------------------------------------------------------------------------------------------------

TILT = np.deg2rad(30)  # how far from above a solid is seen
ACROSS = np.linspace(-1, 1, 65)  # across an outline's box


@dataclasses.dataclass(frozen=True)
class Outline:
    """A silhouette in a unit box: it fills each column of ``ACROSS`` from ``top`` to ``bottom``, 0 ... 1 downwards."""

    shape: str
    aspect: float  # height / width
    top: np.ndarray
    bottom: np.ndarray


@functools.cache
def outlines() -> tuple[Outline, ...]:
    """The solids seen from a distance, ``TILT`` from above: some proportions of round ones, some turns of a cube."""
    arc = np.sqrt(1 - ACROSS**2)
    across = np.abs(ACROSS)
    found = [Outline("sphere", 1.0, (1 - arc) / 2, (1 + arc) / 2)]
    for height in (2.0, 2.3, 2.6):  # in radii, as below
        whole = height * np.cos(TILT) + 2 * np.sin(TILT)
        rim = np.sin(TILT) / whole
        found.append(Outline("cylinder", whole / 2, rim * (1 - arc), 1 - rim * (1 - arc)))
    for height in (1.8, 2.1, 2.4):
        whole = height * np.cos(TILT) + np.sin(TILT)
        rim = np.sin(TILT) / whole
        middle = 1 - rim
        touch = np.sqrt(1 - (rim / middle) ** 2)  # where the line from the tip touches the base
        side = across / touch * (middle - rim**2 / middle)
        top = np.where(across < touch, side, middle - rim * arc)
        found.append(Outline("cone", whole / 2, top, middle + rim * arc))
    return (*found, *(_cube(turn) for turn in np.deg2rad((-20, -10, 0, 10, 20))))


def _cube(turn: float) -> Outline:
    """A cube that at turn 0 has an edge in front; its base is inscribed in the unit circle."""
    angle = turn + np.pi / 2 * np.arange(4)
    x, y = np.cos(angle), np.sin(angle) * np.sin(TILT)  # the base's corners, y downwards
    height = 2**0.5 * np.cos(TILT)
    order = np.argsort(x)
    x, y = x[order], y[order]
    near, far = (1, 2) if y[1] > y[2] else (2, 1)  # of the two between the leftmost and the rightmost
    scale = x[-1]
    bottom = np.interp(ACROSS * scale, x[[0, near, 3]], y[[0, near, 3]])
    top = np.interp(ACROSS * scale, x[[0, far, 3]], y[[0, far, 3]]) - height
    low, high = y.max(), y.min() - height
    return Outline("cube", (low - high) / (2 * scale), (top - high) / (low - high), (bottom - high) / (low - high))


def fit(mask: np.ndarray, hidden: np.ndarray) -> Fit:
    """The outline that a silhouette fits best; its pixels under ``hidden`` do not count. Both bool [H, W]."""
    boxes = _boxes(mask, hidden)
    moves = np.concatenate([np.eye(4), -np.eye(4)]) * len(mask) / 128
    # Summed down a column: pixels an outline would be wrong to fill, less those it would be right to fill.
    cost = np.pad(np.where(mask, -1, np.where(hidden, 0, 1)).cumsum(0), ((1, 0), (0, 0)))

    def errors(outline: Outline, trials: np.ndarray) -> np.ndarray:
        left, top, right, bottom = trials.T
        wrong = 1 + _filled(outline, trials, cost) / mask.sum() + HIDING * np.abs(trials - boxes[0]).sum(1) / len(mask)
        stretch = np.log((bottom - top) / (right - left) / outline.aspect)
        return np.where(np.abs(stretch) < STRETCH, wrong, np.inf)

    starts = sorted(((errors(outline, boxes), outline) for outline in outlines()), key=lambda start: start[0].min())
    best = Fit("", tuple(boxes[0]), np.inf)
    for error, outline in starts[:CLOSEST]:
        least, trials = np.inf, boxes
        while error.min() < least:  # downhill from the best box, edge by edge
            least, box = error.min(), trials[error.argmin()]
            trials = box + moves
            error = errors(outline, trials)
        if least < best.error:
            best = Fit(outline.shape if least < WORST else "", tuple(box), float(least))
    return best


def _filled(outline: Outline, boxes: np.ndarray, summed: np.ndarray) -> np.ndarray:
    """Sums over the pixels [K] that an outline fills in boxes [K, 4], from sums [H + 1, W] down the columns."""
    left, top, right, bottom = boxes.T[:, :, None]
    x = np.arange(summed.shape[1])
    u = 2 * (x + 0.5 - left) / (right - left) - 1
    rows = [top + np.interp(u, ACROSS, edge) * (bottom - top) for edge in (outline.top, outline.bottom)]
    first, last = (np.minimum(np.maximum(np.ceil(row - 0.5), 0), len(summed) - 1).astype(int) for row in rows)
    return ((summed[last, x] - summed[first, x]) * (np.abs(u) < 1)).sum(1)


def _boxes(mask: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Boxes [K, 4] that the whole solid may have, the visible one first: longer on the sides where it may be hidden."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    step = len(mask) / 32
    sides = []
    for beyond, sign in (
        (hidden[top:bottom, max(left - 2, 0) : left], -1),
        (hidden[max(top - 2, 0) : top, left:right], -1),
        (hidden[top:bottom, right : right + 2], 1),
        (hidden[bottom : bottom + 2, left:right], 1),
    ):
        sides.append(sign * step * np.arange(8 if beyond.any() else 1))
    grid = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 4)
    return np.array([left, top, right, bottom]) + grid


# ---- relation ------------------------------------------------------------------------------------------------------


def relation(a: Sequence[float], b: Sequence[float]) -> str:
    """How the solid in box ``a`` stands to that in ``b`` (left, top, right, bottom; whole solids), or ""."""
    width, height = (a[2] - a[0] + b[2] - b[0]) / 2, (a[3] - a[1] + b[3] - b[1]) / 2
    across = (a[0] + a[2] - b[0] - b[2]) / 2 / width
    lower = (a[3] - b[3]) / height  # on the ground, lower in the picture is nearer
    if abs(across) > 0.8 and abs(lower) < 0.4:
        return "to the left of" if across < 0 else "to the right of"
    if abs(across) < 0.3 and a[3] < (b[1] + b[3]) / 2 and a[3] > b[1] - 0.15 * height:
        return "on top of"
    if abs(across) < 0.8 and abs(lower) > 0.2:
        return "in front of" if lower > 0 else "behind"
    return ""
