"""Rows → pairs: formats, drop reasons, sets on disk, fractions, hold-out by prompt."""

import bz2
import gzip
import json
import lzma
import math
import os
import shutil
import zipfile

import pytest
from datasets import Dataset
from errors import dropped, refused
from odd_values import ODD
from tiny import CHATML, agent_rows, tokenizer_for

from mdpo.data import files as files_module
from mdpo.data.files import ROW, whole_row, without_nulls
from mdpo.data.messages import normalize_messages
from mdpo.data.rows import COLUMNS, row_to_pair
from mdpo.data.sources import hold_out, load_datasets, mix
from mdpo.data.tokenize import PlainText, tokenize_dataset, tokenize_row
from mdpo.errors import UserError
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.loss_mask import RenderSettings

SYSTEM = {"role": "system", "content": "Be brief."}
U1, U2 = {"role": "user", "content": "Two?"}, {"role": "user", "content": "Three?"}
A1, A2, A3 = ({"role": "assistant", "content": c} for c in ("2", "3", "4"))
DIFFERENT = "allow_different_prompts: true"
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def pair(mask_turns=True, **row):
    found = row_to_pair(row, mask_turns)
    return found.chosen, found.rejected, found.n_prompt


def test_implicit_prompt_is_all_before_the_first_assistant_turn():
    # TRL's prompt would be the three turns that both sides begin with.
    chosen, rejected = [SYSTEM, U1, A1, U2, A2], [SYSTEM, U1, A1, U2, A3]
    assert pair(chosen=chosen, rejected=rejected) == (chosen, rejected, 2)
    assert pair(mask_turns=False, chosen=chosen, rejected=rejected) == (chosen, rejected, 4)


def test_explicit_prompt_is_context_with_its_assistant_turns():
    prompt = [U1, A1, U2]
    wanted = ([U1, A1, U2, A2], [U1, A1, U2, A3], 3)
    assert pair(prompt=prompt, chosen=[A2], rejected=[A3]) == wanted
    assert pair(prompt=prompt, chosen=[*prompt, A2], rejected=[*prompt, A3]) == wanted  # not written twice
    assert pair(prompt="Two?", chosen=wanted[0], rejected=wanted[1]) == (wanted[0], wanted[1], 1)


def test_plain_strings():
    assert pair(prompt="2+2=", chosen=" 4", rejected=" 5") == ("2+2= 4", "2+2= 5", 4)
    # The common start is "2+2= ", and the space goes to the answers, as in TRL.
    assert pair(chosen="2+2= 4", rejected="2+2= 5") == ("2+2= 4", "2+2= 5", 4)


def test_sharegpt():
    """`conversations` is the prompt, in from and value; roles by their other names; one message as a side."""
    conversations = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Two?"},
        {"from": "gpt", "value": "2"},
        {"from": "human", "value": "Three?"},
    ]
    good, bad = {"from": "gpt", "value": "3"}, {"from": "model", "value": "4"}
    prompt = [SYSTEM, U1, A1, U2]
    wanted = ([*prompt, A2], [*prompt, A3], 4)
    assert pair(conversations=conversations, chosen=good, rejected=bad) == wanted
    assert pair(conversations=conversations, chosen=[good], rejected=[bad]) == wanted
    assert pair(conversations=conversations, chosen="3", rejected="4") == wanted
    assert pair(conversations=conversations[1:], system="Be brief.", chosen=good, rejected=bad) == wanted
    assert pair(conversations=conversations, system="Be long.", chosen=good, rejected=bad) == wanted
    both = [[*conversations[1:], side] for side in (good, bad)]
    assert pair(chosen=both[0], rejected=both[1]) == ([U1, A1, U2, A2], [U1, A1, U2, A3], 1)
    assert pair(chosen=both[0], rejected=both[1], system="Be brief.") == ([*prompt, A2], [*prompt, A3], 2)


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("gpt", "assistant"), ("model", "assistant"), ("ipython", "tool"), ("observation", "tool"),
     ("function", "tool"), ("developer", "developer"), ("tool", "tool")],
)  # fmt: skip
def test_other_names_of_roles(name, role):
    assert normalize_messages([{"role": name, "content": "x"}]) == [{"role": role, "content": "x"}]


