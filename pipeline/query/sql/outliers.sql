-- The features whose largest activation is furthest above what is usual for them: max over the 99th percentile of their
-- active rows. One such token can decide how a page of examples looks.
-- needs features
-- set min_rows INTEGER = 100: leave out features that are active on fewer rows
-- set n INTEGER = 20: how many to show
SELECT feature, max / p99 AS times_p99, max, p99, p50, n_active, top_token
FROM features
WHERE n_active >= $min_rows AND p99 > 0
ORDER BY times_p99 DESC, feature
LIMIT $n
