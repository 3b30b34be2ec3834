-- The features that were active on no row, nearest to a live one first: a dead feature whose decoder row has a cosine
-- close to 1 with a live one's says nothing new.
-- needs features
-- empty Every feature was active on some row of the split that was analysed.
-- set n INTEGER = 20: how many to show
WITH pairs AS (
    SELECT feature, encoder_norm, encoder_bias, promoted_tokens,
           unnest(nearest_features) AS other, unnest(nearest_cosines) AS cosine
    FROM features
    WHERE is_dead
),
live AS (SELECT feature AS other FROM features WHERE NOT is_dead)
SELECT feature, arg_max(other, cosine) FILTER (other IN (FROM live)) AS nearest_live,
       max(cosine) FILTER (other IN (FROM live)) AS cosine, any_value(encoder_norm) AS encoder_norm,
       any_value(encoder_bias) AS encoder_bias, any_value(promoted_tokens) AS promoted_tokens
FROM pairs
GROUP BY feature
ORDER BY cosine DESC NULLS LAST, feature
LIMIT $n
