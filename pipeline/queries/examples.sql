-- The texts in which a feature is most active; the token stands between » and «.
-- needs examples
-- set feature INTEGER = 0: index of the feature
-- set n INTEGER = 10: how many to show
SELECT activation, document, position,
       array_to_string(window_tokens[:position - window_start], '') || '»' || token || '«'
           || array_to_string(window_tokens[position - window_start + 2:], '') AS text
FROM examples
WHERE feature = $feature
QUALIFY row_number() OVER (PARTITION BY row) = 1
ORDER BY activation DESC, row
LIMIT $n
