"""`evaluate` warns of teachers that guess, and of no others, however few the classes are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferkd_data.evaluate import _choose, _spread, evaluate
from ferkd_data.images import open_source
from ferkd_data.labels.statistics import near_chance


@pytest.mark.parametrize(("classes", "teacher"), [(2, "brightness_of_two"), (3, "brightness_of_three")])
def test_a_teacher_of_few_classes_that_is_always_right_is_not_near_chance(
    classes, teacher, tmp_path, make_greys, tiny_teachers
):
    found = evaluate(make_greys(tmp_path, classes), teachers=[f"python:ferkd_tiny_teachers:{teacher}"])
    assert found.scores[0].top1 == 1 and found.warnings == ()


def test_a_teacher_that_guesses_one_of_two_classes_is_near_chance(tmp_path, make_greys, tiny_teachers):
    found = evaluate(
        make_greys(tmp_path, 2), teachers=["python:ferkd_tiny_teachers:brightness_of_two_but_dark_alone"], diagnose=0
    )
    assert found.scores[0].top1 == 0.5 and "near chance" in " ".join(found.warnings)


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10, 100, 1000, 21841])
def test_near_chance_lies_between_chance_and_what_a_teacher_can_reach(classes):
    assert 1 / classes < near_chance(classes) <= min(3 / classes, 0.6)


@pytest.mark.parametrize("order", [lambda number: number % 5, lambda number: number // 40])
def test_all_classes_are_evaluated_in_whatever_order_they_come(order):
    """Of five classes that take turns, every fifth image is of one class."""
    chosen = [order(number) for number in _spread(iter(range(200)), 200, 40)]  # type: ignore[arg-type]
    assert len(chosen) == 40 and set(chosen) == set(range(5))


@given(st.integers(0, 500), st.none() | st.integers(1, 600))
def test_as_many_are_chosen_as_were_asked_for(length, limit):
    chosen: list[int] = list(_spread(iter(range(length)), length, limit))  # type: ignore[arg-type]
    assert len(chosen) == (length if limit is None else min(length, limit)) == len(set(chosen))
    # One of each part: never more than two parts apart.
    assert all(0 < b - a < 2 * length / len(chosen) + 1 for a, b in itertools.pairwise(chosen))


def test_normalisations_are_tried_on_images_of_all_classes(tmp_path, make_greys, tiny_teachers):
    """They were tried on the first images alone: of the first class, which a teacher that sees all too dark names."""
    greys = make_greys(tmp_path, 2, each=64)
    spec = "python:ferkd_tiny_teachers:brightness_of_two?mean=1&std=1"
    assert [ref.target for ref in _choose(open_source(greys), None)[0]] == [0] * 64 + [1] * 64
    warnings = " ".join(evaluate(greys, teachers=[spec], diagnose=32).warnings)
    assert "gets 16 of 32 images right with the given settings, but 32 with" in warnings
