"""Judging features without knowing what one hopes to see: which are drawn, and what ratings of them say."""
