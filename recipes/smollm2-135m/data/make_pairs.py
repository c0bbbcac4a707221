"""Write the multi-turn math-with-Python pairs of recipes/smollm2-135m.

    python recipes/smollm2-135m/data/make_pairs.py [FOLDER]

Every code block is run, and the output block has what it printed. The same seed gives the same bytes.
"""

import json
import random
import re
import sys
from pathlib import Path
from subprocess import PIPE, run

import pair_templates as T
from pair_forms import as_pair, as_trajectories, with_margin, with_weights

SEED = 240902392
DATA = Path(__file__).resolve().parent
SHORT = (T.SHORT, T.SHORT_WORDS, T.TRAIN_RANGES, T.TRAIN_NAMES)  # templates, words, number ranges, names
LONG = (T.LONG, T.LONG_WORDS, T.TRAIN_RANGES, T.TRAIN_NAMES)
HELDOUT = (T.HELDOUT, T.SHORT_WORDS, T.HELDOUT_RANGES, T.HELDOUT_NAMES)
FILES = {  # name: (rows, source, form); no question of an earlier file is repeated
    "train_short": (96, SHORT, as_pair),
    "train_long": (240, LONG, as_pair),
    "heldout": (64, HELDOUT, as_pair),
    "train_margin": (64, SHORT, with_margin),
    "heldout_margin": (32, HELDOUT, with_margin),
    "train_weights": (64, SHORT, with_weights),
    "trajectories": (16, SHORT, as_trajectories),
}
KINDS = ["wrong_operator", "wrong_quantity", "ignores_output", "no_check"]
WRONG_OPERATOR = {"*": "+", "-": "+", "//": "+", "%": "+"}  # one mistake: it adds where it must not
SLIPS = [-20, -10, -9, -2, -1, 1, 2, 9, 10, 20]  # added to the truth where an answer is made up
# Runs a JSON list of snippets, each in a namespace of its own; prints what each printed, one JSON string a line.
RUNNER = """import contextlib, io, json, sys
for code in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        exec(code, {"__name__": "__main__"})
    print(json.dumps(stdout.getvalue()))"""


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    folder.mkdir(parents=True, exist_ok=True)
    used_questions = set()
    for name, (n, source, form) in FILES.items():
        wrongs = 2 if form is as_trajectories else 1
        drawn = [draw_sides(f"{name}-{index:03d}", index, wrongs, used_questions, *source) for index in range(n)]
        fill_outputs([message for sides in drawn for _, messages in sides for message in messages])
        rows = [row for index, sides in enumerate(drawn) for row in form(f"{name}-{index:03d}", sides)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows)} rows")


def demand(condition):
    if not condition:
        raise ArithmeticError("the numbers or the mistake do not suit")


