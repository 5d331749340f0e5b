"""Texts, and the windows of them that are decoded when something is measured."""
