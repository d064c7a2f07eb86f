"""A mail-order shop: suppliers, products, warehouses, stock, customers, purchases, shipments."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import date, timedelta
from typing import Any, Final

from examples.text2sql.databases.draw import CITIES, day, later, names

SCHEMA: Final = """
CREATE TABLE supplier (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, country TEXT NOT NULL, rating INTEGER NOT NULL
);
CREATE TABLE product (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, category TEXT NOT NULL, price REAL NOT NULL,
  weight_kg REAL NOT NULL, supplier_id INTEGER NOT NULL REFERENCES supplier (id)
);
CREATE TABLE warehouse (
  id INTEGER PRIMARY KEY, city TEXT NOT NULL, capacity INTEGER NOT NULL
);
CREATE TABLE stock (
  warehouse_id INTEGER NOT NULL REFERENCES warehouse (id),
  product_id INTEGER NOT NULL REFERENCES product (id), quantity INTEGER NOT NULL,
  PRIMARY KEY (warehouse_id, product_id)
);
CREATE TABLE customer (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, city TEXT NOT NULL, segment TEXT NOT NULL
);
CREATE TABLE purchase (
  id INTEGER PRIMARY KEY, customer_id INTEGER NOT NULL REFERENCES customer (id),
  ordered_on TEXT NOT NULL, status TEXT NOT NULL
);
CREATE TABLE purchase_line (
  id INTEGER PRIMARY KEY, purchase_id INTEGER NOT NULL REFERENCES purchase (id),
  product_id INTEGER NOT NULL REFERENCES product (id), quantity INTEGER NOT NULL
);
CREATE TABLE shipment (
  id INTEGER PRIMARY KEY, purchase_id INTEGER NOT NULL REFERENCES purchase (id),
  warehouse_id INTEGER NOT NULL REFERENCES warehouse (id), carrier TEXT NOT NULL,
  sent_on TEXT NOT NULL, delivered_on TEXT
);
"""

SUPPLIERS: Final = ("Anvil", "Birch", "Comet", "Delta", "Ember", "Falcon", "Grove", "Helix")
COUNTRIES: Final = ("Canada", "Germany", "Mexico", "Vietnam")
CATEGORIES: Final = {
    "garden": ("Hose", "Rake", "Shovel", "Planter"),
    "kitchen": ("Kettle", "Pan", "Toaster", "Blender"),
    "office": ("Desk", "Lamp", "Chair", "Shelf"),
    "sport": ("Ball", "Racket", "Helmet", "Tent"),
}
LINES: Final = ("Basic", "Compact", "Classic", "Pro")
SEGMENTS: Final = ("private", "private", "business", "public")
STATUSES: Final = ("delivered", "delivered", "delivered", "open", "cancelled", "returned")
CARRIERS: Final = ("Swift", "Parcelio", "RoadOne")


def rows(rng: random.Random) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of all tables, in an order that foreign keys allow."""
    purchases = list(_purchases(rng, 700))
    return {
        "supplier": [
            (i, name, rng.choice(COUNTRIES), rng.randint(1, 5))
            for i, name in enumerate(SUPPLIERS, start=1)
        ],
        "product": list(_products(rng)),
        "warehouse": [
            (i, city, rng.randint(20, 90) * 100) for i, city in enumerate(CITIES[:4], start=1)
        ],
        "stock": [
            (warehouse, product, rng.randint(0, 120))
            for warehouse in range(1, 5)
            for product in range(1, 65)
            if rng.random() < 0.7
        ],
        "customer": [
            (i, name, rng.choice(CITIES), rng.choice(SEGMENTS))
            for i, name in enumerate(names(rng, 180), start=1)
        ],
        "purchase": purchases,
        "purchase_line": [
            (i, rng.randint(1, 700), rng.randint(1, 64), rng.randint(1, 6)) for i in range(1, 1501)
        ],
        "shipment": list(_shipments(rng, purchases)),
    }


def _products(rng: random.Random) -> Iterator[tuple[Any, ...]]:
    things = [(category, thing) for category, group in CATEGORIES.items() for thing in group]
    for number, (category, thing, line) in enumerate(
        ((c, t, line) for c, t in things for line in LINES), start=1
    ):
        price, weight = rng.randint(500, 25_000) / 100, rng.randint(1, 200) / 10
        yield number, f"{line} {thing}", category, price, weight, rng.randint(1, 8)


def _purchases(rng: random.Random, count: int) -> Iterator[tuple[Any, ...]]:
    for number in range(1, count + 1):
        ordered = day(rng, date(2023, 1, 1), date(2024, 6, 30)).isoformat()
        yield number, rng.randint(1, 180), ordered, rng.choice(STATUSES)


def _shipments(rng: random.Random, purchases: list[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    sent = [purchase for purchase in purchases if purchase[3] in ("delivered", "returned")]
    for number, (purchase, _, ordered, _) in enumerate(sent, start=1):
        start = date.fromisoformat(ordered) + timedelta(days=rng.randint(0, 5))
        delivered = None if rng.random() < 0.05 else later(start, rng.randint(1, 9))
        yield (
            number, purchase, rng.randint(1, 4), rng.choice(CARRIERS), start.isoformat(),
            delivered,
        )  # fmt: skip
