"""Changing what a language model computes, inside a replacement or not, and measuring what that does."""
