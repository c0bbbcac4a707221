"""Sides that are recorded sequences of token ids: trained on as they are, with a template and without; what is no such
sequence is dropped by name; their messages are compared, and decide nothing."""

import copy
import json

import pytest
import torch
from datasets import Dataset, IterableDataset
from errors import dropped, is_reason, refused
from odd_values import ODD
from tiny import CHATML, agent_rows, save_workshop, tokenizer_for, trl_template
from trainers import loss_and_gradients, mdpo_trainer

from mdpo.data.forms import look
from mdpo.data.groups import AnswerPairs, conversations_in, rows_of_two
from mdpo.data.recorded import read_sequences
from mdpo.data.rows import TRAILING, row_to_pair
from mdpo.data.tokenize import tokenize_dataset, tokenize_row, tokenize_stream
from mdpo.errors import DropPair
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.loss_mask import RenderSettings
from mdpo.masking.plain_texts import PlainText
from mdpo.masking.recorded import AS_RECORDED, NOT_COMPARED, OTHER_MASK, REPEATED, RETOKENIZED, differing
from mdpo.types import sequence_lengths, split

SETTINGS = RenderSettings(None)
A, B = agent_rows(2)
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_for(CHATML, "byte", eos="<|im_end|>")


@pytest.fixture(scope="module")
def bare():
    """The same tokenizer without a chat template."""
    bare = copy.deepcopy(tokenizer_for(CHATML, "byte", eos="<|im_end|>"))
    bare.chat_template = None
    return bare


def tokenized(row, tokenizer, settings=SETTINGS):
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else PlainText(tokenizer)
    return tokenize_row({"key": "k", **row}, 0, template, settings)


def kept(row, tokenizer, settings=SETTINGS):
    out = tokenized(row, tokenizer, settings)
    assert out["drop_reason"] == ""
    return out


def recorded(row, tokenizer, messages=True, **more):
    """The row as a server would have recorded it: a sequence a side, from what its messages are rendered to."""
    out = kept(row, tokenizer)
    recorded = {}
    for name in SIDES:
        ids, masks = (split(out[f"{name}_{part}"], sequence_lengths(out, name)) for part in ("ids", "mask"))
        sequences = [sequence(*both, **more) for both in zip(ids, masks, strict=True)]
        recorded[name] = ({"messages": row[name]} if messages else {}) | {"sequences": sequences}
    return recorded


def sequence(ids, mask, **more):
    return {"input_ids": ids, "assistant_masks": mask, **more}


def side(*sequences):
    return {"sequences": [sequence(*each) for each in sequences]}


GOOD, BAD = side(([5, 6, 7], [0, 1, 1])), side(([5, 8], [0, 1]))


# ------------------------------------------------------------------------------------------------------- as they are


def test_what_was_rendered_and_recorded_is_the_same_row(tokenizer):
    """In every way to write it: ids, masks, digest, prompt's key and all else."""
    plain, both, ids = kept(A, tokenizer), recorded(A, tokenizer), recorded(A, tokenizer, messages=False)
    assert kept(both, tokenizer) == plain
    ways = [
        {**both, "rejected": A["rejected"]},
        {**both, "chosen": A["chosen"]},
        {**both, "rejected": {"messages": A["rejected"], "sequences": None}},
        {"chosen": A["chosen"], "rejected": ids["rejected"]},
        {"chosen": ids["chosen"], "rejected": A["rejected"]},
        {"prompt": A["chosen"][:1], **ids},
        {"prompt": A["chosen"][:1], "chosen": ids["chosen"], "rejected": A["rejected"][1:]},
        {"question": A["chosen"][0]["content"], **ids},
        {"chosen_messages": both["chosen"], "rejected_messages": both["rejected"]},
        {name: json.dumps(value) for name, value in both.items()},
        {name: {**value, "sequences": json.dumps(value["sequences"])} for name, value in both.items()},
        {"prompt": A["chosen"][:1], "responses": [ids["rejected"], both["chosen"]], "rewards": [0, 1]},
        {"prompt": A["chosen"][:1], "completions": [{"rank": 1, "completion": ids["rejected"]},
                                                   {"rank": 0, "completion": ids["chosen"]}]},
    ]  # fmt: skip
    for row in ways:
        out = kept(row, tokenizer)
        assert out | {"margin": None} == plain, row
    swapped = {"chosen": both["rejected"], "rejected": both["chosen"]}
    assert kept(swapped, tokenizer)["digest"] != plain["digest"]


