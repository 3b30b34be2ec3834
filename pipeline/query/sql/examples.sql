-- The texts in which a feature is most active; the token stands between » and «.
-- needs examples
-- set feature INTEGER = 0: index of the feature
-- set n INTEGER = 10: how many to show
-- set before INTEGER = 10: tokens shown before it
-- set after INTEGER = 6: tokens shown after it
SELECT activation, document, position,
       array_to_string(window_tokens[greatest(position - window_start - $before, 0) + 1:position - window_start], '')
           || '»' || token || '«'
           || array_to_string(window_tokens[position - window_start + 2:position - window_start + 1 + $after], '') AS text
FROM examples
WHERE feature = $feature
QUALIFY row_number() OVER (PARTITION BY row) = 1
ORDER BY activation DESC, row
LIMIT $n
