-- The features on whose tokens putting the transcoder in place costs the model most, as far as the tokens can tell:
-- excess is the mean increase of cross entropy where the feature is active, less the mean over all tokens. Means over
-- few tokens are mostly noise, so the order is that of excess_low, the lower end of a 95 % confidence interval:
-- excess − t s / √n, with s the standard deviation over the feature's n tokens and t Student's 97.5 % quantile,
-- 1.96 + 2.37/ν + 2.82/ν² for ν = n − 1, right within 0.2 % from 10 tokens on. Tokens of one context are taken as
-- independent, which they are not quite, so the interval is somewhat too narrow. Give --tables twice, an analysis and an
-- evaluation of the same transcoder and split; of a cross-layer transcoder, the tokens are those of all layers replaced.
-- needs activations rows layers tokens features
-- set min_tokens INTEGER = 10: leave out features that are active on fewer of the evaluation's tokens
-- set n INTEGER = 20: how many to show
WITH losses AS (
    SELECT row, delta, delta - avg(delta) OVER () AS excess
    FROM tokens
    JOIN rows USING (context, position)
    WHERE replaced AND sites = CASE
        WHEN (SELECT count(DISTINCT sites) = 1 AND min(sites) = 'all sites' FROM tokens) THEN 'all sites'
        ELSE (SELECT site FROM layers)
    END
),
means AS (
    SELECT feature, avg(excess) AS excess, stddev_samp(excess) / sqrt(count(*)) AS error, avg(delta) AS mean_delta,
           count(*) AS n_tokens
    FROM losses
    JOIN activations USING (row)
    GROUP BY feature
    HAVING count(*) >= $min_tokens
)
SELECT feature, excess - (1.96 + 2.37 / (n_tokens - 1) + 2.82 / (n_tokens - 1) ** 2) * error AS excess_low, excess,
       mean_delta, n_tokens, frequency, top_token
FROM means
JOIN features USING (feature)
ORDER BY excess_low DESC, feature
LIMIT $n
