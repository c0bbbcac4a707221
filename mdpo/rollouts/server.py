"""Turns sampled by servers that speak OpenAI's protocol: `/v1/completions` with token ids in and out (vLLM, SGLang), so
that what is trained on is what was sampled."""

import asyncio
import os
import random
from dataclasses import dataclass, field
from typing import Any

import httpx

from mdpo.console import first_line, say
from mdpo.data.recorded import ROUNDING, finite
from mdpo.errors import UserError
from mdpo.rollouts.episode import Sampled
from mdpo.rollouts.serving import LOOK_S, Servers

KEY = "OPENAI_API_KEY"  # of the environment: a key is in no file
TRIES = 6  # of a request, waiting 1, 2, 4 … seconds between them
LONGEST_WAIT_S = 60.0
TIMEOUT_S = 600.0  # of a request, and longer where many tokens are asked for
SLOWEST = 10.0  # tokens per second
# Said each time: vLLM takes what is missing from the model's generation_config.json, of which many have such values.
PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
SAID = 3  # reasons of failures that are said, the most frequent ones
AGAIN = (408, 425, 429)  # and all from 500 on


class BadAnswer(Exception):
    """The server answered something that is no turn."""


class NoToken(BadAnswer):
    """It says that a limit ended a turn without a token."""


@dataclass
class Server:
    """One address or more; a request goes to the one with the fewest in flight, after a failure to another. In use as a
    context. `vocabulary` is one more than the highest id. `own` are servers that were started here: a request waits
    while none of them answers, and the death of one is no failed try. Raises UserError where no try succeeds."""

    addresses: list[str]
    model: str
    stops: set[int]
    vocabulary: int
    temperature: float = 0.0
    timeout_s: float = TIMEOUT_S
    first_wait_s: float = 1.0
    own: Servers | None = None
    in_flight: dict[str, int] = field(default_factory=dict)
    retried: dict[str, int] = field(default_factory=dict)  # why -> how often
    spoke: bool = False  # a turn has come back

    def __enter__(self) -> "Server":
        self.in_flight = dict.fromkeys(self.addresses, 0)
        key = os.environ.get(KEY)
        # No proxy, no redirect, no .netrc: nothing is opened but the configured addresses.
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self.timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
            follow_redirects=False,
        )
        return self

    def __exit__(self, *_) -> None:
        """Connections belong to the loop, which has ended."""
        if self.retried:
            whys = sorted(self.retried.items(), key=lambda item: -item[1])
            said = "; ".join(f"{n} x {why}" for why, n in whys[:SAID])
            say(f"{self.option}: {sum(self.retried.values())} requests were made again: {said}")

    @property
    def option(self) -> str:
        return "serve" if self.own else "base_url"

    async def sample(self, prompt: list[int], max_new_tokens: int) -> Sampled:
        """Without ids where the server has turns, but none for this prompt."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_new_tokens,
            "temperature": self.temperature,
            **PLAIN,
            "stop_token_ids": sorted(self.stops),
            "skip_special_tokens": False,
            "return_token_ids": True,
            "logprobs": 1,
        }
        try:
            sampled = await self._tried("/completions", body, lambda answer: self._read(answer, prompt, max_new_tokens))
        except NoToken:
            return Sampled([], cut=True)
        self.spoke = True
        return sampled

    async def _tried(self, path: str, body: dict[str, Any], read) -> Any:
        """What `read` makes of the answer; network errors, refusals for load and bad answers are tried again.
        Raises UserError, or NoToken if that is what other prompts do not get."""
        why, failed, number = "", dict.fromkeys(self.addresses, 0), 0
        while number < TRIES:
            if why:
                self.retried[why] = self.retried.get(why, 0) + 1
                wait = min(self.first_wait_s * 2 ** max(number - 1, 0), LONGEST_WAIT_S)
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            up = await self._up()
            address = min(up, key=lambda a: (failed[a], self.in_flight[a]))
            starts = self.own.starts(address) if self.own else 0
            self.in_flight[address] += 1
            try:
                answer = await self._client.post(address.rstrip("/") + path, json=body)
                if answer.status_code in AGAIN or answer.status_code >= 500:
                    why = f"status {answer.status_code}"
                elif answer.status_code != 200:
                    raise UserError(
                        f"{self.option}: {address}{path}: {answer.status_code}: {answer.text.strip()[:200]}"
                    )
                else:
                    return read(_json(answer))
            except (httpx.RequestError, BadAnswer) as error:
                if isinstance(error, NoToken) and self.spoke and number == TRIES - 1:
                    raise
                why = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
            finally:
                self.in_flight[address] -= 1
                failed[address] += 1
            number += not (self.own and await self.own.died(address, starts))
        raise UserError(f"{self.option}: {', '.join(self.addresses)}: {TRIES} tries failed; the last one: {why}.")

    async def _up(self) -> list[str]:
        """The addresses to ask, as soon as there is one. Raises UserError where no server is left."""
        if self.own is None:
            return self.addresses
        while not (up := self.own.up()):
            await asyncio.sleep(LOOK_S)
        return up

    def _read(self, answer: Any, prompt: list[int], most: int) -> Sampled:
        """A turn from an answer of /v1/completions. Raises BadAnswer, and UserError for a server without token ids, or
        one that has changed the prompt."""
        choice = only_choice(answer)
        given = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
        if given is not None and given != prompt:
            raise UserError(f"{self.option}: {changed(prompt, given)}")
        if choice.get("token_ids") is None:
            raise UserError(
                f"{self.option}: the server returns no token_ids. vLLM and SGLang do, by return_token_ids; "
                "--backend chat takes text."
            )
        ids, reason = choice["token_ids"], choice.get("finish_reason")
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < self.vocabulary for i in ids):
            raise BadAnswer("token_ids are no ids of the vocabulary")
        if len(ids) > most:
            raise BadAnswer(f"{len(ids)} token_ids where {most} were asked for")
        if reason not in ("stop", "length"):
            raise BadAnswer(f"finish_reason {reason!r:.40}")
        stopped = reason == "stop" and (not ids or ids[-1] not in self.stops)
        if stopped:  # the stop was sampled, and is not returned
            stop = next((own for own in self.stops if own == choice.get("stop_reason")), None)
            if stop is None and len(self.stops) > 1:
                raise BadAnswer("finish_reason stop without the token that ended the turn")
            ids = [*ids, min(self.stops) if stop is None else stop]
        if not ids:
            raise NoToken("no token came back")
        logprobs = None if stopped else read_logprobs(choice.get("logprobs"), ids)
        return Sampled(ids, cut=reason == "length" and ids[-1] not in self.stops, logprobs=logprobs)


def only_choice(answer: Any) -> dict[str, Any]:
    """Raises BadAnswer where there is none, or more than one."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer("the answer has no choice")
    return choices[0]


