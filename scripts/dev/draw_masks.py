"""Draw docs/masks.svg, the mask of one pair of the quickstart, from its real tokens: python -m scripts.dev.draw_masks

The pair is the first of the recipe's training pairs with several supervised turns on both sides. Needs
models/smollm2-135m-instruct (scripts/prepare_quickstart.py); the same pair gives the same bytes.
"""

import contextlib
import sys
from html import escape
from itertools import pairwise, zip_longest
from pathlib import Path

from mdpo.console import say
from mdpo.reporting.token_view import COLORS, CONTEXT, END, SHARED, SUPERVISED, VISIBLE, sequence_views, training_pairs
from mdpo.runs.entrypoint import run
from mdpo.types import SIDES

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipes/smollm2-135m/dpo/config_quickstart.yaml"
PICTURE = ROOT / "docs" / "masks.svg"
TURN_OPENS = "<|im_start|>"

WIDTH, PAD, GAP, LABELS = 900, 20, 18, 74  # pixels: picture, its border, between the sides, role labels
SIDE = (WIDTH - 2 * PAD - GAP) / 2
CHAR, BOX, ROW = 7.2, 18, 21  # a monospace character at 12 px, a token's box, a row of them
TOP = 164  # the first row of tokens
INK, GRAY, LINE = "#1f2328", "#57606a", "#d0d7de"
LOOKS = {  # text, fill; tokens of the shared prefix have an outline besides
    **{kind: colors[:2] for kind, colors in COLORS.items()},
    SHARED: (GRAY, "#f6f8fa"),
    CONTEXT: (GRAY, "#e4e8ec"),
}
HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} %(height)s" width="{WIDTH}" height="%(height)s"
 role="img" aria-label="%(title)s">
