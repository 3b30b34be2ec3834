-- The features that have a token among the ten whose logits they raise most by what they write, judged by weights
-- alone; `pipeline promotes` ranks all features by any token.
-- needs features
-- empty No feature has this token among the ten that it raises most, and tables keep no others: some may raise it all
-- empty the same. `pipeline promotes TOKEN --transcoders PATH` asks the weights. Most tokens begin with a space.
-- set token VARCHAR = ' the': text of the token, its leading space included
-- set n INTEGER = 20: how many to show
SELECT feature, promoted_logits[list_position(promoted_tokens, $token)] AS logit,
       list_position(promoted_tokens, $token) AS place, frequency, top_token, promoted_tokens
FROM features
WHERE list_contains(promoted_tokens, $token)
ORDER BY logit DESC, feature
LIMIT $n
