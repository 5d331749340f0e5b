"""Rows of results: how they are kept, resumed and summed up."""
