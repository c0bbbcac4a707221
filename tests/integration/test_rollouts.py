"""Maths tasks from question to judged answer, and turns of real models: continuous batching, `generate` in rounds, and
decoding by hand."""

import asyncio
import json
import subprocess
import sys

import pytest
import torch
from errors import refused
from families import tiny_config
from repository import ROOT
from tiny import CHATML, tiny_llama, tokenizer_for, trl_template
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mdpo.loss.metrics import COLUMNS
from mdpo.masking.chat_template import ChatTemplate
from mdpo.rollouts.answers import gold_answer
from mdpo.rollouts.calls import PythonBlocks, code_of
from mdpo.rollouts.continuous import ContinuousBatching
from mdpo.rollouts.driver import play_all
from mdpo.rollouts.environment import Environments
from mdpo.rollouts.episode import Limits, Player, Sampled
from mdpo.rollouts.generate import Rounds, context_length, refuse_hidden_tool_role, sampling_config, stop_ids
from mdpo.rollouts.python_maths import OUTPUT_CHARACTERS, python_tool, shown_output
from mdpo.rollouts.records import Records, Trajectory
from mdpo.rollouts.rewards import Rewards, right_answer
from mdpo.rollouts.sandbox import Limits as ProgramLimits
from mdpo.rollouts.sandbox import RunResult, Sandbox
from mdpo.rollouts.tables import by_turns, count_turns, rollout_figures, rollout_tables, wilson
from mdpo.rollouts.tasks import Task, read_tasks

QUICKSTART_MODEL = ROOT / "models" / "smollm2-135m-instruct"


TEMPLATE = ChatTemplate(tokenizer_for(CHATML, "byte", eos="<|im_end|>"))
STOP = TEMPLATE.tokenizer.convert_tokens_to_ids("<|im_end|>")


def question(key: str, gold: str = "42") -> Task:
    return Task(key, {"question": key, "answer": gold}, [{"role": "user", "content": key}])


class Script:
    """A policy whose turns are written down: {question: [turn, ...]}; one that ends in CUT is cut there."""

    def __init__(self, turns: dict[str, list]):
        self.turns = turns

    async def sample(self, prompt: list[int], max_new_tokens: int) -> Sampled:
        said = TEMPLATE.tokenizer.decode(prompt).split("<|im_start|>")
        turn = self.turns[said[1].removeprefix("user\n").partition("<|im_end|>")[0]]
        text = turn[sum(part.startswith("assistant\n") for part in said) - 1]
        cut = text.endswith(CUT)
        ids = TEMPLATE.tokenizer(text.removesuffix(CUT), add_special_tokens=False).input_ids
        return Sampled(ids if cut else [*ids, STOP], cut)


CUT = "<cut>"


def mathematician(backend, sandbox, template=TEMPLATE, role="user", stops=(STOP,), **limits) -> Player:
    tools = Environments(functions=[python_tool(sandbox)])
    return Player(backend, template, set(stops), PythonBlocks(role), tools, Rewards([right_answer]), Limits(**limits))


def play(player: Player, tasks: list[Task], in_flight: int = 64) -> dict[str, Trajectory]:
    ended = []
    asyncio.run(play_all(player, [(task, 0) for task in tasks], in_flight, ended.append))
    return {trajectory.key: trajectory for trajectory in ended}


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(ProgramLimits(seconds=60))


def block(code: str) -> str:
    return f"```python\n{code}\n```"


