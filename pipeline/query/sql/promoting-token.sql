-- The features that raise a token's logit most by what they write, judged by weights alone.
-- needs features
-- set token VARCHAR = ' the': text of the token, its leading space included
-- set n INTEGER = 20: how many to show
SELECT feature, promoted_logits[list_position(promoted_tokens, $token)] AS logit,
       list_position(promoted_tokens, $token) AS place, frequency, top_token, promoted_tokens
FROM features
WHERE list_contains(promoted_tokens, $token)
ORDER BY logit DESC, feature
LIMIT $n