def draw_sides(name, index, wrongs, used_questions, templates, wordings, ranges, names):
    """[("right", messages), (kind of mistake, messages), ...], the outputs of their code not filled in yet. Adds to
    `used_questions`, so that no question is repeated."""
    template, at = templates[index // len(KINDS) % len(templates)], index % len(KINDS)
    kinds = (KINDS * 2)[at : at + wrongs]
    rng = random.Random(f"{SEED}/{name}")
    while True:
        try:
            question, numbers, blocks, truth = draw_problem(*template, ranges, names, rng)
            demand(question not in used_questions)
            mistakes = [draw_mistake(kind, numbers, blocks, truth, rng) for kind in kinds]
        except ArithmeticError:
            continue
        used_questions.add(question)
        # All sides have the same wording, so that nothing but the mistake tells them apart.
        draws = [rng.random() for _ in range(4)]
        sides = [("right", trajectory(question, numbers, blocks, truth, wordings, draws))]
        for kind, mistake in zip(kinds, mistakes, strict=True):
            side_wordings = (*wordings[:2], T.GUESSES) if kind == "no_check" else wordings
            sides.append((kind, trajectory(question, numbers, *mistake, side_wordings, draws)))
        return sides


def draw_problem(question, steps, closed_form, ranges, names, rng):
    """Returns question, numbers, blocks and truth. A block is a list of steps (variable, formula, meaning)."""
    numbers = {name: rng.randint(*ranges[letter]) for name, letter in re.findall(r"\{(\w+):(\w)\}", question)}
    people = dict(zip(("who", "other"), rng.sample(names, 2), strict=True))
    question = re.sub(r":\w\}", "}", question).format(**people, **numbers)
    steps = [re.fullmatch(r"(\w+) = (.+?)(?: # (.+))?", step).groups() for step in steps.format(**people).split("; ")]
    # A long pair (its steps have meanings) has up to a block a step; a short one two if its question is short.
    max_blocks = len(steps) if steps[0][2] or len(question) < 74 else 1
    cuts = sorted(rng.sample(range(1, len(steps)), rng.randrange(max_blocks)))
    blocks = [steps[start:end] for start, end in zip([0, *cuts], [*cuts, len(steps)], strict=True)]
    truth = eval(closed_form, dict(numbers))
    demand(truth == round(truth) and len({*numbers.values(), truth}) > len(numbers))
    assert solve(blocks, numbers)[-1][1] == truth, f"{steps} do not compute {closed_form}"
    return question, numbers, blocks, round(truth)


def solve(blocks, numbers):
    """[(code, the value that it should print)]; a block knows the question and what the blocks before it printed."""
    solved, known = [], dict(numbers)
    for block in blocks:
        values, lines = {}, []
        for variable, formula, meaning in block:
            formula = re.sub(r"[a-z_]+", lambda name: str(known.get(name[0], name[0])), formula)
            values[variable] = eval(formula, dict(values))
            demand(values[variable] > 0)
            lines += [f"# {meaning}"] * bool(meaning) + [f"{variable} = {formula}"]
        known[variable] = values[variable]
        solved.append(("\n".join([*lines[:-1], f"print({formula})"]), values[variable]))
    return solved


def draw_mistake(kind, numbers, blocks, truth, rng):
    """Returns the blocks that the rejected side runs and its answer."""
    turn = rng.randrange(len(blocks))
    answer = truth + rng.choice(SLIPS)
    if kind == "no_check":
        blocks = blocks[:turn]
    elif kind != "ignores_output":
        blocks = [list(block) for block in blocks]
        step = rng.randrange(len(blocks[turn]))
        variable, formula, meaning = blocks[turn][step]
        replaceable = WRONG_OPERATOR if kind == "wrong_operator" else numbers
        candidates = [word for word in re.finditer(r"\w+|(?<= )[-+*/%]+(?= )", formula) if word[0] in replaceable]
        demand(candidates)
        word = rng.choice(candidates)
        wrong = WRONG_OPERATOR.get(word[0]) or rng.randrange(2, 10 ** len(str(numbers[word[0]])))
        demand(wrong not in numbers.values())
        blocks[turn][step] = (variable, f"{formula[: word.start()]}{wrong}{formula[word.end() :]}", meaning)
        answer = solve(blocks, numbers)[-1][1]
    demand(answer > 0 and answer != truth)
    return blocks, answer


def trajectory(question, numbers, blocks, answer, wordings, draws):
    """Messages; the content of an output message is still (code, the value that it should print)."""
    contents, fields = [f"{T.INSTRUCTION}\n\n{question}"], {"answer": answer}
    for turn, (block, solved) in enumerate(zip(blocks, solve(blocks, numbers), strict=True)):
        fields["next"] = ", then ".join(meaning for _, _, meaning in block if meaning)
        text = pick(wordings[min(turn, 1)], draws[turn]) % fields
        contents += [f"{text}\n```python\n{solved[0]}\n```".lstrip(), solved]
        fields["last"], fields["value"] = block[-1][2], solved[1]
    contents.append(pick(wordings[2], draws[len(blocks)]) % fields)
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


def pick(options, draw):
    return options[int(draw * len(options))]


def fill_outputs(messages):
    """Run every code block in one subprocess and put what it really printed into its output message."""
    waiting = [message for message in messages if isinstance(message["content"], tuple)]
    codes = json.dumps([message["content"][0] for message in waiting])
    result = run([sys.executable, "-I", "-c", RUNNER], input=codes, stdout=PIPE, text=True, timeout=60, check=True)
    for message, line in zip(waiting, result.stdout.splitlines(), strict=True):
        (code, value), printed = message["content"], json.loads(line)
        assert printed == f"{value}\n", f"{code} printed {printed}"
        message["content"] = f"```output\n{printed}```"


if __name__ == "__main__":
    main()
