"""The judge, held against pictures whose truth is known: fresh renders, clean and degraded, and wrong captions."""

import dataclasses

import numpy as np
import pytest

from sd_jax.evaluate import compositional
from sd_jax.evaluate.compositional import Claim, Verdict, judge, parse
from sd_jax.train import scenes
from sd_jax.types import RequestError


def claim_of(scene):
    return Claim(tuple((s.size, s.colour, s.shape) for s in scene.solids), scene.relation)


@pytest.fixture(scope="module")
def renders():
    """240 pairs (claim, picture), half of them of the held-out split."""
    pairs = []
    for i in range(240):
        rng = np.random.default_rng((7, i))
        scene = scenes.sample_scene(rng, "heldout" if i % 2 else "train")
        pairs.append((claim_of(scene), scenes.render(scene, rng)))
    return pairs


def degrade(image, rng):
    """A blur of 0.7 pixels and a little noise: about what a small autoencoder does to a picture."""
    kernel = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 0.7**2))
    soft = np.pad(image.astype(float), ((2, 2), (2, 2), (0, 0)), mode="edge")
    for axis in (0, 1):
        soft = np.apply_along_axis(np.convolve, axis, soft, kernel / kernel.sum(), mode="valid")
    return (soft + rng.normal(0, 5, soft.shape)).clip(0, 255).round().astype(np.uint8)


def test_true_captions_are_accepted(renders):
    accepted = [judge(image, claim).everything for claim, image in renders]
    assert np.mean(accepted) >= 0.99  # 2,100 other renders: 99.7 %


def test_soft_and_noisy_pictures_are_judged_as_well(renders):
    rng = np.random.default_rng(0)
    accepted = [judge(degrade(image, rng), claim).everything for claim, image in renders[::5]]
    assert np.mean(accepted) > 0.95


def test_larger_pictures_are_judged_as_well():
    for i in range(12):
        rng = np.random.default_rng((8, i))
        scene = scenes.sample_scene(rng)
        assert judge(scenes.render(scene, rng, 128), claim_of(scene)).everything, scenes.caption(scene)


def swapped(claim):
    """(field of the verdict that must be False, a claim that is wrong in just that)."""
    (size, colour, shape), *rest = claim.solids
    other = {"cube": "cylinder", "cylinder": "cone", "cone": "sphere", "sphere": "cube"}[shape]
    yield "shapes", Claim(((size, colour, other), *rest), claim.relation)
    free = next(c for c in compositional.COLOURS if c not in {noun[1] for noun in claim.solids})
    yield "colours", Claim(((size, free, shape), *rest), claim.relation)
    if size:
        yield "size", Claim((({"small": "large", "large": "small"}[size], colour, shape),))
    if rest:
        yield "relation", Claim(claim.solids[::-1], claim.relation)
        yield "colours", Claim((claim.solids[0],))
        for relation in compositional.RELATIONS:
            if relation != claim.relation:
                yield "relation", Claim(claim.solids, relation)
    else:
        yield "colours", Claim((*claim.solids, ("", free, "cube")), "behind")


def test_swapped_claims_are_refused(renders):
    for claim, image in renders[::9]:
        for field, wrong in swapped(claim):
            assert not getattr(judge(image, wrong), field), (claim, wrong)


def test_shapes_swapped_between_the_two_are_refused(renders):
    for claim, image in renders[::5]:
        if claim.relation and claim.solids[0][2] != claim.solids[1][2]:
            (_, c1, s1), (_, c2, s2) = claim.solids
            assert not judge(image, Claim((("", c1, s2), ("", c2, s1)), claim.relation)).shapes


def test_no_picture_of_solids_has_nothing_right():
    nothing = Verdict(False, False, False, False)
    claim = parse("a red cube on top of a blue sphere")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for image in (np.full((64, 64, 3), 230, np.uint8), np.zeros((64, 64, 3), np.uint8), noise):
        assert judge(image, claim) == nothing


