"""mdpo/rollouts/episode.py and driver.py with a policy whose turns are written down."""

import asyncio
import dataclasses
import errno
import json
import os
import sqlite3
import threading
import time

import pytest
from errors import refused
from tiny import CHATML, tokenizer_for

from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.spans import token_ids
from mdpo.rollouts.arguments import wrong_arguments
from mdpo.rollouts.calls import call_form
from mdpo.rollouts.driver import jobs, play_all, roll_out
from mdpo.rollouts.environment import Environments, environments_of, load_object
from mdpo.rollouts.episode import Limits, Outcome, Player, Sampled, shortened
from mdpo.rollouts.options import SamplingOptions
from mdpo.rollouts.records import Records, Trajectory
from mdpo.rollouts.rewards import Rewards, right_answer
from mdpo.rollouts.tasks import Task

TEMPLATE = ChatTemplate(tokenizer_for(CHATML, "byte", eos="<|im_end|>"))
STOP = TEMPLATE.tokenizer.convert_tokens_to_ids("<|im_end|>")


class Script:
    """A policy: {task's text: [turn, …]}, a turn a text, or ids. Without `<|im_end|>` behind it a turn is cut."""

    def __init__(self, turns: dict[str, list]):
        self.turns = {key: list(texts) for key, texts in turns.items()}

    async def sample(self, prompt: list[int], max_new_tokens: int) -> Sampled:
        await asyncio.sleep(0)
        text = TEMPLATE.tokenizer.decode(prompt)
        key = next(key for key in self.turns if f"[{key}]" in text)
        turn = self.turns[key].pop(0)
        ids = turn if isinstance(turn, list) else TEMPLATE.tokenizer(turn, add_special_tokens=False).input_ids
        return Sampled(ids, cut=ids[-1:] != [STOP], logprobs=[-1.0] * len(ids))


