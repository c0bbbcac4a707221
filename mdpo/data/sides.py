"""The columns that contain the two sides of a pair: publicly documented forms, as a table."""

import json
from collections.abc import Callable
from typing import Any

from mdpo.data.columns import Form, Row, number, role_of
from mdpo.errors import DropPair

FEWER = "fewer than two completions with a score"


def named(chosen: str, rejected: str) -> Callable[[Row], Row]:
    """The sides are two columns."""
    return lambda row: {"chosen": row[chosen], "rejected": row[rejected]}


def judged(first: str, second: str, verdict: Callable[[Row], float]) -> Callable[[Row], Row]:
    """The sides are two columns of which `verdict` is below 0 where the first is better, above 0 where the second
    is; its size is the margin."""

    def read(row: Row) -> Row:
        better = verdict(row)
        if not better:
            raise DropPair(f"a tie: neither {first} nor {second} is better")
        names = (first, second) if better < 0 else (second, first)
        return {"chosen": row[names[0]], "rejected": row[names[1]]}

    return read


def with_margin(read: Callable[[Row], Row], size: Callable[[Row], float]) -> Callable[[Row], Row]:
    return lambda row: {**read(row), "margin": size(row)}


def one_of_two(name: str, first: Any) -> Callable[[Row], float]:
    """A column that is 0 or 1, and `first` where the first answer is better."""

    def verdict(row: Row) -> float:
        value = number(row, name)
        if value not in (0, 1):
            raise DropPair(f"{name} is neither 0 nor 1")
        return -1.0 if value == first else 1.0

    return verdict


def winner(row: Row) -> float:
    """Arena's column: model_a, model_b, or a tie of some kind."""
    verdict = str(row["winner"]).lower()
    if verdict.startswith(("tie", "both")):
        return 0.0
    if verdict not in ("model_a", "model_b"):
        raise DropPair(f"winner is neither model_a nor model_b nor a tie: {verdict[:40]}")
    return -1.0 if verdict == "model_a" else 1.0


def _arena_texts(row: Row) -> Row:
    """LMSYS' rows: prompt, response_a and response_b are JSON lists of texts, a turn each."""
    verdict = lambda row: number(row, "winner_model_b") - number(row, "winner_model_a")  # noqa: E731
    pair = judged("response_a", "response_b", verdict)(row)
    asked = _texts(row.get("prompt"))
    both = {side: _texts(pair[side]) for side in ("chosen", "rejected")}
    if asked is None or None in both.values():
        return pair
    if any(len(answers) != len(asked) for answers in both.values()):
        raise DropPair("prompt and responses have different numbers of turns")
    roles = ("user", "assistant")
    return {
        side: [{"role": r, "content": t} for turn in zip(asked, answers, strict=True) for r, t in zip(roles, turn)]  # noqa: B905
        for side, answers in both.items()
    } | {"prompt": None}


def _texts(value: Any) -> list[str] | None:
    """A JSON list of texts, as LMSYS writes one; None for anything else."""
    try:
        texts = json.loads(value) if isinstance(value, str) and value.startswith("[") else value
    except (ValueError, RecursionError):
        return None
    return texts if isinstance(texts, list) and texts and all(isinstance(t, str | None) for t in texts) else None


def after_last_user(row: Row) -> Row:
    """ms-swift: `messages` ends with the chosen answer; the rejected one is alone, or is a whole conversation."""
    name = "rejected_messages" if row.get("rejected_messages") else "rejected_response"
    messages, rejected = row["messages"], row.get(name)
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DropPair("messages is not a list of messages")
    if isinstance(rejected, list) and rejected and role_of(rejected[0]) in ("user", "system"):
        return {"chosen": messages, "rejected": rejected}
    last = max((i for i, m in enumerate(messages) if role_of(m) == "user"), default=-1)
    if last < 0:
        raise DropPair("no user turn in messages")
    return {"prompt": messages[: last + 1], "chosen": messages[last + 1 :], "rejected": rejected}


