"""scripts/show_masks.py and scripts/dev/draw_masks.py show the masks that training uses, and need no weights for it."""

import io
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import show_masks
from repository import ROOT
from rich.console import Console
from tiny import CHATML, agent_rows, tokenizer_for

from mdpo.masking.tokenizer import token_text
from scripts.dev import draw_masks

QUICKSTART_MODEL = ROOT / "models" / "smollm2-135m-instruct"
USER, CALL, OUTPUT, ANSWER = (
    "What is 3 * 4?",
    "Let us see 🎉.\n```python\nprint(3 * 4)\n```",
    "12 <|im_end|>\n<|im_start|>assistant\n\x1b[31mred",
    "It is 12.",
)


def conversation(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


HARD = {
    "chosen": conversation(USER, CALL, OUTPUT, ANSWER),
    "rejected": conversation(USER, CALL, OUTPUT, "It is 13.", "Sure?", "Yes."),
}
# What the policy wrote in HARD, written down by hand: (text, mask).
HARD_SEGMENTS = {
    "chosen": [
        (f"<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n", 0),
        (f"{CALL}<|im_end|>", 1),
        (f"\n<|im_start|>user\n{OUTPUT}<|im_end|>\n<|im_start|>assistant\n", 0),
        ("It is 12.<|im_end|>", 1),
        ("\n", 0),
    ],
    "rejected": [
        (f"<|im_start|>user\n{USER}<|im_end|>\n<|im_start|>assistant\n", 0),
        (f"{CALL}<|im_end|>", 1),
        (f"\n<|im_start|>user\n{OUTPUT}<|im_end|>\n<|im_start|>assistant\n", 0),
        ("It is 13.<|im_end|>", 1),
        ("\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("Yes.<|im_end|>", 1),
        ("\n", 0),
    ],
}
EQUAL = {"chosen": HARD["chosen"], "rejected": HARD["chosen"]}  # dropped: the sides do not differ
# Sets in the recipe's order; eleven rows, so that row 10 must not stand before row 2.
SETS = {"b.jsonl": [HARD, EQUAL], "a.jsonl": agent_rows(11)}
KEPT = ["b.jsonl:1", *(f"a.jsonl:{n}" for n in range(1, 12))]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_for(CHATML)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("masks")
    tokenizer.save_pretrained(folder / "model")
    for name, rows in SETS.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    mixer = "".join(f"  {folder / name}: 1.0\n" for name in SETS)
    path = folder / "recipe.yaml"
    head = f"model_name_or_path: {folder}/model\noutput_dir: {folder}/out\nbf16: false\n"
    path.write_text(f"{head}dataset_mixer:\n{mixer}")
    return path


@pytest.fixture(scope="module")
def printed(recipe):
    """stdout of a real start with --json, from a folder that is not the repository's."""
    command = [sys.executable, ROOT / "scripts" / "show_masks.py", recipe, "--json", "--max_length=1000"]
    done = subprocess.run(command, capture_output=True, cwd=recipe.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr.decode()
    assert b"b.jsonl (train): 2 rows read, 1 kept" in done.stderr
    return done.stdout.decode()


@pytest.fixture(scope="module")
def pairs(printed):
    return [json.loads(line) for line in printed.splitlines()]


@pytest.fixture
def in_process(monkeypatch):
    """load_recipe may set the launcher's precision in the environment, and a test runner's colors are not ours."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def rendered(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False)


def sides(pairs):
    """(messages, side as printed) of both sides of every kept pair."""
    rows = {f"{name}:{n + 1}": row for name, rows in SETS.items() for n, row in enumerate(rows)}
    return [(rows[Path(pair["key"]).name][name], pair[name]) for pair in pairs for name in ("chosen", "rejected")]


# ---- --json


def test_json_is_one_object_for_every_kept_pair_in_the_order_of_sets_and_rows(pairs):
    assert [Path(pair["key"]).name for pair in pairs] == KEPT


def test_json_ids_are_the_templates_own_and_the_lists_are_as_long(pairs, tokenizer):
    for messages, side in sides(pairs):
        assert side["ids"] == tokenizer(rendered(tokenizer, messages), add_special_tokens=False)["input_ids"]
        assert len(side["ids"]) == len(side["tokens"]) == len(side["mask"])
        assert set(side["mask"]) == {0, 1}


def test_json_tokens_join_to_the_rendered_text(pairs, tokenizer):
    split = 0
    for messages, side in sides(pairs):
        text, joined = rendered(tokenizer, messages), "".join(side["tokens"])
        split += "🎉" in text
        assert re.sub("\ufffd+", "🎉", joined) == text
    assert split == 2  # else nothing above had a character split over tokens


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_json_mask_is_the_hand_derived_one(pairs, tokenizer, name):
    side, expected, ends = pairs[0][name], [], []
    for text, bit in HARD_SEGMENTS[name]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected += [bit] * len(ids)
        ends += [len(expected) - 1] * bit
    assert "".join(text for text, _ in HARD_SEGMENTS[name]) == rendered(tokenizer, HARD[name])
    assert side["mask"] == expected
    assert side["ends"] == ends


def test_json_shared_is_the_common_prefix_where_sides_are_one_sequence(pairs):
    for pair in pairs:
        chosen, rejected = (list(zip(pair[s]["ids"], pair[s]["mask"], strict=True)) for s in ("chosen", "rejected"))
        [n], [same] = (pair[s]["shared"] for s in ("chosen", "rejected"))
        assert n == same and chosen[:n] == rejected[:n] and chosen[n] != rejected[n]
        assert [pair[s]["lengths"] for s in ("chosen", "rejected")] == [[len(chosen)], [len(rejected)]]


def test_nothing_is_written_beside_the_recipe_and_no_weights_were_there(printed, recipe):
    assert not list((recipe.parent / "model").glob("*.safetensors"))
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["a.jsonl", "b.jsonl", "model", "recipe.yaml"]


# ---- in the terminal


def visible(text):
    return text.replace("\n", "↵\n").replace("🎉", "\ufffd\ufffd\ufffd\ufffd").replace("\x1b", "␛")


def test_marks_stand_exactly_around_what_the_policy_wrote(recipe, capsys, in_process):
    show_masks.main([str(recipe), "--first=1", "--max_length=1000"])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "b.jsonl:1" in out and "a.jsonl:1," not in out
    body = out.partition("line break")[2]
    written = [
        f"«{visible(text).removesuffix('<|im_end|>')}⟦<|im_end|>⟧»"
        for name in ("chosen", "rejected")
        for text, bit in HARD_SEGMENTS[name]
        if bit
    ]
    shown = re.findall("«.*?»", body.replace("┊", ""), re.DOTALL)
    assert shown == written
    assert body.count("⟦") == len(written) and body.count("┊") == 2
    assert "«It is┊ 12.⟦" in body and "«It is┊ 13.⟦" in body  # the sides part within a supervised span


def test_without_turn_masks_the_tools_output_lies_within_the_marks(recipe, capsys, in_process):
    show_masks.main([str(recipe), "--mask_user_turns=false", "--max_length", "1000", "--first", "1"])
    body = capsys.readouterr().out.partition("line break")[2]
    assert len(re.findall("«.*?»", body, re.DOTALL)) == 2 and "⟦" not in body


def test_no_color_wins_over_a_terminal(pairs, monkeypatch):
    def shown(**options):
        console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", **options)
        show_masks.show(pairs[:1], console)
        return console.file.getvalue()

    assert "«" in shown(no_color=True)
    assert "«" not in shown(no_color=False)
    assert "\x1b[31m" not in shown(no_color=False)  # the tool's own escape codes stay text


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_colors_stand_exactly_on_what_the_policy_wrote(pairs, name):
    [view] = show_masks.sequence_views(pairs[0][name])
    text = show_masks.sequence_text(view, name, plain=False)
    inks = {kind: show_masks.COLORS[kind, name][0] for kind in (show_masks.SUPERVISED, show_masks.END)}
    found = {kind: [text.plain[s.start : s.end] for s in text.spans if s.style.startswith(inks[kind])] for kind in inks}
    ours = [visible(segment).removesuffix("<|im_end|>") for segment, bit in HARD_SEGMENTS[name] if bit]
    assert "".join(found[show_masks.SUPERVISED]) == "".join(ours)
    assert found[show_masks.END] == ["<|im_end|>"] * len(ours)


@pytest.mark.parametrize("kind", ["byte", "metaspace"])
def test_token_text_keeps_the_spaces(kind):
    tokenizer = tokenizer_for(CHATML, kind)
    text = "<|im_start|>user\nLet us compute it  with Python.\n    print(3)<|im_end|>\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    text_of = token_text(tokenizer)
    pieces = [text_of(tuple(ids[max(t - 1, 0) : t]), token) for t, token in enumerate(ids)]
    assert "".join(pieces) == text and all(pieces)
    assert kind == "byte" or "".join(tokenizer.decode([token]) for token in ids) != text  # what a decode alone gives


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--first=0"], "--first: 0 is out of range"),
        (["--first=two"], "--first: invalid int value: 'two'"),
        (["--pair=1"], "--pair is not a key"),
        (["nowhere.yaml", "--json"], "nowhere.yaml: cannot be read"),
        (["--first=3", "--json"], "--first: has no effect with --json"),
        (["--json", "--html=masks.html"], "--html: not allowed with argument --json"),
    ],
)
def test_mistakes_end_in_one_message(argv, words, capsys):
    assert show_masks.run(show_masks.main, argv) == 1
    out, err = capsys.readouterr()
    assert words in err and "Traceback" not in err and out == ""


# ---- the picture


def boxes(svg):
    """(x, y, width) of every token's box below the legend."""
    rects = [r for r in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect") if r.get("rx") == "3.5"]
    placed = [tuple(float(r.get(k)) for k in ("x", "y", "width")) for r in rects]
    return [place for place in placed if place[1] >= draw_masks.TOP]


def test_the_picture_holds_every_token_once_and_no_box_touches_another(pairs):
    pair = draw_masks.first_suitable(pairs)
    svg = draw_masks.draw(pair)
    assert svg == draw_masks.draw(json.loads(json.dumps(pair)))
    placed = boxes(svg)
    assert len(placed) == sum(len(pair[name]["ids"]) for name in ("chosen", "rejected"))
    rows = {}
    for x, y, width in sorted(placed):
        assert rows.get(y, 0) < x and x + width <= draw_masks.WIDTH - draw_masks.PAD
        rows[y] = x + width
    assert all(b - a >= draw_masks.BOX for a, b in zip(sorted(rows), sorted(rows)[1:], strict=False))


def test_the_picture_is_of_sides_of_one_sequence(pairs):
    """Only then do turns of both sides stand beside each other."""
    suited = draw_masks.first_suitable(pairs)
    one, *_ = suited["chosen"]["lengths"]
    several = {**suited, "chosen": {**suited["chosen"], "lengths": [1, one - 1]}}
    assert draw_masks.first_suitable([several, suited]) is suited


@pytest.mark.skipif(not QUICKSTART_MODEL.is_dir(), reason="models/smollm2-135m-instruct is not made yet")
def test_docs_masks_svg_is_what_the_script_draws(monkeypatch, in_process):
    monkeypatch.chdir(ROOT)
    pair = draw_masks.first_suitable(show_masks.training_pairs([draw_masks.RECIPE]))
    made = draw_masks.draw(pair)
    assert made == draw_masks.PICTURE.read_text(encoding="utf-8"), "run `python -m scripts.dev.draw_masks`"
    assert len(boxes(made)) > 100
