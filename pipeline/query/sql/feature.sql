-- What there is to know about one feature, in one row.
-- needs features
-- set feature INTEGER = 0: index of the feature
SELECT feature, frequency, n_active, max, mean, top_token, top_token_share, promoted_tokens, suppressed_tokens,
       nearest_features, nearest_cosines
FROM features
WHERE feature = $feature
