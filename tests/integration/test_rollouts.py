"""mdpo/rollouts/loop.py with a scripted policy, and with real models through mdpo/rollouts/generate.py."""

import json

import pytest
import torch
from errors import refused
from repository import ROOT
from tiny import CHATML, tiny_llama, tokenizer_for
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mdpo.loss.metrics import COLUMNS
from mdpo.masking.chat_template import ChatTemplate
from mdpo.rollouts.generate import Generator, refuse_hidden_tool_role
from mdpo.rollouts.loop import (
    OUTPUT_CHARACTERS,
    Question,
    Reply,
    RolloutConfig,
    Trajectory,
    code_of,
    output_block,
    read_questions,
    roll_out,
    save_all,
)
from mdpo.rollouts.sandbox import Limits, RunResult, Sandbox
from mdpo.rollouts.tables import by_turns, count_turns, rollout_figures, rollout_tables, wilson

QUICKSTART_MODEL = ROOT / "models" / "smollm2-135m-instruct"


def question(key: str, gold: str = "42") -> Question:
    return Question(key, [{"role": "user", "content": key}], gold)


class Script:
    """A policy whose turns are written down: {question: [turn, ...]}. Counts the sizes of the batches it got."""

    def __init__(self, turns: dict[str, list]):
        self.turns, self.sizes = turns, []

    def __call__(self, conversations):
        self.sizes.append(len(conversations))
        said = [sum(m["role"] == "assistant" for m in c) for c in conversations]
        turns = [self.turns[c[0]["content"]][n] for c, n in zip(conversations, said, strict=True)]
        return [turn if isinstance(turn, Reply) else Reply(turn) for turn in turns]


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(Limits(seconds=60))


def block(code: str) -> str:
    return f"```python\n{code}\n```"


# question: (the policy's turns, the outputs that come back, answer, correct, ended, how runs of code ended)
SCRIPTED = {
    "at once": (["It is \\boxed{42}."], [], "42", True, "answered", []),
    "wrong": (["It is \\boxed{41}."], [], "41", False, "answered", []),
    "code, then answer": ([block("print(6 * 7)"), "So \\boxed{42.0}."], ["42\n"], "42.0", True, "answered", ["ok"]),
    "three turns": (
        [f"First\n{block('x = 6')}", f"{block('print(7)')}\nthen", "\\boxed{\\frac{84}{2}}"],
        ["", "7\n"], r"\frac{84}{2}", True, "answered", ["ok", "ok"],
    ),
    "two blocks are one program": (
        [f"{block('x = 6')} and {block('print(x * 7)')}", "\\boxed{42}"], ["42\n"], "42", True, "answered", ["ok"]
    ),
    "names of earlier turns are gone": (
        [block("x = 6"), block("print('x' in globals())"), "\\boxed{42}"],
        ["", "False\n"], "42", True, "answered", ["ok", "ok"],
    ),
    "a box beside code is the answer": ([f"{block('print(1)')} \\boxed{{42}}"], [], "42", True, "answered", []),
    "a box inside code is none": (
        [block(r"print(r'\boxed{1}')"), "\\boxed{42}"], ["\\boxed{1}\n"], "42", True, "answered", ["ok"]
    ),
    "neither": (["I do not know."], [], None, False, "no answer", []),
    "other code": (["```\nprint(1)\n```"], [], None, False, "no answer", []),
    "error": (
        [block("1 / 0"), "\\boxed{42}"],
        ['Traceback (most recent call last):\n  File "main.py", line 1, in <module>\n    1 / 0\n    ~~^~~\n'
         "ZeroDivisionError: division by zero\n"], "42", True, "answered", ["error"],
    ),
    "open block": (["```python\nprint(42)", "\\boxed{42}"], ["42\n"], "42", True, "answered", ["ok"]),
    "for ever": ([block("print(1)")] * 4, ["1\n"] * 3, None, False, "max turns", ["ok"] * 3),
    "cut": ([Reply("```python\nprint(1", "cut")], [], None, False, "cut", []),
    "cut behind a box": ([Reply("\\boxed{42} and so on and", "cut")], [], "42", True, "answered", []),
    "too long": ([block("print(1)"), Reply("", "too long")], ["1\n"], None, False, "too long", ["ok"]),
}  # fmt: skip


def expected(name: str, role: str) -> list[dict]:
    turns, outputs = SCRIPTED[name][:2]
    messages = [{"role": "user", "content": name}]
    for n, turn in enumerate(turns):
        text = turn.text if isinstance(turn, Reply) else turn
        messages += [{"role": "assistant", "content": text}] if text else []
        messages += [{"role": role, "content": f"```output\n{outputs[n]}```"}] if n < len(outputs) else []
    return messages