def test_two_solids_of_one_colour_are_not_one_solid():
    image = np.full((64, 64, 3), 235, np.uint8)
    image[20:40, 5:25] = image[20:40, 35:55] = (220, 30, 35)
    assert not judge(image, parse("a red cube")).colours
    image[20:40, 35:55] = 235
    assert judge(image, parse("a red cube")).colours


def test_a_silhouette_of_no_solid_has_no_shape():
    cross = np.zeros((64, 64), bool)
    cross[28:36, 14:50] = cross[14:50, 28:36] = True
    assert compositional.fit(cross, np.zeros_like(cross)).shape == ""


def test_every_caption_is_understood():
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = scenes.sample_scene(rng)
        assert parse(scenes.caption(scene, rng)) == claim_of(scene)
    for relation, wordings in scenes.RELATIONS.items():
        for wording in wordings:
            assert parse(f"there is a red cube {wording} an orange cone").relation == relation
    assert all(parse(caption) for caption in scenes.all_captions())


@pytest.mark.parametrize("caption", ["a red dog", "a red cube near a blue sphere", "a red cube behind", ""])
def test_other_captions_are_refused_with_what_is_known(caption):
    with pytest.raises(RequestError, match="is not understood: write one solid"):
        parse(caption)


def test_the_judge_knows_the_renderers_words():
    assert set(compositional.COLOURS) == set(scenes.COLOURS)
    assert set(compositional.SHAPES) == set(scenes.SHAPES)
    assert set(compositional.RELATIONS) == set(scenes.RELATIONS)


def paint(captions, seeds):
    """A perfect generator, but that it puts purple for gray."""
    images = []
    for caption, seed in zip(captions, seeds, strict=True):
        claim = parse(caption)
        solids = tuple(scenes.Solid("purple" if c == "gray" else c, s, size) for size, c, s in claim.solids)
        images.append(scenes.render(scenes.Scene(solids, claim.relation), np.random.default_rng(seed)))
    return np.stack(images)


def test_evaluate_counts_by_group_and_by_relation():
    asked = []

    def generate(captions, seeds):
        asked.extend(zip(captions, seeds, strict=True))
        return paint(captions, seeds)

    groups = {
        "one": ["a red cube", "a gray cube", "a small blue sphere", "a cyan cone"],
        "two": ["a red cube behind a green sphere", "a gray cone behind a red cube"],
        "famous": ["a red cube on top of a blue sphere"] * 3,
    }
    counts = compositional.evaluate(generate, groups, seed=10, batch=3)
    assert asked == list(zip(sum(groups.values(), []), range(10, 19), strict=True))
    assert list(counts) == ["one", "two", "famous", "behind"]
    assert counts["one"] | {"relation": 0} == {
        "images": 4,
        "colours": 75,
        "+ shapes": 75,
        "relation": 0,
        "everything": 75,
    }
    assert np.isnan(counts["one"]["relation"])
    half = {"images": 2, "colours": 50, "+ shapes": 50, "relation": 100, "everything": 50}
    assert counts["two"] == counts["behind"] == half
    assert counts["famous"]["everything"] == 100

    lines = compositional.table(counts).splitlines()
    assert lines[0] == "| | images | colours | + shapes | relation | everything |"
    assert lines[2] == "| one | 4 | 75.0 | 75.0 | - | 75.0 |"
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1


def test_evaluate_refuses_a_caption_before_it_generates():
    def never(captions, seeds):
        raise AssertionError("generated")

    with pytest.raises(RequestError, match="a blue dog"):
        compositional.evaluate(never, {"one": ["a red cube", "a blue dog"]})


def test_everything_needs_every_field():
    fields = [field.name for field in dataclasses.fields(Verdict)]
    right = dict.fromkeys(fields, True)
    assert Verdict(**right).everything
    assert not any(Verdict(**{**right, field: False}).everything for field in fields)
