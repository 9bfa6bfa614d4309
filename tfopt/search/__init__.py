"""Searching: which variants to try, in what order, and which one to ship."""