def test_ids_that_no_template_would_write(tokenizer, bare):
    """Three sequences by hand. Distinct tokens are the nodes of their trie: 5 6 7 | 8 behind 5 6 | 5 9."""
    row = {"chosen": side(([5, 6, 7], [0, 1, 1]), ([5, 6, 8], [0, 0, 1])), "rejected": side(([5, 9], [0, 1]))}
    for of in (tokenizer, bare):
        out = kept(row, of)
        assert (out["chosen_ids"], out["chosen_mask"]) == ([5, 6, 7, 5, 6, 8], [0, 1, 1, 0, 0, 1])
        assert (out["chosen_lengths"], out["rejected_lengths"], out["distinct"]) == ([3, 3], [], 5)
        assert (out["rejected_ids"], out["rejected_mask"], out["longest"]) == ([5, 9], [0, 1], 3)
        assert (out["chosen_breaks"], out["rejected_breaks"]) == ([AS_RECORDED], [])
        assert (out["chosen_weights"], out["remarks"], out["unread"], out["retokenized"]) == ([], [], [], [])
    one = {"chosen": side(([5, 6, 7, 5, 6, 8], [0, 1, 1, 0, 0, 1])), "rejected": row["rejected"]}
    assert kept(one, tokenizer)["digest"] != out["digest"]  # the same ids, cut otherwise


def test_datasets_with_and_without_a_chat_template(tokenizer, bare):
    rows = Dataset.from_list([{"key": f"r{i}", "weight": w, **recorded(row, tokenizer)}
                              for i, (row, w) in enumerate(((A, 2.0), (B, None)))])  # fmt: skip
    wanted, _ = tokenize_dataset(Dataset.from_list([A, B]), tokenizer, SETTINGS, "a")
    for of, remark in ((tokenizer, {}), (bare, {f"{NOT_COMPARED}: no chat template": ["r0", "r1"]})):
        out, counts = tokenize_dataset(rows, of, SETTINGS, "a")
        assert out["chosen_ids"] == wanted["chosen_ids"] and out["digest"] == wanted["digest"]
        assert (counts.kept_with, out["weight"], list(counts.unread)) == (remark, [2.0, None], [])
        stream, counts = tokenize_stream(IterableDataset.from_generator(lambda: iter(rows)), of, SETTINGS, "a")
        assert [row["digest"] for row in stream] == wanted["digest"]
    mixed = [{"chosen": recorded(A, tokenizer)["chosen"], "rejected": A["rejected"]}]
    assert look(rows, "a")[1] is False and look(mixed, "a")[1] is True
    with refused("chat_template"):
        tokenize_dataset(Dataset.from_list(mixed), bare, SETTINGS, "a")


def test_one_recorded_side_beside_messages(tokenizer):
    """The messages are rendered as in any row: turn weights too, which the recorded side cannot have."""
    weighted = [{**m, "weight": 0.5} if m["role"] == "assistant" else m for m in A["rejected"]]
    wanted = kept({**A, "rejected": weighted}, tokenizer)
    for messages in (True, False):
        chosen = recorded(A, tokenizer, messages)["chosen"]
        assert kept({"chosen": chosen, "rejected": weighted}, tokenizer) == wanted
    odd = {**chosen, "messages": [{"role": "nobody", "content": "x"}]}  # cannot be read: the other side by itself
    out = kept({"chosen": odd, "rejected": A["rejected"]}, tokenizer)
    assert out["rejected_ids"] == wanted["rejected_ids"] and out["remarks"] == [f"{NOT_COMPARED}: unknown role"]
    for rejected, key in (
        ([{**A["rejected"][0], "role": "nobody"}], "unknown role"),
        (None, "not a pair"),
        ("So 3.", "plain texts beside recorded sequences"),
        (A["rejected"][:1], "last turn not from the assistant"),
    ):
        asked = {"prompt": "x"} if isinstance(rejected, str) else {}
        is_reason(tokenized({"chosen": chosen, "rejected": rejected, **asked}, tokenizer)["drop_reason"], key)
    reason = tokenized({"chosen": chosen, "rejected": [*A["rejected"], {"role": "nobody"}]}, tokenizer)["drop_reason"]
    assert reason.startswith("rejected, message 5")


