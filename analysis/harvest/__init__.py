"""One pass over rows in bounded memory: what every table counts while blocks of active pairs stream past."""