# question: (the policy's turns, the outputs that come back, correct, ended, how runs of code ended)
SCRIPTED = {
    "at once": (["It is \\boxed{42}."], [], True, "done", []),
    "wrong": (["It is \\boxed{41}."], [], False, "done", []),
    "code, then answer": ([block("print(6 * 7)"), "So \\boxed{42.0}."], ["42\n"], True, "done", ["ok"]),
    "three turns": (
        [f"First\n{block('x = 6')}", f"{block('print(7)')}\nthen", "\\boxed{\\frac{84}{2}}"],
        ["", "7\n"], True, "done", ["ok", "ok"],
    ),
    "two blocks are one program": (
        [f"{block('x = 6')} and {block('print(x * 7)')}", "\\boxed{42}"], ["42\n"], True, "done", ["ok"]
    ),
    "names of earlier turns are gone": (
        [block("x = 6"), block("print('x' in globals())"), "\\boxed{42}"],
        ["", "False\n"], True, "done", ["ok", "ok"],
    ),
    "a box beside code is the answer": ([f"{block('print(1)')} \\boxed{{42}}"], [], True, "done", []),
    "a box inside code is none": (
        [block(r"print(r'\boxed{1}')"), "\\boxed{42}"], ["\\boxed{1}\n"], True, "done", ["ok"]
    ),
    "neither": (["I do not know."], [], False, "done", []),
    "other code": (["```\nprint(1)\n```"], [], False, "done", []),
    "error": (
        [block("1 / 0"), "\\boxed{42}"],
        ['Traceback (most recent call last):\n  File "main.py", line 1, in <module>\n    1 / 0\n    ~~^~~\n'
         "ZeroDivisionError: division by zero\n"], True, "done", ["error"],
    ),
    "open block": (["```python\nprint(42)", "\\boxed{42}"], ["42\n"], True, "done", ["ok"]),
    "for ever": ([block("print(1)")] * 4, ["1\n"] * 3, False, "max turns", ["ok"] * 3),
    "cut": (["```python\nprint(1" + CUT], [], False, "cut", []),
    "cut behind a box": (["\\boxed{42} and so on and" + CUT], [], True, "cut", []),
}  # fmt: skip


def expected(name: str, role: str) -> list[dict]:
    turns, outputs = SCRIPTED[name][:2]
    messages = [{"role": "user", "content": name}]
    for n, turn in enumerate(turns):
        messages.append({"role": "assistant", "content": turn.removesuffix(CUT)})
        messages += [{"role": role, "content": f"```output\n{outputs[n]}```"}] if n < len(outputs) else []
    return messages


@pytest.mark.parametrize(("size", "role"), [(1, "user"), (4, "tool"), (100, "user")])
def test_scripted_trajectories(size, role, sandbox):
    policy = Script({name: turns for name, (turns, *_) in SCRIPTED.items()})
    player = mathematician(policy, sandbox, role=role, turns=4)
    found = play(player, [question(name) for name in SCRIPTED], size)
    assert set(found) == set(SCRIPTED)
    for name, (turns, _, correct, ended, code) in SCRIPTED.items():
        t = found[name]
        assert t.messages == expected(name, role), name
        assert (t.correct, t.ended, t.calls) == (correct, ended, [("python", kind) for kind in code]), name
        assert t.turns == len(turns) and t.rewards == {"right_answer": float(correct)}, name


def test_output_blocks():
    def shown(output, ended="ok"):
        turn = PythonBlocks().read(block("1"), [], [])
        return PythonBlocks().results(turn, [shown_output(RunResult(output, ended, 0.0))])[0]["content"]

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
                shown = python_tool(sandbox)(code)
                assert PythonBlocks().results(PythonBlocks().read("", [], []), [shown])[0] == after
                seen += 1
    assert seen >= 5


