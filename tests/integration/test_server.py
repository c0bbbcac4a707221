"""mdpo/rollouts/server.py against a server of this process that answers as it is told, right and wrong."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import sample as script
from errors import refused
from tiny import CHATML, TRL_TEMPLATES, tiny_llama, tokenizer_for

from mdpo.rollouts import server as module
from mdpo.rollouts.chat import Chat
from mdpo.rollouts.episode import Sampled
from mdpo.rollouts.server import TRIES, Server, served_context

STOPS, VOCABULARY = {2, 7}, 50


def completion(ids=(5, 6, 2), reason="stop", logprobs=(-1.0, -2.0, -3.0), **more) -> dict:
    choice = {"token_ids": list(ids), "finish_reason": reason, "text": "…", **more}
    return {"choices": [{**choice, "logprobs": {"token_logprobs": list(logprobs)} if logprobs else None}]}


class Handler(BaseHTTPRequestHandler):
    """Answers with the script's next item: an object as JSON, a number as that status, or one of these words."""

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.server.asked.append((self.path, json.loads(self.rfile.read(length)), dict(self.headers)))
        told = self.server.script.pop(0) if self.server.script else completion()
        if told == "close":
            self.connection.close()
            return
        if told == "hang":
            time.sleep(1.0)
            return
        status, body = (told, b'{"error": "told so"}') if isinstance(told, int) else (200, json.dumps(told).encode())
        body = {"nothing": b"", "garbage": b"<html>"}.get(told if isinstance(told, str) else "", body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + 50 if told == "half" else len(body)))
        if told == "broken gzip":
            self.send_header("Content-Encoding", "gzip")
        if status in (301, 307):
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.end_headers()
        self.wfile.write(body[:5] if told == "half" else body)
        if told == "half":
            self.connection.close()

    def do_GET(self):
        body = json.dumps(getattr(self.server, "listed", None)).encode()
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(*script):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.script, http.asked = list(script), []
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http, f"http://127.0.0.1:{http.server_port}/v1"
        http.shutdown()


def sample(address: str, **options) -> Sampled:
    options = {"timeout_s": 0.3, "first_wait_s": 0.001, **options}
    with Server([address], "mine", STOPS, VOCABULARY, **options) as server:
        return asyncio.run(server.sample([1, 3], 4))


def test_ids_go_in_and_come_out(monkeypatch):
    monkeypatch.setenv(module.KEY, "sk-secret")
    with serving() as (http, address):
        assert sample(address, temperature=0.7) == Sampled([5, 6, 2], False, [-1.0, -2.0, -3.0])
    (path, body, headers), *more = http.asked
    assert path == "/v1/completions" and not more and headers["Authorization"] == "Bearer sk-secret"
    asked = {"model": "mine", "prompt": [1, 3], "max_tokens": 4, "temperature": 0.7, **module.PLAIN}
    how = {"stop_token_ids": [2, 7], "skip_special_tokens": False, "return_token_ids": True, "logprobs": 1}
    assert body == {**asked, **how}


FOUR = [-1.0] * 4
READ = {
    "cut": (completion([5, 6, 8, 9], "length", FOUR), Sampled([5, 6, 8, 9], True, FOUR)),
    "the stop at the last place": (completion([5, 6, 8, 7], "length", FOUR), Sampled([5, 6, 8, 7], False, FOUR)),
    "no log-probs": (completion(logprobs=None), Sampled([5, 6, 2])),
    "log-probs of rounding": (completion(logprobs=[1e-4, 0, -2]), Sampled([5, 6, 2], False, [1e-4, 0, -2])),
    "its prompt": (completion(prompt_token_ids=[1, 3]), Sampled([5, 6, 2], False, [-1.0, -2.0, -3.0])),
    "the stop left out": (completion([5, 6], logprobs=[-1, -2], stop_reason=7), Sampled([5, 6, 7])),
    "the stop alone, left out": (completion([], logprobs=[], stop_reason=2), Sampled([2])),
}


@pytest.mark.parametrize("name", READ)
def test_answers_that_are_turns(name):
    answer, wanted = READ[name]
    with serving(answer) as (_, address):
        assert sample(address) == wanted


def with_logprobs(given) -> dict:
    (choice,) = completion()["choices"]
    return {"choices": [{**choice, "logprobs": {"token_logprobs": given}}]}