def test_tools_of_each_side_are_in_its_rendering():
    template = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}" + CHATML
    tokenizer, allowed = tokenizer_for(template, "byte", eos="<|im_end|>"), RenderSettings(None, different_prompts=True)
    row = {**A, "tools": [{"name": "f"}], "rejected_tools": [{"name": "g"}]}
    out = kept(row, tokenizer, allowed)
    as_recorded = {side: {"messages": A[side], "sequences": [sequence(out[f"{side}_ids"], out[f"{side}_mask"])]}
                   for side in SIDES}  # fmt: skip
    assert kept({**row, **as_recorded}, tokenizer, allowed) == out
    assert kept({**row, **as_recorded, "rejected_tools": None}, tokenizer, allowed)["remarks"] == [RETOKENIZED]


# ------------------------------------------------------------------------------------------------- what is no sequence


@pytest.mark.parametrize(
    ("bad", "key", "details"),
    [
        (sequence([], []), "input_ids", ["empty"]),
        (sequence(None, [0]), "input_ids", ["null"]),
        (sequence("5 6", [0, 1]), "input_ids", ["a text"]),
        (sequence([5, 6.5], [0, 1]), "input_ids", ["token 2", "6.5"]),
        (sequence([5, True], [0, 1]), "input_ids", ["token 2", "true"]),
        (sequence([[5, 6]], [[0, 1]]), "input_ids", ["token 1"]),
        (sequence([5, 6, -1], [0, 1, 1]), "input_ids", ["token 3", "-1", "vocabulary of "]),
        (sequence([5, 10**12], [0, 1]), "input_ids", ["token 2", "1000000000000", "vocabulary of "]),
        (sequence([5, 6], [0, 1, 1]), "assistant_masks", ["3 entries", "2 of input_ids"]),
        (sequence([5, 6], [0]), "assistant_masks", ["1 entries"]),
        (sequence([5, 6], None), "assistant_masks", ["null"]),
        (sequence([5, 6], [0, 2]), "assistant_masks", ["token 2", "2, neither 0 nor 1"]),
        (sequence([5, 6], [0, "1"]), "assistant_masks", ["token 2", '"1"']),
        (sequence([5, 6], [1, 1]), "assistant_masks", ["the first token"]),
        (sequence([5, 6], [0, 0]), "assistant_masks", ["no token is supervised"]),
        (sequence([5, 6], [0, 1], logprobs=[0.0]), "logprobs", ["1 entries", "2 of"]),
        (sequence([5, 6], [0, 1], logprobs=[0.0, None]), "logprobs", ["token 2", "null"]),
        (sequence([5, 6], [0, 1], logprobs=[0.0, float("nan")]), "logprobs", ["token 2", "NaN"]),
        (sequence([5, 6], [0, 1], logprobs=[float("-inf"), -1.0]), "logprobs", ["token 1", "-Infinity"]),
        (sequence([5, 6], [0, 1], logprobs=[0, "x"]), "logprobs", ["token 2"]),
        (sequence([5, 6], [0, 1], logprobs=[None, 0.7]), "logprobs", ["token 2", "0.7", "above 1"]),
        (sequence([5, 6], [0, 1], logprobs={}), "logprobs", ["an object"]),
        (sequence([5, 6], [0, 1], attention_mask=[0, 1]), "attention_mask", ["token 1", "padding"]),
        ([5, 6], "a list in place of a sequence", []),
        (None, "null in place of a sequence", []),
    ],
)
def test_a_sequence_that_is_none_drops_its_pair_by_name(bad, key, details, tokenizer):
    first = sequence([5, 7], [0, 1])
    for name, number, row in (
        ("chosen", 1, {"chosen": {"sequences": [bad]}, "rejected": BAD}),
        ("rejected", 2, {"chosen": GOOD, "rejected": {"sequences": [first, bad]}}),
        ("rejected", 1, {"chosen": A["chosen"], "rejected": {"sequences": [bad]}}),
    ):
        is_reason(tokenized(row, tokenizer)["drop_reason"], key, f"{name}, sequence {number}: ", *details)


def test_the_last_id_of_the_vocabulary_is_one(tokenizer):
    last = max(tokenizer.get_vocab().values())
    assert kept({"chosen": side(([5, last], [0, 1])), "rejected": BAD}, tokenizer)["chosen_ids"] == [5, last]
    is_reason(tokenized({"chosen": side(([5, last + 1], [0, 1])), "rejected": BAD}, tokenizer)["drop_reason"],
              "input_ids", f"{last + 1}, outside")  # fmt: skip


