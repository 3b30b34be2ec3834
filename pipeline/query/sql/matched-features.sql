-- For each feature of one transcoder the feature of another that fires most alike, best pairs first, by the correlation
-- of their activations over the rows that both tables keep. Give the two tables names, --tables a=… --tables b=…, made
-- from the same cache and split; rows that are not the same token are left out.
-- needs a.features b.features a.activations b.activations a.rows b.rows
-- empty Tables a and b have no row in common on which both have an active feature.
-- set rows INTEGER = 20000: rows compared at most, from the first on
-- set n INTEGER = 20: how many to show
WITH common AS (
    SELECT row FROM a.rows JOIN b.rows USING (row, token_id, context, position, document) ORDER BY row LIMIT $rows
),
ours AS (SELECT row, feature AS a, activation::DOUBLE AS x FROM a.activations JOIN common USING (row)),
theirs AS (SELECT row, feature AS b, activation::DOUBLE AS y FROM b.activations JOIN common USING (row)),
of_a AS (SELECT a, count(*) AS n_a, sum(x) AS sx, sum(x * x) AS sxx FROM ours GROUP BY a),
of_b AS (SELECT b, count(*) AS n_b, sum(y) AS sy, sum(y * y) AS syy FROM theirs GROUP BY b),
pairs AS (SELECT a, b, count(*) AS n_both, sum(x * y) AS sxy FROM ours JOIN theirs USING (row) GROUP BY a, b),
alike AS (
    SELECT a, b, n_both, n_a, n_b, n_both / (n_a + n_b - n_both) AS jaccard,
           (n * sxy - sx * sy) / sqrt((n * sxx - sx * sx) * (n * syy - sy * sy)) AS correlation
    FROM pairs
    JOIN of_a USING (a)
    JOIN of_b USING (b)
    CROSS JOIN (SELECT count(*)::DOUBLE AS n FROM common)
    WHERE n * sxx > sx * sx AND n * syy > sy * sy
)
SELECT a, b, correlation, jaccard, n_both, n_a, n_b, f.top_token AS a_top_token, g.top_token AS b_top_token
FROM alike
JOIN a.features f ON f.feature = a
JOIN b.features g ON g.feature = b
QUALIFY row_number() OVER (PARTITION BY a ORDER BY correlation DESC, b) = 1
ORDER BY correlation DESC, a
LIMIT $n
