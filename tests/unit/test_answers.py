"""mdpo/rollouts/answers.py: which box counts, and when two answers are the same."""

import pytest
from errors import refused

from mdpo.rollouts.answers import gold_answer, is_right, last_boxed

BOXES = {
    r"It is \boxed{42}.": "42",
    r"\boxed{1}, no: $\boxed{\frac{1}{2}}$": r"\frac{1}{2}",
    r"\boxed{\{1, {2}\}} apples": r"\{1, {2}\}",
    r"\boxed{\left\{x : x^{2^{n}} > 1\right\}}": r"\left\{x : x^{2^{n}} > 1\right\}",
    r"\boxed {7}": "7",
    r"\boxed{ 7 }": "7",
    r"\boxed{}": "",
    r"\fbox{7}": None,
    r"\boxed{7": None,
    r"\boxed{5} and \boxed{6": "5",  # the last one that is closed
    r"\boxed{\boxed{5}}": "5",
    "boxed{7}": None,
    "The answer is 42.": None,
    "": None,
}


@pytest.mark.parametrize("text", BOXES)
def test_last_box(text):
    assert last_boxed(text) == BOXES[text]


SAME = [
    ("1/2", r"\frac{1}{2}"), ("0.5", r"\frac{1}{2}"), (r"\dfrac12", "0.5"), ("1,000", "1000"), ("1000", "1,000"),
    (r"1\,000", "1000"), ("1 000 000", "1000000"), ("42", "42.0"), ("42.0", "42"), ("42.", "42"), ("1e3", "1000"),
    ("1.5e-3", "0.0015"), (r"\{1, 2\}", r"\{2, 1\}"), ("1, 2", "2, 1"), ("(1, 2)", "(1,2)"), (r"\$18", "18"),
    (r"18\text{ dollars}", "18"), ("x = 5", "5"), (r"\sqrt{18}", r"3\sqrt{2}"), ("x(x+2)", "x^2+2x"),
    (r"\text{Monday}", "monday"), ("-3", "-3.0"), (r"2\pi", r"\pi \cdot 2"),
]  # fmt: skip
DIFFERENT = [
    ("41", "42"), ("-42", "42"), ("4.2", "42"), ("1/3", "1/2"), ("0.33", r"\frac{1}{3}"), ("10000", "1,000"),
    (r"\{1, 2\}", r"\{1, 3\}"), ("1", "1, 2"), ("1, 2", "1"), ("(1, 2)", "(2, 1)"), ("dog", "god"),
    ("Monday", "Friday"),
    (None, "42"), ("", "42"), ("x", "42"), ("12", "1 2"), ("1/0", "0"), (r"\frac{", "1"), ("true", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_the_same(answer, gold):
    assert is_right(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_different(answer, gold):
    assert not is_right(answer, gold)


def test_gold_answers():
    assert gold_answer(42) == "42" and gold_answer(0.5) == "0.5" and gold_answer(" 42 ") == "42"
    assert gold_answer("She has 3 * 14 = <<3*14=42>>42.\n#### 1,042") == "1,042"
    assert gold_answer(r"Thus $x=\boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert gold_answer(r"$\frac{1}{2}$") == r"\frac{1}{2}"
    for wrong in (True, None, [1], "", "#### ", r"\boxed{}"):
        with refused("answer"):
            gold_answer(wrong)
