"""Engines: blocks of byte ranges and their updates in, finished blocks out."""
