"""Says whether SQL that a model wrote may run: one statement that reads the tables, and no more.

It stands on sqlglot's parser and is the first of two walls; the second is the database itself,
opened so that it cannot write. Whatever the parser does not know is refused, not tried.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Final

import sqlglot
from sqlglot import TokenType, exp
from sqlglot.errors import SqlglotError

from hexgen_vllm.text2sql.outcome import QueryOutcome, failure, refusal

# It warns of each statement that it has no grammar for; those are refused here, with a reason.
logging.getLogger("sqlglot").setLevel(logging.ERROR)

Node = Any  # of sqlglot's tree, whose base class differs by version
READS: Final = "only a SELECT on the tables may run"
MOST_REPEATS: Final = 10_000
"""Longest text that functions which only lengthen may make, characters."""


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_EVERYWHERE: Final = _set("""
    abs acos asin atan atan2 avg cast ceil ceiling coalesce concat concat_ws cos count cume_dist
    current_date current_time current_timestamp degrees dense_rank exp first_value floor ifnull
    iif instr lag last_value lead length like ln log log10 lower ltrim max min mod nth_value
    ntile nullif percent_rank pi pow power radians rank replace round row_number rtrim sign sin
    sqrt substr substring sum tan total trim trunc upper
""")
_SQLITE: Final = _set("""
    acosh asinh atanh bm25 char cosh date datetime format glob group_concat hex highlight json
    json_array json_array_length json_each json_extract json_group_array json_group_object
    json_insert json_object json_patch json_quote json_remove json_replace json_set json_tree
    json_type json_valid julianday likelihood likely log2 match matchinfo octet_length offsets
    printf quote random regexp sinh snippet soundex strftime string_agg tanh time timediff typeof
    unicode unixepoch unlikely
""")
_SERVERS: Final = _set("""
    age any_value array_agg array_length array_to_string arrayagg ascii bit_and bit_count
    bit_length bit_or bool_and bool_or btrim cardinality cbrt char_length character_length chr
    corr cot covar_pop covar_samp date_part date_trunc datepart div every extract factorial
    format gcd generate_series greatest initcap isfinite json_agg json_array_length json_object
    json_object_agg jsonb_agg lcm least left localtime localtimestamp lpad make_date make_time
    make_timestamp md5 mode now octet_length overlay percentile_cont percentile_disc position
    regexp_matches regexp_replace regexp_split_to_array regr_avgx regr_avgy regr_count
    regr_intercept regr_r2 regr_slope regr_sxx regr_sxy regr_syy repeat reverse right row
    row_to_json rpad split_part starts_with stddev stddev_pop stddev_samp string_agg
    string_to_array strpos timezone to_char to_date to_json to_timestamp translate unnest
    var_pop var_samp variance width_bucket
""")
_POSTGRES: Final = _SERVERS | _set("""
    array_append array_cat array_lower array_ndims array_position array_positions array_prepend
    array_remove array_replace array_upper clock_timestamp convert_from cosd date daterange
    decode encode format_type get_byte grouping int4range int8range interval isempty
    json_array_elements json_array_elements_text json_build_array json_build_object json_each
    json_each_text json_extract_path json_extract_path_text json_object_keys json_strip_nulls
    json_to_record json_to_recordset json_typeof jsonb_array_elements jsonb_array_elements_text
    jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text
    jsonb_extract_path jsonb_extract_path_text jsonb_object_agg jsonb_object_keys
    jsonb_path_exists jsonb_path_match jsonb_path_query jsonb_path_query_array
    jsonb_path_query_first jsonb_pretty jsonb_strip_nulls jsonb_to_record jsonb_to_recordset
    jsonb_typeof justify_days justify_hours justify_interval lower_inc make_interval
    make_timestamptz min_scale normalize num_nonnulls num_nulls numnode numrange
    phraseto_tsquery plainto_tsquery quote_ident quote_literal random range_agg regexp_count
    regexp_instr regexp_like regexp_match regexp_split_to_table regexp_substr scale sha256
    similarity sind statement_timestamp string_to_table substring_index tand text timestamp
    timestamptz to_ascii to_hex to_jsonb to_number to_tsquery to_tsvector transaction_timestamp
    trim_array trim_scale ts_headline ts_rank ts_rank_cd tsrange unaccent unistr upper_inc uuid
    websearch_to_tsquery word_similarity xmlelement
