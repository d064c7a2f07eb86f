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
    acosh asinh atanh bm25 char cosh date datetime format glob group_concat hex highlight if
    json json_array json_array_length json_each json_error_position json_extract
    json_group_array json_group_object json_insert json_object json_patch json_pretty json_quote
    json_remove json_replace json_set json_tree json_type json_valid jsonb jsonb_array
    jsonb_extract jsonb_group_array jsonb_group_object jsonb_insert jsonb_object jsonb_patch
    jsonb_remove jsonb_replace jsonb_set julianday likelihood likely log2 match matchinfo median
    octet_length offsets percentile percentile_cont percentile_disc printf quote random regexp
    sinh snippet soundex strftime string_agg tanh time timediff typeof unhex unicode unixepoch
    unlikely
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
    acosd acosh array_append array_cat array_dims array_lower array_ndims array_position
    array_positions array_prepend array_remove array_replace array_reverse array_sample
    array_shuffle array_sort array_to_json array_upper asind asinh atan2d atand atanh bit_xor
    casefold clock_timestamp convert_from convert_to cosd cosh cotd crc32 crc32c date date_add
    date_bin date_subtract datemultirange daterange decode difference dmetaphone encode
    enum_first enum_last enum_range erf erfc format_type gamma gen_random_uuid
    generate_subscripts get_bit get_byte grouping int4multirange int4range int8multirange
    int8range interval isempty json_array json_array_elements json_array_elements_text
    json_arrayagg json_build_array json_build_object json_each json_each_text json_exists
    json_extract_path json_extract_path_text json_object_keys json_objectagg json_query
    json_scalar json_serialize json_strip_nulls json_to_record json_to_recordset
    json_to_tsvector json_typeof json_value jsonb_array_elements jsonb_array_elements_text
    jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text
    jsonb_extract_path jsonb_extract_path_text jsonb_insert jsonb_object_agg jsonb_object_keys
    jsonb_path_exists jsonb_path_exists_tz jsonb_path_match jsonb_path_match_tz jsonb_path_query
    jsonb_path_query_array jsonb_path_query_array_tz jsonb_path_query_first
    jsonb_path_query_first_tz jsonb_path_query_tz jsonb_pretty jsonb_set jsonb_set_lax
    jsonb_strip_nulls jsonb_to_record jsonb_to_recordset jsonb_to_tsvector jsonb_typeof
    justify_days justify_hours justify_interval levenshtein levenshtein_less_equal lgamma
    lower_inc lower_inf make_interval make_timestamptz metaphone min_scale multirange normalize
    num_nonnulls num_nulls nummultirange numnode numrange overlaps pg_typeof phraseto_tsquery
    plainto_tsquery quote_ident quote_literal quote_nullable random random_normal range_agg
    range_intersect_agg range_merge regexp_count regexp_instr regexp_like regexp_match
    regexp_split_to_table regexp_substr scale setweight sha224 sha256 sha384 sha512 similarity
    sind sinh soundex st_area st_asgeojson st_astext st_centroid st_contains st_distance
    st_distancesphere st_dwithin st_geomfromtext st_intersects st_length st_makepoint st_point
    st_setsrid st_transform st_within st_x st_y statement_timestamp strict_word_similarity
    string_to_table strip substring_index tand tanh text timeofday timestamp timestamptz
    to_ascii to_hex to_jsonb to_number to_tsquery to_tsvector transaction_timestamp trim_array
    trim_scale ts_headline ts_rank ts_rank_cd tsmultirange tsrange tstzmultirange tstzrange
    unaccent unistr upper_inc upper_inf uuid uuidv4 uuidv7 websearch_to_tsquery word_similarity
    xmlagg xmlconcat xmlelement xmlforest
