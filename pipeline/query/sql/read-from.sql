-- What a feature reads, by weights alone: the tokens whose embeddings it likes best and the heads that may feed it most.
-- needs connections
-- set feature INTEGER = 0: index of the feature
SELECT kind, rank, layer, head, token, weight
FROM connections
WHERE feature = $feature AND kind IN ('token', 'head', 'head_token') AND rank BETWEEN 0 AND 9
