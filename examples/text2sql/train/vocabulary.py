"""What tables and columns are called in questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["label", "category", "number", "year", "date"]


@dataclass(frozen=True)
class SaidColumn:
    """A column and how people speak of it.

    Attributes:
        name: its name.
        kind: what it holds; a label names the row.
        said: what it is called.
        values: what it may hold, for text.
        low: least value of a number or year.
        high: largest one.
        bare: whether a value may stand before the noun, as in "crime novels".
        after: phrases behind the noun, with ``{}`` for the value.
        predicates: phrases behind "Which novels", with ``{}`` for the value.
        verb: participle that goes with a year or date, as "published".
        most: superlatives of large values.
        least: superlatives of small values.
        whole: what asks for the sum of it, with ``{}`` for the rows.
        nullable: whether it may be missing.
    """

    name: str
    kind: Kind
    said: tuple[str, ...]
    values: tuple[str, ...] = ()
    low: int = 0
    high: int = 0
    bare: bool = False
    after: tuple[str, ...] = ()
    predicates: tuple[str, ...] = ()
    verb: tuple[str, ...] = ()
    most: tuple[str, ...] = ()
    least: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    nullable: bool = False

    @property
    def type(self) -> str:
        """Its declared type."""
        return "INTEGER" if self.kind in ("number", "year") else "TEXT"


@dataclass(frozen=True)
class SaidLink:
    """A foreign key and how people speak of it.

    Attributes:
        name: its column.
        target: the table that it points at.
        after: prepositions between a row and its target, as "by" or "written by".
        predicates: the same behind "Which novels".
        active: what targets do, as "borrowed" of members and loans.
    """

    name: str
    target: str
    after: tuple[str, ...] = ("of", "for", "with")
    predicates: tuple[str, ...] = ("belong to", "are from")
    active: tuple[str, ...] = ()


@dataclass(frozen=True)
class SaidTable:
    """A table and how people speak of its rows."""

    name: str
    one: str
    many: str
    columns: tuple[SaidColumn, ...]
    links: tuple[SaidLink, ...] = ()
    key: str = "id"

    @property
    def label(self) -> SaidColumn | None:
        """The column that names a row."""
        return next((column for column in self.columns if column.kind == "label"), None)


@dataclass(frozen=True)
class SaidSchema:
    """Tables in the order of the database, and what the whole is called."""

    name: str
    tables: tuple[SaidTable, ...]

    def table(self, name: str) -> SaidTable:
        """Return the table ``name``."""
        return next(table for table in self.tables if table.name == name)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split("/") if part)


def label(name: str, said: str = "", values: Sequence[str] = ()) -> SaidColumn:
    """Return a column that names rows."""
    return SaidColumn(name, "label", _split(said) or (name,), tuple(values))


def category(
    name: str,
    said: str,
    values: Sequence[str],
    after: str = "",
    predicates: str = "",
    *,
    bare: bool = False,
    nullable: bool = False,
) -> SaidColumn:
    """Return a column with few values of text."""
    return SaidColumn(
        name, "category", _split(said), tuple(values), bare=bare, nullable=nullable,
        after=_split(after), predicates=_split(predicates),
    )  # fmt: skip


def number(
    name: str,
    said: str,
    bounds: tuple[int, int],
    most: str = "",
    least: str = "",
    predicates: str = "",
    whole: str = "",
) -> SaidColumn:
    """Return a column of numbers; ``predicates`` are verbs, as "cost" or "weigh"."""
    return SaidColumn(
        name, "number", _split(said), low=bounds[0], high=bounds[1], most=_split(most),
        least=_split(least), predicates=_split(predicates), whole=_split(whole),
    )  # fmt: skip


def year(name: str, said: str, verb: str, most: str = "", least: str = "") -> SaidColumn:
    """Return a column of years."""
    return SaidColumn(
        name, "year", _split(said), low=1950, high=2023, verb=_split(verb),
        most=_split(most), least=_split(least),
    )  # fmt: skip


def day(name: str, said: str, verb: str, *, nullable: bool = False) -> SaidColumn:
    """Return a column of days as ISO text."""
    return SaidColumn(name, "date", _split(said), verb=_split(verb), nullable=nullable)


def link(
    target: str, after: str = "", predicates: str = "", active: str = "", name: str = ""
) -> SaidLink:
    """Return a foreign key."""
    return SaidLink(
        name or f"{target}_id", target, _split(after) or SaidLink.after,
        _split(predicates) or SaidLink.predicates, _split(active),
    )  # fmt: skip


_CITY: Final = ("from {}/in {}/who live in {}", "live in {}/are from {}/come from {}")


def _table(
    name: str, one: str, many: str, *columns: SaidColumn | SaidLink, key: str = "id"
) -> SaidTable:
    return SaidTable(
        name, one, many, tuple(c for c in columns if isinstance(c, SaidColumn)),
        tuple(c for c in columns if isinstance(c, SaidLink)), key,
    )  # fmt: skip


DEMO: Final = (
    SaidSchema("library", (
        _table("branch", "branch", "branches", label("name"),
               category("city", "city", (), *_CITY),
               year("opened_year", "year of opening/opening year", "opened", "newest", "oldest")),
        _table("author", "author", "authors", label("name"),
               category("country", "country", (), "from {}/of {}", "are from {}/come from {}"),
               year("born_year", "year of birth/birth year", "born", "youngest", "oldest")),
        _table("book", "book", "books", label("title", "title/name"),
               category("genre", "genre/kind", (), "in the genre {}", "are {}", bare=True),
               year("published_year", "year/year of publication/publication year",
                    "published/printed", "newest/latest/most recent", "oldest/earliest"),
               number("pages", "pages/number of pages", (80, 900), "longest/thickest",
                      "shortest/thinnest", whole="pages of {}"),
               link("author", "by/written by/of", "were written by/are by/are from",
                    "wrote/written")),
        _table("copy", "copy", "copies",
               category("condition", "condition", (), "in {} condition/that are {}",
                        "are {}/are in {} condition", bare=True),
               link("book", "of/of the book", "belong to/are of"),
               link("branch", "of/in/at/held by", "belong to/are at/are in", "held/have")),
        _table("member", "member", "members", label("name"),
               category("city", "city", (), *_CITY),
               category("kind", "kind/type", (), "of the kind {}", "are {}", bare=True),
               day("joined_on", "day of joining/joining date", "joined")),
        _table("loan", "loan", "loans",
               day("loaned_on", "day/loan date", "begun/made/started"),
               day("due_on", "due date/day they were due", "due"),
               day("returned_on", "return date/day of return", "returned", nullable=True),
               link("copy", "of/of the copy", "are of"),
               link("member", "by/of/made by", "were made by/belong to", "borrowed/taken out")),
    )),
    SaidSchema("clinic", (
        _table("department", "department", "departments", label("name"),
               number("floor", "floor", (1, 4), "highest", "lowest")),
        _table("doctor", "doctor", "doctors", label("name"),
               year("hired_year", "year of hiring/hiring year", "hired/employed", "newest",
                    "longest serving"),
               number("salary", "salary/pay", (70000, 180000), "best paid", "worst paid", "earn"),
               link("department", "in/of/from the department/working in",
                    "work in/are in/belong to", "employ/employed")),
        _table("patient", "patient", "patients", label("name"),
               category("gender", "gender/sex", (), "", "are {}", bare=True),
               day("born_on", "date of birth/birthday", "born"),
               category("city", "city", (), *_CITY),
               category("insurance", "insurance/insurance company/insurer", (),
                        "insured with {}/with the insurance {}/insured by {}",
                        "are insured with {}/have the insurance {}", nullable=True)),
        _table("visit", "visit", "visits",
               day("visited_on", "date/day of the visit", "made"),
               category("diagnosis", "diagnosis", (),
                        "for {}/for a {}/with the diagnosis {}/because of {}",
                        "ended with the diagnosis {}/were for {}/had the diagnosis {}"),
               number("minutes", "minutes/length in minutes/duration", (10, 60), "longest",
                      "shortest", "took/lasted", "minutes did {} take"),
               number("fee", "fee/cost", (50, 175), "most expensive/dearest", "cheapest", "cost",
                      "did {} cost"),
               link("patient", "of/by/from", "were made by/belong to", "made/had"),
               link("doctor", "to/with/at", "were to/were with", "had/received/seen")),
        _table("drug", "drug", "drugs", label("name"),
               category("maker", "maker/manufacturer", (), "made by {}/from {}/by {}",
                        "are made by {}/come from {}"),
               number("price", "price/cost", (3, 90), "most expensive/dearest", "cheapest", "cost",
                      "did {} cost")),
        _table("prescription", "prescription", "prescriptions",
               number("days", "days/number of days", (5, 30), "longest", "shortest",
                      "last/run for"),
               link("visit", "of/from/written in", "come from"),
               link("drug", "for/of/written for", "were for/were written for/are for",
                    "prescribed")),
    )),
    SaidSchema("shop", (
        _table("supplier", "supplier", "suppliers", label("name"),
               category("country", "country", (), "from {}/in {}", "come from {}/are from {}"),
               number("rating", "rating", (1, 5), "best rated", "worst rated")),
        _table("product", "product", "products", label("name"),
               category("category", "category", (), "in the category {}/of the category {}",
                        "are in the category {}/are for the {}", bare=True),
               number("price", "price/cost", (5, 250), "most expensive/dearest", "cheapest",
                      "cost", "did {} cost"),
               number("weight_kg", "weight/weight in kg", (1, 20), "heaviest", "lightest",
                      "weigh", "did {} weigh"),
               link("supplier", "of/from/by/delivered by/supplied by",
                    "come from/are delivered by", "deliver/supply/sell")),
        _table("warehouse", "warehouse", "warehouses",
               label("city", "city"),
               number("capacity", "capacity", (2000, 9000), "largest/biggest", "smallest")),
        _table("stock", "stock entry", "stock entries",
               number("quantity", "quantity/pieces", (0, 120), "largest", "smallest",
                      whole="pieces of all products lie []/pieces lie []/"
                      "pieces of all products together lie []/pieces together lie []"),
               link("warehouse", "in/in the warehouse in/at", "lie in", "stock/hold"),
               link("product", "of", "are of", "stocked")),
        _table("customer", "customer", "customers", label("name"),
               category("city", "city", (), *_CITY),
               category("segment", "segment", (), "of the segment {}", "are {} customers",
                        bare=True)),
        _table("purchase", "purchase", "purchases",
               day("ordered_on", "order date/day of the order", "made/ordered"),
               category("status", "status", (), "that were {}/with the status {}",
                        "were {}/are {}/have the status {}", bare=True),
               link("customer", "by/of/from/made by", "were made by/came from",
                    "ordered/bought/made")),
        _table("purchase_line", "purchase line", "purchase lines",
               number("quantity", "quantity/pieces", (1, 6), "largest", "smallest",
                      whole="pieces were ordered []/pieces are []"),
               link("purchase", "of/in", "belong to"),
               link("product", "of/for/with", "are for/are about", "ordered/sold")),
        _table("shipment", "shipment", "shipments",
               category("carrier", "carrier", (), "by {}/with {}/sent with {}",
                        "were sent with {}/went by {}"),
               day("sent_on", "day of sending/sending date", "sent/shipped"),
               day("delivered_on", "delivery date/day of delivery", "delivered", nullable=True),
               link("purchase", "of/for", "belong to"),
               link("warehouse", "from/sent from", "were sent from/come from", "sent/shipped")),
    )),
)  # fmt: skip
"""The demo's own schemas; values are read from their databases."""