def test_questions(tmp_path):
    file = tmp_path / "q.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"question": "6 * 7?", "answer": "6 * 7 = 42\n#### 42"}, {"prompt": "1?", "answer": 1, "id": "one"},
            {"prompt": messages, "answer": "\\frac{4}{2}", "key": "two"}]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_tasks(str(file), needs={"answer": gold_answer})
    assert found == [
        Task(f"{file}:1", rows[0], [{"role": "user", "content": "6 * 7?"}]),
        Task("one", rows[1], [{"role": "user", "content": "1?"}]),
        Task("two", rows[2], messages),
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert read_tasks(str(file), "Use Python.")[0].messages[0]["content"] == "Use Python.\n\n6 * 7?"
    file.write_text('{"start": 3}\n')
    assert read_tasks(str(file), own_prompts=True)[0] == Task(
        f"{file}:1", {"start": 3}, [{"role": "user", "content": ""}]
    )


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
        read_tasks(str(file), needs={"answer": gold_answer})
    with refused("rollouts", "none.jsonl"):
        read_tasks(str(tmp_path / "none.jsonl"))


def test_a_second_process_does_not_write_the_same_file(tmp_path):
    """It is refused however often the first has read its own."""
    path = tmp_path / "r.jsonl"
    first = Records(path, "p", {})
    first.append(Trajectory("a", 0, {}, []))
    second = "import sys; from pathlib import Path; from mdpo.rollouts.records import Records; "
    second += "Records(Path(sys.argv[1]), 'p', {})"
    command = [sys.executable, "-c", second, str(path)]
    refusal = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert refusal.returncode == 1 and "another process writes it" in refusal.stderr
    first.close()
    assert subprocess.run(command, cwd=ROOT).returncode == 0


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


BACKENDS = {"continuous": ContinuousBatching, "rounds": Rounds}


def sampled(backend: str, model, stops, prompts: list[list[int]], most: int, temperature: float = 0.0, seed: int = 0):
    async def all_at_once(backend):
        return await asyncio.gather(*(backend.sample(prompt, most) for prompt in prompts))

    with BACKENDS[backend](model, sampling_config(set(stops), 0, temperature), seed) as ready:
        return asyncio.run(all_at_once(ready))


def prompts_of(tokenizer) -> list[list[int]]:
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in CONVERSATIONS]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_four_is_decoding_by_hand(tiny, backend):
    model, tokenizer, template = tiny
    # What checkpoints ship, and would change a greedy answer: it must not count here.
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=5)
    stops = stop_ids(model.generation_config, template)
    found = sampled(backend, model, stops, prompts_of(tokenizer), 12)
    assert len({tuple(one.ids) for one in found}) == 4
    for ids, one in zip(prompts_of(tokenizer), found, strict=True):
        new = by_hand(model, ids, stops, 12)
        assert [token for token in one.ids if token not in stops] == new and one.cut == (len(new) == 12)


TIES = {"float32": 1e-4, "bfloat16": 0.05}  # of the two likeliest logits: either may be taken


def windowed(family: str, window: int, dtype: str, tokenizer):
    """A random model whose turns depend on their prompts, with a sliding window of so many tokens."""
    config = tiny_config(family, len(tokenizer))
    config.sliding_window = window
    attention = "eager" if family == "gpt_oss" else "sdpa"  # it has sinks
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(3)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", TIES)
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
def test_a_sliding_window_is_that_of_decoding_by_hand(family, dtype, tiny):
    """Up to ties, which may part two ways of adding. The window counts: without it other tokens come."""
    _, tokenizer, _ = tiny
    model, prompts = windowed(family, 8, dtype, tokenizer), prompts_of(tokenizer)
    found = [one.ids for one in sampled("continuous", model, [], prompts, 12)]
    parted = 0
    for ids, new in zip(prompts, found, strict=True):
        wanted = by_hand(model, ids, set(), 12)
        same = next((n for n, (a, b) in enumerate(zip(wanted, new, strict=True)) if a != b), None)
        if same is not None:
            first, second = model(torch.tensor([ids + wanted[:same]])).logits[0, -1].float().topk(2).values
            assert first - second < TIES[dtype]
            parted += 1
    assert parted < len(prompts) / 2
    without = windowed(family, 512, dtype, tokenizer)
    assert [by_hand(without, ids, set(), 12) for ids in prompts] != found


def test_log_probs_are_those_of_the_model(tiny):
    model, tokenizer, template = tiny
    prompts = prompts_of(tokenizer)
    for temperature in (0.0, 1.0):
        found = sampled("continuous", model, stop_ids(model.generation_config, template), prompts, 12, temperature)
        for ids, one in zip(prompts, found, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([ids + one.ids])).logits[0, len(ids) - 1 : -1]
            wanted = logits.log_softmax(-1)[torch.arange(len(one.ids)), torch.tensor(one.ids)]
            assert one.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


def test_thoughts_of_gpt_oss_end_no_turn():
    """`<|end|>` closes them, and answers in history: sampling goes on to the answer or the call."""
    tokenizer = tokenizer_for(trl_template("gptoss"), "byte")
    stops = set(tokenizer.convert_ids_to_tokens(sorted(stop_ids(None, ChatTemplate(tokenizer)))))
    assert stops == {"<|return|>", "<|call|>", "<eos>"}


