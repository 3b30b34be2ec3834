"""Crashes, damage, malice and a disk that refuses, as tests.

``python -m tests.faults --seconds 3600`` runs the laboratory's campaigns until the time is over.
"""
