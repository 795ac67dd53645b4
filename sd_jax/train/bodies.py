"""Solids that rays can hit: cube, sphere, cylinder and cone, each standing somewhere in the world.

A solid is where some slabs and at most one quadric overlap, so that a ray is inside it for one span of its length (for
slabs: Kay and Kajiya 1986). The world has x to the right, y up and z towards the viewer.
"""

from __future__ import annotations

import dataclasses

import numpy as np

# Radius (half the side, for a cube) and height of a solid of unit size.
RADIUS = {"cube": 0.46, "sphere": 0.58, "cylinder": 0.45, "cone": 0.58}
HEIGHT = {"cube": 0.92, "sphere": 1.16, "cylinder": 1.02, "cone": 1.22}


@dataclasses.dataclass(frozen=True)
class Body:
    """A solid in the world."""

    colour: np.ndarray  # float32 [3], 0 ... 1
    shape: str
    base: np.ndarray  # [3], the middle of its underside
    scale: float
    yaw: float  # about the vertical, in radians

    @property
    def radius(self) -> float:
        """Of the vertical cylinder that just holds it."""
        return RADIUS[self.shape] * self.scale * (2**0.5 if self.shape == "cube" else 1.0)

    @property
    def height(self) -> float:
        return HEIGHT[self.shape] * self.scale

    @property
    def reach(self) -> float:
        """Radius of the ball about half height that holds it."""
        return self.height / 2 if self.shape == "sphere" else float(np.hypot(self.radius, self.height / 2))


def span(solid: Body, origin: np.ndarray, ray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays are inside the solid: (near, far) in lengths of the ray, near >= far for those that miss.

    Origins [3, ...] and rays [3, ...] broadcast. Rays must be flatter than a cone's side (64.5 degrees): steeper
    ones are inside the double cone twice.
    """
    (ox, oy, oz), (dx, dy, dz) = _local(solid, origin, solid.base), _local(solid, ray)
    r, h = RADIUS[solid.shape], HEIGHT[solid.shape]
    if solid.shape == "sphere":
        oy = oy - r
        return _quadric(dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - r * r)
    spans = [_slab(oy, dy, 0.0, h)]
    if solid.shape == "cube":
        spans += [_slab(ox, dx, -r, r), _slab(oz, dz, -r, r)]
    elif solid.shape == "cylinder":
        spans += [_quadric(dx * dx + dz * dz, ox * dx + oz * dz, ox * ox + oz * oz - r * r)]
    else:
        k, below = (r / h) ** 2, h - oy
        a, b = dx * dx + dz * dz - k * dy * dy, ox * dx + oz * dz + k * below * dy
        spans += [_quadric(a, b, ox * ox + oz * oz - k * below * below)]
    near, far = spans[0]
    for n, f in spans[1:]:
        near, far = np.maximum(near, n), np.minimum(far, f)
    return near, far


def _slab(o: np.ndarray, d: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Where low < o + t d < high."""
    a, b = (low - o) / d, (high - o) / d
    return np.minimum(a, b), np.maximum(a, b)


def _quadric(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a t^2 + 2 b t + c < 0, for a > 0."""
    square = b * b - a * c
    root = np.sqrt(np.maximum(square, 0))
    return (-b - root) / a, (root - b) / a


def normal_and_edge(solid: Body, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outward unit normals [3, N] at visible surface points [3, N], and extra brightness [N] along the edges."""
    x, y, z = _local(solid, point, solid.base)
    r, h = RADIUS[solid.shape], HEIGHT[solid.shape]
    edge = np.zeros_like(x)
    if solid.shape == "sphere":
        nx, ny, nz = x, y - r, z
    elif solid.shape == "cone":
        nx, ny, nz = x, np.hypot(x, z) * r / h, z
    elif solid.shape == "cylinder":
        top = y > h - 1e-3
        nx, ny, nz = np.where(top, 0, x), top * 1.0, np.where(top, 0, z)
        edge = 0.1 * ((np.hypot(x, z) > 0.93 * r) & (y > 0.93 * h))
    else:
        local = np.stack([x / r, 2 * y / h - 1, z / r])
        face = np.abs(local).argmax(0)
        nx, ny, nz = ((face == axis) * np.sign(local[axis]) for axis in range(3))
        edge = 0.1 * (np.sort(np.abs(local), 0)[1] > 0.92)
    return unit(np.stack(_turn(nx, ny, nz, -solid.yaw))), edge


def unit(v: np.ndarray) -> np.ndarray:
    """Vectors [3, ...] at length 1."""
    x, y, z = v
    return v / np.sqrt(x * x + y * y + z * z + 1e-20)


def _local(solid: Body, vector: np.ndarray, origin: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """A point (with ``origin``) or direction in the solid's own frame and size."""
    x, y, z = vector if origin is None else (v - np.float32(o) for v, o in zip(vector, origin, strict=True))
    scale = np.float32(1 / solid.scale)
    return _turn(x * scale, y * scale, z * scale, solid.yaw)


def _turn(x: np.ndarray, y: np.ndarray, z: np.ndarray, yaw: float) -> tuple[np.ndarray, ...]:
    c, s = np.float32(np.cos(yaw)), np.float32(np.sin(yaw))
    return c * x - s * z, y, s * x + c * z