def completion_rewards(row: Row) -> list[float | None]:
    """Of `completions`: less its rank (NeMo-RL, 0 is best), or its score (UltraFeedback)."""
    candidates = row["completions"]
    if not isinstance(candidates, list) or not all(isinstance(c, dict) for c in candidates):
        raise DropPair("completions is not a list of objects")
    return [-number(c, "rank") if _ranked(candidates) else _score(c) for c in candidates]


def completions(row: Row) -> Row:
    """The best against the worst of `completions`; ranks make no margin."""
    rewards, candidates = completion_rewards(row), row["completions"]
    texts = [c.get("completion") if _ranked(candidates) else c.get("response", c.get("completion")) for c in candidates]
    best = extremes(list(zip(rewards, texts, strict=True)))
    return {k: v for k, v in best.items() if k != "margin"} if _ranked(candidates) else best


def _ranked(candidates: list[Row]) -> bool:
    return bool(candidates) and all("rank" in c for c in candidates)


def _score(completion: Row) -> float:
    """UltraFeedback's: the judge's one score, else the mean of its four."""
    for name in ("overall_score", "fine-grained_score", "score"):
        if completion.get(name) is not None:
            return number(completion, name)
    notes = completion.get("annotations")
    ratings = [n.get("Rating") for n in notes.values() if isinstance(n, dict)] if isinstance(notes, dict) else []
    try:
        return sum(map(float, ratings)) / len(ratings)
    except (TypeError, ValueError, ZeroDivisionError):
        reason = "a completion without rank, overall_score, fine-grained_score or ratings"
        raise DropPair(reason, "completions") from None


def listed_rewards(texts: str, rewards: str) -> Callable[[Row], list[float | None]]:
    """Answers in one column, their rewards in another; null is none."""

    def read(row: Row) -> list[float | None]:
        lists = (row[texts], row[rewards])
        if not all(isinstance(column, list) for column in lists) or len(lists[0]) != len(lists[1]):
            raise DropPair(f"{texts} and {rewards} are not lists of one length")
        named = ((f"{rewards}: entry {n}", r) for n, r in enumerate(lists[1], 1))
        return [None if r is None else number({name: r}, name) for name, r in named]

    return read


def best_and_worst(texts: str, rewards: str) -> Callable[[Row], Row]:
    read = listed_rewards(texts, rewards)
    return lambda row: extremes(list(zip(read(row), row[texts], strict=True)))


def extremes(answers: list[tuple[float | None, Any]]) -> Row:
    """The first of the best and the first of the worst that have a score; the margin is the difference of both."""
    scored = [(score, answer) for score, answer in answers if score is not None]
    if len(scored) < 2:
        raise DropPair(FEWER)
    best, worst = max(scored, key=lambda s: s[0]), min(scored, key=lambda s: s[0])
    if best[0] == worst[0]:
        raise DropPair("a tie: all completions have one score or rank")
    return {"chosen": best[1], "rejected": worst[1], "margin": best[0] - worst[0]}


def _by(name: str) -> Callable[[Row], float]:
    return lambda row: number(row, name)


TRL = Form(("chosen", "rejected"), "TRL; UltraFeedback binarized, hh-rlhf, Orca pairs, LLaMA-Factory, UltraInteract",
           "as they are: messages, one message, an object with `messages` or `conversations`, or a text",
           named("chosen", "rejected"))  # fmt: skip
