-- The features that tell one kind of your documents from all others: those with the largest lift where a kept column has
-- a value, such as the language en. lift is the share of these rows on which a feature is active over its share of all rows.
-- needs activations rows documents features
-- empty No kept column of this name has this value in rows whose activations are kept, or no feature is active on as many
-- empty of them. SELECT * FROM documents LIMIT 5 shows the columns.
-- set column VARCHAR = 'lang': name of the column, as in the dataset
-- set value VARCHAR = 'en': its value, as text
-- set min_active INTEGER = 5: leave out features that are active on fewer of these rows
-- set n INTEGER = 20: how many to show
WITH said AS (
    UNPIVOT (SELECT document, COLUMNS(* EXCLUDE document)::VARCHAR FROM documents)
    ON COLUMNS(* EXCLUDE document) INTO NAME column_name VALUE value
),
chosen AS (
    SELECT row
    FROM rows
    WHERE document IN (SELECT document FROM said WHERE column_name = $column AND value = $value)
),
kept AS (SELECT feature, count(*) / (SELECT count(*) FROM rows) AS frequency FROM activations GROUP BY feature)
SELECT feature, count(*) / (SELECT count(*) FROM chosen) AS frequency_here,
       count(*) / (SELECT count(*) FROM chosen) / any_value(kept.frequency) AS lift,
       count(*) AS n_active, any_value(kept.frequency) AS frequency, any_value(features.top_token) AS top_token
FROM chosen
JOIN activations USING (row)
JOIN kept USING (feature)
JOIN features USING (feature)
GROUP BY feature
HAVING count(*) >= $min_active
ORDER BY lift DESC, n_active DESC, feature
LIMIT $n