""")
_DUCKDB: Final = _SERVERS | _set("""
    acosh add ago apply approx_count_distinct approx_quantile approx_top_k arbitrary arg_max
    arg_max_null arg_min arg_min_null argmax argmin array_aggr array_aggregate array_append
    array_apply array_cat array_concat array_contains array_cosine_distance
    array_cosine_similarity array_cross_product array_distance array_distinct array_dot_product
    array_extract array_filter array_grade_up array_has array_has_all array_has_any
    array_indexof array_inner_product array_intersect array_pop_back array_pop_front
    array_position array_prepend array_push_back array_push_front array_reduce array_reverse
    array_reverse_sort array_select array_slice array_sort array_to_json array_transform
    array_unique array_value array_where array_zip asinh atanh bar base64 bin bit_position
    bit_xor bitstring_agg bool_or century columns contains cosh count_if count_star countif
    current_localtime current_localtimestamp damerau_levenshtein date date_add date_diff
    date_sub dateadd datediff datesub datetrunc day dayname dayofmonth dayofweek dayofyear
    days_in_month decade decode divide editdist3 element_at encode ends_with entropy enum_code
    enum_first enum_last enum_range epoch epoch_ms epoch_ns epoch_us equi_width_bins era even
    favg fdiv fill filter first flatten fmod format_bytes formatreadabledecimalsize
    formatreadablesize from_base64 from_binary from_hex from_json from_json_strict fsum gamma
    gen_random_uuid generate_series generate_subscripts geomean geometric_mean get_bit
    get_current_time get_current_timestamp grade_up greatest greatest_common_divisor
    group_concat grouping grouping_id hamming hash hex histogram histogram_exact hour if
    ilike_escape isinf isnan isodow isoyear jaccard jaro_similarity jaro_winkler_similarity json
    json_array json_contains json_deep_merge json_each json_exists json_extract
    json_extract_path json_extract_path_text json_extract_string json_group_array
    json_group_object json_group_structure json_insert json_keys json_merge_patch
    json_merge_patch_diff json_normalize json_pretty json_quote json_remove json_replace
    json_set json_strip_nulls json_structure json_transform json_transform_strict json_tree
    json_type json_valid json_value julian kahan_sum kurtosis kurtosis_pop last last_day lcase
    least_common_multiple left_grapheme len length_grapheme levenshtein lgamma like_escape list
    list_aggr list_aggregate list_any list_any_value list_append list_apply
    list_approx_count_distinct list_avg list_bit_and list_bit_or list_bit_xor list_bool_and
    list_bool_or list_cat list_concat list_contains list_cosine_distance list_cosine_similarity
    list_count list_distance list_distinct list_dot_product list_element list_entropy
    list_extract list_filter list_first list_grade_up list_has list_has_all list_has_any
    list_histogram list_indexof list_inner_product list_intersect list_kurtosis
    list_kurtosis_pop list_last list_mad list_max list_median list_min list_mode list_pack
    list_position list_prepend list_product list_reduce list_reverse list_reverse_sort
    list_select list_sem list_skewness list_slice list_sort list_stddev_pop list_stddev_samp
    list_string_agg list_sum list_transform list_unique list_value list_var_pop list_var_samp
    list_where list_zip listagg log2 mad make_timestamp_ms make_timestamp_ns make_timestamptz
    map map_concat map_contains map_contains_entry map_contains_value map_entries map_extract
    map_extract_value map_from_entries map_keys map_values max_by md5_number mean median
    microsecond millennium millisecond min_by minute mismatches mod month monthname multiply
    nanosecond nextafter nfc_normalize not_ilike_escape not_like_escape now ord
    parse_dirname parse_dirpath parse_filename parse_formatted_bytes parse_path pg_typeof prefix
    printf product quantile quantile_cont quantile_disc quarter random range reduce
    regexp_escape regexp_extract regexp_extract_all regexp_full_match regexp_split_to_table
    regr_avgx reservoir_quantile right_grapheme round_even roundbankers row second sem
    sha1 sha256 signbit sinh skewness split str_split str_split_regex strftime string_split
    string_split_regex strip_accents strlen strptime struct_concat struct_contains
    struct_extract struct_extract_at struct_has struct_indexof struct_insert struct_keys
    struct_pack struct_position struct_update struct_values substring_grapheme subtract suffix
    sumkahan tanh time_bucket timestampdiff timetz timezone_hour timezone_minute to_base
    to_base64 to_binary to_centuries to_days to_decades to_hex to_hours to_microseconds
    to_millennia to_milliseconds to_minutes to_months to_quarters to_seconds to_weeks to_years
    today transaction transaction_timestamp try_cast try_strptime typeof ucase unbin unhex
    unicode union_extract union_tag union_value unpivot url_decode url_encode uuid wavg week
    weekday weekofyear weighted_avg xor year year_month yearweek
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
        "generate_subscripts", "regexp_matches", "regexp_split_to_table", "string_to_table",
        "unnest",
    )),
    "duckdb": frozenset((
        "generate_series", "json_each", "json_tree", "range", "regexp_split_to_table", "unnest",
    )),
}  # fmt: skip
"""Those that may stand for a table."""
_LENGTHENS: Final = frozenset(("lpad", "pad", "repeat", "rpad"))
_FORMATS: Final = frozenset(("format", "printf"))
_WORDS: Final = _set("""
    all and any array as between bigint binary bit blob bool boolean bpchar by case char
    character clob collate cross cube datetime dec decimal distinct double else end enum escape
    except exclude exists filter float from group having ilike in inner int integer intersect
    interval is join json jsonb lateral left like limit list map materialized natural nchar not
    null numeric nvarchar offset on or order outer over partition precision qualify range real
    recursive rename repeatable right rollup row rows select sets similar smallint some struct
    symmetric text then time timestamp tinyint to union using values varbinary varchar varying
    when where window with within zone
    grouping pivot
""")  # fmt: skip
"""Words of the language before ``(`` that name no function: clauses and types."""
_SAMPLE_WORDS: Final = frozenset(("tablesample", "sample"))
"""Before the method of a sample, which stands before ``(`` as a function does."""
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

_WIDE: Final = re.compile(r"%[-+ 0#!,$\d]*(?:\d{5}|\*|\d*\.(?:\d{5}|\*))")
_WIDE_BRACES: Final = re.compile(r"\{[^{}]*(?:\d{5}|\{)")  # of DuckDB's format
_CONTROL: Final = {chr(code) for code in range(32)} - set("\t\n\r\f")


