"""mdpo/rollouts/answers.py: which box counts, and what the right answer is."""

import pytest
from errors import refused

from mdpo.rollouts.answers import gold_answer, last_boxed

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


def test_gold_answers():
    assert gold_answer(42) == "42" and gold_answer(0.5) == "0.5" and gold_answer(" 42 ") == "42"
    assert gold_answer("She has 3 * 14 = <<3*14=42>>42.\n#### 1,042") == "1,042"
    assert gold_answer(r"Thus $x=\boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert gold_answer(r"$\frac{1}{2}$") == r"\frac{1}{2}"
    for wrong in (True, None, [1], "", "#### ", r"\boxed{}"):
        with refused("answer"):
            gold_answer(wrong)
