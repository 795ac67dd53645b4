"""Captioned pictures of coloured solids: what the embedded model is trained on.

A scene is one solid, or two of different colours in one of five relations; ``caption`` puts it into words, ``render``
into pixels, by casting rays at solids that stand on a bright, nearly neutral ground under one soft light. All of it is
NumPy and a function of a seed: example i of ``dataset`` depends on ``(seed, i)`` alone, so that examples can be made in
parallel and a run can be resumed anywhere.

A tenth of the arrangements of two solids is held out of training, each with its mirror image ("a left of b" is "b right
of a"), and so is every "a red cube on top of a blue sphere".
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator

import numpy as np

from sd_jax.train.bodies import Body, normal_and_edge, span, unit

COLOURS = {
    "red": (0.87, 0.12, 0.14),
    "green": (0.15, 0.68, 0.22),
    "blue": (0.14, 0.30, 0.90),
    "yellow": (0.98, 0.86, 0.10),
    "orange": (0.98, 0.50, 0.06),
    "purple": (0.58, 0.18, 0.80),
    "cyan": (0.10, 0.80, 0.86),
    "gray": (0.38, 0.38, 0.38),
}
SHAPES = ("cube", "sphere", "cylinder", "cone")
SIZES = ("small", "large")  # words for a single solid; most have none

# Relation, in its canonical wording, -> other wordings. None contains another relation's.
RELATIONS = {
    "on top of": ("sitting on", "stacked on", "standing on top of"),
    "to the left of": ("left of", "on the left of", "standing to the left of"),
    "to the right of": ("right of", "on the right of", "standing to the right of"),
    "in front of": ("standing in front of", "placed in front of"),
    "behind": ("standing behind", "placed behind"),
}
OPENINGS = ("", "a picture of ", "a photo of ", "an image of ", "there is ")
MIRROR = {"to the right of": "to the left of", "behind": "in front of"}  # the same scene told from the other solid

NEVER_SEEN = "a red cube on top of a blue sphere"
SPLITS = ("train", "heldout", "any")
SINGLE = 0.35  # share of scenes with one solid
CANONICAL = 0.4  # share of captions in canonical wording


@dataclasses.dataclass(frozen=True)
class Solid:
    colour: str
    shape: str
    size: str = ""  # "", "small" or "large"


@dataclasses.dataclass(frozen=True)
class Scene:
    """``solids[0]`` stands in ``relation`` to ``solids[1]``; a single solid has the relation ""."""

    solids: tuple[Solid, ...]
    relation: str = ""


# ---- examples ------------------------------------------------------------------------------------------------------


def dataset(n: int, seed: int, split: str = "train", size: int = 64, start: int = 0) -> tuple[np.ndarray, list[str]]:
    """Examples ``start ... start + n - 1`` of the endless sequence that ``seed`` names.

    Returns (uint8 [n, size, size, 3], n captions in varied wordings).
    """
    images = np.empty((n, size, size, 3), np.uint8)
    captions = []
    for i in range(n):
        rng = np.random.default_rng((seed, start + i))
        scene = sample_scene(rng, split)
        captions.append(caption(scene, rng))
        images[i] = render(scene, rng, size)
    return images, captions


def sample_scene(rng: np.random.Generator, split: str = "any") -> Scene:
    """Draws a scene; ``split="heldout"`` gives pairs only, since no single solid is held out."""
    if split not in SPLITS:
        from sd_jax.types import RequestError  # late: it imports jax, which workers that render do without

        raise RequestError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    single = split != "heldout" and rng.random() < SINGLE
    if single:
        size = str(rng.choice(("", "", *SIZES)))
        return Scene((Solid(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), size),))
    while True:
        colours = rng.choice(list(COLOURS), 2, replace=False)
        shapes = rng.choice(SHAPES, 2)
        solids = tuple(Solid(str(c), str(s)) for c, s in zip(colours, shapes, strict=True))
        scene = Scene(solids, str(rng.choice(list(RELATIONS))))
        if split == "any" or held_out(scene) == (split == "heldout"):
            return scene


def held_out(scene: Scene) -> bool:
    """True for the arrangements that training never shows: a fixed tenth, by a hash of the canonical scene."""
    if len(scene.solids) == 1:
        return False
    words = caption(canonical(scene))
    return words == NEVER_SEEN or hashlib.sha256(words.encode()).digest()[0] % 10 == 0


def canonical(scene: Scene) -> Scene:
    """The one of a scene's two tellings that uses "to the left of" or "in front of"."""
    if scene.relation not in MIRROR:
        return scene
    return Scene(scene.solids[::-1], MIRROR[scene.relation])


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The scene in words, lowercase; without ``rng`` in canonical wording: "a red cube on top of a blue sphere"."""
    if rng is None or rng.random() < CANONICAL:
        return _phrase(scene, scene.relation, "")
    wordings = (scene.relation, *RELATIONS.get(scene.relation, ()))
    return _phrase(scene, str(rng.choice(wordings)), str(rng.choice(OPENINGS)))


def benchmark_captions(n: int, seed: int = 0) -> dict[str, list[str]]:
    """Captions in varied wordings to test a model on, n in each of four groups; the last is one caption n times."""

    def draw(group: int, split: str, solids: int) -> list[str]:
        rng = np.random.default_rng((seed, group))
        scenes = (sample_scene(rng, split) for _ in itertools.count())
        return [caption(s, rng) for s in itertools.islice((s for s in scenes if len(s.solids) == solids), n)]

    return {
        "one object": draw(0, "train", 1),
        "two objects, seen in training": draw(1, "train", 2),
        "two objects, never seen": draw(2, "heldout", 2),
        f'"{NEVER_SEEN}"': [NEVER_SEEN] * n,
    }


def all_captions() -> Iterator[str]:
    """Captions that between them hold every word in every setting: what a tokenizer is trained on."""
    solids = [Solid(*words) for words in itertools.product(COLOURS, SHAPES, ("", *SIZES))]
    for solid, opening in itertools.product(solids, OPENINGS):
        yield _phrase(Scene((solid,)), "", opening)
    for relation, wordings in RELATIONS.items():
        for wording, solid, opening in itertools.product((relation, *wordings), solids, OPENINGS):
            other = Solid("red" if solid.colour == "blue" else "blue", "sphere")
            yield _phrase(Scene((solid, other), relation), wording, opening)


def _phrase(scene: Scene, wording: str, opening: str) -> str:
    nouns = [_noun(solid) for solid in scene.solids]
    return opening + (nouns[0] if len(nouns) == 1 else f"{nouns[0]} {wording} {nouns[1]}")


def _noun(solid: Solid) -> str:
    words = " ".join(w for w in (solid.size, solid.colour, solid.shape) if w)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# ---- arrangement: x to the right, y up, z towards the camera; the ground is y = 0 ----------------------------------

SCALES = {"": (1.2, 2.1), "small": (1.1, 1.3), "large": (1.85, 2.15)}  # of a single solid
PAIR = (1.2, 1.6)  # of each of two


def _arrange(scene: Scene, rng: np.random.Generator) -> list[Body]:
    """Gives the solids scales, turns and places that make the relation plain to see."""
    if len(scene.solids) == 1:
        return [_place(scene.solids[0], rng, SCALES[scene.solids[0].size])]
    a, b = (_place(solid, rng, PAIR) for solid in scene.solids)
    side = rng.choice((-1.0, 1.0))
    if scene.relation == "on top of":
        a, b = (dataclasses.replace(p, scale=k * p.scale) for p, k in ((a, 0.98), (b, 1.18)))
        sunk = 0.16 * b.height if b.shape == "cone" else 0.02  # a tip is too thin to be seen to touch
        away = np.array([rng.uniform(-0.08, 0.08), b.height - sunk, rng.uniform(-0.04, 0.04)])
    elif scene.relation in ("to the left of", "to the right of"):
        gap = a.radius + b.radius + rng.uniform(0.05, 0.5)
        away = np.array([gap if scene.relation == "to the right of" else -gap, 0.0, rng.uniform(-0.25, 0.25)])
    else:
        near, far = (a, b) if scene.relation == "in front of" else (b, a)
        depth = max(a.radius + b.radius, 1.75 * near.height - 0.6 * far.height) + rng.uniform(0.3, 0.6)
        across = side * rng.uniform(0.42, 0.6) * (a.radius + b.radius)
        away = np.array([across, 0.0, depth if scene.relation == "in front of" else -depth])
    middle = away * (0.5, 0.0, 0.5)
    return [dataclasses.replace(a, base=away - middle), dataclasses.replace(b, base=-middle)]


def _place(solid: Solid, rng: np.random.Generator, scales: tuple[float, float]) -> Body:
    """At the origin, turned so that a cube shows two of its sides."""
    yaw = np.deg2rad(rng.uniform(22, 68))
    return Body(np.array(COLOURS[solid.colour], np.float32), solid.shape, np.zeros(3), rng.uniform(*scales), yaw)


# ---- rendering -----------------------------------------------------------------------------------------------------

PITCH = np.deg2rad(30.0)  # the camera looks down by this much
DISTANCE = 12.0  # from the camera to the origin
FIELD = 4.1  # width of the picture, measured at the origin
MARGIN = 0.03  # of the picture, kept free around the solids
EYE = DISTANCE * np.array([0.0, np.sin(PITCH), np.cos(PITCH)])
RIGHT, UP = np.array([1.0, 0.0, 0.0]), np.array([0.0, np.cos(PITCH), -np.sin(PITCH)])
SAMPLES = 2  # rays a pixel, along each side
LIGHTS = 8  # points of the round light; a shadow's edge has as many steps
REACH = 0.17  # radius of the light, in radians
AMBIENT, DIFFUSE, GLOSS, SHADOW = 0.40, 0.62, 0.2, 0.24


def render(scene: Scene, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """A picture of the scene, uint8 [size, size, 3]; sizes, places, turns, light and ground come from ``rng``."""
    placed = _arrange(scene, rng)
    window = _window(placed, rng)
    lights = _lights(rng)

    fine = size * SAMPLES
    ground = _ground(placed, _rays(window, size, (0, size, 0, size)), lights, rng)
    picture = ground.repeat(SAMPLES, 1).repeat(SAMPLES, 2)
    depth = np.full((fine, fine), np.inf, np.float32)
    for solid in placed:
        top, bottom, left, right = box = _pixels(solid, window, fine)
        rays = _rays(window, fine, box)
        near, far = span(solid, EYE, rays)
        seen = (near < far) & (near < depth[top:bottom, left:right])
        depth[top:bottom, left:right][seen] = near[seen]
        rays, near = rays[:, seen], near[seen]
        point = (EYE[:, None] + near * rays).astype(np.float32)
        others = [other for other in placed if other is not solid]
        picture[:, top:bottom, left:right][:, seen] = _shade(solid, point, rays, others, lights)
    pixels = sum(picture[:, i::SAMPLES, j::SAMPLES] for i in range(SAMPLES) for j in range(SAMPLES)) / SAMPLES**2
    return np.round(255 * pixels.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)


def _window(placed: list[Body], rng: np.random.Generator) -> tuple[float, float, float]:
    """Where the picture lies on the camera's image plane, (left, top, width): anywhere that holds all solids."""
    extents = np.array([_extent(solid) for solid in placed])
    (left, bottom), (right, top) = extents[:, :2].min(0), extents[:, 2:].max(0)
    width = max(FIELD / DISTANCE, (right - left) / (1 - 2 * MARGIN), (top - bottom) / (1 - 2 * MARGIN))
    free = width * (1 - 2 * MARGIN)
    x = left - rng.uniform(0, free - (right - left)) - MARGIN * width
    y = top + rng.uniform(0, free - (top - bottom)) + MARGIN * width
    return x, y, width


