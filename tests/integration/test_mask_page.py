"""scripts/show_masks.py --html, looked at in a real browser: supervised text is exactly what the assistant said."""

import json
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest
import show_masks
from browser import BROWSER, QUIET
from several_sequences import (
    LENGTHS,
    PIECES,
    PROMPT,
    REWRITTEN,
    SHARED,
    THOUGHTS,
    letters,
    tokenized_row,
    tokens_of,
)
from tiny import CHATML, agent_rows, tokenizer_for

from mdpo.masking.loss_mask import RenderSettings
from mdpo.masking.spans import tokenize
from mdpo.reporting import mask_page
from mdpo.reporting.mask_page import KINDS, Explainer, RenderedSequence, page_text
from mdpo.reporting.token_view import END, SUPERVISED
from mdpo.reporting.token_view import SHARED as DIMMED
from mdpo.runs.entrypoint import run
from mdpo.types import SIDES, Pair, RecordedSide

U = {"role": "user", "content": "</script><script>document.title='broken'</script> <!-- <b>Two?</b> & <|im_end|>\n12"}
A = [{"role": "assistant", "content": text} for text in ("It is <i>2</i> & so.\n\nDone", "  three 🎉 ")]
KEPT = [{"chosen": [U, A[0], U, A[1]], "rejected": [U, A[0], U, {"role": "assistant", "content": "four"}]},
        *agent_rows(3)]  # fmt: skip
BAD = [
    {"chosen": [U, A[0]], "rejected": [U, A[0]]},
    {"chosen": [U, A[0]], "rejected": None},
    {"chosen": [U, {"role": "assistant", "content": "x" * 900}], "rejected": [U, A[1]]},
]