@pytest.mark.parametrize("sequences", [[], {}, "[", "", 5, [[]], "[]"])
def test_no_list_of_sequences(sequences, tokenizer):
    reason = tokenized(
        {"chosen": {"messages": A["chosen"], "sequences": sequences}, "rejected": A["rejected"]}, tokenizer
    )
    assert reason["drop_reason"].startswith("chosen")


def test_no_odd_value_ends_a_run(tokenizer):
    """Each odd value in each place: read, or dropped by name."""
    reasons, good = set(), {"messages": A["chosen"], **GOOD}
    for odd in ODD:
        of = [{**GOOD["sequences"][0], name: odd} for name in ("input_ids", "assistant_masks", "logprobs", "more")]
        sides = [{**good, "sequences": odd}, {**good, "messages": odd}, {"sequences": [odd]}]
        for chosen in [*sides, *({"sequences": [each]} for each in of)]:
            for row in ({"chosen": chosen, "rejected": BAD}, {"chosen": BAD, "rejected": chosen, "prompt": odd}):
                reasons.add(tokenized(row, tokenizer)["drop_reason"])
    assert len(reasons) > 30 and not [reason for reason in reasons if "unexpected" in reason]


def test_fields_that_nothing_reads_are_counted(tokenizer):
    more = {"logprobs": [None, -1.5, 1e-6], "attention_mask": [1, 1, 1], "text": "x", "finish_reason": None}
    unread: dict = {}
    read = read_sequences([sequence([5, 6, 7], [0, True, 1], **more)], "chosen", unread)
    assert read == [([5, 6, 7], [0, 1, 1])] and list(unread) == ["sequences.logprobs", "sequences.text"]
    out = kept({"chosen": {"sequences": [sequence([5, 6, 7], [0, 1, 1], **more)]}, "rejected": BAD}, tokenizer)
    assert out["unread"] == ["sequences.logprobs", "sequences.text"]


@pytest.mark.parametrize("fields", [{"weight": 0.5}, {"weight": 0}, {"loss": False}, {"train": 0}])
def test_turn_weights_cannot_be_carried_over(fields, tokenizer):
    for name in SIDES:
        row = recorded(A, tokenizer)
        row[name]["messages"] = [*A[name][:3], {**A[name][3], **fields}]
        is_reason(tokenized(row, tokenizer)["drop_reason"], "weight or loss beside recorded sequences",
                  f"{name}, message 4", "assistant_masks")  # fmt: skip
    row["rejected"]["messages"] = [*A["rejected"][:3], {**A["rejected"][3], "weight": 1, "loss": True}]
    assert kept(row, tokenizer)["remarks"] == []


def test_masks_of_their_own_need_turn_masks(tokenizer):
    with refused("sequences", "mask_user_turns: true"):
        row_to_pair({"chosen": GOOD, "rejected": BAD}, mask_turns=False)


# ------------------------------------------------------------------------------------------------------------- the pair


def test_pairs_that_teach_nothing_are_dropped(tokenizer):
    for chosen, rejected, key in (
        (GOOD, GOOD, "chosen equals rejected"),
        (side(([5, 6, 7], [0, 1, 0])), side(([5, 6, 8], [0, 1, 0])), "diverges only in user or tool text"),
        (side(([5, 6], [0, 1]), ([9, 7], [0, 1])), side(([5, 6], [0, 1]), ([8, 7], [0, 1])), "diverges only"),
    ):
        assert tokenized({"chosen": chosen, "rejected": rejected}, tokenizer)["drop_reason"].startswith(key)
    several = side(([5, 6], [0, 1]), ([5, 7], [0, 1]))  # the same tokens one behind the other, cut otherwise
    kept({"chosen": several, "rejected": side(([5, 6, 5, 7], [0, 1, 1, 1]))}, tokenizer)


