-- SQL that must not run: what a misled or hostile model may write, one statement after the other,
-- each ended by a line of four hyphens, under the dialects that it is tried on. {table} is a table
-- with an id and some hundred rows.
---- all
DELETE FROM {table}
----
DELETE FROM {table} WHERE id = 1
----
delete /* quietly */ from {table}
----
DROP TABLE {table}
----
DROP TABLE IF EXISTS {table}
----
DROP VIEW v
----
DROP INDEX i
----
UPDATE {table} SET id = 0
----
UPDATE {table} SET id = id + 1 WHERE id IN (SELECT MAX(id) FROM {table})
----
INSERT INTO {table} DEFAULT VALUES
----
INSERT INTO {table} (id) VALUES (100000)
----
INSERT INTO {table} (id) SELECT id + 100000 FROM {table}
----
INSERT INTO {table} (id) VALUES (1) ON CONFLICT (id) DO NOTHING
----
INSERT INTO {table} (id) VALUES (100001) RETURNING id
----
DELETE FROM {table} RETURNING id
----
UPDATE {table} SET id = 5 WHERE id = 5 RETURNING id
----
CREATE TABLE stolen AS SELECT * FROM {table}
----
CREATE TABLE stolen (id INTEGER)
----
CREATE TEMP TABLE stolen (id INTEGER)
----
CREATE TEMPORARY TABLE stolen AS SELECT 1
----
CREATE VIEW stolen AS SELECT * FROM {table}
----
CREATE TEMP VIEW stolen AS SELECT * FROM {table}
----
CREATE INDEX i ON {table} (id)
----
CREATE UNIQUE INDEX i ON {table} (id)
----
ALTER TABLE {table} RENAME TO stolen
----
ALTER TABLE {table} ADD COLUMN x INTEGER
----
ALTER TABLE {table} DROP COLUMN id
----
ALTER TABLE {table} RENAME COLUMN id TO no
----
WITH doomed AS (SELECT id FROM {table}) DELETE FROM {table} WHERE id IN (SELECT id FROM doomed)
----
WITH doomed AS (SELECT id FROM {table}) UPDATE {table} SET id = 1
----
WITH new AS (SELECT 900000 AS id) INSERT INTO {table} (id) SELECT id FROM new
----
SELECT id FROM {table}; DROP TABLE {table}
----
SELECT id FROM {table} WHERE id = '1'; DELETE FROM {table} --'
----
SELECT 1 /* */; /* */ UPDATE {table} SET id = 0 -- and nothing
----
SELECT 1; SELECT 2
----
SELECT 1;; DROP TABLE {table};;
----
SELECT 1; -- nothing to see
DELETE FROM {table}
----
SELECT 'a;b'; DELETE FROM {table}
----
SELECT "id" FROM {table}; UPDATE {table} SET id = 0
----
BEGIN
----
BEGIN; DELETE FROM {table}; COMMIT
----
COMMIT
----
ROLLBACK
----
SAVEPOINT s
----
RELEASE s
----
ANALYZE
----
ANALYZE {table}
----
VACUUM
----
REINDEX
----
EXPLAIN DELETE FROM {table}
----
EXPLAIN SELECT 1
----
GRANT ALL ON {table} TO PUBLIC
----
SET x = 1
----
PRAGMA writable_schema = ON
----
CALL nothing()
----
SELECT load_extension('/tmp/evil.so')
----
SELECT writefile('/tmp/stolen', 'x')
----
SELECT readfile('/etc/passwd')
----
SELECT "readfile"('/etc/passwd')
----
SELECT length(CAST(readfile('/etc/passwd') AS TEXT)) FROM {table}
----
SELECT id FROM {table} WHERE id > (SELECT length(readfile('/etc/passwd')))
----
SELECT id FROM {table} ORDER BY readfile('/etc/passwd')
----
SELECT id FROM {table} GROUP BY id HAVING load_extension('x') IS NULL
----
WITH readfile(x) AS (SELECT 1) SELECT readfile('/etc/passwd')
----
SELECT COUNT(*) OVER (ORDER BY readfile('x')) FROM {table}
----
SELECT edit('x')
----
SELECT eval('DROP TABLE {table}')
----
SELECT system('id')
----
SELECT shell_exec('id')
----
SELECT sleep(10)
----
WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r
----
WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT COUNT(*) FROM r
----
WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n > 0) SELECT SUM(n) FROM r WHERE n < 0
----
SELECT COUNT(*) FROM {table} a, {table} b, {table} c, {table} d, {table} e, {table} f WHERE a.id + b.id * c.id - d.id * e.id + f.id = -1
----
SELECT a.id, b.id FROM {table} a, {table} b
----

