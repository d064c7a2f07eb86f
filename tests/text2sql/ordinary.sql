---- all
SELECT COUNT(*) FROM Track
----
SELECT Name FROM Artist ORDER BY Name
----
select name from artist where name like 'The B%' order by 1 limit 5;
----
SELECT DISTINCT Country FROM Customer
----
SELECT COUNT(DISTINCT Country) FROM Customer
----
SELECT T1.Title FROM Album AS T1 JOIN Artist AS T2 ON T1.ArtistId = T2.ArtistId WHERE T2.Name = 'The Blue Night'
----
SELECT T2.Name, COUNT(*) FROM Album AS T1 JOIN Artist AS T2 ON T1.ArtistId = T2.ArtistId GROUP BY T2.Name ORDER BY COUNT(*) DESC LIMIT 1
----
SELECT Name FROM Artist WHERE ArtistId NOT IN (SELECT ArtistId FROM Album)
----
SELECT Name FROM Artist EXCEPT SELECT T2.Name FROM Album T1 JOIN Artist T2 ON T1.ArtistId = T2.ArtistId
----
SELECT Country FROM Customer INTERSECT SELECT BillingCountry FROM Invoice
----
SELECT City FROM Customer UNION SELECT City FROM Employee
----
SELECT City FROM Customer UNION ALL SELECT City FROM Employee ORDER BY City
----
SELECT AVG(Milliseconds), MAX(Milliseconds), MIN(Milliseconds) FROM Track
----
SELECT GenreId, AVG(Milliseconds) / 60000.0 AS Minutes FROM Track GROUP BY GenreId HAVING COUNT(*) > 3
----
SELECT g.Name, SUM(il.UnitPrice * il.Quantity) AS Revenue FROM InvoiceLine il JOIN Track t ON t.TrackId = il.TrackId JOIN Genre g ON g.GenreId = t.GenreId GROUP BY g.Name ORDER BY Revenue DESC
----
SELECT c.FirstName || ' ' || c.LastName AS FullName FROM Customer c WHERE c.Company IS NOT NULL
----
SELECT * FROM Customer WHERE Company IS NULL AND Country <> 'USA'
----
SELECT CAST(SUM(CASE WHEN Country = 'USA' THEN 1 ELSE 0 END) AS REAL) * 100 / COUNT(*) FROM Customer
----
SELECT SUM(CASE WHEN GenreId = 1 THEN 1 ELSE 0 END) AS rock, SUM(CASE WHEN GenreId = 2 THEN 1 ELSE 0 END) AS jazz FROM Track
----
SELECT CustomerId FROM Invoice GROUP BY CustomerId HAVING SUM(Total) > (SELECT AVG(Total) FROM Invoice)
----
SELECT Name FROM Track WHERE Milliseconds = (SELECT MAX(Milliseconds) FROM Track)
----
SELECT Name FROM Track t WHERE Milliseconds > (SELECT AVG(Milliseconds) FROM Track WHERE GenreId = t.GenreId)
----
SELECT Name FROM Track WHERE EXISTS (SELECT 1 FROM InvoiceLine WHERE InvoiceLine.TrackId = Track.TrackId)
----
SELECT Name FROM Track WHERE NOT EXISTS (SELECT * FROM InvoiceLine il WHERE il.TrackId = Track.TrackId) ORDER BY TrackId
----
SELECT e.FirstName, m.FirstName AS Manager FROM Employee e LEFT JOIN Employee m ON e.ReportsTo = m.EmployeeId
----
SELECT e.LastName, COUNT(c.CustomerId) FROM Employee e LEFT OUTER JOIN Customer c ON c.SupportRepId = e.EmployeeId GROUP BY e.EmployeeId, e.LastName
----
SELECT COALESCE(Company, 'private') AS Kind, COUNT(*) FROM Customer GROUP BY COALESCE(Company, 'private')
----
SELECT NULLIF(Composer, 'Brown') FROM Track LIMIT 10
----
SELECT UPPER(LastName), LOWER(FirstName), LENGTH(Email) FROM Customer
----
SELECT SUBSTR(Email, 1, 3), REPLACE(Email, '@', ' at '), TRIM(City) FROM Customer
----
SELECT ROUND(AVG(Total), 2) FROM Invoice
----
SELECT ABS(MIN(Total) - MAX(Total)) FROM Invoice
----
SELECT InvoiceId, Total, RANK() OVER (ORDER BY Total DESC) AS r FROM Invoice
----
SELECT InvoiceId, ROW_NUMBER() OVER (PARTITION BY CustomerId ORDER BY InvoiceDate) AS n FROM Invoice
----
SELECT CustomerId, SUM(Total) OVER (PARTITION BY CustomerId ORDER BY InvoiceDate, InvoiceId ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) FROM Invoice
----
SELECT InvoiceId, LAG(Total) OVER (ORDER BY InvoiceDate), LEAD(Total, 2) OVER (ORDER BY InvoiceDate) FROM Invoice
----
SELECT InvoiceId, NTILE(4) OVER (ORDER BY Total), DENSE_RANK() OVER w, PERCENT_RANK() OVER w FROM Invoice WINDOW w AS (ORDER BY Total)
----
SELECT FIRST_VALUE(Name) OVER (PARTITION BY GenreId ORDER BY Milliseconds DESC) FROM Track
----
WITH sums AS (SELECT CustomerId, SUM(Total) AS s FROM Invoice GROUP BY CustomerId) SELECT c.LastName, s FROM sums JOIN Customer c ON c.CustomerId = sums.CustomerId ORDER BY s DESC LIMIT 3
----
WITH a AS (SELECT * FROM Track), b AS (SELECT GenreId, COUNT(*) AS n FROM a GROUP BY GenreId) SELECT MAX(n) FROM b
----
WITH RECURSIVE boss(id, depth) AS (SELECT EmployeeId, 0 FROM Employee WHERE ReportsTo IS NULL UNION ALL SELECT e.EmployeeId, depth + 1 FROM Employee e JOIN boss ON e.ReportsTo = boss.id) SELECT * FROM boss
----
WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 10) SELECT x FROM n
----
WITH RECURSIVE days(d) AS (SELECT 1 UNION ALL SELECT d + 1 FROM days WHERE d < 31) SELECT d, COUNT(*) FROM days GROUP BY d ORDER BY d
----
SELECT x.n FROM (SELECT COUNT(*) AS n FROM Album GROUP BY ArtistId) AS x ORDER BY x.n DESC LIMIT 1
----
SELECT COUNT(*) FROM (SELECT CustomerId FROM Invoice GROUP BY CustomerId HAVING COUNT(*) > 2) s
----
SELECT Name FROM Track WHERE Name LIKE '%River%' AND Milliseconds BETWEEN 100000 AND 500000
----
SELECT Name FROM Track WHERE GenreId IN (1, 2, 3) AND UnitPrice >= 0.99 ORDER BY Milliseconds DESC, Name LIMIT 10 OFFSET 5
----
SELECT p.Name, COUNT(*) FROM Playlist p JOIN PlaylistTrack pt ON pt.PlaylistId = p.PlaylistId GROUP BY p.PlaylistId, p.Name
----
SELECT p.Name FROM Playlist p LEFT JOIN PlaylistTrack pt ON pt.PlaylistId = p.PlaylistId WHERE pt.TrackId IS NULL
----
SELECT COUNT(*) FROM Customer c CROSS JOIN Genre g
----
SELECT a.Name, b.Name FROM Artist a, Artist b WHERE a.Name = b.Name AND a.ArtistId < b.ArtistId
----
SELECT Name AS "Track Name", Milliseconds / 1000 AS "Length (s)" FROM Track
----
SELECT t.Name FROM Track t INNER JOIN MediaType USING (MediaTypeId) WHERE MediaType.Name = 'AAC audio file'
----
SELECT BillingCountry, COUNT(*) AS "count" FROM Invoice GROUP BY 1 ORDER BY 2 DESC
----
SELECT 1
----
SELECT 1 + 1 AS two, 'it''s' AS quoted
----
SELECT 'DROP TABLE Track; DELETE FROM Album' AS text
----
SELECT Name FROM Track WHERE Name <> 'x; DELETE FROM Track' -- the rest; all of it
LIMIT 3
----
/* asked by the board */ SELECT COUNT(*) FROM Invoice
----
-- how many?
SELECT COUNT(*) FROM Invoice;
----
SELECT CASE Country WHEN 'USA' THEN 'home' ELSE 'abroad' END AS place, COUNT(*) FROM Customer GROUP BY CASE Country WHEN 'USA' THEN 'home' ELSE 'abroad' END
----
SELECT CASE WHEN Total > 5 THEN 'large' WHEN Total > 2 THEN 'medium' END FROM Invoice
----
SELECT COUNT(*) FILTER (WHERE Total > 3) FROM Invoice
----
SELECT MAX(Total) - MIN(Total) AS spread FROM Invoice WHERE InvoiceDate >= '2023-01-01'
----
SELECT CustomerId, MIN(InvoiceDate), MAX(InvoiceDate) FROM Invoice GROUP BY CustomerId
----
SELECT c.Country, t.GenreId, COUNT(*) AS n FROM Customer c JOIN Invoice i ON i.CustomerId = c.CustomerId JOIN InvoiceLine l ON l.InvoiceId = i.InvoiceId JOIN Track t ON t.TrackId = l.TrackId GROUP BY c.Country, t.GenreId ORDER BY c.Country, n DESC
----
SELECT * FROM (SELECT GenreId, Name, ROW_NUMBER() OVER (PARTITION BY GenreId ORDER BY Milliseconds DESC) AS place FROM Track) ranked WHERE place <= 2
----
SELECT FLOOR(AVG(Milliseconds)), CEIL(AVG(Milliseconds)), SQRT(16), POWER(2, 3) FROM Track
----
SELECT SIGN(-3), MOD(7, 3), EXP(0), LN(1), PI()
----
SELECT CURRENT_DATE, CURRENT_TIMESTAMP
----
SELECT Name FROM Genre WHERE GenreId = (SELECT GenreId FROM Track GROUP BY GenreId ORDER BY COUNT(*) DESC LIMIT 1)
----
SELECT (SELECT COUNT(*) FROM Album) AS albums, (SELECT COUNT(*) FROM Track) AS tracks
----
SELECT AlbumId, COUNT(*) AS c FROM Track GROUP BY AlbumId HAVING COUNT(*) = (SELECT MAX(n) FROM (SELECT COUNT(*) AS n FROM Track GROUP BY AlbumId) q)
----
SELECT Title FROM Album WHERE ArtistId IN (SELECT ArtistId FROM Artist WHERE Name LIKE 'The %') AND Title NOT LIKE '%Stone%'
----
SELECT DISTINCT a.Title FROM Album a JOIN Track t ON t.AlbumId = a.AlbumId JOIN Genre g ON g.GenreId = t.GenreId WHERE g.Name = 'Rock' OR g.Name = 'Jazz'
----
SELECT AVG(s.total) FROM (SELECT SUM(Total) AS total FROM Invoice GROUP BY CustomerId) AS s
----
SELECT SUM(Bytes) / 1024.0 / 1024.0 AS MB FROM Track WHERE MediaTypeId = 1
----
SELECT t.Name, COUNT(il.InvoiceLineId) AS sold FROM Track AS t LEFT JOIN InvoiceLine AS il ON t.TrackId = il.TrackId GROUP BY t.TrackId, t.Name ORDER BY sold DESC, t.Name ASC LIMIT 5
----
SELECT LastName, FirstName FROM Customer WHERE LastName > 'D' AND (City = 'Oslo' OR City = 'Paris') AND NOT Country = 'USA'
----
SELECT Composer FROM Track WHERE Composer IS NOT NULL GROUP BY Composer ORDER BY COUNT(*) DESC, Composer LIMIT 3
----
SELECT * FROM Track t JOIN Album a ON a.AlbumId = t.AlbumId WHERE a.AlbumId = 3
----
SELECT "Name" FROM (SELECT Name AS "Name" FROM Genre) AS "Custom SQL Query" GROUP BY "Name"
----
SELECT "sub"."Country" AS "Country", COUNT(*) AS "n" FROM (SELECT Country AS "Country" FROM Customer) "sub" GROUP BY "sub"."Country" ORDER BY "sub"."Country" ASC LIMIT 100
----
SELECT SUM(1) AS "sum:Number of Records:ok", Customer.City AS "none:City:nk" FROM Customer Customer GROUP BY Customer.City
----
SELECT Genre.Name AS "genre.name", COUNT(DISTINCT Track.TrackId) AS "track.count" FROM Track LEFT JOIN Genre ON Track.GenreId = Genre.GenreId GROUP BY Genre.Name ORDER BY 2 DESC LIMIT 500
----
SELECT COUNT(*) AS total, COUNT(Composer) AS known, COUNT(*) - COUNT(Composer) AS missing FROM Track
----
SELECT GenreId, COUNT(*) * 100.0 / SUM(COUNT(*)) OVER () AS share FROM Track GROUP BY GenreId
----
SELECT CustomerId, Total, AVG(Total) OVER (ORDER BY InvoiceId ROWS 2 PRECEDING) FROM Invoice
----
SELECT CustomerId, COUNT(*) OVER (PARTITION BY BillingCountry) FROM Invoice
----
VALUES (1, 'a'), (2, 'b')
----
SELECT IFNULL_free.Name FROM (SELECT Name FROM Artist) AS IFNULL_free
----
SELECT Name FROM Track WHERE (AlbumId, GenreId) IN (SELECT AlbumId, GenreId FROM Track WHERE TrackId < 5)
----
SELECT MAX(n) FROM (SELECT COUNT(*) AS n FROM InvoiceLine GROUP BY TrackId UNION SELECT 0) u
----
SELECT Name FROM Genre WHERE Name IN ('Rock', 'rock', 'ROCK') ORDER BY LOWER(Name)
----
SELECT LTRIM('  a'), RTRIM('a  '), REPLACE('aXa', 'X', ' ')
----
SELECT Country, City, COUNT(*) FROM Customer GROUP BY Country, City HAVING COUNT(*) >= 2 AND MIN(CustomerId) < 50
---- sqlite
SELECT strftime('%Y', InvoiceDate) AS y, SUM(Total) FROM Invoice GROUP BY y
----
SELECT STRFTIME('%Y-%m', InvoiceDate), COUNT(*) FROM Invoice GROUP BY STRFTIME('%Y-%m', InvoiceDate)
----
SELECT date('now'), datetime('now', '-1 day'), time('12:00'), julianday('2024-01-01')
----
SELECT CAST(julianday('2024-03-01') - julianday(InvoiceDate) AS INTEGER) FROM Invoice
----
SELECT date(InvoiceDate, 'start of month', '+1 month', '-1 day') FROM Invoice
----
SELECT unixepoch(InvoiceDate) FROM Invoice
----
SELECT substr(InvoiceDate, 1, 4) AS year, COUNT(*) FROM Invoice GROUP BY substr(InvoiceDate, 1, 4)
----
SELECT printf('%.2f', SUM(Total)), format('%d tracks', 3) FROM Invoice
----
SELECT group_concat(Name, ', ') FROM Genre
----
SELECT GROUP_CONCAT(DISTINCT Country) FROM Customer
----
SELECT iif(Total > 3, 'high', 'low'), ifnull(BillingCountry, '-') FROM Invoice
----
SELECT instr(Email, '@'), substr(Email, instr(Email, '@') + 1) FROM Customer
----
SELECT typeof(Total), total(Total) FROM Invoice
----
SELECT json_extract('{"a": {"b": 2}}', '$.a.b')
----
SELECT json_object('id', ArtistId, 'name', Name) FROM Artist
----
SELECT json_group_array(Name) FROM Genre
----
SELECT value FROM json_each('[1, 2, 3]')
----
SELECT key, value FROM json_each('{"a": 1}') WHERE value > 0
----
SELECT g.Name, j.value FROM Genre g, json_each('[1,2]') AS j
----
SELECT '{"a": 1}' ->> '$.a', '{"a": 1}' -> 'a'
----
SELECT json_array_length('[1,2]'), json_valid('x'), json_type('[1]')
----
SELECT fullkey FROM json_tree('{"a": [1, 2]}')
----
SELECT hex('abc'), quote('a'), unicode('a'), char(65)
----
SELECT Name FROM Track WHERE Name GLOB 'B*'
----
SELECT Name FROM Track WHERE Name LIKE 'a\%%' ESCAPE '\'
----
SELECT `Name` FROM `Artist` LIMIT 1
----
SELECT [Name] FROM [Artist] LIMIT 1
----
SELECT main.Artist.Name FROM main.Artist
----
SELECT rowid, Name FROM Artist
----
SELECT max(Milliseconds), Name FROM Track
----
SELECT Name FROM Artist ORDER BY Name COLLATE NOCASE
----
SELECT Name FROM Artist ORDER BY random() IS NULL, Name LIMIT 1
----
SELECT 7 % 3, 7 / 2.0, 5 << 1, 5 | 2, ~1
----
SELECT Name FROM Track WHERE Composer ISNULL OR Composer NOTNULL
----
SELECT Sold FROM BestSellers ORDER BY Sold DESC LIMIT 3
----
SELECT acos(1), atan2(1, 1), log10(100), log2(8), degrees(pi()), radians(180)
----
SELECT round(julianday(max(InvoiceDate)) - julianday(min(InvoiceDate))) FROM Invoice
----
SELECT min(1, 2), max(3, 4, 5)
----
SELECT cast(strftime('%m', InvoiceDate) AS INTEGER) AS month, total(Total) FROM Invoice GROUP BY 1
----
WITH n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 5) SELECT x FROM n
----
SELECT DISTINCT strftime('%w', InvoiceDate) FROM Invoice WHERE InvoiceDate LIKE '2023%'
----
SELECT Total FROM Invoice ORDER BY Total LIMIT 2 - (SELECT COUNT(*) FROM Invoice) % 2 OFFSET (SELECT (COUNT(*) - 1) / 2 FROM Invoice)
----
SELECT printf('{"a":{"n":%05d}}', TrackId), printf('%-10s|', Name) FROM Track
----
SELECT replace(printf('%9s', Name), ' ', '.') FROM Genre
---- postgres
(SELECT Name FROM Artist ORDER BY Name LIMIT 2)
----
SELECT v.x FROM (VALUES (1), (2)) AS v(x)
----
SELECT date_trunc('month', InvoiceDate) AS m, SUM(Total) FROM Invoice GROUP BY 1 ORDER BY 1
----
SELECT EXTRACT(YEAR FROM InvoiceDate), COUNT(*) FROM Invoice GROUP BY 1
----
SELECT to_char(InvoiceDate, 'YYYY-MM'), COUNT(*) FROM Invoice GROUP BY 1
----
SELECT InvoiceDate::date, Total::numeric(10, 1), '5'::int FROM Invoice
----
SELECT InvoiceDate + INTERVAL '1 month' FROM Invoice
----
SELECT now() - INTERVAL '7 days', age(now(), InvoiceDate) FROM Invoice
----
SELECT string_agg(Name, ', ' ORDER BY Name) FROM Genre
----
SELECT array_agg(Name ORDER BY Name) FROM Genre
----
SELECT unnest(ARRAY[1, 2, 3])
----
SELECT x FROM unnest(ARRAY['a', 'b']) AS x
----
SELECT n FROM generate_series(1, 5) AS n
----
SELECT d::date FROM generate_series('2024-01-01'::date, '2024-01-07'::date, '1 day') AS d
----
SELECT DISTINCT ON (CustomerId) CustomerId, InvoiceDate FROM Invoice ORDER BY CustomerId, InvoiceDate DESC
----
SELECT Name FROM Track WHERE Name ILIKE '%blue%'
----
SELECT Name FROM Track WHERE Name ~ '^B'
----
SELECT '{"a": {"b": 2}}'::jsonb -> 'a' ->> 'b'
----
SELECT jsonb_build_object('a', 1), to_jsonb(Name), row_to_json(g) FROM Genre g
----
SELECT key, value FROM jsonb_each_text('{"a": 1}')
----
SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY Total) FROM Invoice
----
SELECT c.LastName, top.Total FROM Customer c CROSS JOIN LATERAL (SELECT Total FROM Invoice i WHERE i.CustomerId = c.CustomerId ORDER BY Total DESC LIMIT 1) top
----
SELECT Country, City, COUNT(*) FROM Customer GROUP BY ROLLUP (Country, City)
----
SELECT Country, City, COUNT(*) FROM Customer GROUP BY GROUPING SETS ((Country), (City), ())
----
SELECT stddev(Total), variance(Total), corr(Total, CustomerId) FROM Invoice
----
SELECT split_part(Email, '@', 2), left(City, 2), right(City, 2), position('@' in Email), strpos(Email, '@') FROM Customer
----
SELECT regexp_replace(Email, '@.*', ''), initcap(City), lpad(City, 10, '.'), reverse(City) FROM Customer
----
SELECT concat(FirstName, ' ', LastName), concat_ws(', ', City, Country) FROM Customer
----
SELECT GREATEST(1, 2), LEAST(1, 2), bool_and(Total > 0), every(Total >= 0) FROM Invoice
----
SELECT public.genre.name FROM public.genre
----
SELECT CustomerId FROM Invoice WHERE Total = ANY (SELECT Total FROM Invoice WHERE CustomerId = 3)
----
SELECT CustomerId FROM Invoice WHERE CustomerId = ANY (ARRAY[1, 2])
----
SELECT to_tsvector('english', 'a fat cat') @@ to_tsquery('cat')
----
SELECT Name FROM Artist FETCH FIRST 3 ROWS ONLY
----
TABLE Genre
----
SELECT MAKE_DATE(2024, 1, 1), DATE '2024-01-01', TIMESTAMP '2024-01-01 10:00', md5('x')
----
WITH x AS MATERIALIZED (SELECT 1 AS a) SELECT a FROM x
----
SELECT COUNT(*) FILTER (WHERE Total > 3), mode() WITHIN GROUP (ORDER BY BillingCountry) FROM Invoice
----
SELECT Total > 3 AS large, Total IS DISTINCT FROM 2 FROM Invoice
----
SELECT "postgres"."public"."genre"."name" FROM "postgres"."public"."genre"
----
SELECT * FROM postgres.public.genre
----
SELECT * FROM Track TABLESAMPLE SYSTEM (50)
----
SELECT * FROM Track TABLESAMPLE BERNOULLI (10) REPEATABLE (42)
----
SELECT COUNT(*) FROM Invoice WHERE (InvoiceDate, InvoiceDate) OVERLAPS (DATE '2023-01-01', DATE '2024-01-01')
----
SELECT date_bin('15 minutes', TIMESTAMP '2024-01-01 10:07', TIMESTAMP '2024-01-01'), gen_random_uuid(), pg_typeof(1)
----
SELECT jsonb_set('{"a":1}', '{a}', '2'), jsonb_insert('{"a":1}', '{b}', '2')
----
SELECT pg_catalog.lower(Name), bit_xor(GenreId) FROM Genre GROUP BY 1
----
SELECT repeat('*', 20) || lpad(Name, 8) || rpad(Name, 8, '.'), format('%s: %10s', Name, GenreId) FROM Genre
---- duckdb
(SELECT Name FROM Artist ORDER BY Name LIMIT 2)
----
SELECT v.x FROM (VALUES (1), (2)) AS v(x)
----
SELECT year(InvoiceDate), month(InvoiceDate), COUNT(*) FROM Invoice GROUP BY ALL
----
SELECT strftime(InvoiceDate, '%Y-%m') AS m, SUM(Total) FROM Invoice GROUP BY m ORDER BY m
----
SELECT date_trunc('month', InvoiceDate), SUM(Total) FROM Invoice GROUP BY 1
----
SELECT date_diff('day', MIN(InvoiceDate), MAX(InvoiceDate)) FROM Invoice
----
SELECT InvoiceDate + INTERVAL 1 MONTH FROM Invoice
----
SELECT EXTRACT(year FROM InvoiceDate) FROM Invoice
----
FROM Genre
----
FROM Genre SELECT Name ORDER BY Name
----
SELECT * EXCLUDE (Bytes) FROM Track
----
SELECT Name, Milliseconds FROM Track QUALIFY ROW_NUMBER() OVER (PARTITION BY GenreId ORDER BY Milliseconds DESC) = 1
----
SELECT list(Name ORDER BY Name) FROM Genre
----
SELECT string_agg(Name, ', ') FROM Genre
----
SELECT unnest([1, 2, 3])
----
SELECT list_sort([2, 1]), [1, 2][1], len([1, 2])
----
SELECT {'a': 1}.a, struct_pack(x := 1)
----
SELECT median(Total), quantile_cont(Total, 0.9), stddev(Total), approx_count_distinct(CustomerId) FROM Invoice
----
SELECT arg_max(Name, Milliseconds), max_by(Name, Bytes) FROM Track
----
SELECT Name FROM Track WHERE regexp_matches(Name, '^B')
----
SELECT Name FROM Track WHERE contains(Name, 'Blue') OR starts_with(Name, 'River') OR Name ILIKE '%x%'
----
SELECT * FROM range(5)
----
SELECT x FROM generate_series(1, 3) AS t(x)
----
SELECT json_extract_string('{"a": 1}', '$.a')
----
SELECT main.Genre.Name FROM main.Genre
----
SELECT COALESCE(TRY_CAST('x' AS INTEGER), 0), '5'::INTEGER
----
SELECT split_part(Email, '@', 2), printf('%d', CustomerId) FROM Customer
----
PIVOT (SELECT Country, City FROM Customer) ON Country USING COUNT(*)
----
SELECT COUNT_IF(Total > 3), SUM(Total) FILTER (WHERE Total > 3) FROM Invoice
----
SELECT MODE(BillingCountry), ANY_VALUE(BillingCountry), FIRST(BillingCountry) FROM Invoice
----
SELECT "music"."main"."Track"."Name" FROM "music"."main"."Track"
----
SELECT Track.Name FROM music.Track
----
SELECT * RENAME (Name AS Title) FROM Genre
----
SELECT * FROM Track USING SAMPLE 10 PERCENT (bernoulli)
----
SELECT * FROM Track TABLESAMPLE reservoir(20 ROWS)
----
SELECT to_days(3), to_hours(1), to_months(1), epoch_us(TIMESTAMP '2024-01-01'), datetrunc('day', DATE '2024-01-01'), julian(DATE '2024-01-01')
----
SELECT group_concat(City, ';'), listagg(City, ','), bit_xor(CustomerId), mean(CustomerId), countif(Country = 'USA') FROM Customer
----
SELECT list_has_any([1], [1]), array_has([1], 1), list_zip([1], [2]), list_first([1]), array_sort([2, 1]), list_reverse([1, 2]), list_where([1], [true])
----
SELECT list_transform([1, 2], lambda x : x * 2), [x * 2 FOR x IN [1, 2] IF x > 1]
----
SELECT Email.split('@')[2], Email.upper(), split(Email, '@') FROM Customer
----
SELECT damerau_levenshtein('a', 'b'), strlen('a'), base64('a'::BLOB), sha256('a'), hex('a'), bin(5), gamma(3), xor(1, 2), union_value(a := 1), unhex('41')
----
SELECT unnest(from_json('[1,2]', '["INTEGER"]')), json_pretty('{"a":1}'), json_exists('{"a":1}', '$.a')
----
SELECT approx_top_k(CustomerId, 3), weighted_avg(Total, CustomerId), histogram_exact(CustomerId, [1, 2]) FROM Invoice
----
SELECT Country, City, COUNT(*), GROUPING_ID(Country, City) FROM Customer GROUP BY CUBE (Country, City)
----
SELECT format('{:>10}|{}', Name, GenreId), repeat('*', 5) FROM Genre
----
SELECT unnest(generate_series(DATE '2024-01-01', DATE '2024-01-10', INTERVAL 1 DAY)) AS d