""")
_DUCKDB: Final = _SERVERS | _set("""
    add approx_count_distinct approx_quantile arg_max arg_min argmax argmin array_contains
    array_extract array_slice array_value bar bool_or century columns contains count_if
    count_star date date_add date_diff date_sub dateadd datediff datesub day dayname dayofmonth
    dayofweek dayofyear decade editdist3 element_at ends_with entropy epoch epoch_ms era even
    favg filter first flatten formatreadablesize fsum geomean greatest grouping hamming hash
    histogram hour if ilike_escape isinf isnan isodow isoyear jaccard jaro_similarity
    jaro_winkler_similarity json json_array json_contains json_each json_extract
    json_extract_path json_extract_path_text json_extract_string json_group_array
    json_group_object json_keys json_merge_patch json_quote json_structure json_transform
    json_tree json_type json_valid kurtosis last last_day lcase len levenshtein list
    list_aggregate list_any list_any_value list_append list_apply list_avg list_concat
    list_contains list_count list_distinct list_element list_extract list_filter list_has
    list_max list_min list_position list_reduce list_reverse_sort list_slice list_sort list_sum
    list_transform list_unique list_value list_zip log2 mad map map_entries map_extract
    map_from_entries map_keys map_values max_by median microsecond millisecond min_by minute mod
    month monthname multiply nextafter nfc_normalize now ord parse_path prefix printf product
    quantile quantile_cont quantile_disc quarter random range regexp_extract regexp_extract_all
    regexp_full_match regexp_split_to_table row sem signbit skewness str_split str_split_regex
    strftime string_split string_split_regex strip_accents strptime struct_extract struct_pack
    subtract suffix sumkahan time_bucket timestampdiff today transaction try_cast try_strptime
    typeof ucase unicode unpivot uuid week weekday weekofyear year year_month yearweek
""")  # fmt: skip
FUNCTIONS: Final = {
    "sqlite": _EVERYWHERE | _SQLITE,
    "postgres": _EVERYWHERE | _POSTGRES,
    "duckdb": _EVERYWHERE | _DUCKDB,
}
"""Functions that may run, by dialect; none reads files, settings or the catalog, none writes."""
_ROWS: Final = {
    "sqlite": frozenset(("json_each", "json_tree")),
    "postgres": frozenset((
        "generate_series", "json_array_elements", "json_array_elements_text", "json_each",
        "json_each_text", "json_object_keys", "json_to_record", "json_to_recordset",
        "jsonb_array_elements", "jsonb_array_elements_text", "jsonb_each", "jsonb_each_text",
        "jsonb_object_keys", "jsonb_path_query", "jsonb_to_record", "jsonb_to_recordset",
        "regexp_matches", "regexp_split_to_table", "string_to_table", "unnest",
    )),
    "duckdb": frozenset((
        "generate_series", "json_each", "json_tree", "range", "regexp_split_to_table", "unnest",
    )),
}  # fmt: skip
"""Those that may stand for a table."""
_LENGTHENS: Final = frozenset(("lpad", "pad", "repeat", "rpad"))
_WORDS: Final = _set("""
    all and any array as between bigint binary bit blob bool boolean bpchar by case char
    character clob collate cross cube datetime dec decimal distinct double else end enum escape
    except exclude exists filter float from group having ilike in inner int integer intersect
    interval is join json jsonb lateral left like limit list map materialized natural nchar not
    null numeric nvarchar offset on or order outer over partition precision qualify range real
    recursive right rollup row rows select sets similar smallint some struct symmetric text then
    time timestamp tinyint to union using values varbinary varchar varying when where window
    with within zone
    grouping pivot
