"""The captioned scenes: seeds, splits, words, and what the pictures must be for hue to tell solids from ground."""

import itertools

import numpy as np
import pytest

from sd_jax.evaluate import compositional
from sd_jax.train import scenes
from sd_jax.train.scenes import Scene, Solid
from sd_jax.types import RequestError


def every_pair():
    """All scenes of two solids."""
    solids = [Solid(c, s) for c, s in itertools.product(scenes.COLOURS, scenes.SHAPES)]
    for a, b, relation in itertools.product(solids, solids, scenes.RELATIONS):
        if a.colour != b.colour:
            yield Scene((a, b), relation)


def test_an_example_depends_on_its_seed_and_index_alone():
    images, captions = scenes.dataset(6, seed=3)
    again, captions_again = scenes.dataset(3, seed=3, start=2)
    assert images.shape == (6, 64, 64, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images[2:5], again)
    assert captions[2:5] == captions_again
    others, _ = scenes.dataset(6, seed=4)
    assert (images != others).any((1, 2, 3)).all()


def test_a_tenth_is_held_out_together_with_its_mirror_images():
    mirror = {
        "to the left of": "to the right of",
        "to the right of": "to the left of",
        "in front of": "behind",
        "behind": "in front of",
    }
    held = []
    for scene in every_pair():
        held.append(scenes.held_out(scene))
        if scene.relation in mirror:
            assert scenes.held_out(Scene(scene.solids[::-1], mirror[scene.relation])) == held[-1]
    assert 0.08 < np.mean(held) < 0.12  # 2688 independent choices of one in ten: a standard deviation is 0.006


def test_the_famous_scene_is_never_trained_on():
    scene = Scene((Solid("red", "cube"), Solid("blue", "sphere")), "on top of")
    assert scenes.caption(scene) == scenes.NEVER_SEEN == "a red cube on top of a blue sphere"
    assert scenes.held_out(scene)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_split_holds_its_own_scenes_only(split):
    drawn = [scenes.sample_scene(np.random.default_rng((0, i)), split) for i in range(300)]
    assert {scenes.held_out(scene) for scene in drawn} == {split == "heldout"}


def test_scenes_are_as_varied_as_announced():
    drawn = [scenes.sample_scene(np.random.default_rng((1, i))) for i in range(600)]
    singles = [scene for scene in drawn if len(scene.solids) == 1]
    assert abs(len(singles) / len(drawn) - scenes.SINGLE) < 0.08  # four standard deviations
    assert {s.solids[0].size for s in singles} == {"", "small", "large"}
    assert {s.relation for s in drawn} == {"", *scenes.RELATIONS}
    assert {(solid.colour, solid.shape) for s in drawn for solid in s.solids} == set(
        itertools.product(scenes.COLOURS, scenes.SHAPES)
    )
    assert all(s.solids[0].colour != s.solids[1].colour for s in drawn if len(s.solids) == 2)


def test_captions_are_english():
    assert scenes.caption(Scene((Solid("orange", "cone"),))) == "an orange cone"
    assert scenes.caption(Scene((Solid("orange", "cone", "large"),))) == "a large orange cone"
    scene = Scene((Solid("gray", "cube"), Solid("orange", "sphere")), "behind")
    assert scenes.caption(scene) == "a gray cube behind an orange sphere"


def test_every_word_and_wording_is_in_all_captions():
    every = list(scenes.all_captions())
    words = {word for caption in every for word in caption.split()}
    _, drawn = zip(*(scenes.dataset(1, seed=9, size=8, start=i) for i in range(300)), strict=True)
    assert {word for (caption,) in drawn for word in caption.split()} <= words
    assert all(caption == caption.lower() for caption in every)
    for wording in itertools.chain(scenes.RELATIONS, *scenes.RELATIONS.values()):
        assert any(f" {wording} a" in caption for caption in every)


def canonical_wording(caption: str) -> str:
    claim = compositional.parse(caption)
    solids = tuple(Solid(colour, shape, size) for size, colour, shape in claim.solids)
    return scenes.caption(Scene(solids, claim.relation))


def test_benchmark_captions_keep_to_their_groups():
    groups = scenes.benchmark_captions(40, seed=5)
    assert [len(captions) for captions in groups.values()] == [40] * 4
    held = {scenes.caption(scene) for scene in every_pair() if scenes.held_out(scene)}
    one, seen, never, famous = (set(map(canonical_wording, captions)) for captions in groups.values())
    assert not held & (one | seen) and held >= never | famous
    assert groups["two objects, never seen"] != [canonical_wording(c) for c in groups["two objects, never seen"]]
    assert groups == scenes.benchmark_captions(40, seed=5)


@pytest.mark.parametrize("size", [64, 128])
def test_ground_is_bright_and_neutral_and_solids_stay_inside(size):
    images, _ = scenes.dataset(40, seed=11, split="any", size=size)
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1).astype(int)
    assert border.min() > 0.62 * 255  # shadows on the ground are lighter than anything gray
    assert (border.max(-1) - border.min(-1)).max() < 0.05 * 255
    assert (images.min((1, 2)) < 0.6 * 255).any(1).all()  # and something stands on it


def test_a_gray_solid_is_darker_than_shadows():
    for i, shape in enumerate(scenes.SHAPES):
        image = scenes.render(Scene((Solid("gray", shape, "large"),)), np.random.default_rng(i))
        value = image.max(-1) / 255
        assert ((value > 0.6) & (value < 0.66)).mean() < 0.03  # a gap in lightness, but for the solid's edge
        assert (value < 0.6).mean() > 0.1


def test_a_cube_shows_three_faces():
    """The three commonest shades of a cube are far apart and cover it."""
    image = scenes.render(Scene((Solid("red", "cube", "large"),)), np.random.default_rng(2)).astype(int)
    red = image[(image[..., 0] - image[..., 1]) > 60][:, 0]
    counts = np.bincount(red // 8)
    shades = np.sort(counts.argsort()[-3:]) * 8
    assert (np.diff(shades) >= 24).all()
    assert np.sort(counts)[-3:].sum() > 0.6 * len(red)


def test_an_unknown_split_is_named():
    with pytest.raises(RequestError, match="'test' is not one of train, heldout, any"):
        scenes.dataset(1, seed=0, split="test")