@pytest.mark.parametrize(("size", "role"), [(1, "user"), (4, "tool"), (100, "user")])
def test_scripted_trajectories(size, role, sandbox):
    policy = Script({name: turns for name, (turns, *_) in SCRIPTED.items()})
    rules = RolloutConfig(max_turns=4, batch_size=size, tool_role=role)
    found = {t.key: t for t in roll_out([question(name) for name in SCRIPTED], policy, sandbox.run, rules)}
    assert set(found) == set(SCRIPTED) and max(policy.sizes) == min(size, len(SCRIPTED))
    for name, (turns, _, answer, correct, ended, code) in SCRIPTED.items():
        t = found[name]
        assert t.messages == expected(name, role), name
        assert (t.answer, t.correct, t.ended, t.code) == (answer, correct, ended, code), name
        assert t.turns == len([turn for turn in turns if not isinstance(turn, Reply) or turn.text]), name


def test_a_place_that_becomes_free_is_filled():
    turns = {"long": [block("1")] * 3 + ["\\boxed{1}"], **{f"q{i}": ["\\boxed{1}"] for i in range(3)}}
    policy = Script(turns)
    ran = []
    found = list(roll_out([question(k, "1") for k in turns], policy, lambda c: ran.append(c) or RunResult("", "ok", 0),
                          RolloutConfig(batch_size=2)))  # fmt: skip
    assert policy.sizes == [2, 2, 2, 1] and ran == ["1\n"] * 3
    assert [t.key for t in found] == ["q0", "q1", "q2", "long"]


def test_samples_have_a_number_each():
    found = list(roll_out([question("a"), question("b")], Script({"a": ["\\boxed{42}"], "b": ["?"]}), None,
                          RolloutConfig(samples=3, batch_size=4)))  # fmt: skip
    assert [(t.key, t.sample, t.correct) for t in found] == [
        ("a", 0, True), ("a", 1, True), ("a", 2, True), ("b", 0, False), ("b", 1, False), ("b", 2, False)
    ]  # fmt: skip


def test_output_blocks():
    def shown(output, ended="ok"):
        return output_block(RunResult(output, ended, 0.0))

    assert shown("42\n") == "```output\n42\n```" == shown("42")
    assert shown("") == "```output\n```"
    assert shown("1\n", "timeout") == "```output\n1\nTimeoutError: the time limit was reached\n```"
    assert shown("a", "flood") == "```output\na\nOSError: too much output\n```"
    half = OUTPUT_CHARACTERS // 2
    long = "a" * half + "b" * 10 + "c" * half
    assert shown(long) == f"```output\n{'a' * half}\n… 10 characters left out …\n{'c' * half}\n```"
    assert shown("a" * 2 * half) == f"```output\n{'a' * 2 * half}\n```"


def test_the_form_is_that_of_the_quickstart_pairs(sandbox):
    """Code of the shipped pairs, run here, gives the very turns that follow it there."""
    rows = (ROOT / "recipes/smollm2-135m/data/heldout.jsonl").read_text().splitlines()[:5]
    seen = 0
    for row in map(json.loads, rows):
        for turn, after in zip(row["chosen"], row["chosen"][1:], strict=False):
            if turn["role"] == "assistant" and (code := code_of(turn["content"])):
                assert output_block(sandbox.run(code)) == after["content"]
                seen += 1
    assert seen >= 5


def test_questions(tmp_path):
    file = tmp_path / "q.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"question": "6 * 7?", "answer": "6 * 7 = 42\n#### 42"}, {"prompt": "1?", "answer": 1, "id": "one"},
            {"prompt": messages, "answer": "\\frac{4}{2}", "key": "two"}]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_questions(str(file)) == [
        Question(f"{file}:1", [{"role": "user", "content": "6 * 7?"}], "42"),
        Question("one", [{"role": "user", "content": "1?"}], "1"),
        Question("two", messages, "\\frac{4}{2}"),
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert read_questions(str(file), "Use Python.")[0].messages[0]["content"] == "Use Python.\n\n6 * 7?"


BAD_ROWS = {
    "no answer": ({"question": "1?"}, "question", "`answer`", "it has question."),
    "both": ({"question": "1?", "prompt": "1?", "answer": 1}, "question", "it has question, prompt, answer."),
    "empty answer": ({"question": "1?", "answer": " "}, "answer", "is empty"),
    "null answer": ({"question": "1?", "answer": None}, "answer", "not None."),
    "number": ({"question": 5, "answer": 1}, "prompt"),
    "ends with the assistant": ({"prompt": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}],
                                 "answer": 1}, "prompt", "the assistant's"),
    "role": ({"prompt": [{"role": "moon", "content": "1?"}], "answer": 1}, "unknown role", "message 1: ", ": moon"),
    "key twice": ({"question": "1?", "answer": 1, "key": "a"}, "key", "'a' comes twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_questions_are_named(name, tmp_path):
    row, key, *details = BAD_ROWS[name]
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "1?", "answer": 1, "key": "a"}) + "\n" + json.dumps(row) + "\n")
    with refused(key, "q.jsonl:2: ", *details):
        read_questions(str(file))
    with refused("rollouts", "none.jsonl"):
        read_questions(str(tmp_path / "none.jsonl"))


