"""One property over generated conversations: the supervised tokens of each assistant turn are its text, as the
template writes it, and its end-of-turn token; every other token is context. Or the pair is dropped for a named reason.

What a template writes comes from the tables of the mask tests, which were derived from the templates' sources by hand.
"""

from functools import partial

import pytest
from conversations import assistant, user
from generated import check_many, holds, ours, run
from hypothesis import Phase
from mask_checks import byte_ranges
from segments import as_stop, native, searched
from templates import ROWS, chat_template

from mdpo.types import Pair

TEMPLATES = {  # name -> the kind of tokenizer that it is tried with in the fast tier
    "qwen2_5": "byte",
    "qwen3": "metaspace",
    "qwen3_5_think": "letters",
    "llama3_1": "byte",
    "gemma3": "metaspace",
    "gemma4": "byte",
    "gptoss": "letters",
    "glm4moe": "byte",
    "deepseekv3": "metaspace",
    "phi3": "always",
    "lfm2_2_5": "letters",
    "cohere2": "byte",
    "nemotron_3_nano": "letters",
    "idefics3": "metaspace",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_supervised_is_what_the_policy_said(name):
    check_many(name, chat_template(name, TEMPLATES[name]), 15)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte", "letters", "metaspace", "always"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_supervised_is_what_the_policy_said_many_times(name, kind):
    check_many(name, chat_template(name, kind), 100)


# ---- negative controls: wrong mask makers


def by_characters(template, text: str, flags: list[int]):
    """Ids and a mask from flags of characters."""
    ids = template.tokenizer(text, add_special_tokens=False)["input_ids"]
    data = b"".join(bytes([flag]) * len(c.encode()) for c, flag in zip(text, flags, strict=True))
    return ids, [int(1 in data[start:end]) for start, end in byte_ranges(template.tokenizer, ids, text)]


def by_search(flags_of, name, template, pair):
    texts = [
        template.tokenizer.apply_chat_template(native(name, side), tools=pair.tools, tokenize=False)
        for side in (pair.chosen, pair.rejected)
    ]
    sides = zip(texts, (pair.chosen, pair.rejected), strict=True)
    return [[by_characters(template, text, flags_of(name, text, side))] for text, side in sides]


def of_contents(name, text, messages):
    """Each assistant's content where it is first found, with the end of turn behind it."""
    flags = [0] * len(text)
    for message in messages:
        if message["role"] == "assistant" and (start := text.find(message["content"].strip())) >= 0:
            end = start + len(message["content"].strip()) + len(as_stop(name))
            flags[start:end] = [1] * len(flags[start:end])
    return flags


def of_headers(name, text, messages):
    """From behind each header to the next end of turn."""
    return searched(text, ROWS[name].header, as_stop(name))


def without_stop(name, template, pair):
    """Ours, but the last token of each turn."""
    return [
        [(ids, [m and int(mask[t + 1 : t + 2] == [1]) for t, m in enumerate(mask)]) for ids, mask in side]
        for side in ours(name, template, pair)
    ]


def all_that_follows(name, template, pair):
    """Everything behind the prompt, tool output and later questions included."""
    return [
        [(ids, [int(any(mask[: t + 1])) for t in range(len(mask))]) for ids, mask in side]
        for side in ours(name, template, pair)
    ]


WRONG = {
    "contents by search": partial(by_search, of_contents),
    "headers by search": partial(by_search, of_headers),
    "no end of turn": without_stop,
    "all that follows": all_that_follows,
}


@pytest.mark.parametrize("maker", WRONG)
@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1"])
def test_a_wrong_mask_fails(name, maker):
    with pytest.raises(AssertionError):
        run(name, chat_template(name, "letters"), 40, WRONG[maker], phases=[Phase.generate])


@pytest.mark.parametrize("maker", ["contents by search", "headers by search"])
def test_it_looks_right_in_good_weather(maker):
    """So that it is the generated conversations that find the fault."""
    prompt = [user("What is 3 * 4?")]
    pair = Pair([*prompt, assistant("It is 12.")], [*prompt, assistant("It is 7.")], 1)
    assert holds("qwen2_5", chat_template("qwen2_5", "letters"), pair, WRONG[maker])