def test_a_turn_ends_at_the_templates_end_of_turn_token(tiny):
    """The model's own eos is another token here, as in many chat models."""
    model, _, _ = tiny
    tokenizer = tokenizer_for(CHATML, "byte")  # eos is <eos>
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    stops = stop_ids(model.generation_config, ChatTemplate(tokenizer))
    assert {end, eos} <= stops
    rounds = Rounds(model, sampling_config(stops, None, 0.0))
    words = tokenizer("It is", add_special_tokens=False)["input_ids"]
    assert rounds._sampled([*words, end, *words]) == Sampled([*words, end])
    assert rounds._sampled([*words, eos]) == Sampled([*words, eos])
    assert rounds._sampled(words) == Sampled(words, cut=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_follows_the_seed_and_the_temperature(tiny, backend):
    model, tokenizer, template = tiny

    def ids(seed, temperature):
        stops = stop_ids(model.generation_config, template)
        return [one.ids for one in sampled(backend, model, stops, prompts_of(tokenizer), 12, temperature, seed)]

    assert ids(0, 1.0) != ids(1, 1.0)
    assert ids(0, 1e-4) == ids(1, 1e-4) == ids(0, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rollouts_of_a_random_model(tiny, sandbox, backend):
    model, tokenizer, template = tiny
    stops = stop_ids(model.generation_config, template)
    tasks = [Task(str(i), {"answer": "12"}, c) for i, c in enumerate(CONVERSATIONS)]
    with BACKENDS[backend](model, sampling_config(stops, 0, 0.0)) as ready:
        player = mathematician(ready, sandbox, template, stops=stops, turns=2, new_tokens=16)
        found = play(player, tasks)
    alone = sampled("rounds", model, stops, prompts_of(tokenizer), 16)
    for key, t in found.items():
        assert t.ended in ("done", "cut") and t.turns == 1 and not t.correct
        (sequence,) = t.sequences
        prompt, ids = prompts_of(tokenizer)[int(key)], alone[int(key)].ids
        assert sequence["input_ids"] == prompt + ids
        assert sequence["assistant_masks"] == [0] * len(prompt) + [1] * len(ids)
        text = tokenizer.decode([token for token in ids if token not in stops])
        assert t.messages == [*CONVERSATIONS[int(key)], {"role": "assistant", "content": text}]
    assert len(found) == 4 and context_length(model.config) == 512


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
    tasks = [Task(str(i), {"answer": "291"}, prompt) for i, prompt in enumerate(prompts)]
    template, stops = ChatTemplate(tokenizer), stop_ids(model.generation_config, ChatTemplate(tokenizer))
    found = []
    for backend, in_flight in (("continuous", 4), ("continuous", 1), ("rounds", 4)):
        with BACKENDS[backend](model, sampling_config(stops, 0, 0.0)) as ready:
            player = mathematician(ready, sandbox, template, stops=stops, turns=2, new_tokens=20)
            played = play(player, tasks, in_flight)
        found.append({key: (t.messages, t.ended, t.turns) for key, t in played.items()})
    assert found[0] == found[1] == found[2] and len(found[0]) == 4
    assert all("<|im_end|>" not in m["content"] for messages, _, _ in found[0].values() for m in messages)


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
    def ended(key, reward, end, turns, *calls):
        return Trajectory(key, 0, {}, [], reward=reward, ended=end, turns=turns, calls=[("python", c) for c in calls])

    figures = rollout_figures([
        ended("a", 1.0, "done", 2, "ok"), ended("a", 0.5, "cut", 1),
        ended("b", 0.0, "max turns", 2, "error", "timeout"), ended("b", None, "environment error", 1),
    ])  # fmt: skip
    assert (figures["tasks"], figures["conversations"]) == (2, 4)
    assert (figures["accuracy"], figures["any_correct"], figures["reward"]) == (0.25, 0.5, 0.5)
    assert figures["ended"] == {
        "done": 1,
        "cut": 1,
        "too long": 0,
        "max turns": 1,
        "refused": 0,
        "environment error": 1,
    }
    assert figures["calls"] == {"ok": 1, "error": 1, "timeout": 1} and figures["without_reward"] == 1
    assert figures["by_turns"] == {1: (2, 0), 2: (2, 1)}
    cells = list(rollout_tables(figures)[0].columns[1].cells)
    shares = ["0.2500 (0.027 to 0.802)", "0.5000 (0.095 to 0.905)", "0.0000 (0.000 to 0.658)"]  # of 2 tasks, not of 4
    assert cells[:4] == [*shares, "0.5000"] and figures["samples"] == 2