<style>
 text {{ font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
 .sans {{ font-family: -apple-system, "Segoe UI", "Noto Sans", Helvetica, "DejaVu Sans", Arial, sans-serif; }}
</style>
<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="%(inner)s" rx="12" fill="#ffffff" stroke="{LINE}"/>"""


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return say(str(__doc__).strip())
    with contextlib.chdir(ROOT):  # the recipe's paths are relative to it
        pair = first_suitable(training_pairs([RECIPE, *argv]))
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(pair), encoding="utf-8")
    print(f"{PICTURE}: {pair['key']}")


def first_suitable(pairs) -> dict:
    """The first pair with several turns on both sides, each of one sequence."""
    sides = ((pair, [pair[name] for name in SIDES]) for pair in pairs)
    return next(pair for pair, both in sides if all(len(s["ends"]) > 1 and len(s["lengths"]) == 1 for s in both))


def draw(pair: dict) -> str:
    """The picture as SVG. Turns of both sides begin at the same height."""
    title = "What M-DPO trains on: only the tokens that the policy itself produced"
    shapes = [
        sans(PAD, 38, title, INK, size=19, weight=600),
        sans(PAD, 61, "Two trajectories for one question, token by token. Only colored tokens enter the loss;", GRAY),
        sans(PAD, 78, "the user's text, the tool's output and the template's markers are only read.", GRAY),
        *legend(PAD, 94),
    ]
    lefts = {name: PAD + i * (SIDE + GAP) for i, name in enumerate(SIDES)}
    for name, left in lefts.items():
        mask = pair[name]["mask"]
        shapes.append(sans(left, TOP - 22, name, accent(name), size=15, weight=600))
        shapes.append(sans(left + LABELS + 4, TOP - 22, f"{sum(mask)} of {len(mask)} tokens supervised", GRAY))
    y = TOP
    for sides in zip_longest(*(turns(pair, name) for name in SIDES), fillvalue=[]):
        shapes += [f'<path d="M{left:.1f} {y - 9}h{SIDE:.1f}" stroke="{LINE}"/>' for left in lefts.values()]
        rows = [add_turn(shapes, turn, name, lefts[name], y) for name, turn in zip(SIDES, sides, strict=True) if turn]
        y += max(rows) * ROW + 15
    return "\n".join([HEAD % {"height": y + 2, "inner": y + 1, "title": escape(title)}, *shapes, "</svg>\n"])


def turns(pair: dict, name: str) -> list[list[tuple[str, str, bool]]]:
    """(text, kind, whether it is in the shared prefix) of each token, turn by turn."""
    [view] = sequence_views(pair[name])
    tokens = [(text, kind, t < view.shared) for t, (text, kind) in enumerate(zip(view.tokens, view.kinds, strict=True))]
    starts = [t for t, text in enumerate(view.tokens) if text == TURN_OPENS]
    return [tokens[a:b] for a, b in pairwise([*starts, len(tokens)])]


def add_turn(shapes: list[str], turn, name: str, left: float, top: float) -> int:
    """Adds one turn's label and boxes to `shapes`; returns how many rows it fills."""
    role, _, content = "".join(text for text, _, _ in turn).removeprefix(TURN_OPENS).partition("\n")
    supervised = any(kind == SUPERVISED for _, kind, _ in turn)
    shapes.append(sans(left, top + 13, role, accent(name) if supervised else GRAY, weight=600 if supervised else 400))
    if content.startswith("```output"):
        shapes.append(sans(left, top + 28, "tool output", GRAY, size=10.5))
    x, row = left + LABELS, 0
    for text, kind, shared in turn:
        visible = text.translate(VISIBLE).replace("\n", "")
        if x + box_width(visible) > left + SIDE:
            x, row = left + LABELS, row + 1
        shapes.append(box(x, top + row * ROW, visible, kind, name, shared))
        x += box_width(visible) + 2
        if "\n" in text:
            x, row = left + LABELS, row + 1
    return row + (x > left + LABELS)


def box_width(text: str) -> float:
    return len(text) * CHAR + 4


def box(x: float, y: float, text: str, kind: str, name: str, outlined: bool) -> str:
    """One token. Its text is fitted to the box whatever the font; spaces at its ends are left blank."""
    ink, fill = LOOKS[kind if kind in LOOKS else (kind, name)]
    stroke = f' stroke="{"#b4bdc6" if kind == SHARED else accent(name)}"' if outlined else ""
    frame = f'x="{x:.1f}" y="{y:.1f}" width="{box_width(text):.1f}" height="{BOX}" rx="3.5"'
    shape, word = f'<rect {frame} fill="{fill}"{stroke}/>', text.strip(" ")
    if not word:
        return shape
    text_x = x + 2 + (len(text) - len(text.lstrip(" "))) * CHAR
    fitted = f'textLength="{len(word) * CHAR:.1f}" lengthAdjust="spacingAndGlyphs"'
    return shape + f'<text x="{text_x:.1f}" y="{y + 13:.1f}" fill="{ink}" {fitted}>{escape(word)}</text>'


def legend(x: float, y: float) -> list[str]:
    outlined = [(SHARED, "", True), *((SUPERVISED, name, True) for name in SIDES)]
    entries = [  # label, samples before it, width of the label
        ("supervised", [(SUPERVISED, name, False) for name in SIDES], 84),
        ("end of turn, supervised too", [(END, name, False) for name in SIDES], 190),
        ("context, not trained on", [(CONTEXT, "", False)], 164),
        ("outlined: in the shared prefix", outlined, 0),
    ]
    shapes = []
    for label, samples, width in entries:
        for sample in samples:
            shapes.append(box(x, y, "  ", *sample))
            x += box_width("  ") + 3
        shapes.append(sans(x + 3, y + 13, label, INK))
        x += width + 8
    return shapes


def accent(name: str) -> str:
    return LOOKS[END, name][1]


def sans(x: float, y: float, text: str, ink: str, size: float = 12.5, weight: int = 400) -> str:
    style = f'style="font-size: {size}px; font-weight: {weight}"'
    return f'<text class="sans" x="{x:.1f}" y="{y:.1f}" fill="{ink}" {style}>{escape(text)}</text>'


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