def test_tool_calls_of_other_formats():
    call = {"name": "f", "arguments": {"x": 1}}
    wanted = [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}]
    assert normalize_messages([{"from": "function_call", "value": call}]) == wanted
    assert normalize_messages([{"from": "function_call", "value": json.dumps(call)}]) == wanted
    assert normalize_messages([{"from": "function_call", "value": json.dumps([call])}]) == wanted
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    assert normalize_messages([old]) == wanted
    assert normalize_messages([{**old, "function_call": json.dumps(call)}]) == wanted
    for other in ("parameters", "input", "args"):
        named = {"type": "function", "name": "f", other: {"x": 1}}
        assert normalize_messages([{"role": "assistant", "tool_calls": [named]}]) == wanted


def test_a_prompt_that_is_a_text_beside_messages():
    """UltraFeedback repeats it as the first user message; where sides are answers alone, it becomes that message."""
    wanted = ([U1, A1], [U1, A2], 1)
    assert pair(prompt="Two?", chosen=[A1], rejected=[A2]) == wanted
    assert pair(prompt="Two?", chosen=A1, rejected=A2) == wanted
    assert pair(prompt="Two? ", chosen=[U1, A1], rejected=[U1, A2]) == wanted
    assert pair(prompt="Two?", chosen=[SYSTEM, U1, A1], rejected=[SYSTEM, U1, A2]) == (
        [SYSTEM, U1, A1],
        [SYSTEM, U1, A2],
        2,
    )


def test_scores_make_a_margin_where_there_is_none():
    row = {"chosen": [U1, A1], "rejected": [U1, A2]}
    assert row_to_pair({**row, "score_chosen": 8, "score_rejected": 6.5}).margin == 1.5
    assert row_to_pair({**row, "score_chosen": 8, "score_rejected": 6.5, "margin": 3}).margin == 3.0
    assert row_to_pair({**row, "score_chosen": 8}).margin is None


def test_prompts_that_differ_are_kept_where_the_recipe_allows_it():
    row = {"chosen": [SYSTEM, U1, A1], "rejected": [U2, A2]}
    found = row_to_pair(row, different_prompts=True)
    assert (found.chosen, found.rejected, found.n_prompt) == ([SYSTEM, U1, A1], [U2, A2], 1)


@pytest.mark.parametrize(
    ("row", "key", "details"),
    [
        ({"prompt": "Three?", "chosen": [U1, A1], "rejected": [U1, A2]}, "prompt mismatch", ["text in prompt"]),
        ({"prompt": [U1], "chosen": " ", "rejected": "3"}, "an empty assistant turn", ["chosen, message 1: "]),
        ({"chosen": "text", "rejected": "  "}, "empty or missing content", []),
        ({"chosen": "text", "rejected": ""}, "not a pair", ["rejected is empty"]),
        ({"chosen": 1, "rejected": 2}, "not a pair", ["chosen is a number"]),
        ({"chosen": ["text"], "rejected": [A1]}, "a text in place of a message", ["chosen, message 1: "]),
        ({"chosen": [{"role": ["user"], "content": "x"}], "rejected": [A1]},
         "unknown role", ["chosen, message 1: ", ": ['user']"]),
        ({"chosen": [U1, {"role": "assistant", "content": 5}], "rejected": [U1, A1]},
         "content", ["chosen, message 2: ", "a number"]),
        ({"chosen": [U1, A1], "rejected": [U1, A2], "tools": "{"}, "tools", ["JSON"]),
        ({"chosen": [U1, A1], "rejected": [U1, A2], "score_chosen": "8"}, "score_chosen", ["a text"]),
        ({"chosen": [U1, {"from": "function_call", "value": "f(1)"}], "rejected": [U1, A2]},
         "tool calls", ["chosen, message 2: ", "JSON"]),
        ({"chosen": [U1, {"from": "function_call", "value": "3"}], "rejected": [U1, A2]},
         "tool_calls", ["chosen, message 2: ", "a number"]),
        ({"chosen": [U1, A1], "rejected": None}, "not a pair", ["rejected is null"]),
        ({"chosen": [U1, A1], "rejected": []}, "not a pair", ["rejected is empty"]),
        ({"chosen": [U1, A1], "rejected": "text"}, "not a pair", ["rejected is a text"]),
        ({"chosen": [U1, A1], "rejected": [U2, A2]}, "prompt mismatch", ["message 1 ", DIFFERENT]),
        ({"chosen": [SYSTEM, U1, A1], "rejected": [SYSTEM, U1, U2, A2]}, "prompt mismatch", ["message 3 ", DIFFERENT]),
        ({"chosen": [{"role": "robot", "content": "x"}, A1], "rejected": [U1, A2]},
         "unknown role", ["chosen, message 1: ", ": robot"]),
        ({"chosen": [{"role": "user", "content": " "}, A1], "rejected": [U1, A2]},
         "empty or missing content", ["chosen, message 1: "]),
        ({"chosen": [U1, {"role": "assistant"}], "rejected": [U1, A2]},
         "an empty assistant turn", ["chosen, message 2: "]),
        ({"chosen": [U1], "rejected": [U1, A2]}, "last turn not from the assistant", []),
        ({"prompt": [U1, A1, U2], "chosen": [U1, A1, U2, U1], "rejected": [A2]},
         "last turn not from the assistant", []),
        ({"chosen": [{"role": "user", "content": [{"type": "image"}]}, A1], "rejected": [U1, A2]},
         "content part", ["chosen, message 1: ", "{type: image}"]),
        ({"chosen": [U1, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
          "rejected": [U1, A2]}, "tool call arguments", ["chosen, message 2: ", "JSON"]),
    ],
)  # fmt: skip
def test_drop_reasons(row, key, details):
    with dropped(key, *details):
        row_to_pair(row)


def test_messages_are_normalized():
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None}
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    silent = {"role": "tool", "content": "", "tool_call_id": "1"}
    assert normalize_messages([parts, call, silent]) == [
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        silent,
    ]


