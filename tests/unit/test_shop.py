"""mdpo/rollouts/shop.py: a task by hand, and that what the expert does is what is asked and what SFT learns."""

import asyncio
import json
import runpy

import pytest
from repository import ROOT
from tiny import tokenizer_for

from mdpo.masking.chat_template import ChatTemplate
from mdpo.rollouts.calls import call_form
from mdpo.rollouts.driver import play_all
from mdpo.rollouts.environment import Environments
from mdpo.rollouts.episode import Limits, Player, Sampled
from mdpo.rollouts.rewards import Rewards
from mdpo.rollouts.shop import COUPONS, Shop, expert, tasks
from mdpo.rollouts.supervised import sft_rows
from mdpo.rollouts.tasks import Task

CATALOG = {"pen": {"red": [120, 5], "blue": [100, 0], "plain": [150, 9]}, "mug": {"large": [300, 2]}}
GOAL = {"items": {"red pen": 3, "large mug": 1}, "coupon": "SPRING10"}


def shop(**goal) -> Shop:
    shop = Shop()
    assert shop.reset(key="k", prompt="…", catalog=CATALOG, goal={**GOAL, **goal}) is None
    return shop


def test_an_order_by_hand():
    s = shop()
    assert s.search("pen") == "red pen: 1.20, 5 in stock; blue pen: 1.00, 0 in stock; plain pen: 1.50, 9 in stock"
    assert s.search("hat") == "nothing found; kinds: pen, mug"
    s.add_to_cart("red pen", 2)
    assert s.add_to_cart("red pen", 1) == "cart: 3 red pen"
    s.add_to_cart("plain pen", 1)
    assert s.remove_from_cart("plain pen") == "cart: 3 red pen"
    s.add_to_cart("large mug", 1)
    assert s.apply_coupon("SPRING10") == "10 per cent off" and s.get_reward() == 0
    assert s.checkout() == "ordered: 3 red pen, 1 large mug; total 5.94"  # 6.60 less 0.66
    assert s.get_reward() == 1
    for call in (s.checkout, lambda: s.add_to_cart("red pen", 1), lambda: s.apply_coupon("HELLO5")):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize(
    ("goal", "reward"),
    [({"coupon": None}, 0), ({"items": {"red pen": 3}}, 0), ({"items": {"red pen": 2, "large mug": 1}}, 0), ({}, 1)],
)
def test_another_order_is_worth_nothing(goal, reward):
    s = shop(**goal)
    for product, pieces in GOAL["items"].items():
        s.add_to_cart(product, pieces)
    s.apply_coupon(GOAL["coupon"])
    s.checkout()
    assert s.get_reward() == reward


def test_what_the_shop_refuses():
    s = shop()
    for call in (
        lambda: s.add_to_cart("red pen", 6), lambda: s.add_to_cart("red pen", 0), lambda: s.add_to_cart("blue pen", 1),
        lambda: s.add_to_cart("green pen", 1), lambda: s.add_to_cart("pen", 1), lambda: s.remove_from_cart("red pen"),
        lambda: s.apply_coupon("FREE"), s.checkout,
    ):  # fmt: skip
        with pytest.raises(ValueError):
            call()
    s.add_to_cart("red pen", 4)
    with pytest.raises(ValueError):
        s.add_to_cart("red pen", 2)


def test_tasks_are_what_their_goal_says():
    rows = tasks(200, seed=1)
    assert rows == tasks(200, seed=1) != tasks(200, seed=2) and len({row["key"] for row in rows}) == 200
    with_coupon = 0
    for row in rows:
        for product, pieces in row["goal"]["items"].items():
            make, kind = product.split()
            enough = {m: price for m, (price, left) in row["catalog"][kind].items() if left >= pieces}
            assert make == min(enough, key=enough.get) and len(set(enough.values())) == len(enough)
            assert f"{pieces} {kind}" in row["prompt"]
        coupon = row["goal"]["coupon"]
        assert coupon is None or (coupon in COUPONS and coupon in row["prompt"])
        with_coupon += coupon is not None
        assert [name for name, _, _ in expert(row)][-1] == "checkout"  # which asserts the reward
    assert 40 <= with_coupon <= 80


def test_it_is_of_the_protocol():
    environments = Environments(Shop)
    assert list(environments.schemas) == ["add_to_cart", "apply_coupon", "checkout", "remove_from_cart", "search"]
    assert environments.has_reward
    parameters = environments.schemas["add_to_cart"]["function"]["parameters"]
    assert parameters["required"] == ["product", "pieces"] and parameters["properties"]["pieces"]["type"] == "integer"


def test_the_policy_is_asked_as_sft_has_shown_it(tmp_path):
    """A policy that does what the expert does gets the ids and masks of SFT's row: the same tools in the same words."""
    folder = ROOT / "recipes/smollm2-135m/data"
    shown = runpy.run_path(str(folder / "make_shop.py"))["shown"]
    source = (folder / "tools.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(tokenizer_for(source, "byte", eos="<|im_end|>"))
    environments, (row, *_) = Environments(Shop), tasks(1, seed=3)
    tools = list(environments.schemas.values())
    (tmp_path / "sft.jsonl").write_text(json.dumps({"messages": shown(row), "tools": tools}))
    [learned] = sft_rows([tmp_path / "sft.jsonl"], template, None)[0]

    class Expert:
        async def sample(self, prompt, max_new_tokens):
            assert prompt == learned["input_ids"][: len(prompt)]
            turn, mask = learned["input_ids"][len(prompt) :], learned["assistant_masks"][len(prompt) :]
            return Sampled(turn[: mask.index(0) if 0 in mask else None], cut=False)

    stop = template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    form, found = call_form("auto", tools, template, "user"), []
    player = Player(Expert(), template, {stop}, form, environments, Rewards(), Limits(turns=20))
    asked = Task("a", row, [{"role": "user", "content": row["prompt"]}])
    asyncio.run(play_all(player, [(asked, 0)], 1, found.append))
    [sequence] = found[0].sequences
    assert found[0].correct and (found[0].ended, found[0].turns) == ("done", len(expert(row)) + 1)
    length = len(sequence["input_ids"])  # SFT's row has the line break behind it
    assert {name: sequence[name] for name in learned} == {name: column[:length] for name, column in learned.items()}
    assert not any(learned["assistant_masks"][length:])
