-- The features on whose tokens putting the transcoder in place costs the model most: the mean increase of cross entropy
-- where the feature is active, less the mean over all tokens. Give --tables twice, an analysis and an evaluation of the
-- same transcoder and split.
-- needs activations rows layers tokens features
-- set min_tokens INTEGER = 10: leave out features that are active on fewer of the evaluation's tokens
-- set n INTEGER = 20: how many to show
WITH losses AS (
    SELECT row, delta
    FROM tokens
    JOIN rows USING (context, position)
    WHERE replaced AND sites = (SELECT site FROM layers)
)
SELECT feature, avg(delta) - (SELECT avg(delta) FROM losses) AS excess, avg(delta) AS mean_delta, count(*) AS n_tokens,
       any_value(features.frequency) AS frequency, any_value(features.top_token) AS top_token
FROM losses
JOIN activations USING (row)
JOIN features USING (feature)
GROUP BY feature
HAVING count(*) >= $min_tokens
ORDER BY excess DESC, feature
LIMIT $n