SIDE_FORMS = (
    TRL,
    Form(("preferred_output", "non_preferred_output"), "OpenAI, Azure, Fireworks, Together",
         "chosen, rejected", named("preferred_output", "non_preferred_output")),
    Form(("chosen_messages", "rejected_messages"), "agent datasets",
         "chosen, rejected", named("chosen_messages", "rejected_messages")),
    Form(("chosen_response", "rejected_response"), "NeMo-RL (with `prompt`), argilla and axolotl (with `instruction`)",
         "chosen, rejected", named("chosen_response", "rejected_response")),
    Form(("messages", "rejected_response"), "ms-swift",
         "`messages` up to its last user turn is the prompt, what follows is chosen; the text, message or messages in "
         "`rejected_response` are rejected", after_last_user),
    Form(("messages", "rejected_messages"), "ms-swift",
         "`messages` is chosen, `rejected_messages` rejected; where that begins with the assistant, it follows the "
         "last user turn of `messages`", after_last_user),
    Form(("response", "rejected_response"), "ms-swift, with `query` and `history`",
         "chosen, rejected", named("response", "rejected_response")),
    Form(("response1", "response2", "overall_preference"), "HelpSteer3",
         "below 0 the first is chosen, above 0 the second, 0 is a tie; the size is the margin",
         with_margin(judged("response1", "response2", _by("overall_preference")),
                     lambda row: abs(number(row, "overall_preference")))),
    Form(("response_1", "response_2", "preference_strength"), "HelpSteer2-Preference",
         "as HelpSteer3; `<extra_id_1>` in `prompt` parts its turns",
         with_margin(judged("response_1", "response_2", _by("preference_strength")),
                     lambda row: abs(number(row, "preference_strength")))),
    Form(("completions",), "NeMo-RL (`rank`, `completion`); UltraFeedback (`overall_score`, else `fine-grained_score`, "
         "else the mean of the annotations' ratings; `response`)",
         "the first of the best against the first of the worst, all equal is a tie; the difference of scores is the "
         "margin, ranks make none", completions, rewards=completion_rewards),
    Form(("generations", "ratings"), "distilabel",
         "the first of the best against the first of the worst, all equal is a tie; the difference is the margin",
         best_and_worst("generations", "ratings"), rewards=listed_rewards("generations", "ratings")),
    Form(("responses", "rewards"), "several answers sampled for one prompt, and the reward of each",
         "the first of the best against the first of the worst, all equal is a tie; the difference is the margin",
         best_and_worst("responses", "rewards"), rewards=listed_rewards("responses", "rewards")),
    Form(("conversation_a", "conversation_b", "winner"), "LMSYS Chatbot Arena, MT-Bench judgments",
         "the winner's conversation is chosen; ties are dropped", judged("conversation_a", "conversation_b", winner)),
    Form(("response_a", "response_b", "winner"), "Arena", "the winner's is chosen; ties are dropped",
         judged("response_a", "response_b", winner)),
    Form(("response_a", "response_b", "winner_model_a", "winner_model_b"), "LMSYS human preference 55k",
         "as Arena; lists of texts as JSON, in `prompt` too, are turns", _arena_texts, ("winner_tie",)),
    Form(("response_0", "response_1", "better_response_id"), "PKU-SafeRLHF", "the better one is chosen",
         judged("response_0", "response_1", one_of_two("better_response_id", 0))),
    Form(("answer_0", "answer_1", "score_0", "score_1"), "WebGPT comparisons",
         "the higher score is chosen, equal ones are a tie; the difference is the margin",
         with_margin(judged("answer_0", "answer_1", lambda row: number(row, "score_1") - number(row, "score_0")),
                     lambda row: abs(number(row, "score_1") - number(row, "score_0")))),
    Form(("human_ref_A", "human_ref_B", "labels"), "SHP", "1: A is chosen, 0: B",
         judged("human_ref_A", "human_ref_B", one_of_two("labels", 1))),
    Form(("response_j", "response_k"), "StackExchange paired", "j is chosen, k rejected",
         named("response_j", "response_k")),
)  # fmt: skip


def sides_form(columns: Any) -> Form | None:
    """The first form whose columns are all there."""
    return next((form for form in SIDE_FORMS if set(form.columns) <= set(columns)), None)
