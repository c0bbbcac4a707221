"""Turns whose edge lies inside a token, and end-of-turn tokens of other kinds: ids and masks derived by hand."""

import copy
import json

import check_data
import pytest
import show_masks
from conversations import TOOLS, WEATHER, assistant, one_call, pair_of, user
from errors import dropped
from mask_checks import LETTERS, byte_level, ones, rounds, said
from tiny import CHATML, tokenizer_for, trl_template
from tokenizers import Tokenizer

from mdpo.masking.breaks import RETOKENIZED
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.conversation import Conversation
from mdpo.masking.loss_mask import RenderSettings, tokenize_pair
from mdpo.masking.sequences import APART, NO_STOP, in_one_text
from mdpo.masking.spans import STRADDLE, mask_of, tokenize
from mdpo.masking.stops import any_of
from mdpo.masking.turns import locate
from mdpo.runs.entrypoint import run
from mdpo.types import Pair, common_prefix, split

SETTINGS = RenderSettings(None)


def names(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def whole(template, messages):
    """The ids of the wrong twin, the rendered text tokenized in one go: a token of it straddles a turn's edge."""
    side = Conversation(messages, 1, template)
    ids, ranges = tokenize(side.text, template.tokenizer)
    with dropped(STRADDLE):
        mask_of(side.text, ids, ranges, spans(side), template.tokenizer)
    assert in_one_text(side) is None
    return ids


def spans(side):
    turns = [locate(side.whole, side.prompt(i), i, side, thoughtless=True) for i in side.trained]
    return [(turn.start, turn.end) for turn in turns]


# ---- a turn whose first words would be one token with the header's end


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_header_and_answer_are_tokenized_apart(trim_offsets):
    """`assistant\\n` + `  b` holds the token `\\n `. The prompt ends with `\\n` at inference: what is sampled are two
    spaces and b. With a token a character (positions as in mask_checks.py) the answer is 21-23, its end 24."""
    template = ChatTemplate(byte_level("ĊĠ", trim_offsets=trim_offsets))
    messages = rounds("a?", "  b")
    got = tokenize_pair(Pair(messages, rounds("a?", "c"), 1), template, SETTINGS)
    assert names(template.tokenizer, got.chosen_ids[20:]) == ["Ċ", "Ġ", "Ġ", "b", "<|im_end|>"]
    assert ones(got.chosen_mask) == [21, 22, 23, 24]
    assert ones(got.rejected_mask) == [21, 22]
    assert common_prefix(got.chosen_ids, got.rejected_ids) == 21  # the prompt is the same tokens on both sides
    assert got.remarks == [APART]
    prompt = template.render(messages[:1], generation=True)
    assert got.chosen_ids[:21] == tokenize(prompt, template.tokenizer)[0]
    assert "ĊĠ" in names(template.tokenizer, whole(template, messages))


def of_kind(template, kind):
    """As `tokenizer_for`; also `llama`, the form of Llama 2 and Phi-3: a normalizer puts a space before each text
    between added tokens, and nothing splits it."""
    if kind != "llama":
        return tokenizer_for(template, kind)
    tokenizer = copy.deepcopy(tokenizer_for(template, "metaspace"))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    state["pre_tokenizer"] = None
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


@pytest.mark.parametrize("kind", ["metaspace", "always", "llama"])
def test_a_real_merge_of_metaspace(kind):
    """The corpus of the tests has `\\n12`: Metaspace merges it across the header's line break. An answer that goes on
    gets no space before its first word."""
    template = ChatTemplate(of_kind(CHATML, kind))
    tokenizer = template.tokenizer
    whole(template, rounds("a?", "12"))
    got = tokenize_pair(pair_of(rounds("a?", "12", "And 3 * 4?", "\n12 again", "Yes?", "Yes.")), template, SETTINGS)
    assert said(tokenizer, got.chosen_ids, got.chosen_mask) == [
        "12<|im_end|>",
        "\n12 again<|im_end|>",
        "Yes.<|im_end|>",
    ]
    first = names(tokenizer, [i for i, m in zip(got.chosen_ids, got.chosen_mask, strict=True) if m])[:3]
    assert not first[0].startswith("▁") and "".join(first[: first.index("<|im_end|>")]) == "12"
    prompt = tokenize(template.render(rounds("a?"), generation=True), tokenizer)[0]
    assert got.chosen_ids[: len(prompt)] == prompt
    assert got.remarks == [APART]


def test_history_has_the_tokens_of_the_prompt_that_it_is_in():
    """The turn in the middle begins inside a token of the whole text. It is sampled apart from its header; the next
    prompt has the token across its edge, so that its ids do not begin with that turn's: a new sequence."""
    template = ChatTemplate(tokenizer_for(CHATML, "metaspace"))
    messages = rounds("What is 3 * 4?", "Let us compute it.", "Go on, please.", "12", "Are you sure?", "That is right.")
    ids = whole(template, messages)
    got = tokenize_pair(pair_of(messages), template, SETTINGS)
    first, second = split(got.chosen_ids, got.chosen_lengths)
    assert got.chosen_breaks == [RETOKENIZED] and got.remarks == [APART]
    assert second == ids[: len(second)]
    prompt = tokenize(template.render(messages[:3], generation=True), template.tokenizer)[0]
    assert first[: len(prompt)] == prompt and first[len(prompt)] != ids[len(prompt)]
    runs = [
        said(template.tokenizer, *side)
        for side in zip((first, second), split(got.chosen_mask, got.chosen_lengths), strict=True)
    ]
    assert runs == [["Let us compute it.<|im_end|>", "12<|im_end|>"], ["That is right.<|im_end|>"]]


def test_a_turn_of_the_prompt_stays_as_its_prompt_is_tokenized():
    """Only sampled turns are made apart: history that is context comes from one text, at inference too."""
    template = ChatTemplate(tokenizer_for(CHATML, "metaspace"))
    messages = rounds("a?", "12", "Sure?", "Yes.")
    got = tokenize_pair(pair_of(messages, n_prompt=3), template, SETTINGS)
    assert got.chosen_ids == tokenize(template.render(messages), template.tokenizer)[0]
    assert got.remarks == []


@pytest.mark.parametrize("space", ["\n", "\n\n", "\n\n\n\n", " ", "  \n", "\t"])
@pytest.mark.parametrize("name", ["qwen2_5", "lfm2", "cohere2", "phi3", "idefics3"])
@pytest.mark.parametrize("kind", ["byte", "metaspace", "always", "llama"])
def test_answers_that_begin_with_white_space_are_kept(kind, name, space):
    """Whatever merges there are, the policy's words are the supervised ones, and the prompt its own tokens."""
    template = ChatTemplate(with_merges(of_kind(trl_template(name), kind)))
    messages = rounds("One?", f"{space}Yes.", "Two?", f"{space}No.")
    got = tokenize_pair(pair_of(messages), template, SETTINGS)
    side = Conversation(messages, 1, template)
    expected = [side.text[start:end] for start, end in spans(side)]
    spaced = [text.removeprefix(" ") for text in expected] if kind != "byte" else expected  # Metaspace's decoder
    assert said(template.tokenizer, got.chosen_ids, got.chosen_mask) in (expected, spaced)
    prompt = tokenize(template.render(messages[:1], generation=True), template.tokenizer)[0]
    if got.remarks:
        assert got.chosen_ids[: len(prompt)] == prompt


def with_merges(tokenizer):
    """The tokenizer with tokens for runs of line breaks, as Qwen2.5 has."""
    tokenizer = copy.deepcopy(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    letter = "Ċ" if "Ċ" in state["model"]["vocab"] else "\n"
    for n in (1, 2, 3):
        state["model"]["vocab"].setdefault(letter * (n + 1), 5000 + n)
        state["model"]["merges"].append([letter, letter * n])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def test_weights_reach_turns_that_are_tokenized_apart():
    template = ChatTemplate(byte_level("ĊĠ"))
    pair = Pair(rounds("a?", "  b"), rounds("a?", "c"), 1, weights=([1.0, 0.5], []))
    got = tokenize_pair(pair, template, SETTINGS)
    assert got.chosen_weights == [1.0] * 21 + [0.5] * 4


# ---- end-of-turn tokens that take white space along, or are ordinary


def edited(tokenizer, **edits):
    """The tokenizer with changed fields of added tokens: edits maps a token to them. Written and read as a file is."""
    tokenizer = copy.deepcopy(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert {t["content"] for t in state["added_tokens"]} >= set(edits)
    for token in state["added_tokens"]:
        token.update(edits.get(token["content"], {}))
    return type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=tokenizer.chat_template,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )


END, START = "<|im_end|>", "<|im_start|>"
KINDS = {
    "rstrip": {END: {"rstrip": True}},
    "rstrip, next header lstrip": {END: {"rstrip": True}, START: {"lstrip": True}},
    "header lstrip": {START: {"lstrip": True}},
    "lstrip and rstrip": {END: {"rstrip": True, "lstrip": True}},
    "ordinary": {END: {"special": False}},
    "both ordinary": {END: {"special": False}, START: {"special": False}},
    "ordinary, rstrip": {END: {"special": False, "rstrip": True}},
    "ordinary, normalized": {END: {"special": False, "normalized": True}},
}
TURNS = ["Yes.<|im_end|>", "No.<|im_end|>"]
NOT_ONE_TOKEN = (NO_STOP, f"{END} behind message 2")


@pytest.mark.parametrize("tokens", ["byte", "metaspace", "always", "letters", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_token_that_ends_a_turn_is_supervised_as_it_is_sampled(kind, tokens):
    tokenizer = edited(of_kind(CHATML, tokens), **KINDS[kind])
    template = ChatTemplate(tokenizer)
    if (tokens, kind) == ("llama", "ordinary, normalized"):  # the normalizer puts a space before the token's own text
        with dropped(*NOT_ONE_TOKEN):
            tokenize_pair(pair_of(rounds("One?", "Yes.")), template, SETTINGS)
        return
    assert template.stops == {END, "<eos>"}
    messages = rounds("One?", "Yes.", "Two?", "No.")
    got = tokenize_pair(pair_of(messages), template, SETTINGS)
    assert said(tokenizer, got.chosen_ids, got.chosen_mask) == TURNS
    assert got.chosen_ids == tokenizer(template.render(messages), add_special_tokens=False)["input_ids"]
    assert got.remarks == []


def test_a_token_that_strips_leaves_the_white_space_out_of_the_ids():
    """By hand: `<|im_end|>\\n<|im_start|>user\\n` is the end, the start, and five letters."""
    tokenizer = edited(tokenizer_for(CHATML, "letters"), **KINDS["rstrip"])
    got = tokenize_pair(pair_of(rounds("a?", "bc", "e", "f")), ChatTemplate(tokenizer), SETTINGS)
    # 0 start, 1-5 user\n, 6-7 a?, 8 end, 9 start, 10-19 assistant\n, 20-21 bc, 22 end, 23 start, 24-28 user\n, 29 e,
    # 30 end, 31 start, 32-41 assistant\n, 42 f, 43 end
    assert ones(got.chosen_mask) == [20, 21, 22, 42, 43]
    assert len(got.chosen_ids) == 44


@pytest.mark.parametrize("name", ["qwen2_5", "phi3", "lfm2_2_5", "qwen3"])
@pytest.mark.parametrize("tokens", ["byte", "metaspace", "llama"])
def test_stripping_ends_of_turn_and_tool_turns(name, tokens):
    end = "<|end|>" if name == "phi3" else END
    headers = {"<|assistant|>": {"rstrip": True}, "<|user|>": {"rstrip": True}} if name == "phi3" else {}
    tokenizer = edited(of_kind(trl_template(name), tokens), **{end: {"rstrip": True}}, **headers)
    template = ChatTemplate(tokenizer)
    calls = [] if name == "phi3" else one_call(WEATHER, output="\n12\n")
    messages = [*(calls or rounds("One?", "Yes.")), user("\nAnd then?\n"), assistant("No.")]
    got = tokenize_pair(pair_of(messages, tools=TOOLS if calls else None), template, SETTINGS)
    runs = said(tokenizer, got.chosen_ids, got.chosen_mask)
    assert len(runs) == (3 if calls else 2)
    assert all(run.endswith(end) for run in runs) and runs[-1] == f"No.{end}"
    assert not any("12" in run or "then" in run for run in runs)


def test_a_header_that_strips_and_an_answer_that_begins_with_line_breaks():
    """`<|assistant|>` would take all of `\\n\\n\\n` along; at inference it takes its own line break, and two are
    sampled."""
    tokens = {name: {"rstrip": True} for name in ("<|end|>", "<|assistant|>", "<|user|>")}
    tokenizer = edited(tokenizer_for(trl_template("phi3"), "letters"), **tokens)
    got = tokenize_pair(pair_of(rounds("a?", "\n\nbc", "d?", "e")), ChatTemplate(tokenizer), SETTINGS)
    assert said(tokenizer, got.chosen_ids, got.chosen_mask) == ["\n\nbc<|end|>", "e<|end|>"]
    assert names(tokenizer, got.chosen_ids[:8]) == ["<|user|>", "a", "?", "<|end|>", "<|assistant|>", "Ċ", "Ċ", "b"]
    assert got.remarks == [APART]


def test_an_end_of_turn_that_is_read_only_as_a_word_of_its_own():
    """`single_word`: glued to a word it falls to pieces, and what a policy samples there is not known."""
    tokenizer = edited(tokenizer_for(CHATML), **{END: {"single_word": True}})
    with dropped(*NOT_ONE_TOKEN):
        tokenize_pair(pair_of(rounds("One?", "Yes")), ChatTemplate(tokenizer), SETTINGS)
    got = tokenize_pair(pair_of(rounds("One?", "Yes."), 1), ChatTemplate(tokenizer), SETTINGS)
    assert said(tokenizer, got.chosen_ids, got.chosen_mask) == ["Yes.<|im_end|>"]


def test_the_old_stop_of_ordinary_tokens_was_the_next_header():
    """The wrong twin: with special tokens alone `<|im_start|>` of the next turn closes this one."""
    template = ChatTemplate(edited(tokenizer_for(CHATML, "letters"), **KINDS["ordinary"]))
    special = [t.content for t in template.tokenizer.added_tokens_decoder.values() if t.special]
    assert any_of(special).findall(f"b{END}\n{START}") == [START]
    assert template.find_special(f"b{END}\n{START}") == [END, START]  # counted where they stand in a user's text
    got = tokenize_pair(pair_of(rounds("a?", "bc", "e", "f")), template, SETTINGS)
    assert ones(got.chosen_mask) == [21, 22, 23, 45, 46]


# ---- what a user sees


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    edited(byte_level("ĊĠ"), **KINDS["ordinary, rstrip"]).save_pretrained(tmp_path / "model")
    rows = [{"chosen": rounds("a?", f"  b{n}"), "rejected": rounds("a?", "c", f"d{n}", "e")} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        "model_name_or_path: ./model\noutput_dir: out\nbf16: false\nuse_cpu: true\nmax_length: 400\n"
        "dataset_mixer: {a.jsonl: 1.0}\n"
    )
    return tmp_path


def test_check_data_and_show_masks_say_so(folder, capsys):
    said = f"kept 3 with {APART} (a.jsonl:1, a.jsonl:2, a.jsonl:3)"
    assert run(check_data.main, ["recipe.yaml", "--report", "."]) == 0
    assert said in capsys.readouterr().out
    [of_set] = json.loads((folder / "data_report.json").read_text())["sets"].values()
    assert of_set["kept_with"] == {APART: {"rows": 3, "first": ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]}}
    assert run(show_masks.main, ["recipe.yaml", "--first", "1"]) == 0
    out = capsys.readouterr().out
    assert said in out
    assert "«  b0⟦<|im_end|>⟧»" in out


def test_a_page_of_masks_in_the_place_of_a_folder_is_refused(folder, capsys):
    assert run(show_masks.main, ["recipe.yaml", "--html=model"]) == 1
    assert "--html: model" in capsys.readouterr().err


def test_the_page_of_masks_shows_the_same_tokens(folder, capsys):
    assert run(show_masks.main, ["recipe.yaml", "--html", "masks.html"]) == 0
    text = (folder / "masks.html").read_text(encoding="utf-8")
    shown = json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])
    [first, *_] = shown["pairs"]
    template = ChatTemplate(LETTERS.tokenizer)
    for [shown_side], texts in zip(first["sides"], (("a?", "  b0"), ("a?", "c", "d0", "e")), strict=True):
        tokens, whole_text = shown_side["tokens"], template.render(rounds(*texts))
        assert "".join(token[0] for token in tokens) in (whole_text, whole_text.removesuffix("\n"))
        words = [text for text, _, role, kind in tokens if shown["kinds"][kind] in ("supervised", "end of turn")]
        ends = ("", "\n")  # it takes the line break along
        assert "".join(words) in ["".join(f"{text}{END}\n" for text in texts[1::2]).removesuffix(end) for end in ends]
        assert sum(shown["kinds"][kind] == "end of turn" for *_, kind in tokens) == len(texts) // 2
