-- The features that fire together with one feature.
-- needs coactivation features
-- empty Co-activation is counted for features that are active on enough rows (`--coactivation-floor`): of this one nothing
-- empty is known, or nothing fires with it.
-- set feature INTEGER = 0: index of the feature
SELECT c.other, c.phi, c.jaccard, c.n_both, f.frequency, f.top_token, f.promoted_tokens
FROM coactivation c
JOIN features f ON f.feature = c.other
WHERE c.feature = $feature
ORDER BY c.rank
