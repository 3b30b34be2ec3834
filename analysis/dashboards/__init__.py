"""What the pages of a dashboard say, computed from published tables; nothing here knows HTML."""
