"""`evaluate` warns of teachers that guess, and of no others, however few the classes are."""

from __future__ import annotations

import pytest

from ferkd_data.evaluate import evaluate
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
