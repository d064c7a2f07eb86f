"""A shop for music, of eleven tables, as many people know one, built by script.

python -m tests.text2sql.music out/music.sqlite
"""

from __future__ import annotations

import random
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

Rows = list[tuple[Any, ...]]

TABLES: Final[Mapping[str, str]] = {
    "Artist": "ArtistId INTEGER PRIMARY KEY, Name VARCHAR(120)",
    "Genre": "GenreId INTEGER PRIMARY KEY, Name VARCHAR(120)",
    "MediaType": "MediaTypeId INTEGER PRIMARY KEY, Name VARCHAR(120)",
    "Playlist": "PlaylistId INTEGER PRIMARY KEY, Name VARCHAR(120)",
    "Employee": "EmployeeId INTEGER PRIMARY KEY, LastName VARCHAR(20) NOT NULL, "
    "FirstName VARCHAR(20) NOT NULL, Title VARCHAR(30), "
    "ReportsTo INTEGER REFERENCES Employee (EmployeeId), HireDate DATE, City VARCHAR(40)",
    "Customer": "CustomerId INTEGER PRIMARY KEY, FirstName VARCHAR(40) NOT NULL, "
    "LastName VARCHAR(20) NOT NULL, Company VARCHAR(80), City VARCHAR(40), Country VARCHAR(40), "
    "Email VARCHAR(60) NOT NULL, SupportRepId INTEGER REFERENCES Employee (EmployeeId)",
    "Album": "AlbumId INTEGER PRIMARY KEY, Title VARCHAR(160) NOT NULL, "
    "ArtistId INTEGER NOT NULL REFERENCES Artist (ArtistId)",
    "Track": "TrackId INTEGER PRIMARY KEY, Name VARCHAR(200) NOT NULL, "
    "AlbumId INTEGER REFERENCES Album (AlbumId), "
    "MediaTypeId INTEGER NOT NULL REFERENCES MediaType (MediaTypeId), "
    "GenreId INTEGER REFERENCES Genre (GenreId), Composer VARCHAR(220), "
    "Milliseconds INTEGER NOT NULL, Bytes INTEGER, UnitPrice NUMERIC(10,2) NOT NULL",
    "Invoice": "InvoiceId INTEGER PRIMARY KEY, "
    "CustomerId INTEGER NOT NULL REFERENCES Customer (CustomerId), InvoiceDate DATE NOT NULL, "
    "BillingCountry VARCHAR(40), Total NUMERIC(10,2) NOT NULL",
    "InvoiceLine": "InvoiceLineId INTEGER PRIMARY KEY, "
    "InvoiceId INTEGER NOT NULL REFERENCES Invoice (InvoiceId), "
    "TrackId INTEGER NOT NULL REFERENCES Track (TrackId), UnitPrice NUMERIC(10,2) NOT NULL, "
    "Quantity INTEGER NOT NULL",
    "PlaylistTrack": "PlaylistId INTEGER NOT NULL REFERENCES Playlist (PlaylistId), "
    "TrackId INTEGER NOT NULL REFERENCES Track (TrackId), PRIMARY KEY (PlaylistId, TrackId)",
}
"""Columns by table, in an order in which they can be made."""
GENRES: Final = ("Rock", "Jazz", "Metal", "Blues", "Latin", "Pop", "Classical", "Reggae")
COUNTRIES: Final = ("Brazil", "Canada", "France", "Germany", "USA", "Norway")
CITIES: Final = ("Oslo", "Paris", "Berlin", "Toronto", "Recife", "Boston")
_WORDS: Final = (
    "Blue",
    "Night",
    "River",
    "Stone",
    "Golden",
    "Paper",
    "Silent",
    "Winter",
    "Electric",
)
_FIRST: Final = ("Ana", "Ben", "Cleo", "Dag", "Eva", "Finn", "Gus", "Hana")
_LAST: Final = ("Almeida", "Brown", "Chase", "Dubois", "Eriksen", "Fischer", "Gray", "Hansen")


def rows(seed: int = 7) -> dict[str, Rows]:
    """Return the rows of every table; the same seed gives the same ones."""
    rng = random.Random(seed)

    def title() -> str:
        return f"{rng.choice(_WORDS)} {rng.choice(_WORDS)}"

    def day() -> str:
        return f"20{rng.randint(21, 25)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"

    lines: Rows = []
    totals: dict[int, float] = {}
    prices = {number: rng.choice((0.99, 0.99, 1.99)) for number in range(1, 201)}
    for number in range(1, 401):
        invoice, track = rng.randint(1, 120), rng.randint(1, 200)
        lines.append((number, invoice, track, prices[track], 1))
        totals[invoice] = round(totals.get(invoice, 0.0) + prices[track], 2)
    pairs = sorted({(rng.randint(1, 6), rng.randint(1, 200)) for _ in range(250)})
    return {
        "Artist": [(i, f"The {title()}") for i in range(1, 31)],
        "Genre": list(enumerate(GENRES, 1)),
        "MediaType": list(enumerate(("MPEG audio file", "AAC audio file", "Video file"), 1)),
        "Playlist": list(enumerate(("Music", "Movies", "90s", "Work", "Sport", "Sleep"), 1)),
        "Employee": [
            (i, _LAST[i - 1], _FIRST[i - 1], "Sales Support Agent" if i > 2 else "Manager",
             None if i == 1 else (i + 1) // 2, day(), rng.choice(CITIES))
            for i in range(1, 9)
        ],
        "Customer": [
            (i, rng.choice(_FIRST), rng.choice(_LAST), None if i % 3 else f"{title()} Ltd",
             rng.choice(CITIES), rng.choice(COUNTRIES), f"c{i}@example.org", rng.randint(3, 5))
            for i in range(1, 60)
        ],
        "Album": [(i, title(), rng.randint(1, 25)) for i in range(1, 61)],
        "Track": [
            (i, f"{title()} {i}", rng.randint(1, 60), rng.randint(1, 3), rng.randint(1, 8),
             None if i % 4 == 0 else rng.choice(_LAST), rng.randint(90_000, 600_000),
             rng.randint(10**6, 10**7), prices[i])
            for i in range(1, 201)
        ],
        "Invoice": [
            (i, rng.randint(1, 59), day(), rng.choice(COUNTRIES), totals.get(i, 0.0))
            for i in range(1, 121)
        ],
        "InvoiceLine": lines,
        "PlaylistTrack": list(pairs),
    }  # fmt: skip


def statements(mark: str = "?") -> Iterator[tuple[str, Rows | None]]:
    """Yield what makes the tables and fills them, with ``mark`` where a value goes."""
    for name, columns in TABLES.items():
        yield f"CREATE TABLE {name} ({columns})", None
    for name, found in rows().items():
        yield f"INSERT INTO {name} VALUES ({', '.join(mark for _ in found[0])})", found


def build_sqlite(path: Path) -> Path:
    """Write the shop into a new file of SQLite."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        for sql, found in statements():
            if found is None:
                connection.execute(sql)
            else:
                connection.executemany(sql, found)
        connection.execute(
            "CREATE VIEW BestSellers AS SELECT TrackId, SUM(Quantity) AS Sold FROM InvoiceLine "
            "GROUP BY TrackId"
        )
        connection.commit()
    return path


if __name__ == "__main__":
    print(build_sqlite(Path(sys.argv[1])))