----
-- nothing
----
/* nothing */
----
;
----
SELECT 1\0; DROP TABLE {table}
----
SELECT 1\u0007
----
SELECT * FROM information_schema.tables
----
SELECT table_name FROM information_schema.columns
----
SELECT * FROM otherwhere.secret.things
----
SELECT id FROM {table} WHERE id = ?
----
SELECT id FROM {table} WHERE id = :id
----
SELECT ((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((1
----
DROP DATABASE x
----
CREATE DATABASE x
----
CREATE SCHEMA x
----
CREATE SEQUENCE s
----
CREATE FUNCTION f() RETURNS INTEGER AS 'SELECT 1'
----
TRUNCATE TABLE {table}
----
MERGE INTO {table} USING (SELECT 1 AS id) s ON {table}.id = s.id WHEN MATCHED THEN DELETE
----
COPY {table} TO '/tmp/stolen'
----
USE main
----
SHOW TABLES
----
DESCRIBE {table}
----
LOCK TABLE {table}
---- sqlite
REPLACE INTO {table} (id) VALUES (1)
----
INSERT OR REPLACE INTO {table} (id) VALUES (1)
----
UPDATE OR IGNORE {table} SET id = 0
----
CREATE TEMP TRIGGER t AFTER INSERT ON {table} BEGIN SELECT 1; END
----
CREATE TRIGGER t AFTER DELETE ON {table} BEGIN DELETE FROM {table}; END
----
CREATE VIRTUAL TABLE v USING fts5(x)
----
PRAGMA query_only = OFF
----
PRAGMA user_version
----
PRAGMA journal_mode = DELETE
----
PRAGMA main.integrity_check
----
pragma table_info({table})
----
SELECT * FROM pragma_database_list
----
SELECT * FROM pragma_database_list()
----
SELECT name FROM pragma_table_info('{table}')
----
SELECT name FROM pragma_function_list
----
SELECT compile_options FROM pragma_compile_options
----
SELECT sql FROM sqlite_schema
----
SELECT COUNT(*) FROM sqlite_master
----
SELECT COUNT(*) FROM main.sqlite_master
----
SELECT COUNT(*) FROM "sqlite_master"
----
SELECT COUNT(*) FROM [sqlite_schema]
----
SELECT COUNT(*) FROM `sqlite_temp_master`
----
SELECT * FROM sqlite_sequence
----
SELECT * FROM sqlite_stat1
----
SELECT (SELECT sql FROM sqlite_master LIMIT 1) FROM {table}
----
SELECT id FROM {table} UNION SELECT sql FROM sqlite_master
----
WITH sqlite_master AS (SELECT 1 AS x) SELECT x FROM sqlite_master
----
WITH m AS (SELECT sql FROM sqlite_master) SELECT * FROM m
----
SELECT id FROM {table} WHERE EXISTS (SELECT 1 FROM sqlite_master)
----
SELECT id FROM {table} JOIN sqlite_master ON 1
----
SELECT * FROM dbstat
----
SELECT * FROM sqlite_dbpage
----
SELECT * FROM sqlite_stmt
----
SELECT * FROM temp.x
----
ATTACH DATABASE '/tmp/stolen.db' AS stolen
----
ATTACH ':memory:' AS m
----
DETACH main
----
VACUUM INTO '/tmp/stolen.db'
----
BEGIN IMMEDIATE
----
BEGIN EXCLUSIVE
----
END
----
REINDEX {table}
----
EXPLAIN QUERY PLAN SELECT 1
----
SELECT randomblob(100000000)
----
SELECT zeroblob(100000000)
----
SELECT length(printf('%.*c', 100000000, 'x'))
----
SELECT length(replace(hex(group_concat(id)), '3', group_concat(id) || group_concat(id) || group_concat(id) || group_concat(id))) FROM {table}
----
SELECT fts3_tokenizer('simple')
----
SELECT sqlite_version()
----
SELECT sqlite_source_id()
----
SELECT sqlite_compileoption_get(1)
----
SELECT sqlite_log(1, 'x')
----
SELECT last_insert_rowid()
----
SELECT changes()
----
SELECT total_changes()
----
SELECT fts5(NULL)
----
SELECT fts5_source_id()
----
SELECT rtreecheck('{table}')
----
SELECT load_extension('/tmp/evil.so', 'entry')
----
WITH r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT COUNT(*) FROM r
----
WITH r(n) AS (SELECT 1 UNION SELECT n + 1 FROM r) SELECT MAX(n) FROM r
----
SELECT * FROM json_each((SELECT group_concat(sql) FROM sqlite_master))
----
SELECT id FROM {table} WHERE id IN (SELECT value FROM generate_series(1, 10))
----
SELECT value FROM carray(1, 2)
----
SELECT * FROM fsdir('/')
----
SELECT * FROM csv('/etc/passwd')
----
SELECT 1 WHERE id MATCH readfile('x')
----
SELECT $secret
----
SELECT @secret
----
SELECT 1 /* /* */ ; DROP TABLE {table} -- */
----
SELECT printf('%' || '.' || '100000000' || 'c', 'x')
----
SELECT format(replace('%!c', '!', '.100000000'), 'x')
----
SELECT printf('%' || id || '00000000d', 1) FROM {table}
----
SELECT * FROM pragma_module_list
----
SELECT * FROM [pragma_index_list]('{table}')
----
SELECT `load_extension`('x')
----
SELECT * FROM zipfile('/tmp/x.zip')
----
SELECT sha3_query('SELECT 1')
----
SELECT 1 /* a */;/* b */DELETE/**/FROM/**/{table}
---- postgres
SELECT pg_sleep(10)
----
SELECT pg_catalog.pg_sleep(10)
----
SELECT id FROM {table} WHERE pg_sleep(1) IS NULL
----
SELECT pg_read_file('/etc/passwd')
----
SELECT pg_read_binary_file('/etc/passwd')
----
SELECT pg_ls_dir('/')
----
SELECT * FROM pg_ls_dir('/')
----
SELECT pg_stat_file('/etc/passwd')
----
SELECT lo_import('/etc/passwd')
----
SELECT lo_export(1, '/tmp/stolen')
----
SELECT lo_create(0)
----
SELECT lo_from_bytea(0, 'x')
----
COPY {table} TO PROGRAM 'id'
----
COPY {table} FROM '/etc/passwd'
----
COPY (SELECT 1) TO STDOUT
----
SELECT * FROM dblink('host=127.0.0.1', 'SELECT 1') AS t(x int)
----
SELECT set_config('transaction_read_only', 'off', false)
----
SELECT set_config('role', 'postgres', true)
----
SELECT current_setting('data_directory')
----
SELECT current_setting('is_superuser')
----
SELECT version()
----
SELECT inet_server_addr()
----
SELECT usename FROM pg_user
----
SELECT rolname, rolpassword FROM pg_authid
----
SELECT * FROM pg_shadow
----
SELECT * FROM pg_catalog.pg_shadow
----
SELECT * FROM "pg_catalog"."pg_class"
----
SELECT relname FROM pg_class
----
WITH pg_shadow AS (SELECT 1 AS x) SELECT x FROM pg_shadow
----
SELECT * FROM pg_settings
----
SELECT * FROM pg_stat_activity
----
SELECT pg_terminate_backend(1)
----
SELECT pg_cancel_backend(1)
----
SELECT pg_reload_conf()
----
SELECT pg_switch_wal()
----
SELECT pg_advisory_lock(1)
----
SELECT pg_advisory_xact_lock(1)
----
SELECT pg_notify('x', 'y')
----
NOTIFY x
----
LISTEN x
----
SELECT nextval('s')
----
SELECT setval('s', 1)
----
SELECT txid_current()
----
SELECT query_to_xml('DELETE FROM {table}', true, true, '')
----
SELECT table_to_xml('{table}', true, true, '')
----
SELECT database_to_xml(true, true, '')
----
SELECT cursor_to_xml('c', 1, true, true, '')
----
SELECT ts_stat('SELECT 1')
----
SELECT * FROM ts_stat('SELECT to_tsvector(x) FROM secret')
----
SELECT ts_rewrite('a'::tsquery, 'SELECT 1')
----
SELECT * INTO stolen FROM {table}
----
SELECT id INTO TEMP stolen FROM {table}
----
SELECT id FROM {table} FOR UPDATE
----
SELECT id FROM {table} FOR SHARE
----
WITH gone AS (DELETE FROM {table} RETURNING id) SELECT * FROM gone
----
WITH new AS (INSERT INTO {table} (id) VALUES (9) RETURNING id) SELECT id FROM new
----
WITH new AS (UPDATE {table} SET id = 1 RETURNING id) SELECT COUNT(*) FROM new
----
SELECT * FROM (DELETE FROM {table} RETURNING id) x
----
SET ROLE postgres
----
RESET ROLE
----
SET SESSION AUTHORIZATION postgres
----
SET TRANSACTION READ WRITE
----
SELECT 1; SET TRANSACTION READ WRITE; DELETE FROM {table}
----
SELECT 1; COMMIT; SET default_transaction_read_only = off; DELETE FROM {table}
----
DO $$ BEGIN DELETE FROM {table}; END $$
----
PREPARE p AS DELETE FROM {table}
----
EXECUTE p
----
DECLARE c CURSOR FOR SELECT 1
----
FETCH ALL FROM c
----
CREATE EXTENSION dblink
----
CREATE ROLE evil SUPERUSER
----
ALTER SYSTEM SET log_statement = 'all'
----
ALTER ROLE postgres PASSWORD 'x'
----
CREATE MATERIALIZED VIEW m AS SELECT 1
----
REFRESH MATERIALIZED VIEW m
----
CLUSTER {table}
----
LOAD '/tmp/evil.so'
----
SELECT repeat('x', 1000000000)
----
SELECT repeat('x', id * 1000000) FROM {table}
----
SELECT lpad('x', 1000000000)
----
SELECT rpad('x', 100000000, 'y')
----
SELECT generate_series(1, 1000000000)
----
SELECT COUNT(*) FROM generate_series(1, 1000000000) a, generate_series(1, 1000000000) b
----
SELECT has_table_privilege('{table}', 'DELETE')
----
SELECT pg_get_functiondef(1)
----
SELECT pg_relation_filepath('{table}')
----
SELECT currval('s')
----
TABLE pg_shadow
----
VALUES (pg_sleep(1))
----
SELECT id FROM {table} WHERE id = $1
----
EXPLAIN ANALYZE DELETE FROM {table}
----
COMMENT ON TABLE {table} IS 'x'
----
SECURITY LABEL ON TABLE {table} IS 'x'
----
SELECT U&"pg\005fsleep"(10)
----
SELECT * FROM LATERAL pg_sleep(10) x
----
SELECT * FROM ROWS FROM (pg_ls_dir('/')) AS x
----
SELECT public.lower('x')
----
SELECT evil.count(id) FROM {table}
----
SELECT repeat(repeat('x', 10000), 10000)
----
SELECT replace(repeat('a', 10000), 'a', repeat('b', 10000))
----
SELECT lpad(repeat('x', 9000), 9000)
----
SELECT format('%' || '100000000' || 's', 'x')
----
SELECT format('%*s', 100000000, 'x')
----
SELECT format(concat('%', '99999999', 's'), 'x')
----
SELECT format('%1$100000000s', 'x')
----
SELECT array_fill(0, ARRAY[100000000])
----
SELECT dblink_exec('host=127.0.0.1', 'DELETE FROM {table}')
----
SELECT $a$;$a$; DROP TABLE {table}
----
SELECT E'\'; DELETE FROM {table}; --'; DELETE FROM {table}
----
SELECT U&'\0027'; DELETE FROM {table}
----
WITH x AS (SELECT id FROM {table} FOR UPDATE) SELECT * FROM x
----
SELECT * FROM other.public.{table}
----
WITH RECURSIVE r(s) AS (SELECT 'x' UNION ALL SELECT repeat(s, 100) FROM r WHERE length(s) < 100000000000) SELECT MAX(length(s)) FROM r
---- duckdb
SELECT * FROM read_csv('/etc/passwd')
----
SELECT * FROM read_csv_auto('/etc/passwd')
----
SELECT * FROM read_text('/etc/passwd')
----
SELECT * FROM read_blob('/etc/*')
----
SELECT * FROM read_parquet('/tmp/x.parquet')
----
SELECT * FROM read_json_auto('/tmp/x.json')
----
SELECT * FROM parquet_scan('/tmp/x.parquet')
----
SELECT * FROM '/etc/passwd'
----
SELECT * FROM "/etc/passwd"
----
FROM '/etc/passwd'
----
SELECT * FROM 'http://127.0.0.1/x.csv'
----
SELECT * FROM glob('/etc/*')
----
SELECT * FROM sqlite_scan('x.db', 't')
----
SELECT * FROM postgres_scan('host=127.0.0.1', 'public', 't')
----
SELECT * FROM query('DELETE FROM {table}')
----
SELECT * FROM query_table('{table}')
----
SELECT getenv('HOME')
----
SELECT getvariable('x')
----
SELECT current_setting('memory_limit')
----
SELECT * FROM duckdb_settings()
----
SELECT * FROM duckdb_secrets()
----
SELECT * FROM duckdb_tables()
----
SELECT * FROM duckdb_tables
----
SELECT * FROM pragma_table_info('{table}')
----
SELECT * FROM pg_catalog.pg_class
----
SELECT * FROM sqlite_master
----
SELECT * FROM system.main.duckdb_settings
----
SELECT nextval('s')
----
INSTALL httpfs
----
LOAD httpfs
----
FORCE INSTALL httpfs
----
ATTACH '/tmp/stolen.db' AS stolen
----
ATTACH DATABASE ':memory:' AS m
----
DETACH stolen
----
COPY {table} TO '/tmp/stolen.csv'
----
COPY (SELECT * FROM {table}) TO '/tmp/stolen.parquet' (FORMAT PARQUET)
----
COPY {table} FROM '/etc/passwd'
----
EXPORT DATABASE '/tmp/stolen'
----
IMPORT DATABASE '/tmp/stolen'
----
SET enable_external_access = true
----
RESET enable_external_access
----
SET VARIABLE x = 1
----
PRAGMA database_list
----
PRAGMA enable_profiling
----
CREATE MACRO m(x) AS x
----
CREATE SECRET s (TYPE S3)
----
CHECKPOINT
----
FORCE CHECKPOINT
----
SUMMARIZE {table}
----
SHOW ALL TABLES
----
SELECT repeat('x', 1000000000)
----
SELECT COUNT(*) FROM range(1000000000) a, range(1000000000) b WHERE a.range + b.range = -1
----
SELECT COUNT(*) FROM generate_series(1, 100000000000) t(x) WHERE x = -1
----
SELECT list_sum(range(100000000000))
----
SELECT * FROM which_secret('x', 's3')
----
SELECT write_log('x')
----
SELECT current_query()
----
SELECT txid_current()
----
SELECT parse_duckdb_log_message('x', 'y')
----
UPDATE EXTENSIONS
----
PREPARE p AS SELECT 1
----
EXECUTE p
----
SELECT * FROM arrow_scan(1, 2, 3)
----
SELECT * FROM python_map_function()
----
SELECT * FROM sniff_csv('/etc/passwd')
----
SELECT * FROM parquet_metadata('/tmp/x')
----
SELECT * FROM force_checkpoint()
----
SELECT * FROM summary((SELECT 1))
----
SELECT * FROM test_all_types()
----
SELECT error('x')
----
SELECT repeat(repeat(repeat('x', 10000), 10000), 10)
----
SELECT repeat(s, 10000) FROM (SELECT repeat('x', 10000) AS s)
----
SELECT repeat(repeat([1, 2, 3], 10000), 10000)
----
SELECT 'x'.repeat(1000000000)
----
SELECT 'x'.lpad(1000000000, 'y')
----
SELECT format('{:>1000000000}', 'x')
----
SELECT format('{:>{}}', 'x', 1000000000)
----
SELECT format('{' || ':>1000000000' || '}', 'x')
----
SELECT '{:>1000000000}'.format('x')
----
SELECT printf('%' || '1000000000d', 1)
----
WITH RECURSIVE r(s) AS (SELECT 'x' UNION ALL SELECT repeat(s, 100) FROM r WHERE length(s) < 100000000000) SELECT MAX(length(s)) FROM r
----
SELECT list_transform(['PATH'], lambda x : getenv(x))
----
SELECT 'PATH'.getenv()
----
SELECT list_resize([1], 1000000000)
----
SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))
----
PIVOT '/etc/passwd' ON a
----
SELECT * FROM other.main.{table}
----
SELECT sleep_ms(100000)