""")  # fmt: skip
"""Words of the language before ``(`` that name no function: clauses and types."""
_SYSTEM: Final = {
    "sqlite": ("sqlite_", "pragma_", "dbstat", "bytecode", "tables_used"),
    "postgres": ("pg_",),
    "duckdb": ("sqlite_", "pragma_", "pg_", "duckdb_"),
}
_STATEMENTS: Final[dict[type, str]] = {
    exp.Alter: "changing the schema",
    exp.Analyze: "ANALYZE",
    exp.Attach: "ATTACH",
    exp.Copy: "COPY",
    exp.Create: "changing the schema",
    exp.Delete: "DELETE",
    exp.Describe: "DESCRIBE",
    exp.Detach: "DETACH",
    exp.Drop: "changing the schema",
    exp.Insert: "INSERT",
    exp.Into: "SELECT INTO",
    exp.Lock: "locking rows",
    exp.Merge: "MERGE",
    exp.Pragma: "PRAGMA",
    exp.Set: "SET",
    exp.Summarize: "SUMMARIZE",
    exp.Transaction: "a transaction",
    exp.TruncateTable: "TRUNCATE",
    exp.Update: "UPDATE",
    exp.Use: "USE",
}
_STATEMENT_WORDS: Final = """
    alter analyze attach begin call checkpoint close cluster comment commit copy create deallocate
    declare delete describe detach discard do drop end execute explain export fetch force grant
    import insert install listen load lock merge move notify pragma prepare reassign refresh
    reindex release replace reset revoke rollback savepoint security set show start summarize
    truncate unlisten update use vacuum
"""
STATEMENT_WORDS: Final = frozenset(_STATEMENT_WORDS.split())
"""First words, in lower case, of what is no query."""
COMMENT: Final = r"/\*(?:[^*]|\*(?!/))*\*/"
"""A comment, in a pattern: it ends in one place only, so that many of them are read in one way."""

_WIDE: Final = re.compile(r"%[-+ 0#!,]*(?:\d{5}|\*|\d*\.(?:\d{5}|\*))")
_CONTROL: Final = {chr(code) for code in range(32)} - set("\t\n\r\f")


class Gate:
    """Judges queries on one database.

    Args:
        dialect: ``sqlite``, ``postgres`` or ``duckdb``.
        tables: the tables that may be read, with their schema before a dot where they need it.
        schemas: schemas that may stand before a table that needs none.
    """

    def __init__(self, dialect: str, tables: Iterable[str], schemas: Iterable[str] = ()) -> None:
        self._dialect = dialect
        self._tables = {name.lower() for name in tables}
        self._schemas = {name.lower() for name in schemas}
        self._functions = FUNCTIONS[dialect]

    def objection(self, sql: str) -> QueryOutcome | None:
        """Return what speaks against ``sql``: a refusal or an error; ``None`` when it may run."""
        if not _CONTROL.isdisjoint(sql):
            return refusal("a control character is not allowed in a query")
        try:
            return self._objection(sql)
        except RecursionError:
            return refusal("the query is nested too deeply")
        except SqlglotError as error:
            word = re.match(rf"(?:\s|;|--.*\n|{COMMENT})*(\w+)", sql)
            if word is not None and word[1].lower() in STATEMENT_WORDS:
                return refusal(f"{word[1].upper()} is not allowed; {READS}")
            found = [one for one in getattr(error, "errors", ()) if one.get("description")]
            if not found:
                return failure(f"the query cannot be read: {error}")
            what = str(found[0]["description"]).partition(" but got <")[0]
            return failure(f"the query cannot be read: {what} near {found[0]['highlight']!r}")

    def _objection(self, sql: str) -> QueryOutcome | None:
        tokens = sqlglot.tokenize(sql, read=self._dialect)
        found = [one for one in sqlglot.parse(sql, read=self._dialect) if one is not None]
        if not found:
            return refusal("there is no statement; " + READS)
        why = None
        if len(found) > 1:
            why = _kind(found[0]) or _kind(found[1])
            return refusal(
                "only one statement may run" + (f", and {why} none at all" if why else "")
            )
        tree: Any = found[0]
        for why in (
            *self._of_kinds(tree),
            *self._of_recursion(tree),
            *self._of_functions(tree, tokens, sql),
        ):
            return refusal(why)
        return self._of_tables(tree, sql)

    def _of_kinds(self, tree: Node) -> Iterator[str]:
        if not isinstance(tree, exp.Query | exp.Values | exp.Pivot):
            yield f"{_kind(tree) or 'this kind of statement'} is not allowed; {READS}"
        for node in tree.walk():
            if kind := _kind(node):
                yield f"{kind} is not allowed; {READS}"
            if isinstance(node, exp.Placeholder | exp.Parameter | exp.SessionParameter):
                yield "a parameter is not allowed; write the value itself"

    def _of_recursion(self, tree: Node) -> Iterator[str]:
        """Yield what recursion has no bound: no condition, no limit and no table to run out of."""
        for cte in tree.find_all(exp.CTE):
            name = cte.alias.lower()
            body = cte.this
            again = [t for t in body.find_all(exp.Table) if t.name.lower() == name]
            if not again:
                continue
            if not isinstance(body, exp.SetOperation):
                yield "a recursive query needs a first part, UNION, and a part that goes on"
                continue
            step = body.expression
            bounds = step.find(exp.Where, exp.Limit, exp.Join) or body.args.get("limit")
            if bounds is None:
                yield "recursion without a bound is not allowed; give it a WHERE or a LIMIT"

    def _of_functions(self, tree: Node, tokens: Sequence[Any], sql: str) -> Iterator[str]:
        named = Counter(
            alias.name.lower()
            for alias in tree.find_all(exp.TableAlias)
            if alias.args.get("columns") and alias.this is not None
        )
        for name, quoted in _called(tokens):
            if not quoted and all(word in _WORDS for word in name.split()):
                continue
            if named[name] > 0:
                named[name] -= 1
            elif name not in self._functions:
                close = get_close_matches(name, sorted(self._functions), 2)
                like = f" (close to it: {', '.join(close)})" if close else ""
                yield (
                    f"function {name} is not allowed{like}; text, date, math, JSON, aggregate and "
                    f"window functions are"
                )
        for node in tree.find_all(exp.Func, exp.Anonymous):
            name = _written(node, sql)
            if name in _LENGTHENS and not _is_short(node):
                yield f"{name} needs a length as a number, of up to {MOST_REPEATS}"
            if name in ("format", "printf") and any(
                _WIDE.search(text.name) for text in node.find_all(exp.Literal) if text.is_string
            ):
                yield f"{name} with so wide a field is not allowed; write its width, below 10000"

    def _of_tables(self, tree: Node, sql: str) -> QueryOutcome | None:
        ctes = {cte.alias.lower() for cte in tree.find_all(exp.CTE)}
        rows = _ROWS[self._dialect]
        for table in tree.find_all(exp.Table):
            inner, home = table.this, table.db.lower()
            if isinstance(inner, exp.Func | exp.Anonymous):
                if _written(inner, sql) not in rows:
                    return refusal(f"the table {_written(inner, sql)} is not allowed; {READS}")
                continue
            name = table.name
            low, known = name.lower(), self._is_known(name, home, table.catalog)
            if known or (not home and low in rows and self._dialect == "sqlite"):
                continue
            whole = ".".join(part.name for part in table.parts)
            if home == "information_schema" or home.startswith("pg_") or self._is_system(low):
                return refusal(f"the table {whole} is not allowed; {READS}")
            if home or low not in ctes:
                return failure(f"no such table: {whole}")
        return None

    def _is_known(self, name: str, home: str, catalog: str) -> bool:
        if catalog:
            return False
        if (not home or home in self._schemas) and name.lower() in self._tables:
            return True
        return f"{home}.{name.lower()}" in self._tables

    def _is_system(self, name: str) -> bool:
        return name.startswith(_SYSTEM[self._dialect])


def _kind(node: Node) -> str | None:
    for kind in type(node).__mro__:
        if kind in _STATEMENTS:
            return _STATEMENTS[kind]
    if isinstance(node, exp.Command):
        return str(node.this).upper()
    if isinstance(node, exp.DDL | exp.DML) and not isinstance(node, exp.Query):
        return type(node).__name__.upper()
    return None


def _called(tokens: Sequence[Any]) -> Iterator[tuple[str, bool]]:
    """Yield every word before ``(``, in lower case, and whether it stands in quotes."""
    for word, after in pairwise(tokens):
        if after.token_type is not TokenType.L_PAREN:
            continue
        quoted = word.token_type is TokenType.IDENTIFIER
        text = word.text.lower()
        plain = text[:1].isalpha() or text[:1] == "_"
        if quoted or (plain and not word.token_type.name.endswith("STRING")):
            yield text, quoted


def _written(node: Node, sql: str) -> str:
    """Return the name of a function in lower case, as it is written where that is known."""
    start, end = node.meta.get("start"), node.meta.get("end")
    if start is not None and end is not None and not isinstance(node, exp.Anonymous):
        return sql[start : end + 1].lower()
    if isinstance(node, exp.Anonymous):
        return str(node.name).lower()
    return node.sql_name().lower() if isinstance(node, exp.Func) else ""


def _is_short(node: Node) -> bool:
    values = list(node.iter_expressions())
    length = values[1] if len(values) > 1 else None
    return (
        isinstance(length, exp.Literal)
        and not length.is_string
        and (float(str(length.this)) <= MOST_REPEATS)
    )
