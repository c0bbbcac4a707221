"""mdpo/rollouts/shop.py: a task by hand, and that what the expert does is what is asked."""

import pytest

from mdpo.rollouts.environment import Environments
from mdpo.rollouts.shop import COUPONS, Shop, expert, tasks

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
