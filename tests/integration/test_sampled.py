"""What a side is made of from its messages is what was sampled: the same ids as the recorded prompts and turns, with
exactly the sampled ones supervised. A random model talks in the syntax of fourteen chat templates."""

from collections import Counter
from functools import cache

import pytest
from conversations import pair_of
from sampling import LINEAR, THINKING, Sampler, Syntax, merged
from shown import sequences_of
from templates import chat_template
from tiny import tokenizer_for

from mdpo.errors import DropPair
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.conversation import Conversation
from mdpo.masking.loss_mask import RenderSettings, tokenize_pair
from mdpo.masking.spans import mask_of, tokenize
from mdpo.masking.turns import locate

SETTINGS = RenderSettings(None)
MOVED = (  # the system text goes to the last question, as in Mistral's templates
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set asked = messages | selectattr('role', 'eq', 'user') | list %}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}"
    "{{ '[INST] ' + (system if ns.n == asked | length else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
REWRITING = {**THINKING, "moved": Syntax("</s>", spaced=True, system=True)}
SYNTAX = {**LINEAR, **REWRITING}
TALKS = 3  # of each template, and of each way of using it


def template_of(name, kind="byte"):
    return ChatTemplate(tokenizer_for(MOVED, kind, eos="</s>")) if name == "moved" else chat_template(name, kind)


@cache
def talks(name, kind="byte"):
    sampler = Sampler(template_of(name, kind).tokenizer, SYNTAX[name])
    ways = [False, True] if SYNTAX[name].call else [False]
    return [sampler.trajectory(agent) for agent in ways for _ in range(TALKS)]


def unstable(tokenizer, turns):
    """Of how many turns the sampled text, up to the stop, has other tokens than were sampled: those cannot be known
    from messages. Decoded behind a word, as a Metaspace decoder drops the space of its first token."""
    word = tokenizer("It", add_special_tokens=False)["input_ids"]
    texts = [tokenizer.decode([*word, *ids[:-1]], skip_special_tokens=False) for _, ids in turns]
    again = [tokenizer(text.removeprefix("It"), add_special_tokens=False)["input_ids"] for text in texts]
    return sum(ids != own[:-1] for ids, (_, own) in zip(again, turns, strict=True))


def same(got, recorded):
    """Whether sequences are those recorded, but for what a template writes behind the last turn, of which no token
    counts."""
    if len(got) != len(recorded):
        return False
    (ids, mask), (own_ids, own_mask) = got[-1], recorded[-1]
    behind = [0] * (len(mask) - len(own_mask))
    return got[:-1] == recorded[:-1] and ids[: len(own_ids)] == own_ids and mask == [*own_mask, *behind]


def supervised(tokenizer, sequences):
    """The text of all that is supervised."""
    return "".join(tokenizer.decode([i for i, m in zip(*s, strict=True) if m]) for s in sequences)


def side_of(talk, template):
    return Conversation(talk.messages, 1 + (talk.messages[0]["role"] == "system"), template, talk.tools)


def of_messages(talk, template):
    n = side_of(talk, template).n_prompt
    return sequences_of(tokenize_pair(pair_of(talk.messages, n, tools=talk.tools), template, SETTINGS))


def of_whole_text(talk, template):
    """The wrong twin: one rendered text, in which the turns are supervised."""
    side = side_of(talk, template)
    ids, ranges = tokenize(side.text, template.tokenizer)
    try:
        turns = [locate(side.whole, side.prompt(i), i, side, thoughtless=False) for i in side.trained]
        spans = [(turn.start, turn.end) for turn in turns]
        return [(ids, mask_of(side.text, ids, ranges, spans, template.tokenizer)[1])]
    except DropPair:
        return []


METASPACE = ("qwen2_5", "phi3", "qwen3", "gptoss", "deepseek_r1_distill", "moved")


@pytest.mark.parametrize("name, kind", [(n, "byte") for n in SYNTAX] + [(n, "metaspace") for n in METASPACE])
def test_sequences_are_what_was_sampled(name, kind):
    """Where a sampled text has other tokens than were sampled, as " rep" + "ort", it is the same text all the same; one
    turn, or a tenth of them, at most are of that kind."""
    template, seen = template_of(name, kind), Counter()
    for talk in talks(name, kind):
        got, recorded = of_messages(talk, template), merged(talk.turns)
        seen["turns"] += len(talk.turns)
        seen["unstable"] += (others := unstable(template.tokenizer, talk.turns))
        assert same(got, recorded) == (not others)
        assert supervised(template.tokenizer, got) == supervised(template.tokenizer, recorded)
        assert sum(sum(mask) for _, mask in recorded) == sum(len(ids) for _, ids in talk.turns)
        seen["several sequences"] += len(recorded) > 1
    assert seen["unstable"] <= max(1, 0.1 * seen["turns"]), seen
    if name in REWRITING:
        assert seen["several sequences"] == len(talks(name, kind))
    elif kind == "byte":  # the other one has a token of the header's line break and an answer's first letter
        assert not seen["several sequences"]


@pytest.mark.parametrize("name", SYNTAX)
def test_one_whole_text_is_what_was_sampled_on_linear_templates_alone(name):
    """The negative control: on every other template no trajectory is what one rendered text holds."""
    template, agrees = template_of(name), set()
    for talk in talks(name):
        if not unstable(template.tokenizer, talk.turns):
            agrees.add(same(of_whole_text(talk, template), merged(talk.turns)))
    assert agrees == {name in LINEAR}


def test_recorded_turns_are_joined_by_hand():
    turns = [([1], [2]), ([1, 2, 3], [4]), ([1, 3], [5])]
    assert merged(turns) == [([1, 2, 3, 4], [0, 1, 0, 1]), ([1, 3, 5], [0, 0, 1])]


def test_tokens_that_no_text_has_are_noticed():
    tokenizer = template_of("qwen2_5").tokenizer
    turn = tokenizer.convert_tokens_to_ids(["It", "Ġrep", "ort", "<|im_end|>"])
    assert unstable(tokenizer, [([], turn), ([], tokenizer("It report<|im_end|>")["input_ids"])]) == 1