def test_dropped_rows_are_counted_under_their_reason_and_key():
    good, equal = agent_rows(1)[0], agent_rows(2)[1]
    rows = [good, {"chosen": equal["chosen"], "rejected": equal["chosen"]}, {"chosen": [U1, A1], "rejected": []}]
    for row, key in zip(rows, ("a.jsonl:1", "a.jsonl:2", "a.jsonl:3"), strict=True):
        row["key"] = key
    kept, counts = tokenize_dataset(Dataset.from_list(rows), tokenizer_for(CHATML), RenderSettings(None), "a.jsonl")
    assert (counts.read, counts.kept, len(kept)) == (3, 1, 1)
    assert counts.reasons == {"chosen equals rejected": ["a.jsonl:2"], "not a pair: rejected is empty": ["a.jsonl:3"]}
    assert counts.lines()[0] == "a.jsonl: 3 rows read, 1 kept, 2 dropped"
    assert "  dropped 1: not a pair: rejected is empty (a.jsonl:3)" in counts.lines()
    with refused("dataset", "(a.jsonl:2)", "(a.jsonl:3)"):
        tokenize_dataset(Dataset.from_list(rows[1:]), tokenizer_for(CHATML), RenderSettings(None), "a.jsonl")


@pytest.fixture
def files(tmp_path):
    rows = agent_rows(10)
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(tmp_path / "saved" / "data-00000-of-00001.arrow", tmp_path / "saved.arrow")
    Dataset.from_list(rows).to_parquet(tmp_path / "tables" / "part.parquet")
    lines = (tmp_path / "pairs.jsonl").read_bytes()
    (tmp_path / "lines.json").write_bytes(lines)  # JSON Lines under another ending
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": rows}))
    for ending, pack in PACKERS.items():
        (tmp_path / f"pairs.jsonl{ending}").write_bytes(pack(lines))
    with zipfile.ZipFile(tmp_path / "pairs.jsonl.zip", "w") as packed:
        packed.writestr("pairs.jsonl", lines)
    folder = tmp_path / "folder"
    folder.mkdir()
    for split, part in (("train", rows[:7]), ("test", rows[7:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return tmp_path


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
LOCAL = ["pairs.parquet", "saved", "saved.arrow", "tables", "pairs.json", "pairs.jsonl", "lines.json", "wrapped.json",
         *(f"pairs.jsonl{ending}" for ending in (*PACKERS, ".zip"))]  # fmt: skip


@pytest.mark.parametrize("name", LOCAL)
def test_local_sets_hold_the_same_rows(name, files):
    [part] = load_datasets({str(files / name): 1.0}, ["train", "test"])
    assert (part.name, part.split) == (str(files / name), "train")
    assert whole_row(part.rows[3])["chosen"] == agent_rows(10)[3]["chosen"]
    assert set(part.columns) == {"chosen", "rejected"}
    assert part.rows[3]["key"] == (f"{files}/tables/part.parquet:4" if name == "tables" else f"{files / name}:4")


def test_a_folder_with_splits_and_fractions(files):
    mixer = {str(files / "folder"): 0.5, str(files / "pairs.jsonl"): 0.3}
    parts = load_datasets(mixer, ["train", "test"])
    # The share of each set's training rows; rows to evaluate on are not shared out.
    assert [(part.split, len(part.rows)) for part in parts] == [("train", 3), ("test", 3), ("train", 3)]
    assert parts[0].name == f"{files / 'folder'}[train]"
    assert list(parts[0].rows["key"]) == [f"{files / 'folder' / 'train.jsonl'}:{n}" for n in (1, 2, 3)]


def test_several_files_by_a_pattern(files):
    [part] = load_datasets({str(files / "folder" / "t*.jsonl"): 1.0}, ["train"])
    assert [key.rpartition("/")[2] for key in part.rows["key"]] == [
        *(f"test.jsonl:{n}" for n in (1, 2, 3)),
        *(f"train.jsonl:{n}" for n in range(1, 8)),
    ]
    with refused("dataset files", "pairs.json", "parquet", "json"):
        load_datasets({str(files / "pairs.[jp]*[nt]"): 1.0}, ["train"])


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    row = json.dumps({"chosen": "a", "rejected": "b"})
    (tmp_path / "a.jsonl").write_text(f"\ufeff{row}\n\n{row}\n")
    [part] = load_datasets({str(tmp_path / "a.jsonl"): 1.0}, ["train"])
    assert list(part.rows["key"]) == [f"{tmp_path / 'a.jsonl'}:{n}" for n in (1, 3)]


def test_rows_of_other_keys_and_types_keep_their_own(tmp_path):
    """A table of columns would give each call the arguments of all calls, null where it has none of its own."""
    calls = [{"city": "Paris"}, {"query": "x", "n": None}]
    rows = [
        {
            "chosen": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": a}}]}],
            "rejected": "b",
        }
        for a in calls
    ] + [{"chosen": "text", "rejected": ["b"], "id": 1}, {"chosen": "text", "rejected": "b", "id": "two"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [part] = load_datasets({str(tmp_path / "a.jsonl"): 1.0}, ["train"])
    assert [
        row["chosen"][0]["tool_calls"][0]["function"]["arguments"]
        for row in map(whole_row, part.rows)
        if isinstance(row["chosen"], list)
    ] == calls
    assert [row["rejected"] for row in map(whole_row, part.rows)][2:] == [["b"], "b"]
    table = Dataset.from_list([{"chosen": row["chosen"]} for row in rows[:2]])
    assert None in table[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"].values()
    assert without_nulls(table[0])["chosen"][0]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}


def test_texts_that_look_like_json_stay_texts(tmp_path):
    rows = [
        {"chosen": '"Yes."', "rejected": "42", "prompt": "2024"},
        {"chosen": '{"city": "Paris"}', "rejected": "true", "prompt": "null"},
        {"chosen": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"eps": 1e-12, "n": 2**70}}]}]},
        {"margin": 0.123456789012345, "chosen": "\ud83d"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"rejected": "b", **row}) + "\n" for row in rows))
    [part] = load_datasets({str(tmp_path / "a.jsonl"): 1.0}, ["train"])
    found = [{k: v for k, v in whole_row(row).items() if k != "key"} for row in part.rows]
    assert found == [{"rejected": "b", **row} for row in rows]
    assert math.isnan(whole_row({ROW: '{"margin": NaN}', "key": "a:1"})["margin"])


