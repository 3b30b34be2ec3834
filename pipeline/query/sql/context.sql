-- A passage token by token, with the features that are most active on each, strongest first. Numbers of contexts are in
-- examples and rows; row is the token's number in both.
-- needs rows activations
-- empty There is no such context among the rows whose activations are kept; SELECT DISTINCT context FROM rows lists them.
-- set context INTEGER = 0: number of the context
-- set top INTEGER = 5: features shown for each token
SELECT row, position, token, count(activation) AS n_active,
       list(feature ORDER BY activation DESC, feature)[:$top] AS features,
       list(activation ORDER BY activation DESC, feature)[:$top] AS activations
FROM rows
LEFT JOIN activations USING (row)
WHERE context = $context
GROUP BY row, position, token
ORDER BY row