def test_both_sides_answer_the_same_prompt(tokenizer):
    """The ids before the first supervised token of the first sequence; token 2 is the first that differs."""
    other = side(([5, 4, 8], [0, 0, 1]))
    for row in ({"chosen": GOOD, "rejected": other}, {"chosen": side(([5, 9, 7], [0, 0, 1])), "rejected": other}):
        reason = tokenized(row, tokenizer)["drop_reason"]
        is_reason(reason, "prompt mismatch", "token 2 ", "allow_different_prompts: true")
        kept(row, tokenizer, RenderSettings(None, different_prompts=True))
    later = {"chosen": side(([5, 7], [0, 1]), ([9, 6], [0, 1])), "rejected": side(([5, 8], [0, 1]), ([4, 6], [0, 1]))}
    kept(later, tokenizer)  # the prompts of later sequences are what came of the first answer


def test_max_length_measures_each_sequence(tokenizer):
    row = {"chosen": side(([5, 6, 7], [0, 1, 1]), ([5, 6, 7, 8], [0, 0, 1, 1])), "rejected": BAD}
    assert kept(row, tokenizer, RenderSettings(4))["longest"] == 4
    out = tokenized(row, tokenizer, RenderSettings(3))
    assert (out["drop_reason"], out["longest"]) == ("over-long", 4)
    out = kept(row, tokenizer, RenderSettings(3, "keep_start"))
    assert (out["chosen_ids"], out["chosen_lengths"], out["cut"]) == ([5, 6, 7, 5, 6, 7], [3, 3], True)
    assert tokenized(row, tokenizer, RenderSettings(2, "keep_start"))["drop_reason"] == "last turn lost"


def test_prompt_keys(tokenizer):
    """Of messages, else of the prompt, else of the ids before the first supervised token: what is held out together."""

    def key(row):
        return kept(row, tokenizer)["prompt_key"]

    plain, ids = key(A), recorded(A, tokenizer, messages=False)
    assert key(recorded(A, tokenizer)) == key({"prompt": A["chosen"][:1], **ids}) == plain
    assert key(ids) != plain
    of_ids = key({"chosen": GOOD, "rejected": BAD})
    assert of_ids == key({"chosen": side(([5, 9], [0, 1]), ([4, 6], [0, 1])), "rejected": BAD})
    assert of_ids != key({"chosen": side(([4, 9], [0, 1])), "rejected": side(([4, 6], [0, 1]))})


def test_margins_and_weights_of_recorded_rows(tokenizer):
    row = {"chosen": GOOD, "rejected": BAD}
    out = kept({**row, "score_chosen": 3, "score_rejected": 1, "weight": 0.25}, tokenizer)
    assert (out["margin"], out["weight"]) == (2.0, 0.25)
    for more, key in (({"weight": -1}, "weight"), ({"margin": "x"}, "margin")):
        is_reason(tokenized({**row, **more}, tokenizer)["drop_reason"], key)


def test_a_duplicate_is_one_however_it_is_written(tokenizer, tmp_path):
    from mdpo.data.prepare import without_repeated

    rows = [A, recorded(A, tokenizer), B]
    rows = [{"row as JSON": json.dumps(row), "key": f"r{i}"} for i, row in enumerate(rows)]
    out, counts = tokenize_dataset(Dataset.from_list(rows), tokenizer, SETTINGS, "a")
    assert without_repeated(out, counts, set())["key"] == ["r0", "r2"] and counts.reasons == {"duplicate": ["r1"]}


# ------------------------------------------------------------------------------------------------- several answers


def test_recorded_sides_as_several_answers(tokenizer):
    third = side(([5, 9, 9], [0, 1, 1]))
    group = {"key": "g", "responses": [GOOD, BAD, third], "rewards": [1.0, 0.0, 0.5]}
    rows, several = rows_of_two(group, AnswerPairs("adjacent"))
    assert several and [kept(row, tokenizer)["chosen_ids"] for row in rows] == [[5, 6, 7], [5, 9, 9]]
    assert [kept(row, tokenizer)["rejected_ids"] for row in rows] == [[5, 9, 9], [5, 8]]
    lists = {"key": "g", "chosen": [GOOD, json.dumps(third)], "rejected": BAD}
    assert conversations_in(lists["chosen"]) == [GOOD, third] and conversations_in(GOOD) is None
    rows, _ = rows_of_two({**lists, "chosen": [GOOD, third]}, AnswerPairs())
    assert [kept(row, tokenizer)["chosen_ids"] for row in rows] == [[5, 6, 7], [5, 9, 9]]


# ---------------------------------------------------------------------------------------------------------- comparison