def test_an_archive_of_several_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as packed:
        packed.writestr("a.jsonl", "{}")
        packed.writestr("b.jsonl", "{}")
    with refused("dataset file", "a.jsonl.zip", "2 files"):
        load_datasets({str(tmp_path / "a.jsonl.zip"): 1.0}, ["train"])


def test_brackets_in_the_name_of_a_file_that_is_there(tmp_path):
    for name in ("pairs[12].jsonl", "pairs1.jsonl"):
        (tmp_path / name).write_text(json.dumps({"chosen": name, "rejected": "b"}) + "\n")
    [part] = load_datasets({str(tmp_path / "pairs[12].jsonl"): 1.0}, ["train"])
    assert [whole_row(row)["chosen"] for row in part.rows] == ["pairs[12].jsonl"]


def test_rows_with_images_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"chosen": "a", "rejected": "b", "images": ["x.png"]}) + "\n")
    with refused("dataset", "a.jsonl", "images", "trl.DPOTrainer"):
        load_datasets({str(tmp_path / "a.jsonl"): 1.0}, ["train"])


def test_a_prompt_that_sides_repeat_is_written_once():
    """On one side only, with white space or other fields around it; begun and not continued it is a mismatch."""
    wanted = ([SYSTEM, U1, A1], [SYSTEM, U1, A2], 2)
    prompt = [SYSTEM, U1]
    assert pair(prompt=prompt, chosen=[*prompt, A1], rejected=[A2]) == wanted
    spaced = [SYSTEM, {**U1, "content": " Two?\n"}]
    assert pair(prompt=prompt, chosen=[*spaced, A1], rejected=[*prompt, A2]) == wanted
    assert pair(prompt=prompt, chosen=[SYSTEM, {**U1, "id": 1}, A1], rejected=[A2]) == wanted
    for side in ([U1, A1], [SYSTEM, U1, A1]):
        with dropped("prompt mismatch"):
            pair(prompt=[*prompt, A3, U2], chosen=side, rejected=[A2])
    with dropped("prompt mismatch"):
        pair(prompt=prompt, chosen=[U1, A1], rejected=[A2])


