-- The features that are active on a token, wherever it stands, most reliable first: share is of the token's occurrences,
-- and lift is how many times more often than on any token.
-- needs activations rows features
-- empty Of the rows whose activations are kept, none has this token, or no feature is active on one that has. Most tokens
-- empty begin with a space; `pipeline analyze --activations all` keeps every row.
-- set token VARCHAR = ' the': text of the token, its leading space included
-- set n INTEGER = 20: how many to show
WITH occurrences AS (SELECT row FROM rows WHERE token = $token)
SELECT feature, count(*) / (SELECT count(*) FROM occurrences) AS share,
       count(*) / (SELECT count(*) FROM occurrences) / any_value(features.frequency) AS lift,
       avg(activation) AS mean_activation, any_value(features.max) AS max_anywhere
FROM occurrences
JOIN activations USING (row)
JOIN features USING (feature)
GROUP BY feature
ORDER BY share DESC, lift DESC, feature
LIMIT $n