def spelled(ids, t, tokenizer):
    """Ids with token `t` as its letters: the same text, tokenized otherwise."""
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in tokenizer.convert_ids_to_tokens(ids[t])]
    assert len(letters) > 1 and None not in letters
    return ids[:t] + letters + ids[t + 1 :], len(letters)


@pytest.mark.parametrize(
    ("a", "b", "tokens"),
    [
        (["ab", "c", "d"], ["a", "bc", "d"], 2),
        (["ab", "c"], ["ab", "c"], 0),
        (["a", "b", "c", "d"], ["ab", "cd"], 4),
        (["ab", "c", "ab"], ["a", "b", "c", "ab"], 2),
        (["ab", "c", "a", "b"], ["a", "b", "c", "ab"], 3),  # c is at its place; two of the others on either side of it
        (["a", "b"], ["a"], 1),
        (["a", "a", "a"], ["a", "a"], 1),  # each is somewhere: the numbers of tokens differ
        (["a", "b", "c"], ["a", "d", "e", "b", "c"], 2),  # behind what is put in, places count from the end
        ([], ["a"], 1),
        (["<0xC3>", "<0xA9>", "c", "é", "d"], ["é", "c", "<0xC3>", "<0xA9>", "d"], 3),  # a byte each
    ],
)
def test_tokens_that_differ_by_hand(a, b, tokens):
    class Letters:
        def convert_ids_to_tokens(self, ids):
            return [names[i] for i in ids]

    names = sorted({*a, *b})
    ids = [[names.index(text) for text in texts] for texts in (a, b)]
    assert differing(*ids, Letters()) == differing(*ids[::-1], Letters()) == tokens


def test_drift_is_counted_and_decides_nothing(tokenizer):
    row, plain = recorded(A, tokenizer), kept(A, tokenizer)
    ids, mask = plain["chosen_ids"], plain["chosen_mask"]
    t = next(t for t in range(len(ids) - 1, 0, -1) if mask[t] and len(tokenizer.convert_ids_to_tokens(ids[t])) > 3
             and ids[t] not in tokenizer.all_special_ids)  # fmt: skip
    other, letters = spelled(ids, t, tokenizer)
    assert tokenizer.decode(other) == tokenizer.decode(ids)
    row["chosen"]["sequences"] = [sequence(other, mask[:t] + [1] * letters + mask[t + 1 :])]
    out = kept(row, tokenizer)
    assert (out["chosen_ids"], out["remarks"], out["retokenized"]) == (other, [RETOKENIZED], [letters])
    rows = [{"row as JSON": json.dumps(row), "key": f"r{i}"} for i, row in enumerate((row, recorded(B, tokenizer)))]
    _, counts = tokenize_dataset(Dataset.from_list(rows), tokenizer, SETTINGS, "a")
    assert counts.kept_with == {RETOKENIZED: ["r0"]} and counts.as_dict()["retokenized"] == {
        "sides": 1,
        "tokens": letters,
    }
    assert any(f"{letters} tokens of 1 sides" in line for line in counts.lines())
    row["rejected"]["sequences"].append(sequence([5, 6], [0, 1]))  # the rendering has no such sequence
    assert kept(row, tokenizer)["retokenized"] == [letters, 2]


def test_sequences_of_a_template_that_takes_thoughts_out():
    """Of two turns with thoughts, Qwen3 shows the second without the first one's: two sequences. Recorded as one, which
    is what a server that keeps thoughts would have seen, it is another text."""
    qwen = tokenizer_for(trl_template("qwen3"), "byte", eos="<|im_end|>")
    ask = [{"role": "user", "content": "What is 3 * 4?"}]
    first = {"role": "assistant", "content": "It is 12.", "reasoning_content": "Three fours."}
    more = [*ask, first, {"role": "user", "content": "And 3 * 5?"}]
    row = {name: [*more, {"role": "assistant", "content": text, "reasoning_content": "One more."}]
           for name, text in zip(SIDES, ("15.", "16."), strict=True)}  # fmt: skip
    plain, as_recorded = kept(row, qwen), recorded(row, qwen)
    assert [len(as_recorded[name]["sequences"]) for name in SIDES] == [2, 2]
    out = kept(as_recorded, qwen)
    whys = {f"{name}_breaks": [AS_RECORDED] for name in SIDES}
    assert out == plain | whys | {"remarks": out["remarks"]}
    assert not {RETOKENIZED, OTHER_MASK} & set(out["remarks"]) and out["retokenized"] == []
    seen, later = as_recorded["chosen"]["sequences"]
    own = later["assistant_masks"].index(1)
    one = sequence(
        seen["input_ids"] + later["input_ids"][own:], seen["assistant_masks"] + later["assistant_masks"][own:]
    )
    out = kept({**as_recorded, "chosen": {**as_recorded["chosen"], "sequences": [one]}}, qwen)
    assert out["remarks"] == [RETOKENIZED] and out["chosen_lengths"] == [] and len(out["retokenized"]) == 1


