"""One pass over rows in bounded memory: the counts of every table, from blocks of active pairs."""