def call(name: str, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call><|im_end|>"


class Counter:
    """A counter, as one for TRL's GRPOTrainer is written: nothing of this project is in it."""

    def reset(self, start: int = 0, **kwargs) -> str | None:
        self.value, self._secret = start, 7
        return f" It stands at {start}."

    def add(self, by: int) -> int:
        """
        Adds to the counter.

        Args:
            by: How much.
        """
        self.value += by
        return self.value

    async def double(self) -> str:
        """
        Doubles the counter.
        """
        await asyncio.sleep(0)
        self.value *= 2
        return f"now {self.value}"

    def fail(self) -> str:
        """
        Fails.
        """
        raise RuntimeError("out of order")

    def hang(self) -> str:
        """
        Never returns in time.
        """
        time.sleep(1)
        return ""

    def get_reward(self) -> float:
        return float(self.value == 12)


def player(script: Script, environments: Environments | None = None, rewards: Rewards | None = None, form: str = "text",
           **limits) -> Player:  # fmt: skip
    environments = environments or Environments(Counter)
    calls = call_form(form, list(environments.schemas.values()), TEMPLATE, "user")
    return Player(script, TEMPLATE, {STOP}, calls, environments, rewards or Rewards(), Limits(**limits))


def task(key: str, **row) -> Task:
    row = {"prompt": f"[{key}]", **row}
    return Task(key, row, [{"role": "user", "content": row["prompt"]}])


def play(player: Player, *tasks: Task, in_flight: int = 4) -> list:
    ended = []
    asyncio.run(play_all(player, [(one, 0) for one in tasks], in_flight, ended.append))
    return sorted(ended, key=lambda t: t.key)


def test_an_episode_from_reset_to_reward():
    script = Script({"a": [call("add", by=1), call("double"), "Done.<|im_end|>"]})
    (found,) = play(player(script), task("a", start=5))
    answers = [m["content"] for m in found.messages if m["role"] == "user"]
    assert answers == ["[a] It stands at 5.", "<tool_response>\n6\n</tool_response>",
                       "<tool_response>\nnow 12\n</tool_response>"]  # fmt: skip
    assert found.calls == [("add", "ok"), ("double", "ok")] and found.rewards == {"Counter": 1.0} and found.correct
    assert (found.ended, found.turns, found.prompt_messages, found.error) == ("done", 3, 2, "")
    (sequence,) = found.sequences
    sampled = [t for t, s in zip(sequence["input_ids"], sequence["assistant_masks"], strict=True) if s]
    assert TEMPLATE.tokenizer.decode(sampled).count("<|im_end|>") == 3 and sampled[-1] == STOP
    assert [x is not None for x in sequence["logprobs"]] == [bool(m) for m in sequence["assistant_masks"]]


# What the policy writes -> how the call ended, and what comes back.
WRONG = {
    "unknown": (call("subtract", by=1), "unknown", "no tool subtract"),
    "no argument": (call("add"), "wrong arguments", "needs the argument by"),
    "another argument": (call("add", by=1, to=2), "wrong arguments", "takes no argument to"),
    "another type": (call("add", by="1"), "wrong arguments", "integer"),
    "true is no number": (call("add", by=True), "wrong arguments", "integer"),
    "raises": (call("fail"), "raised", "RuntimeError: out of order"),
    "hangs": (call("hang"), "hung", "did not return"),
    "malformed": ('<tool_call>{"name": </tool_call><|im_end|>', "malformed", "cannot be read"),
    "a private method": (call("_secret"), "unknown", "no tool _secret"),
    "reset": (call("reset", start=12), "unknown", "no tool reset"),
    "get_reward": (call("get_reward"), "unknown", "no tool get_reward"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_goes_wrong_comes_back_and_is_counted(name):
    text, ended, shown = WRONG[name]
    script = Script({"a": [text, call("add", by=12), "Done.<|im_end|>"]})
    (found,) = play(player(script, seconds=0.3), task("a"))
    assert [kind for _, kind in found.calls] == [ended, "ok"] and found.ended == "done"
    said = found.messages[3]["content"]
    assert said.startswith("<tool_response>\nerror: ") and shown in said
    assert found.rewards == {"Counter": 1.0}


def test_how_episodes_end():
    script = Script({
        "cut": ["Let me th"], "one stop": [[STOP]], "turns": [call("add", by=1)] * 3,
        "long": [call("add", by=1), "x" * 900 + "<tool_call><|im_end|>"],
    })  # fmt: skip
    tasks = [task(key) for key in script.turns]
    found = {t.key: t for t in play(player(script, turns=3, new_tokens=200, context=1100), *tasks)}
    assert {key: (t.ended, t.turns) for key, t in found.items()} == {
        "cut": ("cut", 1), "one stop": ("done", 1), "turns": ("max turns", 3), "long": ("too long", 2),
    }  # fmt: skip
    assert found["one stop"].messages[-1] == {"role": "assistant", "content": ""}
    assert sum(found["one stop"].sequences[0]["assistant_masks"]) == 1
    assert [kind for _, kind in found["long"].calls] == ["ok", "malformed"]


def test_a_conversation_without_room_for_a_token_has_no_such_turn():
    script = Script({"a": [call("add", by=12), []], "b": [[]]})
    a, b = play(player(script), task("a"), task("b"))
    assert [(t.ended, t.turns, t.rewards) for t in (a, b)] == [("too long", 1, {"Counter": 1.0}), ("too long", 0, {})]
    assert a.messages[-1]["role"] == "user" and b.sequences == [] and b.reward is None
    assert a.sequences[0]["input_ids"][-1] == STOP


class Broken(Counter):
    def reset(self, broken: str = "", **kwargs):
        super().reset(**kwargs)
        self.broken = broken
        if broken == "reset":
            raise OSError("no database")
        if broken == "reset hangs":
            time.sleep(1)
        return 3 if broken == "returns a number" else None

    def get_reward(self):
        if self.broken == "reward":
            raise KeyError("score")
        if self.broken == "reward hangs":
            time.sleep(1)
        return {"none": None, "nan": float("nan")}.get(self.broken, 1.0)


BROKEN = {  # -> (what is said of it, reward)
    "reset": ("OSError: no database", None),
    "reset hangs": ("Hung: reset did not return", None),
    "returns a number": ("TypeError: reset returned int", None),
    "reward": ("KeyError: 'score'", None),
    "reward hangs": ("Hung: get_reward did not return", None),
    "nan": ("ValueError: get_reward returned nan", None),
    "none": ("", None),
    "": ("", 1.0),
}


def test_a_broken_environment_ends_its_own_episode_only():
    script = Script({f"x{n}": ["Done.<|im_end|>"] for n in range(len(BROKEN))})
    tasks = [task(f"x{n}", broken=broken) for n, broken in enumerate(BROKEN)]
    found = play(player(script, Environments(Broken), seconds=0.3), *tasks)
    for (broken, (error, reward)), t in zip(BROKEN.items(), found, strict=True):
        assert t.error.startswith(error) and bool(t.error) == bool(error), broken
        assert t.reward == reward and t.ended == ("environment error" if error else "done"), broken


def test_a_reward_function_that_hangs_ends_its_own_episode_only():
    def slow(completions, slow, **row):
        time.sleep(slow[0])
        return [1.0]

    script = Script({"a": ["x<|im_end|>"], "b": ["x<|im_end|>"]})
    one = player(script, Environments(), Rewards([slow]), seconds=0.3)
    hung, found = play(one, task("a", slow=1.0), task("b", slow=0.0))
    assert (hung.ended, hung.reward, found.ended, found.reward) == ("environment error", None, "done", 1.0)
    assert hung.error.startswith("Hung: slow did not return")


def test_a_hung_instance_is_not_used_again():
    made = []

    class Watched(Counter):
        def __init__(self):
            made.append(self)

    environments = Environments(Watched)
    script = Script({"a": [call("hang"), "x<|im_end|>"], "b": ["x<|im_end|>"], "c": ["x<|im_end|>"]})
    one = player(script, environments, seconds=0.2)
    play(one, task("a"), in_flight=1)
    play(one, task("b"), task("c"), in_flight=1)
    assert len(made) == 3 and [name for name, _ in one.hung] == ["hang"]  # one is only looked at, for its tools


class Database(Counter):
    """What belongs to one thread, and what belongs to one loop."""

    def reset(self, goods: dict | None = None, **kwargs):
        super().reset()
        self.db, self.goods, self._loop = sqlite3.connect(":memory:"), goods, None
        self.db.execute("create table t (n)")

    def put(self, n: int) -> dict:
        """
        Puts a number in.

        Args:
            n: It.
        """
        self.db.execute("insert into t values (?)", (n,))
        self.goods["left"] -= n
        return {("a", 1): self.goods["left"]}

    async def look(self) -> int:
        """
        Looks.
        """
        self._loop = self._loop or asyncio.get_running_loop()
        assert self._loop is asyncio.get_running_loop()
        return self.db.execute("select sum(n) from t").fetchone()[0]

    def get_reward(self) -> float:
        return float(self.db.execute("select count(*) from t").fetchone()[0])


def test_an_instance_lives_in_one_thread_and_has_rows_of_its_own():
    """As in TRL; and each episode of a task begins with the row as it is in the file."""
    said = [call("put", n=2), call("look"), call("put", n=1), call("look"), "x<|im_end|>"]
    script = Script({"a": [*said, *said]})
    row = task("a", goods={"left": 9})
    one = player(script, Environments(Database))
    found = play(one, row, in_flight=1) + play(one, row, in_flight=1)
    for t in found:
        assert [ended for _, ended in t.calls] == ["ok"] * 4 and t.reward == 2, t
        results = [m["content"].split("\n")[1] for m in t.messages if m["content"].startswith("<tool_response>")]
        assert results == ["{('a', 1): 7}", "2", "{('a', 1): 6}", "3"] and t.task["goods"] == {"left": 9}


class Fickle(Counter):
    """Its third instance cannot be made."""

    made = 0

    def __init__(self):
        Fickle.made += 1
        if Fickle.made == 3:
            raise OSError("too many")


def test_an_instance_that_cannot_be_made_ends_its_episode_only():
    script = Script({key: ["x<|im_end|>"] for key in "abc"})
    found = play(player(script, Environments(Fickle)), *(task(key) for key in "abc"))
    assert sorted(t.error for t in found) == ["", "", "OSError: too many"]


def test_a_backend_that_fails_ends_the_run_and_records_nothing_of_it():
    class Fails(Script):
        async def sample(self, prompt, max_new_tokens):
            if "[b]" in TEMPLATE.tokenizer.decode(prompt):
                raise MemoryError("out of memory")
            return await super().sample(prompt, max_new_tokens)

    ended = []
    with refused("backend", "MemoryError: out of memory"):
        one = player(Fails({"a": ["x<|im_end|>"], "b": ["x<|im_end|>"]}))
        asyncio.run(play_all(one, [(task("a"), 0), (task("b"), 0)], 2, ended.append))
    assert [t.key for t in ended] in (["a"], []) and all(t.ended == "done" for t in ended)


def test_a_tool_that_always_hangs_ends_the_run(monkeypatch):
    monkeypatch.setattr("mdpo.rollouts.episode.HUNG", 2)
    with refused("environment", "hang"):
        play(player(Script({"a": [call("hang")] * 6}), seconds=0.1), task("a"))


def test_two_of_one_name_are_refused():
    with refused("tools", "python"):
        Environments(functions=[python, python])
    with refused("rewards", "right_answer"):
        Rewards([right_answer, right_answer])


def test_places_are_filled_and_bounded():
    class Full(Script):
        """No turn comes before three conversations have asked at once: fewer places would wait for ever."""

        open, full = 0, asyncio.Event()

        async def sample(self, prompt, max_new_tokens):
            self.open += 1
            assert self.open <= 3
            if self.open == 3:
                await asyncio.sleep(0.5)  # for a fourth, if there were one
                self.full.set()
            await asyncio.wait_for(self.full.wait(), 30)
            try:
                return await super().sample(prompt, max_new_tokens)
            finally:
                self.open -= 1

    script = Full({f"t{n}": [call("add", by=1)] * (n % 4) + ["x<|im_end|>"] for n in range(20)})
    found = play(player(script), *(task(f"t{n}") for n in range(20)), in_flight=3)
    assert len(found) == 20 and script.full.is_set()
    assert all(t.turns == 1 + int(t.key[1:]) % 4 for t in found)


class Waiting:
    """Its tool returns when the policy has been asked for the turn of another conversation."""

    sampled = threading.Event()

    def reset(self, **row):
        pass

    def wait(self) -> str:
        """
        Waits.
        """
        return str(Waiting.sampled.wait(30))

    def get_reward(self) -> float:
        return 1.0


def test_tools_run_while_others_are_sampled():
    class Tells(Script):
        async def sample(self, prompt, max_new_tokens):
            if "[b] at last" in TEMPLATE.tokenizer.decode(prompt):
                Waiting.sampled.set()
            return await super().sample(prompt, max_new_tokens)

    Waiting.sampled.clear()
    script = Tells({"a": [call("wait"), "x<|im_end|>"], "b": ["x<|im_end|>"], "b0": ["x<|im_end|>"]})
    jobs = task("a"), task("b0"), Task("b", {}, [{"role": "user", "content": "[b] at last"}])
    found = play(player(script, Environments(Waiting)), *jobs, in_flight=2)  # b begins when b0 has ended
    assert found[0].messages[-2]["content"] == "<tool_response>\nTrue\n</tool_response>"


class Meeting:
    """Its tool returns when as many conversations are in it as the barrier has places."""

    barrier, inside, most = threading.Barrier(1), 0, 0

    def reset(self, **row):
        pass

    def meet(self) -> str:
        """
        Waits for the others.
        """
        Meeting.inside += 1
        Meeting.most = max(Meeting.most, Meeting.inside)
        Meeting.barrier.wait(30)
        time.sleep(0.02)
        Meeting.inside -= 1
        return "met"

    def get_reward(self) -> float:
        return 1.0


def test_tools_that_wait_are_bounded_by_an_option_not_by_cores(tmp_path):
    n = 3 * len(os.sched_getaffinity(0))
    Meeting.barrier = threading.Barrier(n)
    options = SamplingOptions(tmp_path, environment="meeting.py:Meeting", in_flight=n)
    script = Script({f"t{k:03}": [call("meet"), "x<|im_end|>"] for k in range(n)})
    one = player(script, Environments(Meeting))
    one.slots = asyncio.Semaphore(options.slots)
    found = play(one, *(task(key) for key in script.turns), in_flight=n)
    assert all(t.calls == [("meet", "ok")] for t in found)
    Meeting.barrier, Meeting.most, one.slots = threading.Barrier(1), 0, asyncio.Semaphore(1)
    script.turns["a"] = [call("meet"), call("meet"), "x<|im_end|>", "x<|im_end|>"]
    play(one, task("a"), task("a"))
    assert Meeting.most == 1


def test_calls_at_once(tmp_path):
    """Programs of maths compute."""
    cores, maths = len(os.sched_getaffinity(0)), SamplingOptions(tmp_path, in_flight=7)
    assert maths.slots == cores and dataclasses.replace(maths, tools=("a.py:f",)).slots == 7
    assert dataclasses.replace(maths, base_url=("a", "b"), environment="a.py:A", in_flight=None).slots == 128
    assert dataclasses.replace(maths, tools_at_once=500).slots == 500


def test_prompts_are_tokenized_beside_the_loop(monkeypatch):
    """Where that blocked it, servers would wait for all other conversations."""
    threads = set()

    def watched(text, tokenizer):
        threads.add(threading.current_thread())
        return token_ids(text, tokenizer)

    monkeypatch.setattr("mdpo.rollouts.episode.token_ids", watched)
    play(player(Script({"a": ["x<|im_end|>"]})), task("a"))
    assert threads and threading.main_thread() not in threads


def test_rewards_are_summed_with_weights():
    seen = []

    def length(prompts, completions, completion_ids, environments, start, **kwargs):
        seen.append((prompts[0][-1]["role"], completions[0][0]["role"], len(completion_ids[0]), start))
        assert kwargs.keys() == {"trainer_state", "log_extra", "log_metric"} and isinstance(environments[0], Counter)
        return [len(completions[0])]

    async def judge(completions, **kwargs):
        await asyncio.sleep(0)
        return [0.25]

    script = Script({"a": [call("add", by=12), "Done.<|im_end|>"]})
    (found,) = play(player(script, rewards=Rewards([length, judge], [0.5, 4.0])), task("a", start=0))
    assert found.rewards == {"Counter": 1.0, "length": 3.0, "judge": 0.25} and found.reward == 1 + 1.5 + 1
    assert seen[0][:2] == ("user", "assistant") and seen[0][3] == [0] and seen[0][2] > 2
    with refused("reward_weights", 2):
        Rewards([length, judge], [1.0])


def test_right_answers_in_the_python_form():
    environments = Environments(functions=[python])
    script = Script({"a": ["```python\nprint(6*7)\n```<|im_end|>", "It is \\boxed{42}.<|im_end|>"],
                     "b": ["\\boxed{none}<|im_end|>"], "c": ["No idea.<|im_end|>"]})  # fmt: skip
    tasks = [task(key, answer="42") for key in "abc"]
    found = play(player(script, environments, Rewards([right_answer]), form="python"), *tasks)
    assert [t.reward for t in found] == [1, 0, 0] and found[0].calls == [("python", "error")]
    assert found[0].messages[2] == {"role": "user", "content": "```output\nran print(6*7)\n```"}


def python(code: str) -> str:
    """
    Runs a program.

    Args:
        code: It.
    """
    return Outcome.of(f"ran {code}", "error")


def test_samples_of_a_task_start_when_the_cache_has_its_prompt():
    tasks = [task(f"t{n}") for n in range(3)]
    found = [(one.key, sample) for one, sample in jobs(tasks, samples=2, in_flight=2)]
    assert found == [("t0", 0), ("t1", 0), ("t0", 1), ("t1", 1), ("t2", 0), ("t2", 1)]


def test_what_is_missing_is_sampled_and_nothing_twice(tmp_path):
    tasks = [task(f"t{n}") for n in range(6)]
    texts = {t.key: ["x<|im_end|>", "y<|im_end|>"] for t in tasks}
    path = tmp_path / "r.jsonl"
    roll_out(player(Script(texts)), jobs(tasks[:3], 1), Records(path, "p", {}))
    again = Records(path, "p", {})
    roll_out(player(Script(texts)), jobs(tasks, 2), again)
    assert sorted((t.key, t.sample) for t in again.done) == [(t.key, n) for t in tasks for n in (0, 1)]
    assert len(path.read_text().splitlines()) == 12 and [t.sample for t in again.done[:3]] == [0, 0, 0]


def test_a_disk_that_is_full_loses_only_what_has_not_ended(tmp_path):
    tasks, path = [task(f"t{n}") for n in range(4)], tmp_path / "r.jsonl"
    records = Records(path, "p", {})
    texts = {t.key: ["x<|im_end|>"] for t in tasks}
    write, written = records._file.write, []

    def full(text: str) -> int:
        if len(written) == 2:
            write(text[:40])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(text)
        return write(text)

    records._file = type("Full", (), {"write": staticmethod(full), "flush": records._file.flush,
                                      "fileno": records._file.fileno})()  # fmt: skip
    with refused("save", path, "2 trajectories"):
        roll_out(player(Script(texts)), jobs(tasks, 1), records, in_flight=1)
    records._file.flush()
    again = Records(path, "p", {})
    assert again.torn == 40 and [t.key for t in again.done] == ["t0", "t1"]
    roll_out(player(Script(texts)), jobs(tasks, 1), again)
    assert sorted(t.key for t in Records(path, "p", {}).done) == [t.key for t in tasks]


def test_a_turn_that_the_template_refuses_ends_its_trajectory_alone():
    """One turn calls a tool, and the template does not take what the policy said there."""
    guard = "{% for m in messages if 'BAD' in m.content %}{{ raise_exception('BAD is refused') }}{% endfor %}"
    template = ChatTemplate(tokenizer_for(guard + CHATML, "byte", eos="<|im_end|>"))
    script = Script({"a": [f"BAD {call('add', by=1)}"], "b": [call("add", by=1), "x<|im_end|>"]})
    one = dataclasses.replace(player(script), template=template)
    a, b = play(one, task("a"), task("b"))
    assert (a.ended, a.turns, b.ended) == ("refused", 1, "done") and "BAD is refused" in a.error
    with refused("template refuses the conversation", "BAD is refused"):
        play(one, task("BAD"))


def test_a_reward_function_may_ask_for_what_trl_s_trainer_gives():
    def asks(completions, trainer_state, log_extra, log_metric, **columns):
        log_extra("column", ["x"])
        log_metric("name", 1.0)
        return [float(trainer_state.global_step)]

    def takes_all(completions, **columns):
        return [float(columns["trainer_state"].global_step)]

    rewards = Rewards([asks, takes_all])
    (found,) = play(player(Script({"a": ["x<|im_end|>"]}), rewards=rewards), task("a"))
    assert found.rewards == {"Counter": 0.0, "asks": 0.0, "takes_all": 0.0} and not found.error


def test_right_answers_of_maths_are_those_of_math_verify():
    """Whatever else is added; elsewhere a reward of 1 is right."""
    for rewards, total, right in (
        ({"right_answer": 1.0, "short": -0.5}, 0.5, True), ({"right_answer": 0.0, "form": 1.0}, 1.0, False),
        ({"Counter": 0.9}, 0.9, False), ({"Counter": 1.0}, 1.0, True), ({"right_answer": 1.0, "x": None}, None, False),
    ):  # fmt: skip
        assert Trajectory("a", 0, {}, [], reward=total, rewards=rewards).correct is right


class Outage:
    """Its database answers the first `well` times, and never again."""

    well = 3

    def reset(self, **row):
        Outage.well -= 1
        if Outage.well < 0:
            raise ConnectionError("no database")

    def get_reward(self):
        return 1.0


def test_an_environment_that_is_out_of_order_ends_sampling(tmp_path, monkeypatch):
    """Its trajectories are not kept, and the next start plays them; a few of them are what they are."""
    monkeypatch.setattr("mdpo.rollouts.driver.BROKEN", 5)
    tasks, path = [task(f"t{n:02}") for n in range(12)], tmp_path / "r.jsonl"
    texts = {t.key: ["x<|im_end|>"] for t in tasks}
    with refused("environment", 5, "no database"):
        roll_out(player(Script(texts), Environments(Outage)), jobs(tasks, 1), Records(path, "p", {}), in_flight=1)
    assert [t.ended for t in Records(path, "p", {}).done] == ["done"] * 3
    Outage.well = 7
    texts = {t.key: ["x<|im_end|>"] for t in tasks}
    roll_out(player(Script(texts), Environments(Outage)), jobs(tasks, 1), Records(path, "p", {}), in_flight=1)
    ends = [t.ended for t in Records(path, "p", {}).done]
    assert ends == ["done"] * 10 + ["environment error"] * 2


def test_weights_that_sum_to_one_make_a_right_answer():
    functions = [lambda **_: [1.0], lambda **_: [1.0], lambda **_: [1.0]]
    for n, function in enumerate(functions):
        function.__name__ = f"f{n}"
    total = Rewards(functions, (0.7, 0.2, 0.1)).total({"f0": 1.0, "f1": 1.0, "f2": 1.0})
    assert Trajectory("a", 0, {}, [], reward=total).correct and not Trajectory("a", 0, {}, [], reward=0.999).correct
    with refused("reward_weights", "nan"):
        Rewards(functions, (1.0, float("nan"), 1.0))


NO_CLASS = {
    "class NoReset:\n    pass": "reset",
    "class Raises:\n    def __init__(self): raise OSError('gone')": "OSError: gone",
    "class Hangs:\n    def __init__(self): __import__('time').sleep(30)\n    def reset(self): pass": "Hangs() did not",
    "class Exits:\n    def __init__(self): raise SystemExit(3)": "SystemExit: 3",
    "class NoDoc:\n    def reset(self): pass\n    def tool(self, x: int): pass": "tool",
    "class NoHint:\n    def reset(self): pass\n    def tool(self, x):\n        'Doc.\\n\\nArgs:\\n    x: X.'": "tool",
}


@pytest.mark.parametrize("source", NO_CLASS)
def test_a_class_that_is_not_of_the_protocol_is_refused(source, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    name = source.partition(":")[0].removeprefix("class ")
    factory = load_object(f"{tmp_path / 'mine.py'}:{name}", "environment")
    for several in (factory, {"mine": factory}):
        with refused("environment", NO_CLASS[source]):
            environments_of(several, seconds=0.3)


@pytest.mark.parametrize("empty", [{}, {1: Counter}])
def test_environments_without_names_are_refused(empty):
    with refused("environment", "names"):
        environments_of(empty)


def test_a_name_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1")
    (tmp_path / "broken.py").write_text("import no_such_module")
    for spec, detail in {
        "mine": "mine", f"{tmp_path}/no.py:A": "no.py", f"{tmp_path}/mine.py:A": "x",
        f"{tmp_path}/broken.py:A": "no_such_module", "no.such.module:A": "no.such.module",
    }.items():  # fmt: skip
        with refused("environment", detail):
            load_object(spec, "environment")
    assert load_object("mdpo.rollouts.shop:Shop", "environment").__name__ == "Shop"


def test_arguments_against_a_schema():
    properties = {
        "n": {"type": "number"},
        "s": {"type": ["string", "null"]},
        "k": {"type": "string", "enum": ["a", "b"]},
        "any": {},
        "o": {"type": "object"},
        "maybe": {"type": "integer", "nullable": True},
    }
    schema = {"name": "f", "parameters": {"properties": properties, "required": []}}
    for good in ({"n": 1}, {"n": 1.5}, {"s": None}, {"k": "a"}, {"any": [1]}, {"o": {}}, {"maybe": None}, {}):
        assert not wrong_arguments(good, schema), good
    for bad in ({"n": "1"}, {"s": 1}, {"k": "c"}, {"o": []}, {"maybe": 1.5}, {"z": 1}, {"n": False}):
        assert wrong_arguments(bad, schema), bad


def test_long_results_are_shortened_in_the_middle():
    text = "a" * 8000 + "b" * 100 + "c" * 8000
    assert shortened(text) == "a" * 8000 + "\n… 100 characters left out …\n" + "c" * 8000
    assert shortened(text[:16000]) == text[:16000]