def test_what_follows_the_last_sampled_token_is_no_drift(tokenizer):
    """A server stops at the end of turn; ChatML writes a line break behind it. A last word of the environment is left
    out of what is rendered, and a recorder may have it."""
    row, plain = recorded(A, tokenizer), kept(A, tokenizer)
    ids, mask = plain["chosen_ids"], plain["chosen_mask"]
    assert mask[-2:] == [1, 0]
    for own in (sequence(ids[:-1], mask[:-1]), sequence([*ids, 5, 6], [*mask, 0, 0])):
        row["chosen"]["sequences"] = [own]
        row["chosen"]["messages"] = [*A["chosen"], {"role": "user", "content": "Done."}]
        out = kept(row, tokenizer)
        assert out["remarks"] == [] and out["chosen_ids"] == own["input_ids"]
    mixed = kept({**row, "rejected": [*A["rejected"], {"role": "user", "content": "Done."}]}, tokenizer)
    assert mixed["remarks"] == [TRAILING]  # of what is rendered, it is said
    no_stop = sequence(ids[:-2], mask[:-2])  # out of tokens
    row["chosen"]["sequences"] = [no_stop]
    assert kept(row, tokenizer)["retokenized"] == [1]


def test_other_masks_are_said(tokenizer):
    row = recorded(A, tokenizer)
    mask = row["chosen"]["sequences"][0]["assistant_masks"]
    first = mask.index(1)
    end = mask.index(0, first)
    row["chosen"]["sequences"][0]["assistant_masks"] = (
        mask[:first] + [1] * (end - first + 3) + mask[end + 3 :]
    )  # a header
    assert kept(row, tokenizer)["remarks"] == [OTHER_MASK]
    both = {
        "prompt": A["chosen"][:3],
        **{side: {**recorded(A, tokenizer)[side], "messages": A[side][3:]} for side in SIDES},
    }
    assert kept({**both, "rejected": {**both["rejected"], "messages": A["chosen"][3:]}}, tokenizer)["remarks"] == [
        OTHER_MASK, RETOKENIZED
    ]  # fmt: skip


def test_messages_that_cannot_be_rendered_lose_no_row(tokenizer):
    row = recorded(A, tokenizer)
    for messages, key in (
        ([{"role": "nobody", "content": "x"}], "unknown role"),
        (A["chosen"][:1], "last turn not from the assistant"),
        ([*A["chosen"][:3], {"role": "assistant", "content": [{"type": "image"}]}], "content part"),
    ):
        out = kept({**row, "chosen": {**row["chosen"], "messages": messages}}, tokenizer)
        assert out["remarks"] == [f"{NOT_COMPARED}: {key}"] and out["chosen_ids"] == kept(A, tokenizer)["chosen_ids"]
    out = kept(
        {**row, "chosen": {**row["chosen"], "messages": B["chosen"]}}, tokenizer
    )  # of another row: each by itself
    assert out["remarks"] == [f"{NOT_COMPARED}: prompt mismatch", RETOKENIZED]
    strict = "{% if messages | length > 3 %}{{ raise_exception('no') }}{% endif %}" + CHATML
    out = kept(row, tokenizer_for(strict, "byte", eos="<|im_end|>"))
    assert out["remarks"] == [f"{NOT_COMPARED}: template refuses the conversation"]


# -------------------------------------------------------------------------------------------------- a run, the displays


def test_the_trainer_takes_them(tokenizer, tmp_path):
    rows = [recorded(row, tokenizer, messages=False) for row in agent_rows(4)]
    plain, own = (mdpo_trainer(tmp_path, tokenizer, rows) for rows in (agent_rows(4), rows))
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in (plain, own)]
    (loss, gradients), (same, same_gradients) = (
        loss_and_gradients(trainer, batch) for trainer, batch in zip((plain, own), batches, strict=True)
    )
    assert loss == same and all((gradients[name] == same_gradients[name]).all() for name in gradients)


