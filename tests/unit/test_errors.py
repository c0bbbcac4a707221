"""The `key` of an error: what its message is about, which tests compare in place of sentences."""

import ast
import asyncio
import copy
import os
import pickle
import re
import signal

import pytest
from errors import dropped, refused
from repository import ROOT

from mdpo.errors import DropPair, Preempted, UserError
from mdpo.runs import preemption

KEYS = {
    "beta: -0.1 is out of range; give a number > 0.": "beta",
    "recipe.yaml:3: beta: -0.1 is out of range; give a number > 0.": "beta",
    "--beta: -0.1 is out of range; give a number > 0.": "beta",
    "'x' is no file name here": "",  # no key and no subject: such a message is given one
    "dataset file pairs.jsonl: line 3 is not a JSON object.": "dataset file",
    "The merged model does not have the adapter's log-probs.": "merged model",
    "HF_DATASETS_CACHE: x, which holds tokenized rows, cannot be written to.": "HF_DATASETS_CACHE",
    "q.jsonl:2: an answer is empty: ''.": "answer",
    "dataset 'a/b' has none of the splits ['train'].": "dataset",
    "base model 'x' cannot be loaded: no such file. Give its folder: --base.": "base model",
    "loss_type: 'x' needs MDPOConfig.": "loss_type",
    "resume_from_checkpoint: x is not a folder.": "resume_from_checkpoint",
    "step 3: the loss of row 5 is not finite\nmargin: 3": "step",
}
REASONS = {
    "over-long": "over-long",
    "chosen, message 3: content part {type: image}": "content part",
    "rejected: empty or missing content": "empty or missing content",
    "message 2: tool call without a name": "tool call without a name",
    "prompt mismatch: a side begins with the prompt's question": "prompt mismatch",
    "not a pair: its columns are a, b": "not a pair",
    'a message\'s weight is "x", not a number': "a message's weight",
    "both prompt and messages, which differ: keep one": "both prompt and messages",
    "tool calls are not JSON": "tool calls",
    "score_chosen is a text, not a finite number": "score_chosen",
}


@pytest.mark.parametrize("message", KEYS)
def test_the_key_of_a_message(message):
    assert UserError(message).key == KEYS[message]
    assert UserError(message, key="other").key == "other" and str(UserError(message, key="other")) == message


@pytest.mark.parametrize("reason", REASONS)
def test_the_key_of_a_reason(reason):
    assert DropPair(reason).key == REASONS[reason]
    assert DropPair(reason, key="other").key == "other"


@pytest.mark.parametrize("error", [UserError("beta: no", key="k"), DropPair("over-long", key="k")])
def test_errors_travel_between_processes_with_their_key(error):
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(twin), str(twin), twin.key) == (type(error), str(error), "k")


# ---- tests assert keys and data; sentences stand in tests/cases

OURS = re.compile(r"\b(UserError|DropPair|Unread)\b")
OF_ERROR = re.compile(r"str\(\w+\.value\)")
MOST = 4  # words of prose: a name, a value or two of them beside a few words are data
PROSE = re.compile(r"(?<![\w`'\"./\\-])[a-z]{2,}(?![\w`'\"./=:\\-])")


def text_of(node: ast.expr) -> str:
    """The constant parts of a text, without what is put into it."""
    parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return " {} ".join(part for part in parts if isinstance(part, str))


def sentences(source: str) -> list[str]:
    """The texts of more than MOST words of prose that assertions on our errors compare, or on `str(error.value)`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        whole = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        whole += [node.func.value, *node.args] if isinstance(node, ast.Call) and hasattr(node.func, "value") else []
        if any(OF_ERROR.fullmatch(ast.unparse(part)) for part in whole):
            found += map(text_of, whole)
    for call in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]:
        name = ast.unparse(call.func).rpartition(".")[2]
        if name == "raises" and OURS.search(" ".join(map(ast.unparse, call.args))):
            found += [text_of(keyword.value) for keyword in call.keywords if keyword.arg == "match"]
        elif name in ("refused", "dropped"):
            found += [text_of(detail) for detail in call.args[1:]]
    return [text for text in found if len(PROSE.findall(text)) > MOST]


def test_tests_compare_keys_and_data_not_sentences():
    files = [path for path in (ROOT / "tests").rglob("*.py") if "cases" not in path.relative_to(ROOT).parts]
    assert len(files) > 100
    assert {str(path): found for path in files if (found := sentences(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("with pytest.raises(UserError, match='the weights were not written as a whole'): f()", 1),
        ("with raises((KeyError, errors.DropPair), match=f'a {x} that is not what we want'): f()", 1),
        ("with refused('weights', folder, 'the weights were not written as a whole'): f()", 1),
        ("with errors.dropped('tools', f'the {name} are not text but something else'): f()", 1),
        ("assert str(error.value) == 'no pair is left of all those rows'", 1),
        ("assert str(error.value).startswith(f'{x}: there is none of them in it')", 1),
        ("assert 'no pair is left' in str(error.value) and error.value != 'of another kind in all its own words'", 0),
        ("with pytest.raises(UserError, match='^beta: -0.1 is out of range'): f()", 0),
        ("with pytest.raises(KeyError, match='of another library, in all its own words'): f()", 0),
        ("with refused('data_collator', 'input_ids, attention_mask and completion_mask'): f()", 0),
    ],
)
def test_a_sentence_in_an_assertion_would_be_seen(source, found):
    assert len(sentences(source)) == found


def test_what_is_refused_by_another_key_or_without_its_data_fails():
    message = "beta: -0.1 is out of range; give a number > 0."
    with refused("beta", -0.1, "> 0"):
        raise UserError(message)
    with dropped("over-long"):
        raise DropPair("over-long")
    for key, detail, error in (
        ("gamma", "-0.1", UserError(message)),
        ("beta", "-0.2", UserError(message)),
        ("beta", "-0.1", type("Other", (UserError,), {})(message)),
    ):
        with pytest.raises(AssertionError), refused(key, detail):
            raise error
    with pytest.raises(DropPair), refused("over-long"):
        raise DropPair("over-long")


def test_a_signal_in_a_callback_of_asyncio_ends_what_waits(monkeypatch):
    """asyncio raises SystemExit alone out of its loop; every other BaseException of a callback is logged and gone."""
    monkeypatch.setattr(preemption, "_request", preemption._request)  # put back: the request would meet other tests

    async def interrupted(stop):
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        asyncio.get_running_loop().call_soon(stop)
        await asyncio.sleep(0.2)

    with preemption.listening(), pytest.raises(Preempted):
        asyncio.run(interrupted(lambda: os.kill(os.getpid(), signal.SIGUSR1)))

    class Lost(BaseException):
        pass

    def lost():
        raise Lost

    asyncio.run(interrupted(lost))  # which is what Preempted must not be