NAN, INF = float("nan"), float("inf")
BAD_LOGPROBS = [
    ["a", "b", "c"],
    [NAN, -1.0, -1.0],
    [-1.0, 1e9, -1.0],
    [-INF, -1.0, -1.0],
    [True] * 3,
    5,
    "abc",
    {"a": 1},
]
BAD = ["close", "hang", "half", "nothing", "garbage", "broken gzip", 408, 425, 429, 500, 503, [], {}, {"choices": []},
       {"choices": [5]}, completion([50]), completion([-1]), completion([1.5]), completion([True]), completion("5"),
       completion([5] * 5), completion(reason="error"), completion(reason=None), completion([5], logprobs=[-1]),
       completion([], "length", []), completion(logprobs=[-1.0]), *map(with_logprobs, BAD_LOGPROBS),
       {"choices": [{**completion()["choices"][0], "logprobs": [-1.0, -2.0]}]},
       completion([5], logprobs=[-1], stop_reason=[2])]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: json.dumps(bad)[:60])
def test_what_is_no_turn_is_asked_for_again(bad):
    with serving(bad, bad) as (http, address):
        assert sample(address).ids == [5, 6, 2]
    assert len(http.asked) == 3


def test_a_server_that_never_answers_well_ends_the_run():
    with serving(*[503] * TRIES) as (http, address), refused("base_url", address, "503", TRIES):
        sample(address)
    assert len(http.asked) == TRIES
    with refused("base_url", "127.0.0.1:9"):  # nobody listens there
        sample("http://127.0.0.1:9/v1")


@pytest.mark.parametrize("status", [400, 401, 404, 307])
def test_a_refusal_is_not_asked_again(status):
    """A redirect is one too: no address is opened but the configured one."""
    with serving(status) as (http, address), refused("base_url", address, status):
        sample(address)
    assert len(http.asked) == 1


def test_a_server_without_ids_is_refused():
    with serving({"choices": [{"text": "hello", "finish_reason": "stop"}]}) as (_, address):
        with refused("base_url", "token_ids"):
            sample(address)


@pytest.mark.parametrize("given", [[3], [1, 3, 4], [0, 1, 3], "13", 5])
def test_a_server_that_changes_prompts_is_refused(given):
    """In the choice, where vLLM has them, or beside it."""
    for told in (completion(prompt_token_ids=given), {**completion(), "prompt_token_ids": given}):
        with serving(told) as (http, address), refused("base_url", "prompt_token_ids", 2):
            sample(address)
        assert len(http.asked) == 1


EMPTY = completion([], "length", [])


def test_a_prompt_without_a_token_ends_its_own_trajectory():
    """Not the run, unless the server has never had one."""
    with serving(completion(), *[EMPTY] * TRIES, completion()) as (http, address):
        with Server([address], "mine", STOPS, VOCABULARY, first_wait_s=0.001) as server:

            async def three():
                return [await server.sample([1, 3], 4) for _ in range(3)]

            first, empty, last = asyncio.run(three())
    assert empty == Sampled([], True) and first.ids == last.ids == [5, 6, 2] and len(http.asked) == TRIES + 2
    with serving(*[EMPTY] * TRIES) as (http, address), refused("base_url", address, TRIES):
        sample(address)


def test_a_dead_server_is_no_end_while_another_lives():
    with serving() as (http, address):
        options = {"timeout_s": 0.3, "first_wait_s": 0.001}
        with Server(["http://127.0.0.1:9/v1", address], "mine", STOPS, VOCABULARY, **options) as server:
            assert asyncio.run(server.sample([1, 3], 4)).ids == [5, 6, 2]
        assert server.retried and len(http.asked) == 1


def test_what_a_server_says_of_its_models():
    listed = {"data": [{"id": "mine", "max_model_len": 77}, {"id": "other"}]}
    with serving() as (http, address):
        assert served_context(address, "mine") is None  # it has no list
        http.listed = listed
        assert served_context(address, "mine") == 77 and served_context(address, "other") is None
        with refused("served_model", "mine, other", "third"):
            served_context(address, "third")
    assert served_context("http://127.0.0.1:9/v1", "mine") is None


def test_requests_go_to_the_server_with_fewer_in_flight():
    async def many(server):
        return await asyncio.gather(*(server.sample([1], 4) for _ in range(20)))

    with serving() as (one, a), serving() as (other, b):
        with Server([a, b], "mine", STOPS, VOCABULARY) as server:
            assert len(asyncio.run(many(server))) == 20
        assert set(server.in_flight.values()) == {0}
        assert len(one.asked) == len(other.asked) == 10


