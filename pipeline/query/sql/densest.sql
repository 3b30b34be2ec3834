-- The features that are active on the largest share of tokens.
-- needs features
-- set n INTEGER = 20: how many to show
SELECT feature, frequency, mean, max, top_token, promoted_tokens
FROM features
ORDER BY frequency DESC, feature
LIMIT $n
