"""scripts/show_masks.py --html, looked at in a real browser: supervised text is exactly what the assistant said."""

import json
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest
import show_masks
from browser import BROWSER, QUIET
from tiny import CHATML, agent_rows, tokenizer_for

from mdpo.runs.entrypoint import run

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
    lists of (text, classes, title)."""

    def __init__(self, text: str):
        super().__init__()
        self.cards, self.side, self.token = [], None, None
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

    def handle_endtag(self, tag):
        if tag == "section":
            self.side = None


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
