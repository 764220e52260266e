"""Second moments in bf16 and 8 bits follow float32 ones; rounded to nearest they do not."""

import itertools

import pytest
from helpers import assert_same_bits

from studies import fidelity, report

ELEMENTS = 512


@pytest.mark.parametrize("rule", fidelity.OPTIMIZERS)
def test_states_follow_and_to_nearest_they_do_not(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "BEFORE", 500)
    monkeypatch.setattr(fidelity, "AFTER", 1500)
    subjects = fidelity.our_subjects(ELEMENTS, [rule], nearest=rule == "adamaxw")
    for name, columns in fidelity.measure(subjects, fidelity.Gradients(ELEMENTS)).items():
        state_format = "bf16" if "bf16" in name else "8bit"
        outside = []
        for column in fidelity.COLUMNS:
            low, high = fidelity.bounds(state_format, column)
            last = columns[column][-1]
            assert last.zeros == 0, (name, column)
            if not low <= last.geometric_mean <= high:
                outside.append((column, last))
        if name.endswith(fidelity.NEAREST):
            # A stalled state shows where the gradients fall, not before.
            falling = set(fidelity.COLUMNS) - set(fidelity.STATIONARY)
            assert {column for column, _ in outside} >= falling, (name, columns)
        else:
            assert not outside, name


@pytest.mark.parametrize("state_format", ["bf16", "8bit"])
@pytest.mark.parametrize("rule", fidelity.OPTIMIZERS)
def test_what_rounds_to_nearest_differs_in_nothing_else(rule: str, state_format: str) -> None:
    ours = fidelity.Ours(rule, state_format, ELEMENTS)
    dithered = fidelity.Recursion(rule, state_format, ELEMENTS, nearest=False)
    for grad in itertools.islice(fidelity.Gradients(ELEMENTS), 100):
        ours.step(grad)
        dithered.step(grad)
    assert_same_bits(dithered.second_moment(), ours.second_moment())


def test_the_page_has_what_was_measured() -> None:
    text = report.PAGE.read_text()
    assert report.updated(text) == text
