"""Text on which the tokenizer of the tiny model is trained: SQL, schemas and plain English.

Nothing here is random, so every machine trains the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

SUBJECTS = (
    "account", "airport", "album", "author", "bond", "charter_school", "client", "country",
    "customer", "department", "district", "driver", "employee", "enrollment", "flight", "hospital",
    "invoice", "laboratory", "league", "match", "molecule", "order", "patient", "payment",
    "player", "post", "product", "race", "region", "school", "station", "student", "supplier",
    "team", "transaction", "vote",
)  # fmt: skip

COLUMNS = (
    "id", "name", "code", "type", "status", "city", "address", "phone", "email", "amount",
    "balance", "price", "quantity", "score", "rating", "gender", "birthday", "created_at",
    "start_date", "end_date", "percentage", "latitude", "longitude", "description",
)  # fmt: skip

QUERIES = (
    "SELECT T1.{a}, COUNT(*) AS total FROM {s} AS T1 INNER JOIN {o} AS T2 ON T1.id = T2.{s}_id "
    "WHERE T2.{b} > 100 GROUP BY T1.{a} HAVING COUNT(*) >= 5 ORDER BY total DESC LIMIT 10;",
    "SELECT DISTINCT {a} FROM {s} WHERE {b} IS NOT NULL AND {a} LIKE '%2024%';",
    "SELECT CAST(SUM(CASE WHEN {a} = 'active' THEN 1 ELSE 0 END) AS REAL) * 100 / COUNT({b}) "
    "FROM {s} WHERE STRFTIME('%Y', {b}) BETWEEN '1990' AND '1999';",
    "WITH ranked AS (SELECT {a}, RANK() OVER (PARTITION BY {b} ORDER BY {a} DESC) AS position "
    "FROM {s}) SELECT {a} FROM ranked WHERE position = 1;",
    "SELECT AVG({a}), MIN({b}), MAX({b}) FROM {s} LEFT JOIN {o} ON {s}.{o}_id = {o}.id "
    "WHERE {o}.{a} IN (SELECT {a} FROM {s} WHERE {b} <> 0);",
    "CREATE TABLE {s} (\n  id INTEGER PRIMARY KEY,\n  {a} TEXT NOT NULL,\n  {b} REAL,\n"
    "  {o}_id INTEGER,\n  FOREIGN KEY ({o}_id) REFERENCES {o} (id)\n);",
)

SENTENCES = (
    "You are given a question about the {s} table and the database schema below.",
    "Write one SQLite query that answers the question, and explain each step of your reasoning.",
    "Which {s} has the highest {a}, and how many of them are there in every {o}?",
    "Please list the {a} and the {b} of each {s} whose {o} was created before 2015.",
    "The previous query failed with the error: no such column: {s}.{a}. Please correct it.",
    "The result is empty. Check the join between {s} and {o}, then revise the condition.",
    "Extract the keywords, column names and values that the question mentions.",
    "Generate a unit test that tells the candidate queries apart, then evaluate each of them.",
    "Answer yes or no: does the candidate query return the expected {a} for this {s}?",
    "Only use the columns that exist in the schema; do not invent names that are not there.",
    "First think about which tables are needed, then about how the tables are connected.",
    "What is the average {a} of the {s} records with a {b} greater than the overall average?",
    "Assistant: here is the final answer. The query should return one row per {o}.",
    "If two results are the same, prefer the shorter query, because it is easier to read.",
)

# Words of everyday English and of database questions that the templates do not have.
WORDS = """
able about above academic access according across action active add address after again against
age agent all allow almost along already also although always among amount analysis and another
any appear apply are area around array article ask assign available award away back bank base
because become been before begin behind being belong below best better big bill birth black block
blue body book both branch bring budget build business but buy calculate call can capital car card
care carefully case category cause center central century certain chain chance change character
charge chart check chemical child choose circuit city claim class clean clear close code cold
color combine come comment common company compare complete component computer condition consider
contain content control convert cost could count county course cover create credit cross current
daily data date day deal death debt decide default degree delay deliver demand describe design
detail develop device difference direct discount discuss distance divide doctor does done door
double down draw drop during each early east edge education effect eight either element eligible
else empty energy engine english enough enter equal especially even event every exactly example
except exist explain express extra face fact family fast federal female field figure file film
fill filter find fine finish fire five flow follow food force foreign form format forward four
free frequency friend from full function further game general get girl give goal going gold good
government grade grant great green ground group grow growth guest half hand happen hard have he
head health hear heart heavy height help helpful her here high him his history hold home hour
house however hundred idea identify if important improve in include income increase index
individual industry information input inside instead institution instruction insurance interest
into island issue item job join judge just keep kind know label land language large last late law
lead learn least leave left length less let letter level library license life light limit line
link list little live loan local location logic long look lose loss lot low magic main major make
male man manager many map mark market master matter may mean measure medical meet member memory
mention message method middle might mile million minimum minute miss model modern moment money
month monthly more morning most mother mountain move much multiple museum music must my national
nature near necessary need network never new next night nine normal north note nothing notice now
null number object observe occur of off offer office official often oil old on once one open
operation opinion option or original other our out output outside over own owner page paper parent
park part party pass past path pay people per perform period permit person place plan plant play
please point policy popular population position possible power practice present president pressure
previous primary private problem process produce program project proper protect provide public
publish purchase purpose put quality quarter quick quite race range rate ratio read ready real
reason receive recent record red reduce refer reference relate remain remember remove replace
report represent request require research reserve resource respond rest retail return revenue
right river road rock role room round row rule run safe salary sale same sample save say science
second section see select sell send separate series serve service set seven several share she ship
short should show side sign similar simple since single site six size skill small social society
some son soon sort source south space special specific speed spend sport square stage stand
standard state statement station stay step still stock stop store story street string strong
structure study style sub subject success such sum summer superhero supply support sure surface
system take task teacher tell ten term test text than that their them then there these they thing
think third this those though thousand three through time title to today together too top total
toward town track trade train travel treatment tree trip true try turn two type under union unique
unit university until up upon us use user usual value various version very view village visit
volume wait walk wall want war was water way we wear website week weight well went were west what
when where which while white who whole whose why wide will win window winter wish with within
without woman word work world would write wrong year yellow yes yesterday yet you young your zero
zone
"""


def texts() -> Iterator[str]:
    """Yield queries and sentences, filled with names of tables and columns in turn, and words."""
    for _ in range(4):  # often enough to be tokens of their own
        yield " ".join(WORDS.split())
    templates = QUERIES + SENTENCES
    for i, (subject, template) in enumerate(product(SUBJECTS, templates)):
        yield template.format(
            s=subject,
            o=SUBJECTS[(7 * i + 3) % len(SUBJECTS)],
            a=COLUMNS[(5 * i) % len(COLUMNS)],
            b=COLUMNS[(11 * i + 1) % len(COLUMNS)],
        )
