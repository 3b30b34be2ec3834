-- The documents in which a feature is most active, with its strongest token in each and how many tokens it is active on.
-- needs activations rows
-- set feature INTEGER = 0: index of the feature
-- set n INTEGER = 20: how many to show
SELECT document, max(activation) AS max, arg_max(token, activation) AS token, arg_max(row, activation) AS row,
       count(*) AS n_active
FROM activations
JOIN rows USING (row)
WHERE feature = $feature
GROUP BY document
ORDER BY max DESC, document
LIMIT $n