# ------------------------------------------------------------------------------------------------ generation


@pytest.fixture(scope="module")
def tiny():
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    return tiny_llama(tokenizer, seed=3), tokenizer, ChatTemplate(tokenizer)


CONVERSATIONS = [
    [{"role": "user", "content": "What is 3 * 4?"}],
    [{"role": "user", "content": "Search the web, read the page and report what it says about rivers. " * 3}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}],
    [{"role": "user", "content": "It is sunny in Paris."}],
]


def by_hand(model, ids: list[int], stops: set[int], most: int) -> list[int]:
    """Greedy decoding without cache, padding or `generate`; a stop token is not returned."""
    new: list[int] = []
    while len(new) < most:
        token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in stops:
            break
        new.append(token)
    return new


def test_a_batch_of_four_is_four_batches_of_one_and_decoding_by_hand(tiny):
    model, tokenizer, template = tiny
    # What checkpoints ship, and would change a greedy answer: it must not count here.
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=5)
    generate = Generator(model, tokenizer, template, max_new_tokens=12)
    together = generate(CONVERSATIONS)
    assert together == [generate([c])[0] for c in CONVERSATIONS]
    assert len({reply.text for reply in together}) == 4
    for conversation, reply in zip(CONVERSATIONS, together, strict=True):
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        new = by_hand(model, ids, {tokenizer.eos_token_id}, 12)
        assert reply == Reply(tokenizer.decode(new), "cut" if len(new) == 12 else "turn")


def test_a_turn_ends_at_the_templates_end_of_turn_token(tiny):
    """The model's own eos is another token here, as in many chat models."""
    model, _, _ = tiny
    tokenizer = tokenizer_for(CHATML, "byte")  # eos is <eos>
    template = ChatTemplate(tokenizer)
    generate = Generator(model, tokenizer, template, max_new_tokens=8)
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    assert {end, eos} <= generate.stops
    words = tokenizer("It is", add_special_tokens=False)["input_ids"]
    assert generate._reply([*words, end, *words]) == Reply("It is") == generate._reply([*words, eos])
    assert generate._reply(words) == Reply("It is", "cut")
    assert generate._reply([end]) == Reply("")


def test_a_conversation_that_leaves_no_room_is_too_long(tiny):
    model, tokenizer, template = tiny
    generate = Generator(model, tokenizer, template, max_new_tokens=12)
    rest = generate.context - 12
    fill = [{"role": "user", "content": "1" * n} for n in range(rest)]
    size = {len(generate.prompt([m])): [m] for m in fill}  # one token a digit, or nearly
    assert rest in size and rest + 1 in {*size, len(generate.prompt([{"role": "user", "content": "1" * rest}]))}
    over = next(m for n, m in sorted(size.items()) if n > rest)
    replies = generate([size[rest], over, CONVERSATIONS[0]])
    assert [r.ended == "too long" for r in replies] == [False, True, False]
    assert replies[2] == generate([CONVERSATIONS[0]])[0]
    with refused("max_new_tokens", "512 ", "context of 512 "):
        Generator(model, tokenizer, template, max_new_tokens=512)


def test_sampling_follows_the_seed_and_the_temperature(tiny):
    model, tokenizer, template = tiny

    def sampled(seed, temperature):
        generate = Generator(model, tokenizer, template, 12, temperature)
        torch.manual_seed(seed)
        return generate(CONVERSATIONS)

    assert sampled(0, 1.0) == sampled(0, 1.0) != sampled(1, 1.0)
    assert sampled(0, 1e-4) == sampled(1, 1e-4) == sampled(0, 0.0)


def test_rollouts_of_a_random_model(tiny, sandbox, tmp_path):
    model, tokenizer, template = tiny
    generate = Generator(model, tokenizer, template, max_new_tokens=16)
    questions = [Question(str(i), c, "12") for i, c in enumerate(CONVERSATIONS)]
    found = save_all(roll_out(questions, generate, sandbox.run, RolloutConfig(max_turns=2)), tmp_path / "t.jsonl", 4)
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [t.key for t in found] and len(rows) == 4
    alone = [reply.text for reply in generate(CONVERSATIONS)]
    for row in rows:
        assert row["ended"] in ("no answer", "cut") and row["turns"] == 1 and not row["correct"]
        asked, said = CONVERSATIONS[int(row["key"])], alone[int(row["key"])]
        assert row["messages"] == [*asked, {"role": "assistant", "content": said}]


