-- In which documents a feature fires, by what your dataset says of them: for every value of every kept column, the share
-- of its rows on which the feature is active, and lift, how many times that is the share over all rows.
-- needs activations rows documents
-- empty The feature is active on no row whose activations are kept, or min_rows is too large.
-- set feature INTEGER = 0: index of the feature
-- set min_rows INTEGER = 20: leave out values with fewer rows
-- set n INTEGER = 20: how many to show
WITH said AS (
    UNPIVOT (SELECT document, COLUMNS(* EXCLUDE document)::VARCHAR FROM documents)
    ON COLUMNS(* EXCLUDE document) INTO NAME column_name VALUE value
),
fired AS (SELECT row, activation FROM activations WHERE feature = $feature),
seen AS (SELECT document, activation FROM rows LEFT JOIN fired USING (row)),
overall AS (SELECT count(activation) / count(*) AS frequency FROM seen)
SELECT column_name AS "column", value, count(activation) / count(*) AS frequency,
       count(activation) / count(*) / any_value(overall.frequency) AS lift, count(activation) AS n_active,
       count(*) AS n_rows, max(activation) AS max
FROM seen
JOIN said USING (document)
CROSS JOIN overall
WHERE column_name <> 'split' AND overall.frequency > 0
GROUP BY column_name, value
HAVING count(*) >= $min_rows
ORDER BY lift DESC, n_active DESC, column_name, value
LIMIT $n
