-- The pairs of features that are active on the same tokens most often for how often each is active, by their φ
-- (correlation of firing), each pair once.
-- needs coactivation features
-- set n INTEGER = 20: how many to show
SELECT c.feature, c.other, c.phi, c.jaccard, c.n_both, a.top_token, b.top_token AS other_top_token
FROM coactivation c
JOIN features a ON a.feature = c.feature
JOIN features b ON b.feature = c.other
WHERE c.feature < c.other OR NOT EXISTS (
    SELECT 1 FROM coactivation d WHERE d.feature = c.other AND d.other = c.feature
)
ORDER BY c.phi DESC, c.feature, c.other
LIMIT $n