def _extent(solid: Body) -> tuple[float, float, float, float]:
    """(left, bottom, right, top) of the solid on the image plane, at unit distance from the camera, y up."""
    top = np.array([0, solid.height, 0])
    if solid.shape == "sphere":
        points = top / 2 + (solid.height / 2) * np.stack([RIGHT, -RIGHT, UP, -UP])
    else:
        corners, first = (4, np.pi / 4 - solid.yaw) if solid.shape == "cube" else (16, 0.0)
        turn = first + np.linspace(0, 2 * np.pi, corners, endpoint=False)
        rim = solid.radius * np.stack([np.cos(turn), 0 * turn, np.sin(turn)], 1)
        points = np.concatenate([rim, top + (0 * rim if solid.shape == "cone" else rim)])
    view = solid.base + points - EYE
    distance = view @ (-EYE / DISTANCE)
    x, y = view @ RIGHT / distance, view @ UP / distance
    return x.min(), y.min(), x.max(), y.max()


def _pixels(solid: Body, window: tuple[float, float, float], size: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box of pixels that holds the solid."""
    x, y, width = window
    left, bottom, right, top = _extent(solid)
    edges = np.array([y - top, y - bottom, left - x, right - x]) * size / width
    low, high = np.floor(edges[::2]) - 1, np.ceil(edges[1::2]) + 1
    return tuple(int(e) for e in np.clip((low[0], high[0], low[1], high[1]), 0, size))


def _rays(window: tuple[float, float, float], size: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """Directions float32 [3, H, W] through the centres of the pixels of a box; their length is 1 along the view."""
    x, y, width = window
    top, bottom, left, right = box
    across = x + (np.arange(left, right) + 0.5) * width / size
    up = y - (np.arange(top, bottom) + 0.5) * width / size
    forward = -EYE / DISTANCE
    rays = forward[:, None, None] + RIGHT[:, None, None] * across + UP[:, None, None] * up[:, None]
    return rays.astype(np.float32)


def _lights(rng: np.random.Generator) -> np.ndarray:
    """Directions to points of the light, float32 [LIGHTS, 3], the first its middle: above, to the left, in front.

    None is higher than 64 degrees, so that light rays are flatter than a cone's side.
    """
    azimuth, height = np.deg2rad(rng.uniform(110, 160)), np.deg2rad(rng.uniform(44, 54))
    spiral = np.arange(LIGHTS) * 2.4
    reach = REACH * np.sqrt(np.arange(LIGHTS) / LIGHTS)
    azimuth, height = azimuth + reach * np.cos(spiral) / np.cos(height), height + reach * np.sin(spiral)
    lights = [np.cos(height) * np.cos(azimuth), np.sin(height), np.cos(height) * np.sin(azimuth)]
    return np.stack(lights, 1).astype(np.float32)


def _ground(placed: list[Body], rays: np.ndarray, lights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The ground with the solids' shadows, float32 [3, H, W]: bright, nearly neutral, darker towards one side."""
    point = (EYE[:, None, None] - EYE[1] / rays[1] * rays).astype(np.float32)
    shade = SHADOW * _shadow(placed, point, lights)
    h, w = rays.shape[1:]
    slope = rng.uniform(-0.03, 0.03, 2)
    tilt = slope[0] * np.linspace(-1, 1, h)[:, None] + slope[1] * np.linspace(-1, 1, w)
    tint = rng.uniform(0.9, 0.96) + rng.uniform(-0.008, 0.008, (3, 1, 1))
    return ((tint + tilt) * (1 - shade)).astype(np.float32)


def _shadow(solids: list[Body], point: np.ndarray, lights: np.ndarray) -> np.ndarray:
    """The share of the light that solids hide from points [3, ...] -> [...]."""
    maybe = np.zeros(point.shape[1:], bool)
    for solid in solids:  # the ray to the light's middle passes near the solid
        x, y, z = (np.float32(m) - p for m, p in zip(solid.base + (0, solid.height / 2, 0), point, strict=True))
        along = lights[0, 0] * x + lights[0, 1] * y + lights[0, 2] * z
        maybe |= x * x + y * y + z * z - along * along < (solid.reach + REACH * 1.2 * np.abs(along)) ** 2
    hidden = np.zeros((int(maybe.sum()), len(lights)), bool)
    for solid in solids:
        near, far = span(solid, point[:, maybe][:, :, None], lights.T[:, None, :])
        hidden |= (near < far) & (far > 1e-3)
    dark = np.zeros(point.shape[1:], np.float32)
    dark[maybe] = hidden.mean(1)
    return dark


def _shade(solid: Body, point: np.ndarray, rays: np.ndarray, others: list[Body], lights: np.ndarray) -> np.ndarray:
    """Colours [3, N] of surface points [3, N] (Blinn 1977): ambient, diffuse, and a soft highlight if round."""
    normal, edge = normal_and_edge(solid, point)
    light = lights[0]
    lit = np.maximum(light @ normal, 0)
    if others:
        lit *= 1 - _shadow(others, point, lights)
    half = unit(light[:, None] - unit(rays))
    gloss = 0.0 if solid.shape == "cube" else GLOSS * np.maximum((half * normal).sum(0), 0) ** 24 * (lit > 0)
    return solid.colour[:, None] * (AMBIENT + 0.06 * normal[1] + DIFFUSE * lit + edge) + gloss