def test_a_prompt_of_one_message_and_prompts_that_are_none():
    assert pair(prompt=U1, chosen=[A1], rejected=[A2]) == ([U1, A1], [U1, A2], 1)
    assert pair(conversations={"from": "human", "value": "Two?"}, chosen="2", rejected="3") == ([U1, A1], [U1, A2], 1)
    assert pair(prompt=[], conversations=[U1], chosen=[A1], rejected=[A2]) == ([U1, A1], [U1, A2], 1)
    with dropped("both prompt and conversations"):
        pair(prompt=[U1], conversations=[U2], chosen=[A1], rejected=[A2])
    with dropped("prompt"):
        pair(prompt=42, chosen=[A1], rejected=[A2])


@pytest.mark.parametrize("mask_turns", [True, False])
@pytest.mark.parametrize("strings", [True, False])
def test_no_odd_row_ends_a_run(strings, mask_turns):
    """Each field of a good row in turn holds each odd value: kept, or dropped under a name."""
    template, settings = ChatTemplate(tokenizer_for(CHATML)), RenderSettings(None, mask_turns=mask_turns)
    good = {"chosen": "2", "rejected": "3"} if strings else {"chosen": [U1, A1], "rejected": [U1, A2]}
    rows = [{**good, name: odd} for odd in ODD for name in COLUMNS]
    fields = ("role", "content", "from", "value", "tool_calls", "function_call", "name", "weight", "tool_call_id")
    rows += [{**good, "chosen": [U1, {**A1, name: odd}]} for odd in ODD for name in fields]
    calls = ("function", "name", "arguments", "parameters", "id", "type")
    call = {"name": "f", "arguments": {"x": 1}}
    rows += [{**good, "chosen": [U1, {**A1, "tool_calls": [{**call, k: odd}]}]} for odd in ODD for k in calls]
    reasons = []
    for n, row in enumerate(rows):
        try:
            reasons.append(tokenize_row(row, n, template, settings)["drop_reason"])
        except UserError as error:
            assert "weight" in str(error) and not mask_turns
    odd = {reason for reason in reasons if "unexpected" in reason}
    assert odd <= {"unexpected TypeError: TextInputSequence must be str"}, odd  # half an emoji in a template's variable
    assert "" in reasons and len(set(reasons)) > (3 if strings else 10)


def test_an_error_that_nobody_thought_of_drops_its_row(monkeypatch):
    monkeypatch.setattr("mdpo.data.tokenize.row_to_pair", lambda *_: 1 / 0)
    out = tokenize_row({"chosen": "a", "rejected": "b"}, 0, None, RenderSettings(None))
    assert out["drop_reason"] == "unexpected ZeroDivisionError: division by zero"


