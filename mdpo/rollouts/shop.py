"""A small shop: an environment with state, five tools, generated tasks and a checker, in TRL's protocol. Products are
sold by kind ("pen", in several makes at several prices); the task says what to buy, and the order says if it was.

    rows = tasks(100, seed=0)     # {"key", "prompt", "catalog", "goal"} each
    expert(rows[0])               # the calls and texts of a trajectory that does what is asked
"""

import json
import random
from typing import Any

KINDS = ("pen", "notebook", "lamp", "mug", "bag", "clock", "scarf", "book")
MAKES = ("red", "blue", "green", "plain", "large", "small")
COUPONS = {"SPRING10": 10, "HELLO5": 5, "BULK20": 20}  # per cent
ASKED = (
    "Buy {items}. Take the cheapest make of each that is in stock.",
    "I need {items}, always the cheapest make in stock. Please order.",
    "Order {items} for me. The cheapest make that you have in stock will do.",
)
WITH_COUPON = " Use the coupon {coupon}."


class Shop:
    """`reset(**row)` takes a task's row. The reward is 1 where an order was placed that is exactly the goal, else 0."""

    def reset(self, catalog: dict[str, dict[str, list[int]]] | None = None, goal: dict | None = None, **_: Any) -> None:
        """`catalog` has {kind: {make: [price in cents, pieces in stock]}}, `goal` {"items": {"make kind": pieces},
        "coupon"}."""
        self._catalog, self._goal = catalog or {}, goal or {}
        self._cart: dict[str, int] = {}
        self._coupon: str | None = None
        self._order: dict | None = None

    def search(self, kind: str) -> str:
        """
        Lists the makes of a kind of product, with price and stock.

        Args:
            kind: The kind of product, such as "pen".
        """
        makes = self._catalog.get(kind)
        if makes is None:
            return f"nothing found; kinds: {', '.join(self._catalog)}"
        return "; ".join(f"{make} {kind}: {price / 100:.2f}, {left} in stock" for make, (price, left) in makes.items())

    def add_to_cart(self, product: str, pieces: int) -> str:
        """
        Puts pieces of a product into the cart.

        Args:
            product: Make and kind, such as "red pen".
            pieces: How many pieces.
        """
        self._refuse_closed()
        make, _, kind = product.partition(" ")
        if make not in self._catalog.get(kind, {}):
            raise ValueError(f"there is no product {product}")
        left = self._catalog[kind][make][1] - self._cart.get(product, 0)
        if not 1 <= pieces <= left:
            raise ValueError(f"{left} pieces of {product} are left")
        self._cart[product] = self._cart.get(product, 0) + pieces
        return f"cart: {self._content()}"

    def remove_from_cart(self, product: str) -> str:
        """
        Takes all pieces of a product out of the cart.

        Args:
            product: Make and kind, such as "red pen".
        """
        self._refuse_closed()
        if product not in self._cart:
            raise ValueError(f"{product} is not in the cart")
        del self._cart[product]
        return f"cart: {self._content()}"

    def apply_coupon(self, code: str) -> str:
        """
        Applies a coupon to the order; one at a time.

        Args:
            code: The coupon's code.
        """
        self._refuse_closed()
        if code not in COUPONS:
            raise ValueError(f"the coupon {code} is not valid")
        self._coupon = code
        return f"{COUPONS[code]} per cent off"

    def checkout(self) -> str:
        """
        Orders what is in the cart. Nothing can be changed afterwards.
        """
        self._refuse_closed()
        if not self._cart:
            raise ValueError("the cart is empty")
        self._order = {"items": dict(self._cart), "coupon": self._coupon}
        cents = sum(self._price(product) * pieces for product, pieces in self._cart.items())
        cents -= cents * COUPONS.get(self._coupon or "", 0) // 100
        return f"ordered: {self._content()}; total {cents / 100:.2f}"

    def get_reward(self) -> float:
        return float(self._order is not None and self._order == {"coupon": None, **self._goal})

    def _refuse_closed(self) -> None:
        if self._order is not None:
            raise ValueError("the order is placed already")

    def _price(self, product: str) -> int:
        make, _, kind = product.partition(" ")
        return self._catalog[kind][make][0]

    def _content(self) -> str:
        return ", ".join(f"{pieces} {product}" for product, pieces in self._cart.items()) or "empty"


def tasks(n: int, seed: int = 0, kinds: tuple[int, int] = (1, 2), coupons: float = 0.3) -> list[dict[str, Any]]:
    """n rows, the same for the same seed: `kinds` products at least and at most, with a coupon in that share."""
    rng, rows = random.Random(f"shop {seed}"), []
    for number in range(n):
        wanted = {kind: rng.randint(1, 4) for kind in rng.sample(KINDS, rng.randint(*kinds))}
        catalog = {kind: _makes(rng, pieces) for kind, pieces in wanted.items()}
        catalog |= {kind: _makes(rng, 1) for kind in rng.sample(KINDS, 2) if kind not in catalog}
        coupon = rng.choice(list(COUPONS)) if rng.random() < coupons else None
        items = {f"{_cheapest(catalog[kind], pieces)} {kind}": pieces for kind, pieces in wanted.items()}
        asked = " and ".join(f"{pieces} {kind}{'s' * (pieces > 1)}" for kind, pieces in wanted.items())
        prompt = rng.choice(ASKED).format(items=asked) + (WITH_COUPON.format(coupon=coupon) if coupon else "")
        rows.append({"key": f"shop-{seed}-{number}", "prompt": prompt, "catalog": catalog,
                     "goal": {"items": items, "coupon": coupon}})  # fmt: skip
    return rows


def _makes(rng: random.Random, pieces: int) -> dict[str, list[int]]:
    """Three makes of distinct prices, of which at least one has the pieces in stock."""
    prices = rng.sample(range(50, 1000, 5), 3)
    stock = [pieces + rng.randint(0, 9), *(rng.choice((0, pieces + rng.randint(0, 9))) for _ in range(2))]
    rng.shuffle(stock)
    return {make: [price, left] for make, price, left in zip(rng.sample(MAKES, 3), prices, stock, strict=True)}


def _cheapest(makes: dict[str, list[int]], pieces: int) -> str:
    return min((price, make) for make, (price, left) in makes.items() if left >= pieces)[1]


def expert(row: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(tool, what it answers, its arguments) of each turn of a trajectory that does what is asked, one call a turn."""
    shop, turns = Shop(), []
    shop.reset(**row)
    calls: list[tuple[str, dict[str, Any]]] = []
    for product, pieces in row["goal"]["items"].items():
        calls += [
            ("search", {"kind": product.partition(" ")[2]}),
            ("add_to_cart", {"product": product, "pieces": pieces}),
        ]
    if row["goal"]["coupon"]:
        calls.append(("apply_coupon", {"code": row["goal"]["coupon"]}))
    for name, arguments in [*calls, ("checkout", {})]:
        turns.append((name, getattr(shop, name)(**arguments), arguments))
    assert shop.get_reward() == 1, json.dumps(row)
    return turns