def test_a_server_from_the_command_line(tmp_path, capsys):
    """Each trajectory has the ids that the server sampled behind those of its prompt; it may be asked for from anew."""
    tokenizer = tokenizer_for(CHATML, "byte", eos="<|im_end|>")
    tiny_llama(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "q.jsonl").write_text('{"question": "6 * 7?", "answer": 42}\n')
    (tmp_path / "r.yaml").write_text(f"model_name_or_path: {tmp_path}/model\ndataset_mixer: {{none.jsonl: 1.0}}\n")
    turn = [*tokenizer("It is \\boxed{42}.").input_ids, tokenizer.eos_token_id]
    command = [f"{tmp_path}/model", f"--recipe={tmp_path}/r.yaml", f"--tasks={tmp_path}/q.jsonl", "--dtype=float32",
               "--backend=server", f"--save={tmp_path}/t.jsonl", "--bf16=false", "--max_new_tokens=100"]  # fmt: skip
    with refused("base_url"):
        script.main(command)
    with serving(503, completion(turn, logprobs=[-0.5] * len(turn))) as (http, address):
        script.main([*command, f"--base_url={address}", "--served_model=mine"])
    (row,) = map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())
    prompt = http.asked[0][1]["prompt"]
    assert row["sequences"][0]["input_ids"] == prompt + turn and row["reward"] == 1 and row["ended"] == "done"
    assert row["sequences"][0]["logprobs"] == [None] * len(prompt) + [-0.5] * len(turn)
    told = capsys.readouterr().out
    assert http.asked[1][1]["model"] == "mine" and "1.0000" in told and "made again: 1 x status 503" in told
    script.main([*command, "--base_url=http://127.0.0.1:9/v1"])  # all is there: nobody is asked


# ---- /v1/chat/completions


def said(content="Hello.", reason="stop", **more) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": content, **more}, "finish_reason": reason}]}


def answer(address: str, messages=({"role": "user", "content": "Hi."},), tools=None) -> Sampled:
    with Chat([address], "mine", set(), 0, 0.7, timeout_s=0.3, first_wait_s=0.001) as server:
        return asyncio.run(server.answer(list(messages), tools, 4))


GIVEN = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"by": 5}'}}
SAID = {
    "text": (said(), {"content": "Hello."}, False),
    "cut": (said(reason="length"), {"content": "Hello."}, True),
    "nothing": (said(None), {"content": ""}, False),
    "thoughts": (said(reasoning="Hm."), {"content": "Hello.", "reasoning_content": "Hm."}, False),
    "calls": (said(None, "tool_calls", tool_calls=[GIVEN]), {"content": "", "tool_calls": [GIVEN]}, False),
}


@pytest.mark.parametrize("name", SAID)
def test_messages_that_are_turns(name):
    told, message, cut = SAID[name]
    with serving(told) as (http, address):
        assert answer(address, tools=[{"a": "tool"}]) == Sampled([], cut, None, {"role": "assistant", **message})
    ((path, body, _),) = http.asked
    hello = {"role": "user", "content": "Hi."}
    assert path == "/v1/chat/completions" and body == {
        "model": "mine", "messages": [hello], "max_tokens": 4, "temperature": 0.7, "top_p": 1.0,
        "tools": [{"a": "tool"}],
    }  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        500,
        "garbage",
        "half",
        "broken gzip",
        {},
        {"choices": 5},
        said(tool_calls={}),
        said([]),
        {"choices": [{}]},
        said(5),
        said(reason="abort"),
        said(tool_calls="add"),
    ],
)
def test_what_is_no_message_is_asked_for_again(bad):
    with serving(bad, said()) as (http, address):
        assert answer(address).message["content"] == "Hello."
    assert len(http.asked) == 2


@pytest.mark.parametrize(("second", "told"), [("Hello.", True), ("Good day.", False)])
def test_a_server_that_never_samples_is_named(second, told, capsys):
    async def both(server):
        return [await server.answer([{"role": "user", "content": "Hi."}], None, 4) for _ in range(2)]

    with serving(said(), said(second)) as (_, address):
        with Chat([address], "mine", set(), 0, 0.7) as server:
            asyncio.run(both(server))
    assert ("1 prompts got the same answer each time, at temperature 0.7" in capsys.readouterr().out) is told


COUNTER = """
class Counter:
    def reset(self, **row):
        self.value = 7

    def add(self, by: int) -> int:
        \"\"\"
        Adds to the counter.

        Args:
            by: How much.
        \"\"\"
        self.value += by
        return self.value

    def get_reward(self) -> float:
        return float(self.value == 12)
"""


def chatting(tmp_path, template: str) -> list[str]:
    tokenizer = tokenizer_for(template, "byte", eos="<|im_end|>")
    model = tiny_llama(tokenizer, seed=0)
    model.config.max_position_embeddings = 10_000
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "counter.py").write_text(COUNTER)
    (tmp_path / "q.jsonl").write_text('{"prompt": "It stands at 7. Make it 12."}\n')
    (tmp_path / "r.yaml").write_text(f"model_name_or_path: {tmp_path}/model\ndataset_mixer: {{none.jsonl: 1.0}}\n")
    return [f"{tmp_path}/model", f"--recipe={tmp_path}/r.yaml", f"--tasks={tmp_path}/q.jsonl", "--dtype=float32",
            "--backend=chat", f"--save={tmp_path}/t.jsonl", "--bf16=false", "--max_new_tokens=100",
            f"--environment={tmp_path}/counter.py:Counter"]  # fmt: skip