@pytest.mark.parametrize("answers", [("4", "5"), ("four", "five"), ("4", "fish")])
def test_rows_of_one_question_are_held_out_together(answers):
    """In plain texts without a prompt the sides' common start runs into the answers."""
    template, settings = PlainText(tokenizer_for(CHATML)), RenderSettings(None)
    keys = set()
    for good, bad in (answers, ("fourteen", "fifteen"), ("yes", "no")):
        row = {side: f"Human: 2+2?\n\nAssistant: {text}" for side, text in (("chosen", good), ("rejected", bad))}
        keys.add(tokenize_row(row, 0, template, settings)["prompt_key"])
    assert len(keys) == 1
    turns = [U1, A1, U2]
    keys = {tokenize_row({"prompt": prompt, "chosen": [A2], "rejected": [A3]}, 0, ChatTemplate(tokenizer_for(CHATML)),
                         settings)["prompt_key"] for prompt in ([U1], turns)}  # fmt: skip
    assert len(keys) == 1  # another branch of one conversation


def test_a_json_file_is_read_to_its_end_once(tmp_path, monkeypatch):
    """Other ranks and later starts find its columns and rows in `datasets`' cache."""
    path, reads, read = tmp_path / "a.jsonl", [], files_module.json_rows
    path.write_text(json.dumps({"chosen": "a", "rejected": "b", "id": 1}) + "\n")
    monkeypatch.setattr(files_module, "json_rows", lambda path: (reads.append(path), read(path))[1])
    for expected in (2, 2):  # once for mistakes and columns, once for the rows
        [part] = load_datasets({str(path): 1.0}, ["train"])
        assert (part.columns, whole_row(part.rows[0])["chosen"]) == (["chosen", "rejected", "id"], "a")
        assert len(reads) == expected


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ("one", "two"):
        path.write_text(json.dumps({"chosen": text, "rejected": "b"}) + "\n")
        os.utime(path, ns=(0, len(text) if text == "one" else 99))
        [part] = load_datasets({str(path): 1.0}, ["train"])
        assert whole_row(part.rows[0])["chosen"] == text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl.zst", "hello", "pip install zstandard"),
        ("broken.json", '[{"chosen": 1},\n{]', "line 2 column 2"),
        ("numbers.json", "[1, 2]", "entry 1 "),
        ("nothing.json", "[]", "no rows"),
        ("two.json", '{"train": [], "test": []}', "2 arrays (train, test)"),
        ("number.json", "5", "contains int"),
        ("deep.jsonl", '{"a": ' + "[" * 100_000 + "\n", ": line 1 "),
        ("digits.jsonl", '{"a": ' + "1" * 5000 + "}\n", ": line 1 "),
        ("cut.arrow", b"ARROW1\0\0" + b"x" * 50, "Arrow"),
        ("cut.parquet", b"PAR1" + b"x" * 50, "Parquet"),
        ("bad.jsonl.zip", "hello", "cannot be read"),
        ("blank.jsonl", "\n\n", "no rows"),
        ("cut.jsonl.gz", gzip.compress(b"x" * 100, mtime=0)[:-12], "cannot be read"),
        ("not.jsonl.gz", "hello", "cannot be read"),
    ],
)
def test_unreadable_files_are_named_with_their_line(name, text, message, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused("dataset file", name, message):
        load_datasets({str(tmp_path / name): 1.0}, ["train"])


def tokenized(n, prompts):
    return Dataset.from_dict({"id": list(range(n)), "prompt_key": [f"p{i % prompts}" for i in range(n)]})


def test_hold_out_takes_whole_prompts_and_is_seeded():
    rows = tokenized(20, prompts=5)  # four rows a prompt
    train, held_out = hold_out(rows, 6, seed=1)
    assert len(held_out) == 8 and len(train) == 12  # two prompts are needed for six rows
    assert not set(train["prompt_key"]) & set(held_out["prompt_key"])
    assert hold_out(rows, 6, seed=1)[1]["id"] == held_out["id"]
    assert any(hold_out(rows, 6, seed=s)[1]["id"] != held_out["id"] for s in range(2, 6))
    assert len(hold_out(rows, 0.2, seed=1)[1]) == 4
    with refused("test_split_size", "20 "):
        hold_out(rows, 20, seed=1)


def test_mix_shuffles_by_seed_and_limits():
    parts = [tokenized(6, 6), tokenized(4, 4)]
    assert sorted(mix(parts, 0)["id"]) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5]
    assert mix(parts, 0)["id"] == mix(parts, 0)["id"] != mix(parts, 1)["id"]
    assert len(mix(parts, 0, limit=3)) == 3
