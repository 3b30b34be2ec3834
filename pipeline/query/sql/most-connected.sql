-- The features with the strongest connections by weights to features of later transcoders (--downstream), and how many
-- of their listed connections reach half of the strongest.
-- needs connections features
-- set n INTEGER = 20: how many to show
WITH strengths AS (
    SELECT feature, site, other, abs(weight) AS strength, max(abs(weight)) OVER (PARTITION BY feature) AS strongest
    FROM connections
    WHERE kind = 'feature'
)
SELECT feature, any_value(strongest) AS strongest, arg_max(site, strength) AS site, arg_max(other, strength) AS other,
       count(*) FILTER (strength >= strongest / 2) AS n_strong, any_value(features.frequency) AS frequency,
       any_value(features.top_token) AS top_token
FROM strengths
JOIN features USING (feature)
GROUP BY feature
ORDER BY strongest DESC, feature
LIMIT $n
