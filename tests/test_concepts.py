"""Generated concepts: the same bytes everywhere, phrases that name what they say, and their files."""

import hashlib

import numpy as np
import pytest

from evsam_lib.data.concepts import FORMS, ConceptScene, concept_scene, vocabulary

SIZE = (112, 128)

# Bytes of concept_scene(0, 0..1, size=SIZE). A change here means: raise concepts.VERSION, train the mini teacher again.
PINNED = [
    "696d115da4769bbe7ad3e9bd04c486b42b3156bd8e9a9b4417eaa247380b1626",
    "cbb4724034d39111ecadf52d83835a089fbd89f3f0121643ba61254418eed6ec",
]


def digest(made: ConceptScene) -> str:
    found = hashlib.sha256(made.image.tobytes() + made.masks.tobytes())
    found.update(repr(made.phrases).encode())
    return found.hexdigest()


@pytest.fixture(scope="module")
def scenes() -> list[ConceptScene]:
    return [concept_scene(3, index, size=SIZE) for index in range(40)]


@pytest.mark.parametrize("index", range(2))
def test_bytes_are_pinned(index):
    assert digest(concept_scene(0, index, size=SIZE)) == PINNED[index]


def test_an_instance_is_what_its_words_say(scenes):
    for made in scenes:
        assert made.image.shape == (*SIZE, 3) and made.image.dtype == np.uint8
        assert not (made.masks.sum(0) > 1).any(), "visible parts are disjoint"
        assert made.masks.any((1, 2)).all()
        for instance in made.instances:
            inside = made.image[instance.mask].mean(0)
            if instance.item.texture == "plain" and instance.item.colour in ("red", "green", "blue"):
                assert inside.argmax() == ("red", "green", "blue").index(instance.item.colour)


def test_a_phrase_names_all_its_instances_and_no_other(scenes):
    words = {"positive": 0, "hard": 0, "absent": 0}
    for made in scenes:
        for phrase in made.phrases:
            words[phrase.kind] += 1
            asked = set(phrase.text.split()) - {"thing"}
            fit = [
                number
                for number, found in enumerate(made.instances)
                if asked <= {found.item.form, found.item.colour, found.item.texture}
            ]
            assert list(phrase.instances) == fit
            assert bool(fit) == (phrase.kind == "positive")
    assert words["positive"] == words["hard"] + words["absent"]


def test_a_hard_negative_is_one_word_off(scenes):
    for made in scenes:
        items = [{found.item.form, found.item.colour, found.item.texture} for found in made.instances]
        for phrase in made.phrases:
            if phrase.kind == "hard":
                asked = set(phrase.text.split()) - {"thing"}
                assert any(len(asked - item) == 1 for item in items)


def test_the_vocabulary_holds_every_phrase_and_sizes_run_far(scenes):
    assert {phrase.text for made in scenes for phrase in made.phrases} <= set(vocabulary())
    assert len(vocabulary()) == len(set(vocabulary())) == 4 * 7 * (len(FORMS) + 1)
    areas = sorted(mask.sum() for made in scenes for mask in made.masks)
    assert areas[-1] > 30 * areas[0]


@pytest.mark.parametrize("wrong", [(-1, 0, SIZE), (0, -1, SIZE), (0, 0, (32, 200))])
def test_bad_input_is_named(wrong):
    seed, index, size = wrong
    with pytest.raises(ValueError, match="must be"):
        concept_scene(seed, index, size=size)
