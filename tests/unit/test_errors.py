"""The `key` of an error: what its message is about, which tests compare in place of sentences."""

import copy
import pickle

import pytest

from mdpo.errors import DropPair, UserError

KEYS = {
    "beta: -0.1 is out of range; give a number > 0.": "beta",
    "recipe.yaml:3: beta: -0.1 is out of range; give a number > 0.": "beta",
    "--beta: -0.1 is out of range; give a number > 0.": "beta",
    "'x' is no file name here": "",  # no key and no subject: such a message is given one
    "dataset file pairs.jsonl: line 3 is not a JSON object.": "dataset file",
    "The merged model does not have the adapter's log-probs.": "merged model",
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