def test_calls_of_a_server_that_reads_them(tmp_path, capsys):
    """They go into the messages as it gave them, and back to it with their results; there are no ids to train on."""
    template = TRL_TEMPLATES / "qwen2_5.jinja"
    command = [*chatting(tmp_path, template.read_text(encoding="utf-8")), f"--chat_template={template}"]
    broken = {**GIVEN, "function": {"name": "add", "arguments": "{by"}}
    script_of = [said(None, "tool_calls", tool_calls=[broken]), said("Five.", "tool_calls", tool_calls=[GIVEN]), said()]
    with serving(*script_of) as (http, address):
        script.main([*command, f"--base_url={address}", '--chat_template_kwargs={"thinking": false}'])
    (row,) = map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())
    assert row["reward"] == 1 and row["sequences"] == [] and row["settings"]["backend"] == "chat"
    assert row["calls"] == [["", "malformed"], ["add", "ok"]] and row["turns"] == 3 and row["ended"] == "done"
    called, result, last = row["messages"][-3:]
    assert called["content"] == "Five." and called["tool_calls"][0]["function"]["arguments"] == {"by": 5}
    assert result["content"] == "12" and last == {"role": "assistant", "content": "Hello."}
    bodies = [body for _, body, _ in http.asked]
    assert all([tool["function"]["name"] for tool in body["tools"]] == ["add"] for body in bodies)
    assert all(body["chat_template_kwargs"] == {"thinking": False} for body in bodies)  # the recipe's
    sent = bodies[2]["messages"]
    assert sent[-2]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"by": 5}'}
    assert sent[-1]["tool_call_id"] == sent[-2]["tool_calls"][0]["id"]
    shown = capsys.readouterr().out
    assert "no token ids" in shown and f"its own chat template; start it with the recipe's, {template}" in " ".join(
        shown.split()
    )


DOORS = """

class Doors:
    def reset(self, prompt):  # not `environment`, which names the class
        self.open = False

    def push(self) -> str:
        \"\"\"Pushes the door.\"\"\"
        self.open = True
        return "It opens."

    def get_reward(self) -> float:
        return float(self.open)


BOTH = {"counter": Counter, "doors": Doors}
"""


def test_each_task_has_the_environment_that_its_row_names(tmp_path):
    """A dict of classes, as TRL takes it: each with its own tools and reward."""
    command = chatting(tmp_path, (TRL_TEMPLATES / "qwen2_5.jinja").read_text(encoding="utf-8"))
    (tmp_path / "counter.py").write_text(COUNTER + DOORS)
    command = [*command[:-1], f"--environment={tmp_path}/counter.py:BOTH", "--in_flight=1"]
    tasks = [{"prompt": "Open it.", "environment": "doors"}, {"prompt": "Make it 12.", "environment": "counter"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    pushed = {**GIVEN, "function": {"name": "push", "arguments": "{}"}}
    script_of = [said(None, "tool_calls", tool_calls=[call]) for call in (pushed, GIVEN)]
    with serving(script_of[0], said(), *script_of, said()) as (http, address):
        script.main([*command, f"--base_url={address}"])
    doors, counter = map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())
    assert doors["rewards"] == {"Doors": 1} and doors["calls"] == [["push", "ok"]]
    assert counter["rewards"] == {"Counter": 1} and counter["calls"] == [["push", "unknown"], ["add", "ok"]]
    shown = [[tool["function"]["name"] for tool in body["tools"]] for _, body, _ in http.asked]
    assert shown == [["push"]] * 2 + [["add"]] * 3
    for bad, why in (("windows", "none of counter, doors"), (["doors"], "none of"), (None, "none of")):
        (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "Hi.", "environment": bad}) + "\n")
        with refused("environment", "q.jsonl:1: ", why):
            script.main([*command, f"--base_url={address}"])
    (tmp_path / "q.jsonl").write_text('{"prompt": "Hi."}\n')
    with refused("question", "q.jsonl:1: ", "`environment`"):
        script.main([*command, f"--base_url={address}"])


def test_calls_in_text_of_a_template_without_tools(tmp_path):
    command = chatting(tmp_path, CHATML)
    call = '<tool_call>{"name": "add", "arguments": {"by": 5}}</tool_call>'
    with serving(said(call, reasoning_content="Hm."), said()) as (http, address):
        script.main([*command, f"--base_url={address}"])
    (row,) = map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())
    assert row["reward"] == 1 and row["messages"][-3]["reasoning_content"] == "Hm."
    assert all("tools" not in body for _, body, _ in http.asked)
    (tmp_path / "t.jsonl").unlink()
    with serving(said(call, tool_calls=[GIVEN])) as (_, address):
        script.main([*command, f"--base_url={address}"])
    (row,) = map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())
    assert row["ended"] == "environment error" and row["reward"] is None and "tool_calls" in row["error"]