PLACES: Final = (
    "Oslo", "Paris", "Berlin", "Toronto", "Recife", "Boston", "Lisbon", "Kyoto", "Cairo", "Lima",
    "Old Mill", "Springfield", "Riverton", "Lakeside", "Greenville", "Milton", "Dover", "Ghent",
    "Malmo", "Turin", "Porto", "Bergen", "Quito", "Perth", "Leeds", "Graz",
)  # fmt: skip
NATIONS: Final = (
    "Spain", "Italy", "Chile", "Kenya", "Poland", "Greece", "Japan", "Norway", "Peru", "China",
    "Ireland", "Sweden", "Portugal", "Turkey", "Ghana", "Nepal", "Cuba", "Austria", "Germany",
)  # fmt: skip
FIRMS: Final = (
    "Northwind", "Acme", "Globex", "Initech", "Umbra", "Vertex", "Nimbus", "Orion", "Zenith",
    "Polaris", "Atlas", "Quartz", "Cobalt", "Sierra", "Lumen", "Borealis",
)  # fmt: skip
NAMES: Final = tuple(
    f"{a} {b}"
    for a in ("Anna", "Ben", "Clara", "David", "Eva", "Felix", "Gina", "Henry", "Iris", "Jack")
    for b in ("Adams", "Brown", "Clark", "Davis", "Evans", "Foster", "Green", "Hall", "King")
)
THINGS: Final = tuple(
    f"{a} {b}"
    for a in ("Red", "Blue", "Grand", "Little", "Royal", "New", "Bright", "Deep")
    for b in ("Star", "Dream", "Bridge", "Tower", "Storm", "Field", "Song", "Door")
)
GROUPS: Final = (
    ("junior", "senior", "lead"), ("small", "medium", "large"), ("red", "green", "blue", "black"),
    ("active", "closed", "pending"), ("gold", "silver", "bronze"), ("rock", "jazz", "pop", "folk"),
    ("drama", "comedy", "horror", "action"), ("wood", "steel", "glass"), ("open", "paid", "late"),
    ("cat", "dog", "rabbit", "horse"), ("physics", "biology", "art", "music"),
    ("economy", "business", "first"), ("national", "private", "public"), ("low", "high", "urgent"),
    ("tennis", "football", "hockey", "chess"), ("morning", "evening", "night"),
    ("vegan", "meat", "fish"), ("beta", "stable", "final"), ("apple", "pear", "plum", "cherry"),
)  # fmt: skip
CATEGORY_NAMES: Final = (
    "type", "kind", "class", "status", "color", "grade", "level", "style", "group", "material",
    "subject", "section", "species", "shape", "brand", "role", "mode", "priority", "region",
    "language", "format", "sector", "rank", "season", "topic", "origin",
)  # fmt: skip
NUMBER_NAMES: Final = (
    ("price", "price/cost", "most expensive/dearest", "cheapest", "cost", "did {} cost"),
    ("salary", "salary/pay", "best paid", "worst paid", "earn", ""),
    ("age", "age", "oldest", "youngest", "", ""),
    ("height", "height", "tallest/highest", "lowest/shortest", "", ""),
    ("weight", "weight", "heaviest", "lightest", "weigh", "did {} weigh"),
    ("length", "length", "longest", "shortest", "", ""),
    ("size", "size", "largest/biggest", "smallest", "", ""),
    ("score", "score", "best", "worst", "", ""), ("points", "points", "best", "worst", "", ""),
    ("budget", "budget", "richest", "poorest", "", ""), ("distance", "distance", "farthest",
     "nearest", "", ""), ("speed", "speed", "fastest", "slowest", "", ""),
    ("amount", "amount", "largest", "smallest", "", ""), ("quantity", "quantity/number of pieces",
     "largest", "smallest", "", ""), ("seats", "seats/number of seats", "largest", "smallest",
     "", ""), ("population", "population", "most populous/largest", "smallest", "", ""),
    ("duration", "duration", "longest", "shortest", "take", "did {} take"),
    ("rating", "rating", "best rated", "worst rated", "", ""), ("stock", "stock", "", "", "", ""),
    ("credits", "credits/number of credits", "", "", "", ""), ("area", "area", "largest",
     "smallest", "", ""), ("total", "total", "largest", "smallest", "", ""),
    ("rooms", "rooms/number of rooms", "largest", "smallest", "", ""),
    ("visitors", "visitors/number of visitors", "most popular", "", "", ""),
    ("fee", "fee", "most expensive", "cheapest", "cost", "did {} cost"),
    ("goals", "goals/number of goals", "", "", "", ""), ("wins", "wins", "", "", "", ""),
    ("hours", "hours", "longest", "shortest", "take", "did {} take"),
    ("minutes", "minutes", "longest", "shortest", "last", ""), ("floor", "floor", "highest",
     "lowest", "", ""), ("capacity", "capacity", "largest/biggest", "smallest", "", ""),
)  # fmt: skip
YEAR_NAMES: Final = (
    ("founded", "founded", "newest", "oldest"), ("built", "built", "newest", "oldest"),
    ("opened", "opened", "newest", "oldest"), ("released", "released", "latest/newest", "oldest"),
    ("hired", "hired", "newest", "longest serving"), ("born", "born", "youngest", "oldest"),
    ("made", "made/produced", "newest", "oldest"), ("elected", "elected", "latest", "earliest"),
    ("started", "started", "latest", "earliest"), ("printed", "printed", "latest", "earliest"),
)  # fmt: skip
DAY_NAMES: Final = (
    ("created", "created"), ("paid", "paid"), ("shipped", "shipped"), ("closed", "closed"),
    ("signed", "signed"), ("started", "started"), ("ended", "ended"), ("booked", "booked"),
    ("returned", "returned"), ("sold", "sold"), ("bought", "bought"), ("planned", "planned"),
    ("finished", "finished"), ("joined", "joined"), ("sent", "sent"), ("received", "received"),
    ("cancelled", "cancelled"), ("born", "born"),
)  # fmt: skip
NOUNS: Final = (
    "employee", "company", "student", "course", "teacher", "school", "flight", "airport",
    "airline", "hotel", "room", "booking", "guest", "movie", "actor", "director", "song",
    "album", "artist", "concert", "stadium", "team", "player", "match", "coach", "league",
    "city", "river", "mountain", "museum", "painting", "visitor", "ticket", "car", "driver",
    "race", "engine", "bus", "station", "train", "ship", "port", "farm", "animal", "owner",
    "pet", "project", "task", "client", "invoice", "payment", "account", "bank", "loan_request",
    "branch_office", "store", "item", "order", "order_item", "seller", "review", "user", "post",
    "comment", "tag", "message", "device", "sensor", "reading", "machine", "part", "factory",
    "worker", "shift", "contract", "policy", "claim", "agent", "house", "tenant", "lease",
    "garden", "plant", "recipe", "dish", "restaurant", "cook", "meal", "club", "event",
    "sponsor", "prize", "exam", "lecture", "professor", "faculty", "paper", "journal", "editor",
    "reader", "game", "level_map", "hero", "weapon", "planet", "star", "mission", "crew",
    "truck", "route", "depot", "parcel", "courier", "nurse", "ward", "bed", "lab", "test_run",
)  # fmt: skip
SYLLABLES: Final = (
    "ba", "cor", "del", "fin", "gor", "hal", "jun", "kel", "lom", "mar", "nex", "or", "pil",
    "qua", "rin", "sol", "tam", "ul", "ven", "wex", "yor", "zim", "bre", "cla", "dro", "fle",
    "gri", "plo", "sta", "tre", "el", "an", "is", "ot",
)  # fmt: skip
OWNERS: Final = (
    ("of", "belong to", ""), ("by", "were made by", "made"), ("from", "come from", "sent"),
    ("in", "are in", "have"), ("at", "are at", "have"), ("with", "are with", "had"),
    ("for", "are for", "got"), ("by", "were written by", "wrote"), ("of", "belong to", "own"),
    ("by", "were bought by", "bought"), ("by", "were sold by", "sold"), ("to", "go to", "got"),
)  # fmt: skip