class Gate:
    """Judges queries on one database.

    Args:
        dialect: ``sqlite``, ``postgres`` or ``duckdb``.
        tables: the tables that may be read, with their schema before a dot where they need it.
        schemas: schemas that may stand before a table that needs none.
        catalog: the database's own name, which may stand before all that; none by default.
    """

    def __init__(
        self, dialect: str, tables: Iterable[str], schemas: Iterable[str] = (), catalog: str = ""
    ) -> None:
        self._dialect = dialect
        self._tables = {name.lower() for name in tables}
        self._schemas = {name.lower() for name in schemas}
        self._catalog = catalog.lower()
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
        found = [one for one in parsed(sql, self._dialect) if one is not None]
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
            *self._of_functions(tree, tokens),
            *self._of_lengths(tree, sql),
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

    def _of_functions(self, tree: Node, tokens: Sequence[Any]) -> Iterator[str]:
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
        for dot in tree.find_all(exp.Dot) if self._dialect == "postgres" else ():
            home = dot.this.name.lower()
            if isinstance(dot.expression, exp.Func | exp.Anonymous) and home != "pg_catalog":
                yield f"a function of the schema {home} is not allowed"

    def _of_lengths(self, tree: Node, sql: str) -> Iterator[str]:
        """Yield what lengthens a text without bound: no engine looks at the time meanwhile."""
        longest = pads = 1.0
        for node in tree.find_all(exp.Func, exp.Anonymous):
            name = _written(node, sql)
            if name not in _LENGTHENS and name not in _FORMATS:
                continue
            if isinstance(node.parent, exp.Dot) and node.parent.this is not node:
                yield f"{name} behind a dot is not allowed; write {name}(…)"
            elif name in _FORMATS:
                braces = name == "format" and self._dialect == "duckdb"
                yield from _of_format(name, node, _WIDE_BRACES if braces else _WIDE)
            elif (count := _length(node)) is None or count > MOST_REPEATS:
                yield f"{name} needs a length as a number, of up to {MOST_REPEATS}"
            elif name == "repeat":
                longest *= max(count, 1)
                if _recurs(node):
                    yield "repeat in a recursion is not allowed"
            else:
                pads = max(pads, count)
        if longest * pads > MOST_REPEATS:
            yield f"repeat and pads may lengthen a text {MOST_REPEATS} times, all taken together"

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
            low, known = name.lower(), self._is_known(name, home, table.catalog.lower())
            if known or (not home and low in rows and self._dialect == "sqlite"):
                continue
            whole = ".".join(part.name for part in table.parts)
            if home == "information_schema" or home.startswith("pg_") or self._is_system(low):
                return refusal(f"the table {whole} is not allowed; {READS}")
            if home or low not in ctes:
                return failure(f"no such table: {whole}")
        return None

    def _is_known(self, name: str, home: str, catalog: str) -> bool:
        if catalog not in ("", self._catalog):
            return False
        if (not home or home in self._schemas) and name.lower() in self._tables:
            return True
        return f"{home}.{name.lower()}" in self._tables

    def _is_system(self, name: str) -> bool:
        return name.startswith(_SYSTEM[self._dialect])


def parsed(sql: str, dialect: str) -> list[Any]:
    """Return the statements of ``sql``, with ``None`` for empty ones.

    Raises:
        SqlglotError: it cannot be read.
    """
    try:
        return list(sqlglot.parse(sql, read=dialect))
    except SqlglotError:
        # It takes the `%` of `LIMIT 2 - n % 2` for a percentage, which only DuckDB has.
        marks = [t.start for t in sqlglot.tokenize(sql, read=dialect) if t.text == "%"]
        if dialect == "duckdb" or not marks:
            raise
        text = list(sql)
        for mark in marks:
            text[mark] = "*"
        return list(sqlglot.parse("".join(text), read=dialect))


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
    before = ""
    for word, after in pairwise(tokens):
        last, before = before, word.text.lower()
        if after.token_type is not TokenType.L_PAREN or last in _SAMPLE_WORDS:
            continue
        if before == "percent" and last.isdigit():
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


def _of_format(name: str, node: Node, wide: re.Pattern[str]) -> Iterator[str]:
    """Yield what is wrong with a format: it is not written out, or has a field that is too wide."""
    pattern = next(node.iter_expressions(), None)
    if not isinstance(pattern, exp.Literal) or not pattern.is_string:
        yield f"{name} needs its format written out, as the first argument"
    elif wide.search(pattern.name):
        yield f"{name} with so wide a field is not allowed; write its width, below 10000"


def _length(node: Node) -> float | None:
    """Return the length that a function gives a text, if it is written as a number."""
    values = list(node.iter_expressions())
    length = values[1] if len(values) > 1 else None
    return float(length.name) if isinstance(length, exp.Literal) and not length.is_string else None


def _recurs(node: Node) -> bool:
    """Return whether it stands in a part of a query that reads itself."""
    cte = node.find_ancestor(exp.CTE)
    while cte is not None:
        name = cte.alias.lower()
        if any(table.name.lower() == name for table in cte.this.find_all(exp.Table)):
            return True
        cte = cte.find_ancestor(exp.CTE)
    return False