def read_logprobs(given: Any, ids: list[int]) -> list[float] | None:
    """One for each id, as recorded rows may have them; None where the server knows none. Raises BadAnswer."""
    if not isinstance(given, dict | None):
        raise BadAnswer("logprobs are no object")
    if not given or (logprobs := given.get("token_logprobs")) is None:
        return None
    if not isinstance(logprobs, list) or not all(x is None or (finite(x) and x <= ROUNDING) for x in logprobs):
        raise BadAnswer("token_logprobs are no list of finite numbers up to 0")
    if len(logprobs) != len(ids):
        raise BadAnswer(f"{len(logprobs)} logprobs beside {len(ids)} token_ids")
    return logprobs


def changed(prompt: list[int], given: Any) -> str:
    """What a server has made of a prompt."""
    how = f"samples behind {len(given)} prompt_token_ids" if isinstance(given, list) else "returns prompt_token_ids"
    return (
        f"the server {how} that are not the {len(prompt)} that it was sent. It must not shorten or change prompts: "
        "start it with a longer context, without truncation and without tokens of its own."
    )


def served_context(address: str, model: str, listed: bool = True) -> int | None:
    """The tokens of context that a server serves a model with (vLLM's `max_model_len`); None where it does not say.
    Raises UserError where it serves others only, by a list that should have it (`listed`)."""
    key = os.environ.get(KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(trust_env=False, follow_redirects=False, timeout=30.0, headers=headers) as client:
            served = client.get(address.rstrip("/") + "/models").json()["data"]
        names = {entry["id"]: n if type(n := entry.get("max_model_len")) is int else None for entry in served}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
        return None  # it may begin later, or have no such list
    if listed and model not in names:
        raise UserError(f"--served_model: {address} serves {', '.join(names) or 'nothing'}, not {model}.")
    return names.get(model)


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise BadAnswer("the answer is no JSON") from error