class Page(HTMLParser):
    """The cards of a page after its script has run: {"key", "reason", "hidden", "chosen", "rejected"}, the sides as
    lists of (text, classes, title), and "sequences", the headings of both sides, where there are some."""

    def __init__(self, text: str):
        super().__init__()
        self.cards, self.side, self.heading = [], None, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        classes = (attrs.get("class") or "").split()
        if tag == "article":
            self.cards.append({"key": attrs["data-key"], "reason": attrs["data-reason"], "hidden": "hidden" in attrs})
        elif tag == "section" and self.cards:
            self.side = self.cards[-1].setdefault(classes[0], [])
        elif tag == "span" and "t" in classes and self.side is not None:
            self.side.append((attrs["data-text"], classes, attrs["title"]))

        elif tag == "h4":
            self.heading = True

    def handle_endtag(self, tag):
        if tag == "section":
            self.side = None
        if tag == "h4":
            self.heading = False
            self.cards[-1].setdefault("sequences", []).append("")

    def handle_data(self, data):
        if self.heading:
            self.cards[-1].setdefault("sequences", [""])[-1] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page as it is on disk."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer_for(CHATML).save_pretrained(folder / "model")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*KEPT, *BAD]))
    (folder / "recipe.yaml").write_text(
        f"model_name_or_path: {folder}/model\noutput_dir: {folder}/out\nbf16: false\nuse_cpu: true\nmax_length: 400\n"
        f"dataset_mixer: {{{folder}/a.jsonl: 1.0}}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        assert run(show_masks.main, [str(folder / "recipe.yaml"), "--html", str(folder / "masks.html")]) == 0
    return folder / "masks.html"


def seen(page: Path, reason: str = "") -> Page:
    """The page as the browser has it, filtered by a drop reason."""
    command = [
        BROWSER,
        *QUIET,
        f"--user-data-dir={page.parent}/browser",
        "--dump-dom",
        f"file://{page}#{quote(reason)}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return Page(done.stdout)


def test_the_page_needs_no_network(page):
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "src=" not in text.split("<script id")[0]
    assert text.count("<script") == text.count("</script>") == 2  # what rows hold is no tag


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_supervised_text_is_exactly_the_assistants(page):
    cards = [card for card in seen(page).cards if card["reason"] == "kept"]
    assert [card["key"].rpartition(":")[2] for card in cards] == ["1", "2", "3", "4"]
    for card, row in zip(cards, KEPT, strict=True):
        for name in ("chosen", "rejected"):
            supervised = "".join(text for text, classes, _ in card[name] if {"k2", "k3"} & set(classes))
            said = [m["content"] for m in row[name] if m["role"] == "assistant"]
            assert supervised == "".join(text + "<|im_end|>" for text in said)
            ends = [text for text, classes, _ in card[name] if "k3" in classes]
            assert ends == ["<|im_end|>"] * len(said)
            whole = tokenizer_for(CHATML).apply_chat_template(row[name], tokenize=False)
            assert "".join(text for text, _, _ in card[name]) == whole


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_hovering_tells_id_and_role(page):
    card, tokenizer = seen(page).cards[0], tokenizer_for(CHATML)
    for text, classes, title in card["chosen"]:
        number, role, kind = title.split(" · ")
        assert tokenizer.decode([int(number.removeprefix("id "))]) in (text, "\ufffd")
        assert (role == "assistant") == bool({"k2", "k3"} & set(classes))
        assert ("s" in classes) == kind.endswith(", in the shared prefix")
    assert {title.split(" · ")[1] for *_, title in card["chosen"]} == {"template", "user", "assistant"}
    users = "".join(text for text, _, title in card["chosen"] if " · user · " in title)
    assert users == U["content"] * 2  # the special token inside it is the user's too


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_dropped_rows_are_there_and_the_filter_shows_them_alone(page):
    everything = seen(page)
    assert [card["reason"] for card in everything.cards[4:]] == [
        "chosen equals rejected",
        "not a pair: rejected is null",
        "over-long",
    ]
    assert not any(card["hidden"] for card in everything.cards)
    filtered = seen(page, "over-long")
    assert [card["key"].rpartition(":")[2] for card in filtered.cards if not card["hidden"]] == ["7"]
    [long] = [card for card in filtered.cards if not card["hidden"]]
    assert sum(1 for _, classes, _ in long["rejected"] if {"k2", "k3"} & set(classes)) > 0  # what would be supervised


# ---- sides of several sequences

SAID = {"chosen": ("<think>sum</think>12", "Yes."), "rejected": ("<think>sum</think>13", "No.")}
ROW = {
    "key": "a.jsonl:1",
    **{side: [{"role": ("user", "assistant")[i % 2], "content": text}
              for i, text in enumerate(("3*4?", said[0], "Sure?", said[1]))] for side, said in SAID.items()},
}  # fmt: skip


def two_sequences(messages, pair, template, turn_weights=()):
    """What masking makes of ROW where earlier thoughts are left out; contents by hand."""
    side = next(side for side in SIDES if ROW[side][1]["content"] == messages[1]["content"])
    answer = SAID[side][0][-2:]
    contents = [[("3*4?", 0), (SAID[side][0], 1)], [("3*4?", 0), (answer, 1), ("Sure?", 2), (SAID[side][1], 3)]]
    out = []
    for pieces, placed in zip(PIECES[side], contents, strict=True):
        text = "".join(piece for piece, _ in pieces)
        (ids, mask), (_, ranges) = tokens_of(pieces, template.tokenizer), tokenize(text, template.tokenizer)
        places = [(text.index(content), text.index(content) + len(content), i) for content, i in placed]
        out.append(RenderedSequence(text, ids, ranges, mask, places, THOUGHTS if out else ""))
    return out


@pytest.fixture
def explain(monkeypatch):
    monkeypatch.setattr(mask_page, "side_sequences", two_sequences)
    return Explainer(letters(), RenderSettings(None))


def shown_texts(sequence, what, column):
    """Text of the tokens whose role (column 2) or kind (3) is `what`."""
    return "".join(token[0] for token in sequence["tokens"] if token[column] == what)


def test_each_sequence_with_its_roles_and_kinds(explain):
    card = explain(ROW, tokenized_row(explain.tokenizer), "")
    for side, sequences in zip(SIDES, card["sides"], strict=True):
        assert [s["title"] for s in sequences] == ["sequence 1 of 2", f"sequence 2 of 2: {THOUGHTS}"]
        assert [s["shared"] for s in sequences] == SHARED[side]
        assert [len(s["tokens"]) for s in sequences] == LENGTHS[side]
        first, second = sequences
        assert shown_texts(first, "assistant", 2) == SAID[side][0] + "<|im_end|>"
        # The answer of the first turn is the assistant's in the second sequence too, but context there.
        assert shown_texts(second, "assistant", 2) == SAID[side][0][-2:] + SAID[side][1] + "<|im_end|>"
        assert shown_texts(second, "user", 2) == "3*4?Sure?"
        assert shown_texts(second, KINDS.index(SUPERVISED), 3) == SAID[side][1]
        assert shown_texts(second, KINDS.index(DIMMED), 3) == PIECES[side][1][0][0][: len(PROMPT) + 1]
        assert shown_texts(second, KINDS.index(END), 3) == "<|im_end|>"


def test_the_masks_are_those_trained_on(explain):
    """A first turn of weight 0 is context on the page too; what is no row's is refused."""
    kept = tokenized_row(explain.tokenizer)
    off = {**kept, "chosen_mask": [0] * 31 + kept["chosen_mask"][31:]}
    first, _ = explain(ROW, off, "")["sides"][0]
    assert shown_texts(first, KINDS.index(SUPERVISED), 3) == ""
    assert shown_texts(first, "assistant", 2) == SAID["chosen"][0] + "<|im_end|>"
    other = {**kept, "chosen_ids": [kept["chosen_ids"][-1], *kept["chosen_ids"][1:]]}
    with pytest.raises(AssertionError):
        explain(ROW, other, "")


def test_what_was_cut_off(explain):
    """The second sequence of chosen after 40 tokens, and the whole second one of rejected."""
    kept = tokenized_row(explain.tokenizer)
    kept |= {f"chosen_{field}": kept[f"chosen_{field}"][: 31 + 40] for field in ("ids", "mask")}
    kept |= {f"rejected_{field}": kept[f"rejected_{field}"][:31] for field in ("ids", "mask")}
    kept |= {"chosen_lengths": [31, 40], "rejected_lengths": []}
    chosen, rejected = explain(ROW, kept, "")["sides"]
    cut = KINDS.index("cut off")
    assert [[sum(t[3] == cut for t in s["tokens"]) for s in side] for side in (chosen, rejected)] == [[0, 16], [0, 55]]
    assert [s["shared"] for s in (*chosen, *rejected)] == [29, 23, 29, 0]  # of what is trained on


def test_a_dropped_row_shows_what_would_be_supervised(explain):
    card = explain(ROW, None, "duplicate")
    assert [shown_texts(s, KINDS.index(SUPERVISED), 3) for s in card["sides"][1]] == list(SAID["rejected"])


@pytest.mark.parametrize("kept", [True, False])
def test_recorded_tokens_have_no_roles(explain, monkeypatch, kept):
    """Ids and masks alone: there is no text that a template wrote. The other side is rendered as ever."""
    sequences = [tokens_of(pieces, explain.tokenizer) for pieces in PIECES["rejected"]]
    pair = Pair(ROW["chosen"], [], 1, recorded=(None, RecordedSide(sequences)))
    monkeypatch.setattr(mask_page, "fit", lambda *_: pair)
    chosen, rejected = explain(ROW, tokenized_row(explain.tokenizer) if kept else None, "" if kept else "x")["sides"]
    assert [s["title"] for s in rejected] == ["sequence 1 of 2", "sequence 2 of 2" + f": {REWRITTEN}" * kept]
    assert [shown_texts(s, "text", 2) for s in rejected] == [
        "".join(text for text, _ in pieces) for pieces in PIECES["rejected"]
    ]
    assert [shown_texts(s, KINDS.index(SUPERVISED), 3) for s in rejected] == list(SAID["rejected"])
    assert [s["shared"] for s in rejected] == SHARED["rejected"]
    assert shown_texts(chosen[1], "user", 2) == "3*4?Sure?"


def test_under_trls_rule_a_side_is_the_whole_text(explain, monkeypatch):
    """No sequences; where a turn is not tokenized as it was, the tokens trained on are shown without roles."""
    explain.settings = RenderSettings(None, mask_turns=False)
    row = {**ROW, "key": "a.jsonl:2"}
    whole = explain.tokenizer.apply_chat_template(row["chosen"], tokenize=False)
    ids = explain.tokenizer(whole, add_special_tokens=False)["input_ids"]
    kept = {"key": row["key"]} | {f"{side}_mask": [1] * len(ids) for side in SIDES}
    kept |= {"chosen_ids": ids, "rejected_ids": [*ids[:-1], ids[0]]}
    (chosen,), (rejected,) = explain(row, kept, "")["sides"]
    assert "".join(token[0] for token in chosen["tokens"]) == whole and shown_texts(chosen, "user", 2) == "3*4?Sure?"
    assert {token[2] for token in rejected["tokens"]} == {"text"} and len(rejected["tokens"]) == len(ids)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_sequences_in_a_browser(explain, tmp_path):
    kept = tokenized_row(explain.tokenizer)
    plain = explain({**ROW, "key": "a.jsonl:2"}, None, "duplicate")
    for side in plain["sides"]:
        side.pop()
    page = tmp_path / "masks.html"
    page.write_text(page_text("r.yaml", [explain(ROW, kept, ""), plain]), encoding="utf-8")
    several, one = seen(page).cards
    assert [text for text in several["sequences"] if text] == [
        "sequence 1 of 2 (31 tokens, 8 supervised, 29 shared)",
        f"sequence 2 of 2: {THOUGHTS} (56 tokens, 5 supervised, 24 shared)",
        "sequence 1 of 2 (31 tokens, 8 supervised, 29 shared)",
        f"sequence 2 of 2: {THOUGHTS} (55 tokens, 4 supervised, 24 shared)",
    ]
    assert "sequences" not in one and len(one["chosen"]) == 31
    both = [text for text, classes, _ in several["chosen"] if "s" in classes]
    assert "".join(both) == "<think>sum</think>1"  # supervised in the first sequence, and shared
    assert [title.endswith(", in the shared prefix") for _, _, title in several["chosen"]].count(True) == 6
