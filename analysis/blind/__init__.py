"""Blind rating of features: the sample that is drawn, what is withheld, and the statistics of the ratings."""