def test_tool_roles_that_a_template_does_not_show():
    shows = ChatTemplate(tokenizer_for(CHATML, "byte", eos="<|im_end|>"))
    for role in ("user", "tool"):
        refuse_hidden_tool_role(shows, role)
    hides = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    with refused("tool_role", "leaves out", "'tool'"):
        refuse_hidden_tool_role(ChatTemplate(tokenizer_for(hides, "byte", eos="<|im_end|>")), "tool")
    refusal = "{{ raise_exception('no tools') if m['role'] == 'tool' }}"
    raises = CHATML.replace("{{ '<|im_start|>' ", refusal + "{{ '<|im_start|>' ")
    with refused("tool_role", ": tool: ", ": no tools"):
        refuse_hidden_tool_role(ChatTemplate(tokenizer_for(raises, "byte", eos="<|im_end|>")), "tool")


@pytest.mark.slow
def test_rollouts_of_the_quickstart_model(sandbox):
    if not QUICKSTART_MODEL.is_dir():
        pytest.skip("scripts/prepare_quickstart.py has not been run")
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL, dtype="float32")
    rows = (ROOT / "recipes/smollm2-135m/data/heldout.jsonl").read_text().splitlines()[:4]
    prompts = [json.loads(row)["chosen"][:1] for row in rows]
    questions = [Question(str(i), prompt, "291") for i, prompt in enumerate(prompts)]
    generate = Generator(model, tokenizer, ChatTemplate(tokenizer), max_new_tokens=20)
    four, one = (
        {t.key: t for t in roll_out(questions, generate, sandbox.run, RolloutConfig(max_turns=2, batch_size=size))}
        for size in (4, 1)
    )
    assert four == one and len(four) == 4
    assert all(t.ended and t.turns for t in four.values())
    assert all("<|im_end|>" not in m["content"] for t in four.values() for m in t.messages)


# ------------------------------------------------------------------------------------------------ figures


def test_wilson():
    """By hand for 8 of 10: z² = 3.841459, (0.8 + 0.192073 ± 1.959964 √(0.016 + 0.00960365)) / 1.3841459."""
    low, high = wilson(0.8, 10)
    assert (low, high) == (pytest.approx(0.490157, abs=1e-5), pytest.approx(0.943318, abs=1e-5))
    assert wilson(0.0, 10) == (0.0, pytest.approx(0.277533, abs=1e-5))
    assert wilson(1.0, 10) == (pytest.approx(1 - 0.277533, abs=1e-5), pytest.approx(1.0))
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_turns_of_a_mask():
    for mask, turns in (([], 0), ([0, 0], 0), ([1], 1), ([0, 1, 1, 0, 1], 2), ([1, 0, 1, 0, 0, 1, 1], 3)):
        assert count_turns(mask) == turns


def test_held_out_figures_by_turns():
    """Rows come in another order than their numbers; margins 1, −1, 3, 0 of pairs with 1, 2, 2, 1 turns."""
    table = torch.zeros(4, len(COLUMNS), dtype=torch.float64)
    for place, values in enumerate([(2, 0.1, 3, 0), (0, 0.2, 2, 1), (3, 0.6, 1, 1), (1, 0.9, 0, 1)]):
        table[place, :4] = torch.tensor(values, dtype=torch.float64)  # row, loss, chosen_reward, rejected_reward
    figures = by_turns(table, [1, 2, 2, 1])
    assert {n: (f["pairs"], f["accuracy"], f["margin"], round(f["loss"], 9)) for n, f in figures.items()} == {
        "1": (2, 0.5, 0.5, 0.4), "2": (2, 0.5, 1.0, 0.5), "all": (4, 0.5, 0.75, 0.45)
    }  # fmt: skip


def test_rollout_figures():
    def ended(key, correct, end, turns, *code):
        return Trajectory(key, 0, [], "1", None, correct, end, turns, list(code))

    figures = rollout_figures([
        ended("a", True, "answered", 2, "ok"), ended("a", False, "cut", 1),
        ended("b", False, "max turns", 2, "error", "timeout"), ended("b", False, "no answer", 1),
    ])  # fmt: skip
    assert (figures["questions"], figures["conversations"]) == (2, 4)
    assert (figures["accuracy"], figures["any_correct"]) == (0.25, 0.5)
    assert figures["ended"] == {"answered": 1, "no answer": 1, "cut": 1, "too long": 0, "max turns": 1}
    assert figures["code"] == {"ok": 1, "error": 1, "timeout": 1}
    assert figures["by_turns"] == {1: (2, 0), 2: (2, 1)}
    cells = list(rollout_tables(figures)[0].columns[1].cells)
    assert cells[:2] == ["0.2500 (0.027 to 0.802)", "0.5000 (0.095 to 0.905)"]  # of 2 questions, not of 4 conversations