def test_several_sequences_are_summed(tokenizer, tmp_path):
    """log π of a side is the sum over its sequences of what the model says of each by itself, packed and padded."""
    rows = [
        {"chosen": side(([5, 6, 7, 9], [0, 1, 1, 0]), ([5, 6, 8, 11], [0, 0, 1, 1]), ([40, 6], [0, 1])), "weight": 2.0,
         "rejected": side(([5, 9, 3], [0, 1, 1]))},
        {"chosen": GOOD, "rejected": side(([5, 9, 3], [0, 1, 1]), ([5, 9, 3, 4, 8], [0, 0, 0, 0, 1]))},
    ]  # fmt: skip
    losses = []
    for shared in (True, False):
        trainer = mdpo_trainer(tmp_path, tokenizer, rows, shared_prefix=shared, per_device_train_batch_size=2)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        loss, policy = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        losses.append(loss.item())

        def alone(ids, mask, model=trainer.model):
            logps = model(input_ids=torch.tensor([ids])).logits.log_softmax(-1)[0]
            return sum(logps[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])

        for name in SIDES:
            wanted = [sum(alone(s["input_ids"], s["assistant_masks"]) for s in rows[row][name]["sequences"])
                      for row in batch.row.tolist()]  # fmt: skip
            assert getattr(policy, name).tolist() == pytest.approx(wanted, rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_and_the_displays_show_them(tokenizer, tmp_path):
    """Rows of a file through a recipe, as run_dpo.py, show_masks.py --json and --html read them; one is dropped."""
    from mdpo.config.recipe import load_recipe
    from mdpo.data.prepare import prepare_pairs
    from mdpo.reporting.mask_page import write_page
    from mdpo.reporting.token_view import training_pairs

    save_workshop(tmp_path, tokenizer, f"output_dir: {tmp_path}/out\n")
    rows = [recorded(A, tokenizer), recorded(B, tokenizer, messages=False), {"chosen": GOOD, "rejected": GOOD}]
    (tmp_path / "recorded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [str(tmp_path / "recipe.yaml"), f"--dataset_mixer={{{tmp_path}/recorded.jsonl: 1.0}}"]
    train, _, report = prepare_pairs(load_recipe(flags), tokenizer)
    assert len(train) == 2 and list(report.counts.values())[0].dropped == 1 and report.unused == {}
    shown = list(training_pairs(flags))
    assert [pair["chosen"]["ids"] for pair in shown] == [kept(row, tokenizer)["chosen_ids"] for row in (A, B)]
    assert "".join(shown[1]["chosen"]["tokens"]).startswith("<|im_start|>user\nWhat is 1 * 4?")
    page = write_page(tmp_path / "page.html", load_recipe(flags), tokenizer, 100)
    assert page == {"kept": 2, "chosen equals rejected": 1}


def test_a_row_of_both_kinds_names_a_problem_by_side():
    with dropped("prompt"):
        row_to_pair({"chosen": [], "rejected": [], "prompt": 5})
    with pytest.raises(DropPair):
        row_to_pair({"chosen": GOOD, "rejected": []})


def test_a_turn_that_two_sequences_supervise_is_counted(tokenizer):
    """A server that records each turn with all turns so far supervised: the first one would count twice."""

    def remarks(*masks, ids=((5, 6, 7), (5, 6, 7, 8, 9), (5, 6, 9, 9, 9))):
        own = [{"input_ids": list(i), "assistant_masks": m} for i, m in zip(ids, masks, strict=False)]
        other = {"sequences": [{"input_ids": [5, 6, 8], "assistant_masks": masks[0]}]}
        return kept({"chosen": {"sequences": own}, "rejected": other}, tokenizer)["remarks"]

    assert remarks([0, 0, 1], [0, 0, 1, 0, 1]) == [REPEATED]
    assert remarks([0, 0, 1], [0, 0, 1], ids=((5, 6, 7), (5, 6, 7))) == [REPEATED]
    assert remarks([0, 0, 1], [0, 0, 0, 0, 1]) == remarks([0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 1, 0, 1]) == []
    assert remarks([0, 1, 1], [0, 0, 0, 0, 1], [0, 1, 0, 0, 1]) == [REPEATED]  # one between them does not
